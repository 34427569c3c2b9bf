"""New tokens get a row each, which starts as it says and alone trains; they travel with everything that is saved."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
)

import partialtune as pt
from conftest import REPOSITORY, some_windows
from partialtune.bench.measure import measure
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.delta_checkpoint import Base, write_delta
from partialtune.errors import InputError, ModelError, RecipeError
from partialtune.freeze.plan_table import plan_table
from partialtune.freeze.recipe_plan import empty_base, plan_of_recipe
from partialtune.model.digests import digest, digests
from partialtune.model.loading import load_tokenizer
from partialtune.model.new_tokens import NewToken, NewTokens, give_rows, new_tokens_of
from partialtune.recipe.recipe import recipe_from_values
from partialtune.text.tokenizing import token_ids_of, tokenize_text
from tiny_models import tiny_config

pytestmark = pytest.mark.usefixtures("undrawn")

LILLIPUT = builtin_folder("builtin:lilliput")
TOKENS, INIT = ["<poem>", "<drama>"], {"<drama>": "a play"}
TEXT = "".join(
    f"{'<poem>' if number % 2 else '<drama>'}\nThe {number}th voyage was longer than the one before it, and colder.\n\n"
    for number in range(60)
)


@pytest.fixture
def tokenizer():
    return load_tokenizer("builtin:lilliput")


def tiny_llama(vocabulary=4096, kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    """With a head of its own, and weights of which every row has another mean."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(config(vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **shape))


def lilliput():
    return AutoModelForCausalLM.from_pretrained(LILLIPUT)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def mean(rows):
    return rows.double().mean(0).float()


# ---- start values and rows -------------------------------------------------------------------------------------------


def test_rows_start_from_the_mean_of_all_or_of_the_words_in_the_embedding_and_in_a_head_of_its_own(tokenizer):
    model, words = tiny_llama(), tokenizer("a play", add_special_tokens=False)["input_ids"]
    before = weights(model)
    state = torch.random.get_rng_state()
    assert pt.add_tokens(model, tokenizer, TOKENS, INIT) == ["embeddings.tokens[4096:4098]", "head[4096:4098]"]
    assert torch.equal(torch.random.get_rng_state(), state)
    after = weights(model)
    assert after.keys() == before.keys()
    for name in before:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[name], before[name])
            continue
        assert after[name].shape == (4098, 16)
        assert torch.equal(after[name][:4096], before[name])
        assert torch.equal(after[name][4096], mean(before[name]))
        assert torch.equal(after[name][4097], mean(before[name][words]))
    assert model.config.vocab_size == 4098 == len(tokenizer)
    assert tokenizer("<poem> and <drama>", add_special_tokens=False)["input_ids"][0] == 4096
    assert tokenizer.decode([4096, 4097], skip_special_tokens=True) == "<poem><drama>"


