"""Recipes, selectors, texts and checkpoints that nobody meant: no traceback, no hang, and the promised exit codes.

The examples are the same in every run, and few. PARTIALTUNE_FUZZ=50 draws other ones, fifty times as many.
"""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import datasets
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MarianConfig, MarianForCausalLM, SchedulerType

from cluster import small_recipe
from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.engine.checkpoint_files import MARKER, finish_checkpoint
from partialtune.errors import ModelError, PartialtuneError, RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.launcher_environment import ADDRESS, PLACE, SIZES, left_over
from partialtune.model.conformance import check_conformance
from partialtune.model.digests import digests
from partialtune.model.loading import load_config, load_model
from partialtune.model.train_mode import set_dropout
from partialtune.net.addresses import without_secrets
from partialtune.proof.due_updates import DueUpdates
from partialtune.recipe.arguments import TextArguments
from partialtune.recipe.key_rules import FORMER_NAMES, REFUSED, recipe_types
from partialtune.recipe_run import train
from partialtune.recipe_run import write_results as results
from partialtune.run_folder import exit_code_of, is_finished, recorded_sources
from partialtune.text.reading import check_texts_unchanged, read_texts
from partialtune.training.training_data import prepare_data
from partialtune.verify.verify import verify
from tiny_models import tiny_config

MORE = int(os.environ.get("PARTIALTUNE_FUZZ", "0"))
AS_USUAL = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def fuzz(examples: int):
    """Settings for so many examples."""
    return settings(
        max_examples=examples * max(1, MORE),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=AS_USUAL,
    )


def outcome(call):
    """What a call gives, and the error that it was meant to raise, one of them None."""
    with in_time():
        try:
            return call(), None
        except PartialtuneError as error:
            return None, error


