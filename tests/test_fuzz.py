"""Recipes, selectors, texts and checkpoints that nobody meant: no traceback, no hang, and the promised exit codes.

The examples are the same in every run, and few. PARTIALTUNE_FUZZ=50 draws other ones, fifty times as many.
"""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, MarianConfig, MarianForCausalLM

from cluster import small_recipe
from conftest import tiny_gpt2
from partialtune import results, train
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.data import prepare_data
from partialtune.environment import ADDRESS, PLACE, SIZES, left_over
from partialtune.errors import ModelError, PartialtuneError, RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.model.dropout import set_dropout
from partialtune.output_dir import exit_code_of, is_finished, recorded_sources
from partialtune.recipe.arguments import TextArguments
from partialtune.recipe.rules import FORMER_NAMES, REFUSED, recipe_types
from partialtune.text.sources import check_kept
from partialtune.training.checkpoints import MARKER, finish_checkpoint

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
        _, error = outcome(lambda: check_kept(recorded_sources(tmp_path), ["builtin:python-docs"], tmp_path))
        assert error is None or "is not what it was" in str(error)