def test_a_tied_head_stays_tied_and_needs_one_selector(tokenizer):
    model = lilliput()
    base = digest(model.transformer.wte.weight)
    assert pt.add_tokens(model, tokenizer, TOKENS) == ["embeddings.tokens[4096:4098]"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert digest(model.transformer.wte.weight[:4096]) == base
    assert new_tokens_of(model).base["transformer.wte.weight"].sha256 == base
    assert set(new_tokens_of(model).base) == {"transformer.wte.weight", "lm_head.weight"}


def test_where_a_plan_unties_the_head_its_rows_train_too(tokenizer):
    model = lilliput()
    plan = pt.plan_freeze(model, pt.add_tokens(model, tokenizer, TOKENS), head="untied")
    assert plan.rows == {"transformer.wte.weight": ((4096, 4098),), "lm_head.weight": ((4096, 4098),)}
    assert plan.trainable_parameters == 2 * 2 * 192


@pytest.mark.parametrize(("rows", "grown"), [(4160, 4160), (4097, 4098), (4098, 4098)])
def test_a_padded_matrix_is_filled_before_it_grows(tokenizer, rows, grown):
    model = tiny_llama(rows)
    before = weights(model)
    selectors = pt.add_tokens(model, tokenizer, TOKENS, INIT)
    plan = pt.plan_freeze(model, selectors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        now = model.get_parameter(name)
        assert now.shape == (grown, 16)
        assert torch.equal(now[:4096], before[name][:4096])
        assert torch.equal(now[4096], mean(before[name][:4096]))  # what is padding has no say in the mean
        assert torch.equal(now[4098:], before[name][4098:])
    assert model.config.vocab_size == grown
    table = plan_table(plan)
    assert f"Matrix of {rows:,} rows, the tokenizer had 4,096 tokens" in table
    assert ("lm_head.weight has 4,160 rows, the tokenizer 4,098 tokens" in table) == (rows == 4160)
    assert plan.to_json({}, {}).get("tokenizer_length") == (4098 if rows == 4160 else None)


def test_rows_of_tokens_that_the_model_never_knew_get_the_mean_and_stay_frozen(tokenizer):
    model = tiny_llama(4000)
    before = weights(model)
    plan = pt.plan_freeze(model, pt.add_tokens(model, tokenizer, ["<poem>"]))
    head = model.lm_head.weight
    assert head.shape == (4097, 16)
    assert torch.equal(head[4000:], mean(before["lm_head.weight"]).expand(97, 16))
    assert plan.rows["lm_head.weight"] == ((4096, 4097),)


def test_entries_of_a_heads_bias_are_averaged_and_stay_frozen(tokenizer):
    model = tiny_llama(kind=PhiForCausalLM, config=PhiConfig)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-1, 3, 4096))
    before, words = model.lm_head.bias.detach().clone(), tokenizer("a play", add_special_tokens=False)["input_ids"]
    plan = pt.plan_freeze(model, pt.add_tokens(model, tokenizer, TOKENS, INIT))
    assert torch.equal(model.lm_head.bias[:4096], before)
    assert torch.equal(model.lm_head.bias[4096:], torch.stack([mean(before), mean(before[words])]))
    assert "lm_head.bias" in plan.frozen
    assert plan.rows["lm_head.weight"] == ((4096, 4098),)


@pytest.mark.parametrize(
    ("tokens", "init", "words"),
    [
        ([], {}, "a list of one or more texts"),
        ("<poem>", {}, "a list of one or more texts"),
        (["<poem>", " \n"], {}, r"' \\n' is no token"),
        (["<poem>", "<poem>"], {}, "'<poem>' stands there twice"),
        (["<poem>"], {"<verse>": "a verse"}, "'<verse>' is none of new_tokens"),
        (["<poem>"], {"<poem>": " "}, "words whose rows are averaged"),
        (["<poem>", "the"], {}, r"'the' is a token already, row \d+.*embeddings.tokens\[\d+\]"),
        ([" the"], {}, "' the' is a token already"),
        (["<|endoftext|>"], {}, "is a token already, row 0"),
        (["ä!"], {}, "Write it in ASCII"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused_before_the_model_changes(tokenizer, tokens, init, words):
    model = tiny_llama()
    with pytest.raises(RecipeError, match=words):
        pt.add_tokens(model, tokenizer, tokens, init)
    assert model.get_input_embeddings().weight.shape == (4096, 16)
    assert new_tokens_of(model) is None


def test_a_model_that_has_new_tokens_or_a_plan_already_is_refused(tokenizer):
    model = tiny_llama()
    pt.add_tokens(model, tokenizer, ["<poem>"])
    with pytest.raises(ModelError, match="has new tokens already"):
        pt.add_tokens(model, tokenizer, ["<drama>"])
    planned = tiny_llama()
    pt.apply_plan(planned, pt.plan_freeze(planned, ["embeddings.tokens[3]"]))
    with pytest.raises(ModelError, match="before a plan is applied"):
        pt.add_tokens(planned, tokenizer, ["<drama>"])
    assert len(tokenizer) == 4097


def test_adapters_beside_new_tokens_are_refused(tokenizer):
    model = lilliput()
    with pytest.raises(RecipeError, match="does not go with new tokens"):
        pt.plan_freeze(model, pt.add_tokens(model, tokenizer, TOKENS), lora={"target": ["attention"]})


@pytest.mark.parametrize("kind", ["blt", "gemma3n_text", "marian", "moshi", "xlstm"])
def test_a_model_that_would_not_load_again_with_more_rows_is_refused_in_words(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind))
    with pytest.raises(ModelError, match="new tokens"):
        give_rows(model, NewTokens((NewToken("<poem>", 1000),), 99))


def test_a_text_is_tokenised_word_by_word_as_it_is_as_a_whole(tokenizer):
    pt.add_tokens(lilliput(), tokenizer, [*TOKENS, "before it"])
    text = f"{TEXT}a<poem>b <poem>,<drama>. before it<poem>"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenize_text(text, tokenizer).tolist() == whole
    without = load_tokenizer("builtin:lilliput")
    pt.add_tokens(lilliput(), without, TOKENS)
    assert token_ids_of([text], without)[0].tolist() == without(text, add_special_tokens=False)["input_ids"]


# ---- doors -----------------------------------------------------------------------------------------------------------


def values(folder, **changes):
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    return {
        "model_name_or_path": "builtin:lilliput",
        "text": str(text),
        "block_size": 32,
        "new_tokens": TOKENS,
        "new_tokens_init": INIT,
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "weight_decay_on": "all",
        "prompts": ["<poem>\nThe"],
        **changes,
    }


def written(folder, **changes):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values(folder, **changes)))
    return str(file)