@contextmanager
def in_time(seconds: int = 30):
    """Fail where something hangs: after so many seconds of this process's own work, or twenty times as many in all."""

    def fail(number, frame):
        raise AssertionError(f"it hangs: {signal.Signals(number).name}")

    before = {number: signal.signal(number, fail) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(20 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- recipes --------------------------------------------------------------------------------------------------------

KEYS = sorted({*recipe_types(), *REFUSED, *FORMER_NAMES})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["5e-5", "auto", "no", "nan", "-1", "1e400", "blocks[-1]", "!all", "/(/", "~", "{}", "0x10", "1_0"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
GOOD = {
    "model_name_or_path": "builtin:lilliput",
    "text": "builtin:python-docs",
    "trainable": ["all"],
    "output_dir": "out",
}


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """Nothing trains: what is tested is everything before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda recipe: tmp_path)
    return tmp_path


def code_of(words):
    with in_time():
        code = main(words)
    assert code in (0, 2), (code, words)
    return code


@fuzz(60)
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=10), VALUES, max_size=4))
def test_a_recipe_of_any_keys_and_values_is_taken_or_refused(stubbed, changes):
    (stubbed / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, **changes}), encoding="utf-8")
    code_of(["train", "recipe.yaml"])
    assert [path.name for path in stubbed.iterdir()] == ["recipe.yaml"]


SCHEDULE_KEYS = ["min_lr", "min_lr_rate", "num_decay_steps", "num_decay_step", "num_cycles", "power", "lr_end", "mode"]
SCHEDULE_KEYS += [
    "warmup_type",
    "timescale",
    "factor",
    "last_epoch",
    "num_warmup_steps",
    "num_stable_steps",
    "optimizer",
]


@fuzz(60)
@given(
    kind=st.sampled_from([kind.value for kind in SchedulerType]),
    kwargs=st.dictionaries(st.sampled_from(SCHEDULE_KEYS), SCALARS, max_size=3),
    metric=st.sampled_from(["loss", "eval_bits_per_byte", "perplexity", "accuracy", "eval_", ""]),
    warmup=st.sampled_from([0, 0.5, 10**9]),
)
@example(kind="polynomial", kwargs={"power": 1e400}, metric="loss", warmup=0)
@example(kind="cosine_with_restarts", kwargs={"num_cycles": 0}, metric="loss", warmup=0)
@example(kind="inverse_sqrt", kwargs={"timescale": 0}, metric="loss", warmup=0)
@example(kind="warmup_stable_decay", kwargs={"num_decay_steps": -1, "num_stable_steps": 0}, metric="loss", warmup=0)
def test_a_schedule_of_any_arguments_and_any_best_metric_are_taken_or_refused(stubbed, kind, kwargs, metric, warmup):
    changes = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup, "max_steps": 9}
    changes |= {"metric_for_best_model": metric}
    (stubbed / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, **changes}), encoding="utf-8")
    code_of(["train", "recipe.yaml"])


@fuzz(40)
@given(content=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"base_model_name_or_path": ["builtin:lilliput"]}')
@example(content=b'{"base_model_name_or_path": "builtin:absent"}')
@example(content=b'{"base_model_name_or_path": "`touch here`"}')
def test_a_folder_with_any_adapter_is_refused(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    for _ in range(2):
        model, error = outcome(lambda: load_config(str(tmp_path)))
        assert model is None
        assert error.exit_code == 2
        assert "holds an adapter" in str(error)
        assert "`" not in str(error)
        (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "config.json").unlink()


@fuzz(60)
@given(content=st.binary(max_size=80) | st.text(max_size=120).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"a: &a [*a]")
@example(content=b"? [1, 2]\n: 3")
@example(content=b"<<: {a: 1}\n<<: 3")
@example(content=b"- " * 3000)
@example(content=b"{" * 3000)
def test_a_file_of_any_bytes_is_no_recipe(stubbed, content):
    (stubbed / "recipe.yaml").write_bytes(content)
    assert code_of(["train", "recipe.yaml"]) == 2


@fuzz(40)
@given(words=st.lists(st.sampled_from([f"--{key}" for key in KEYS]) | st.text(max_size=10), max_size=5))
def test_any_words_after_a_recipe_are_taken_or_refused(stubbed, words):
    (stubbed / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    if not {"-h", "--help", "--version"} & set(words):
        code_of(["train", "recipe.yaml", *words])


# ---- selectors ------------------------------------------------------------------------------------------------------

PIECES = [
    "blocks",
    "[",
    "]",
    "-",
    ":",
    ",",
    ".",
    "!",
    "/",
    " ",
    "0",
    "1",
    "99",
    "biases",
    "norms",
    "head",
    "all",
    "mlp",
]
PIECES += ["embeddings", "final_norm", ".attention", "(", ")", "*", "+", "\\w", "\\", ".*", "|", "{9}", "^", "?"]


@fuzz(150)
@given(selectors=st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=8), max_size=4))
@example(selectors=["/([\\w.]+)+!/"])
@example(selectors=["/(.*)*(.*)*(.*)*x/"])
@example(selectors=["blocks[" + "9" * 5000 + "]"])
@example(selectors=["/a{99999999999}/"])
@example(selectors=["/" + "(" * 500 + ")" * 500 + "/"])
def test_any_selectors_make_a_plan_or_an_error_in_words(selectors):
    plan, error = outcome(lambda: plan_freeze(tiny_gpt2(), selectors))
    assert plan.trainable if error is None else isinstance(error, RecipeError) and str(error)


@fuzz(10)
@given(
    selectors=st.lists(st.sampled_from(["embeddings.positions", "all", "!all", "final_norm", "blocks[-1]", "/.*p.*/"]))
)
@example(selectors=["embeddings.positions"])
@example(selectors=["all", "!/(?!.*positions).*/"])
def test_no_selectors_add_what_the_model_keeps_fixed(selectors):
    config = MarianConfig(d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, vocab_size=9)
    config.pad_token_id = 0
    with torch.device("meta"):
        model = MarianForCausalLM(config)
    plan, error = outcome(lambda: plan_freeze(model, selectors))
    fixed = "model.decoder.embed_positions.weight"
    assert fixed in plan.frozen if error is None else isinstance(error, RecipeError) and str(error)


@fuzz(30)
@given(
    kind=st.sampled_from(["gpt2", "opt", "mpt", "dbrx", "bart", "gemma3n_text"]),
    share=st.sampled_from([0, 1e-9, 0.5, 0.999]),
)
def test_any_dropout_is_put_on_dropouts_alone_or_refused_in_words(kind, share):
    config = AutoConfig.for_model(kind)
    before = flat(config.to_dict())
    _, error = outcome(lambda: set_dropout(config, share))
    after = flat(config.to_dict())
    assert all("drop" in key and "layerdrop" not in key for key in after if after[key] != before[key])
    if error is None:
        type(config).from_dict(config.to_dict())
    else:
        assert isinstance(error, ModelError)
        assert "takes no such value" in str(error)


def flat(values, path=""):
    """Of mappings in mappings: dotted key -> value."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + str(key): value}
    return found


# ---- texts ----------------------------------------------------------------------------------------------------------

MARKS = ["*** START OF THE PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK X ***", "\r\n", "\r"]
MARKS += ["Character set encoding: x\n", "\ufeff", "\u2028", "  ", "\n\n", "<html>", "a", "one two three ", "\x00", "é"]
MARKED = st.lists(st.sampled_from(MARKS) | st.text(max_size=20), max_size=30).map("".join)
TEXTS = st.binary(max_size=300) | MARKED.map(lambda text: text.encode("utf-8", "ignore"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIALTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))


@fuzz(80)
@given(
    content=TEXTS,
    cleaning=st.sampled_from(["auto", "gutenberg", "none"]),
    share=st.sampled_from([0, 0.1, 0.99]),
    in_memory=st.sampled_from([0, 1 << 20]),
)
def test_any_bytes_are_a_text_or_an_error_in_words(
    tmp_path, monkeypatch, tokenizer, content, cleaning, share, in_memory
):
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_bytes(content)
    arguments = TextArguments(
        text=[str(tmp_path / "text.txt")], text_cleaning=cleaning, validation_share=share, block_size=4
    )
    data, error = outcome(lambda: prepare_data(arguments, {}, tokenizer, 0, in_memory))
    assert len(data.train) > 0 if error is None else error.exit_code == 2 and str(error)


NAMES = ["t.jsonl", "t.json", "t.csv", "t.tsv"]
COLUMNS = st.lists(st.dictionaries(st.sampled_from(["text", "a", ""]), VALUES, max_size=3), max_size=4)


@fuzz(20)
@given(
    rows=COLUMNS, name=st.sampled_from(["t.jsonl", "t.json", "t.csv", "t.tsv"]), torn=st.integers(0, 60), column=TEXTS
)
def test_any_file_with_columns_is_a_text_or_an_error_in_words(tmp_path, monkeypatch, rows, name, torn, column):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps(row) for row in rows]
    content = "\n".join(lines).encode() if name == "t.jsonl" else json.dumps(rows).encode()
    (tmp_path / name).write_bytes(content[: len(content) - torn] if name.startswith("t.j") else b"text,a\n" + column)
    texts, error = outcome(lambda: read_texts([str(tmp_path / name)]))
    assert texts[0].text.strip() if error is None else error.exit_code == 2 and str(error)


SECRETS = st.text(
    st.characters(codec="ascii", exclude_characters=" \t\r\n\x0b\x0c\x1c\x1d\x1e\x1f"), min_size=6, max_size=20
)


@fuzz(200)
@given(
    secret=SECRETS,
    place=st.sampled_from(
        ["http://me:{}@host/a.txt", "https://{}@host:80/a", "http://h/a?token={}", "http://h/a?x=1&b={}#c"]
    ),
    around=st.sampled_from(["{}", "{}: the server denies access", "got ['{}'], allowed", "see '{}'.", "({})"]),
)
@example(secret="pass/word", place="http://me:{}@host/a.txt", around="{}")
def test_no_secret_of_an_address_is_shown(secret, place, around):
    secret = "S3CRET" + quote(secret, safe="!$'()*+,;=~")
    shown = without_secrets(around.format(place.format(secret)))
    assert "S3CRET" not in shown
    assert without_secrets(shown) == shown


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    assert main(small_recipe(folder, max_steps=2, schedule=[], prompts=[], validation_share=0)) == 0
    (folder / "run" / "exit.json").unlink()
    return folder


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors", "origin.json"]
FILES += ["config.json", MARKER]
HARMS = ["lose", "empty", "cut", "flip", "folder", "other bytes", "other json", "other field"]


def harm(file: Path, how: str, data) -> None:
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    if how in ("lose", "folder"):
        file.unlink()
        if how == "folder":
            file.mkdir()
    elif how == "other field" and file.suffix == ".json":
        values = json.loads(content)
        values[data.draw(st.sampled_from(sorted(values)))] = data.draw(VALUES)
        file.write_text(json.dumps(values))
    else:
        others = {
            "empty": b"",
            "cut": content[:place],
            "flip": content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :],
            "other json": json.dumps(data.draw(VALUES)).encode(),
        }
        file.write_bytes(others.get(how) if how in others else data.draw(st.binary(max_size=50)))


@fuzz(40)
@given(kept=VALUES | st.fixed_dictionaries({"due": VALUES, "largest": st.dictionaries(st.text(max_size=3), VALUES)}))
@example(kept={"had_gradient": [[]]})
@example(kept={"largest": {"w": [1, 0]}})
@example(kept={"largest": {"w": ["x", None]}})
def test_anything_for_what_a_checkpoint_keeps_of_the_audit_is_taken_or_refused_in_words(kept):
    updates = DueUpdates()
    _, error = outcome(lambda: updates.go_back_to(kept))
    assert error is None or error.exit_code == 2
    if error is None and all(isinstance(name, str) for name in updates.due):
        updates.merge([updates.state()])


# ---- weights --------------------------------------------------------------------------------------------------------

DTYPES = [*(torch.float64, torch.float32, torch.bfloat16, torch.float16), torch.int64, torch.complex64, torch.bool]


@fuzz(10)
@given(dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
@example(dtypes=[torch.float64])
@example(dtypes=[torch.complex64])
def test_weight_files_of_any_dtypes_are_loaded_and_verified_or_refused_in_words(tmp_path, dtypes):
    base, other = tmp_path / "base", tmp_path / "other"
    for folder in (base, other):
        tiny_gpt2(n_layer=1).save_pretrained(folder)
    tensors = load_file(other / "model.safetensors")
    for name, dtype in zip(sorted(tensors), dtypes, strict=False):
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    _, error = outcome(lambda: load_model(str(other), load_config(str(other))))
    if {torch.float64, torch.complex64} & set(dtypes):
        assert "complex" in str(error) or "fp64" in str(error)
    found, error = outcome(lambda: verify(str(base), str(other), []))
    assert torch.complex64 not in dtypes or "complex" in str(error)
    if error is None and set(dtypes) <= {torch.float64, torch.float32}:
        assert found.passed is True


@fuzz(4)
@given(data=st.data(), how=st.sampled_from(HARMS), name=st.sampled_from(FILES), honest=st.booleans())
def test_a_run_with_any_harm_to_a_checkpoint_goes_on_or_is_refused(
    begun, tmp_path, monkeypatch, capfd, data, how, name, honest
):
    """`honest` harm is found by the digests; else whoever did it made new ones."""
    for pages in ("draw_figures", "write_card", "write_report"):
        monkeypatch.setattr(results, pages, lambda folder: None)
    place = tmp_path / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(begun, place)
    run = place / "run"
    checkpoint = run / "checkpoint-2"
    harm(checkpoint / name, how, data)
    if not honest and name != MARKER:
        (checkpoint / MARKER).unlink()
        (run / ".unfinished").mkdir()
        finish_checkpoint(checkpoint.rename(run / ".unfinished" / "checkpoint-2"), checkpoint)
    text = (place / "recipe.yaml").read_text().replace(str(begun), str(place))
    (place / "recipe.yaml").write_text(text)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(begun), str(place)))
    with in_time():
        code = main(["train", str(place / "recipe.yaml"), "--resume_from_checkpoint", "auto", "--max_steps", "3"])
    assert code in (0, 2, 3, 4)
    assert code == 0 or not honest
    assert "Traceback" not in capfd.readouterr().err