def test_a_recipe_and_a_line_of_python_make_the_same_plan(tokenizer, tmp_path):
    recipe = recipe_from_values(values(tmp_path))
    plan = plan_of_recipe(empty_base(recipe.model), recipe.freeze)
    model = lilliput()
    by_hand = pt.plan_freeze(model, pt.add_tokens(model, tokenizer, TOKENS, INIT))
    assert by_hand.parameters == plan.parameters
    assert by_hand.selectors == plan.selectors == ("embeddings.tokens[4096:4098]",)
    assert by_hand.new_tokens.tokens == plan.new_tokens.tokens


def test_attach_trains_their_rows_and_nothing_else(tokenizer, tmp_path):
    model = tiny_llama()
    plan = pt.plan_freeze(model, pt.add_tokens(model, tokenizer, TOKENS))
    before = weights(model)
    windows = some_windows(vocabulary=4098, block_size=8).map(
        lambda row: {"input_ids": [4096, 4097, *row["input_ids"][2:]], "labels": [4096, 4097, *row["input_ids"][2:]]}
    )
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, weight_decay=0.1, report_to="none", use_cpu=True
    )
    trainer = Trainer(model, args, train_dataset=windows)
    tuning = pt.attach(trainer, plan)
    trainer.train()
    assert tuning.audit.passed
    shapes = {tuple(v.shape) for state in trainer.optimizer.state.values() for v in state.values() if v.ndim}
    assert shapes == {(2, 16)}
    for name, old in before.items():
        now = model.get_parameter(name).detach()
        is_matrix = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(now[:4096], old[:4096]) if is_matrix else torch.equal(now, old)
        assert not is_matrix or not torch.equal(now[4096:], old[4096:])


def test_a_delta_of_which_one_of_two_rows_in_padding_trains_holds_both(tokenizer, tmp_path):
    tiny_llama(4160).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    pt.add_tokens(model, tokenizer, TOKENS)
    plan = pt.plan_freeze(model, ["embeddings.tokens[4096]", "head[4096]"])
    pt.apply_plan(model, plan)
    before = digests(model)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(0.1)
    (tmp_path / "delta").mkdir()
    write_delta(tmp_path / "delta", model, plan, before, digests(model), Base(str(tmp_path / "base")))
    again = pt.load(tmp_path / "delta")
    ids = torch.tensor([[4096, 4097, 5]])
    assert torch.equal(again(ids).logits, model(ids).logits)


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run on lilliput, with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("new_tokens")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("figures", "report"):
            patch.setattr(f"partialtune.pages.{module}.render_figure", lambda *_, **__: b"not drawn")
        assert main(["train", written(folder)]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "a run"))


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_run_trains_two_rows_and_keeps_every_other_bit(finished, tokenizer):
    base, model = load_file(LILLIPUT / "model.safetensors"), load_file(finished / "model.safetensors")
    for name, old in base.items():
        assert torch.equal(model[name][: len(old)], old), name
    start = lilliput()
    pt.add_tokens(start, tokenizer, TOKENS, INIT)
    assert model["transformer.wte.weight"].shape == (4098, 192)
    assert not torch.equal(model["transformer.wte.weight"][4096:], start.transformer.wte.weight[4096:])
    plan = read(finished, "freeze_plan.json")
    assert plan["new_tokens"] == [
        {"token": "<poem>", "row": 4096, "init": "mean"},
        {"token": "<drama>", "row": 4097, "init": "a play", "init_rows": [65, 1725]},
    ]
    entry = plan["parameters"][0]
    assert (entry["shape"], entry["base_shape"], entry["rows"]) == ([4098, 192], [4096, 192], [[4096, 4098]])
    assert entry["sha256_base"] == digest(base["transformer.wte.weight"])
    assert entry["sha256_before"] == digest(start.transformer.wte.weight)
    assert entry["sha256_after"] == digest(model["transformer.wte.weight"])
    assert entry["sha256_other_rows_before"] == entry["sha256_other_rows_after"] == entry["sha256_base"]
    assert (plan["trainable_parameters"], read(finished, "config.json")["vocab_size"]) == (2 * 192, 4098)
    assert read(finished, "audit.json")["passed"]