# ---- models ---------------------------------------------------------------------------------------------------------

SMALL_TYPES = ("gpt2", "bart", "bert", "xlm", "xlnet", "cpmant", "rwkv", "git", "mixtral", "prophetnet", "reformer")
SWITCHES = ("is_decoder", "causal", "use_cache", "tie_word_embeddings", "output_router_logits", "is_encoder_decoder")


@fuzz(25)
@example(model_type="reformer", block_size=64, changes={})
@example(model_type="rwkv", block_size=2, changes={"rescale_every": 1})
@given(
    model_type=st.sampled_from(SMALL_TYPES),
    block_size=st.integers(2, 40),
    changes=st.dictionaries(st.sampled_from(SWITCHES), st.booleans(), max_size=2),
)
def test_any_model_is_taken_or_refused_in_words_and_keeps_its_weights(model_type, block_size, changes):
    config = tiny_config(model_type)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
    except (AssertionError, ValueError):
        return  # transformers makes no such model
    before = digests(model)
    found, error = outcome(lambda: check_conformance(model, block_size))
    assert found is not None or len(str(error)) > 40
    assert digests(model) == before


# ---- what others leave in the environment and in a run's folder -----------------------------------------------------

VARIABLES = st.dictionaries(
    st.sampled_from([*SIZES, *SIZES.values(), PLACE, ADDRESS]),
    st.sampled_from(["", " ", "0", "1", "2", "-1", "two", "²", "1e9", "9" * 5000, "2\n"]) | st.text(max_size=3),
)


@fuzz(200)
@given(VARIABLES)
def test_whatever_a_launcher_left_is_named_or_believed(variables):
    found = left_over(variables)
    assert found.keys() <= variables.keys()
    if not found:  # torch and accelerate can make numbers of what is left
        assert all(int(variables[name]) >= -1 for name in (*SIZES, PLACE) if variables.get(name, "").strip())


@fuzz(60)
@given(st.one_of(st.text(max_size=20), VALUES.map(lambda value: json.dumps({"code": value}))))
@example('{"code": Infinity}')
@example('{"code": NaN}')
@example("[" * 5000)
def test_whatever_exit_json_holds_only_a_run_that_ended_is_finished(tmp_path, content):
    (tmp_path / "exit.json").write_text(content, encoding="utf-8", errors="replace")
    code = exit_code_of(tmp_path)
    assert code is None or isinstance(code, int)
    assert is_finished(tmp_path) == (code in (0, 5))


@fuzz(60)
@given(VALUES)
def test_whatever_a_recipe_says_of_its_texts_is_compared_or_let_be(tmp_path, value):
    for run in (value, {"sources": value}, {"sources": [value]}, {"sources": [{"name": value, "sha256": value}]}):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"run": run}), encoding="utf-8")
        _, error = outcome(lambda: check_texts_unchanged(recorded_sources(tmp_path), ["builtin:python-docs"], tmp_path))
        assert error is None or "is not what it was" in str(error)