def test_the_pages_say_what_was_added_and_what_the_scores_before_are(finished):
    for page in ("README.md", "report.html"):
        words = (finished / page).read_text(encoding="utf-8")
        assert "row 4,096, from the mean of all rows" in words
        assert "the scores before are those of the base with these tokens" in words


FRESH = """\
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder in sys.argv[1:]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("<poem>\\nThe voyage <drama>", return_tensors="pt")["input_ids"]
    found.append([ids.tolist(), model(ids).logits.double().sum().item(), tokenizer.decode(ids[0])])
print(json.dumps(found))
"""


def test_run_and_checkpoint_load_in_a_fresh_process_with_their_tokenizer(finished):
    folders = [str(finished), str(finished / "checkpoint-4")]
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    model, tokenizer = pt.open_run(finished).load()
    ids = tokenizer("<poem>\nThe voyage <drama>", return_tensors="pt")["input_ids"]
    assert {4096, 4097} < set(ids[0].tolist())
    expected = [ids.tolist(), model(ids).logits.double().sum().item(), "<poem>\nThe voyage <drama>"]
    assert json.loads(done.stdout) == [expected, expected]


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_not_with_other_tokens(run, finished, tmp_path, capfd):
    words = ["--resume_from_checkpoint", str(run / "checkpoint-2"), "--output_dir", str(tmp_path / "again")]
    assert main(["train", str(finished / "recipe.yaml"), *words]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    capfd.readouterr()
    words[-1] = str(tmp_path / "other")
    assert main(["train", str(finished / "recipe.yaml"), *words, "--new_tokens_init", "{<drama>: a tragedy}"]) == 2
    err = capfd.readouterr().err
    assert "new_tokens: [{'token': '<poem>', 'row': 4096, 'init': 'mean'}, {'token': '<drama>'" in err
    assert main(["train", str(finished / "recipe.yaml"), "--new_tokens", "<poem>", "--new_tokens_init", "{}"]) == 2
    assert "another recipe; they differ in new_tokens, new_tokens_init" in capfd.readouterr().err


def test_verify_allows_the_rows_that_the_plan_names_and_no_others(run, capfd):
    assert main(["verify", "builtin:lilliput", str(run)]) == 0
    out = capfd.readouterr().out
    assert "note: Rows of new tokens, which the base does not have: transformer.wte.weight (2)." in out
    assert "1 of the 1 parameter that may move did; the other 51, and transformer.wte.weight (rows other than" in out
    assert main(["verify", "builtin:lilliput", str(run), "--trainable", "final_norm"]) == 3
    assert (
        "no freeze plan says new_tokens of so many: transformer.wte.weight (4,096 -> 4,098)" in capfd.readouterr().out
    )
    plan = read(run, "freeze_plan.json")
    for key in ("base_shape", "sha256_base"):
        del plan["parameters"][0][key]
    (run / "freeze_plan.json").write_text(json.dumps({**plan, "new_tokens": []}))
    assert main(["verify", "builtin:lilliput", str(run)]) == 3
    assert "no freeze plan says new_tokens" in capfd.readouterr().out
    (run / "freeze_plan.json").unlink()
    assert main(["verify", "builtin:lilliput", str(run)]) == 2  # nothing says that the two are one model
    assert "(4096, 192) in builtin:lilliput and (4098, 192)" in capfd.readouterr().err


@pytest.mark.parametrize("row", [0, 4095, 4097])
def test_one_planted_bit_makes_verify_exit_3(run, capfd, row):
    tensors = load_file(run / "model.safetensors")
    tensors["transformer.wte.weight"].view(torch.int32)[row, 5] ^= 1
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", "builtin:lilliput", str(run)]) == 3
    out = capfd.readouterr().out
    assert ("first in row" in out) == (row < 4096)
    assert "has other values than the run ended with (sha256_after)" in out


def test_the_pages_are_made_again_from_the_files(run):
    (run / "README.md").unlink()
    assert main(["report", str(run)]) == 0
    assert "embeddings.tokens[4096:4098]" in (run / "README.md").read_text(encoding="utf-8").split("Selectors")[1]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_delta_holds_two_rows_and_makes_the_very_model_again(finished, tmp_path, head):
    words = ["--checkpoint_format", "delta", "--output_dir", str(tmp_path / "delta"), "--head", head]
    assert main(["train", str(finished / "recipe.yaml"), *words]) == 0
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    names = ["transformer.wte.weight", *(["lm_head.weight"] if head == "untied" else [])]
    assert {name: tuple(rows.shape) for name, rows in stored.items()} == dict.fromkeys(names, (2, 192))
    assert read(tmp_path / "delta", "delta.json")["new_tokens"][0] == {"token": "<poem>", "row": 4096, "init": "mean"}
    assert main(["apply", str(tmp_path / "delta"), str(tmp_path / "whole")]) == 0
    made = load_file(tmp_path / "whole" / "model.safetensors")
    assert len(load_tokenizer(str(tmp_path / "whole"))) == 4098
    assert read(tmp_path / "whole", "config.json")["vocab_size"] == 4098
    for folder in ("delta", "whole"):
        assert main(["verify", "builtin:lilliput", str(tmp_path / folder)]) == 0
    if head == "tied":
        expected = load_file(finished / "model.safetensors")
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
    model, tokenizer = pt.open_run(tmp_path / "delta").load()
    assert model.get_output_embeddings().weight.shape == (4098, 192) == (len(tokenizer), 192)


# ---- padded, head of its own, bias: through a run -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4000, 4096, 4160])
@pytest.mark.parametrize("checkpoint_format", ["full", "delta"])
def test_a_head_with_a_bias_and_a_padded_or_short_matrix_pass_audit_verify_and_apply(rows, checkpoint_format, tmp_path):
    base = tmp_path / "base"
    model = tiny_llama(rows, kind=PhiForCausalLM, config=PhiConfig)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-1, 3, rows))
    model.save_pretrained(base)
    load_tokenizer("builtin:lilliput").save_pretrained(base)
    text = tmp_path / "text.txt"
    text.write_text("<poem> and <drama> " * 400)  # of tokens that a matrix of 4,000 rows has, too
    recipe = written(tmp_path, model_name_or_path=str(base), checkpoint_format=checkpoint_format, save_steps=4)
    assert main(["train", recipe]) == 0
    run = tmp_path / "run"
    assert main(["verify", str(base), str(run)]) == 0
    if checkpoint_format == "delta":
        assert set(load_file(run / "delta.safetensors")) == {
            "model.embed_tokens.weight",
            "lm_head.weight",
            "lm_head.bias",
        }
        assert main(["apply", str(run), str(tmp_path / "whole")]) == 0
        assert main(["verify", str(base), str(tmp_path / "whole")]) == 0
        run = tmp_path / "whole"
    tensors = load_file(run / "model.safetensors")
    assert len(tensors["lm_head.weight"]) == len(tensors["lm_head.bias"]) == max(rows, 4098)
    tensors["lm_head.bias"][17] += 1
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(base), str(run)]) == 3


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_plan_shows_the_tokens_without_weights(tmp_path, capfd):
    recipe = written(tmp_path)
    assert main(["plan", recipe]) == 0
    assert (
        "New tokens: '<poem>' is row 4,096, from the mean of all rows; '<drama>' is row 4,097" in capfd.readouterr().out
    )
    assert main(["plan", recipe, "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert [token["row"] for token in content["new_tokens"]] == [4096, 4097]
    assert content["parameters"][0]["sha256_base"] is None


def test_a_padded_matrix_prints_the_tokenizers_length_beside_its_rows(tmp_path, capfd):
    tiny_llama(4160).save_pretrained(tmp_path / "base")
    load_tokenizer("builtin:lilliput").save_pretrained(tmp_path / "base")
    changes = {"new_tokens": [], "new_tokens_init": {}, "trainable": ["head[-2:]"]}
    assert main(["plan", written(tmp_path, model_name_or_path=str(tmp_path / "base"), **changes)]) == 0
    assert "lm_head.weight has 4,160 rows, the tokenizer 4,096 tokens" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora", "trainable": ["attention"]}, "method lora trains adapters alone"),
        ({"lora": {"target": ["attention"]}}, "lora: does not go with new tokens"),
        ({"new_tokens": []}, "new_tokens: got"),
        ({"new_tokens": ["<poem>", "  "], "new_tokens_init": {}}, "is no token"),
        ({"new_tokens": ["<poem>"]}, "'<drama>' is none of new_tokens"),
        ({"new_tokens": ["the"], "new_tokens_init": {}}, "is a token already"),
    ],
)
def test_recipes_that_cannot_be_carried_out_are_refused_before_anything_is_written(tmp_path, capfd, changes, words):
    assert main(["train", written(tmp_path, **changes)]) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_new_tokens_go_with_a_schedule_with_other_parts_and_with_everything(tmp_path):
    later = [{"from_step": 2, "trainable": ["final_norm"]}]
    for changes, count in (
        ({"schedule": later}, 2 * 192 + 384),
        ({"trainable": ["all", "!embeddings"]}, 4 * 444_864 + 384 + 2 * 192),
        ({"method": "full"}, 2_664_576 + 2 * 192),
    ):
        recipe = recipe_from_values(values(tmp_path, **changes))
        plan = plan_of_recipe(empty_base(recipe.model), recipe.freeze, recipe.freeze.schedule)
        assert plan.trainable_parameters == count


def test_a_text_without_the_tokens_is_said(tmp_path, caplog):
    (tmp_path / "text.txt").write_text(TEXT.replace("<drama>", "A drama"))
    assert main(["train", written(tmp_path, max_steps=1, prompts=[])]) == 0
    assert "The training text does not hold <drama>" in caplog.text


def test_recipes_with_other_tokens_are_not_compared(tmp_path, capfd):
    one, two = written(tmp_path), str(tmp_path / "two.yaml")
    Path(two).write_text(yaml.safe_dump(values(tmp_path, new_tokens=["<poem>"], new_tokens_init={})))
    assert main(["compare", one, two, "--output_dir", str(tmp_path / "compared")]) == 2
    assert "new_tokens: ['<poem>', '<drama>'] in" in capfd.readouterr().err


@pytest.mark.slow
def test_rank_bench_and_learning_rates_take_such_a_recipe(tmp_path, capfd, monkeypatch, in_this_process):
    monkeypatch.setattr("partialtune.bench.bench.run_variant", lambda variant, steps: measure(variant.values, steps))
    recipe = written(tmp_path, max_steps=2)
    assert main(["rank", recipe, "--batches", "1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["windows"] == 2
    assert main(["bench", recipe, "--steps", "2", "--json"]) == 0
    capfd.readouterr()
    words = ["--output_dir", str(tmp_path / "compared"), "--learning_rates", "1e-3", "1e-2"]
    Path(tmp_path / "two.yaml").write_text(yaml.safe_dump(values(tmp_path, max_steps=2, trainable=["final_norm"])))
    assert main(["compare", recipe, str(tmp_path / "two.yaml"), *words]) == 0
    assert len(in_this_process) == 2 + 2


def test_the_snippet_of_the_page_does_what_stands_there(tmp_path):
    page = (REPOSITORY / "docs" / "what-may-learn.md").read_text(encoding="utf-8")
    section = page[page.index("## New tokens") :].split("\n## ")[0]
    (yaml_text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (python,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    made: dict = {}
    exec(compile(python.replace("openai-community/gpt2", str(LILLIPUT)), "what-may-learn.md", "exec"), made)
    recipe = recipe_from_values({**values(tmp_path), **yaml.safe_load(yaml_text)})
    plan = plan_of_recipe(empty_base(recipe.model), recipe.freeze)
    assert made["plan"].new_tokens.tokens == plan.new_tokens.tokens
    assert made["plan"].rows == plan.rows == {"transformer.wte.weight": ((4096, 4098),)}


def test_input_errors_of_the_library_are_input_errors(tokenizer):
    with pytest.raises(InputError, match="plain model of transformers"):
        pt.add_tokens(torch.nn.Linear(2, 2), tokenizer, ["<poem>"])
