"""A delta holds what was trained; with its base, and no other, it makes the whole model again, bit for bit."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import partialtune
from conftest import some_windows, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.delta_checkpoint import Base, read_delta, write_delta
from partialtune.errors import InputError, ModelError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.hub.published_files import check_finished, files_to_send
from partialtune.model.digests import digests
from partialtune.model.loading import load_config, load_model
from test_modeling import rename_to_hub
from test_verify import flip_a_bit, hub, tiny_mixtral  # noqa: F401  (hub is a fixture)

pytestmark = pytest.mark.usefixtures("undrawn")

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


def write_trained(folder, base, selectors, head="tied", name=None, commit=None):
    """Train a base's parameters by hand, and write the whole model and its delta side by side.

    Returns:
        The folder of the whole model and that of the delta.
    """
    model = load_model(str(base), load_config(str(base)))
    plan = plan_freeze(model, selectors, head=head)
    apply_plan(model, plan)
    before = digests(model)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.linspace(-0.02, 0.03, parameter.numel()).view_as(parameter), alpha=1.0 + number)
    whole, delta = folder / "whole", folder / "delta"
    model.save_pretrained(whole)
    delta.mkdir()
    origin = Base(name or str(base), commit=commit)
    write_delta(delta, model, plan, before, digests(model), origin)
    return whole, delta


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_rebuilt(whole, delta, out, *words):
    """`apply` makes the very files that saving the whole model makes, and `load` its logits."""
    assert main(["apply", str(delta), str(out), *words]) == 0
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    assert json.loads((out / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    expected = AutoModelForCausalLM.from_pretrained(whole)
    loaded = partialtune.load(delta, *words[1:])
    ids = torch.tensor(some_windows(count=2, vocabulary=32)["input_ids"])
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert not loaded.training
    return loaded


@pytest.fixture
def gpt2(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_model_with_a_tied_head_is_rebuilt_and_the_delta_holds_only_what_was_trained(tmp_path, gpt2):
    whole, delta = write_trained(tmp_path, gpt2, ["blocks[-1].mlp", "embeddings"])
    stored = load_file(delta / "delta.safetensors")
    assert {name.split(".")[1] for name in stored} == {"h", "wte", "wpe"}
    assert len(stored) == 6
    assert {values.dtype for values in stored.values()} == {torch.float32}
    assert {path.name for path in delta.iterdir()} == {
        *("delta.json", "delta.safetensors", "config.json", "generation_config.json")
    }
    loaded = check_rebuilt(whole, delta, tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_model_with_an_untied_head_is_rebuilt_untied(tmp_path, gpt2):
    whole, delta = write_trained(tmp_path, gpt2, ["final_norm", "head"], head="untied")
    assert set(load_file(delta / "delta.safetensors")) == {
        *("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight")
    }
    loaded = check_rebuilt(whole, delta, tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)


def test_an_untied_head_that_stayed_frozen_is_the_base_s_embedding(tmp_path, gpt2):
    whole, delta = write_trained(tmp_path, gpt2, ["embeddings.tokens"], head="untied")
    assert set(load_file(delta / "delta.safetensors")) == {"transformer.wte.weight"}
    check_rebuilt(whole, delta, tmp_path / "out")


def test_a_base_with_the_hubs_names_and_mask_buffers_serves(tmp_path, gpt2):
    rename_to_hub(gpt2)
    whole, delta = write_trained(tmp_path, gpt2, ["norms"])
    check_rebuilt(whole, delta, tmp_path / "out")


def test_fused_experts_are_stored_as_the_parameters_that_they_are(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "base")
    whole, delta = write_trained(tmp_path, tmp_path / "base", ["blocks[-1].mlp"])
    stored = load_file(delta / "delta.safetensors")
    assert "model.layers.1.mlp.experts.gate_up_proj" in stored
    assert stored.keys() < {name for name, _ in tiny_mixtral().named_parameters()}
    check_rebuilt(whole, delta, tmp_path / "out")


def test_a_16_bit_base_is_widened_as_it_was_for_training(tmp_path):
    tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    whole, delta = write_trained(tmp_path, tmp_path / "base", ["final_norm"])
    check_rebuilt(whole, delta, tmp_path / "out")


def test_a_bundled_base_is_found_by_its_name(tmp_path):
    whole, delta = write_trained(tmp_path, builtin_folder("builtin:lilliput"), ["norms"], name="builtin:lilliput")
    check_rebuilt(whole, delta, tmp_path / "out")


def test_base_and_delta_on_the_hub_are_fetched_at_their_commits(tmp_path, gpt2, hub):  # noqa: F811
    whole, delta = write_trained(tmp_path, gpt2, ["final_norm"], name="someone/tiny", commit="a" * 40)
    hub(gpt2, "someone/tiny", "a" * 40)
    hub(delta, "me/tiny-norms", "b" * 40)
    check_rebuilt(whole, "me/tiny-norms", tmp_path / "out")
    with pytest.raises(ModelError, match="me/tiny-norms at revision v9"):
        partialtune.load("me/tiny-norms@v9")


# Refusals


def refused(match, *arguments, kind=ModelError):
    with pytest.raises(kind, match=match) as caught:
        partialtune.load(*arguments)
    assert caught.value.exit_code == 2


def test_another_base_is_refused_by_one_bit_and_nothing_is_written(tmp_path, gpt2, capsys):
    _, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    other = tiny_gpt2()
    with torch.no_grad():
        flip_a_bit(other.transformer.h[0].ln_1.weight)
    other.save_pretrained(gpt2)
    assert main(["apply", str(delta), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "1 of 40 parameters differ (transformer.h.0.ln_1.weight)" in message
    assert "--base" in message
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta", "whole"}


def test_a_base_that_moved_is_named_with_base_and_one_of_another_shape_is_refused(tmp_path, gpt2):
    whole, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    gpt2.rename(tmp_path / "moved")
    refused(r"is a delta of .*base, which cannot be had from .*there is no folder", delta)
    check_rebuilt(whole, delta, tmp_path / "out", "--base", str(tmp_path / "moved"))
    tiny_gpt2(n_embd=16).save_pretrained(tmp_path / "narrow")
    refused("is a delta of", delta, str(tmp_path / "narrow"))
    tiny_mixtral().save_pretrained(tmp_path / "mixtral")
    refused("is a delta of", delta, str(tmp_path / "mixtral"))


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, gpt2):
    _, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    (tmp_path / "out").mkdir()
    partialtune.apply_delta(delta, tmp_path / "out")  # an empty one serves
    with pytest.raises(InputError, match="no empty folder"):
        partialtune.apply_delta(delta, tmp_path / "out")


def test_damaged_deltas_are_refused_in_words(tmp_path, gpt2):
    whole, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    with pytest.raises(ModelError, match=r"holds no delta\.json"):
        partialtune.apply_delta(whole, tmp_path / "out")
    assert digests(partialtune.load(whole)) == digests(partialtune.load(delta))  # a whole model is read as it is
    refused("holds a whole model, which has no base", whole, str(gpt2))
    values, description = load_file(delta / "delta.safetensors"), json.loads((delta / "delta.json").read_text())

    def with_values(changed):
        save_file(changed, delta / "delta.safetensors")
        refused("delta", delta)

    flipped = {name: tensor.clone() for name, tensor in values.items()}
    flip_a_bit(flipped["transformer.ln_f.bias"], 3)
    save_file(flipped, delta / "delta.safetensors")
    refused(r"damaged, transformer\.ln_f\.bias is not what the run ended with", delta)
    with_values({"transformer.ln_f.bias": values["transformer.ln_f.bias"]})
    with_values({**values, "stranger": torch.zeros(2)})
    with_values({**values, "transformer.ln_f.bias": torch.zeros(2)})
    (delta / "delta.safetensors").write_bytes(b"not a tensor in sight")
    refused("the delta is damaged", delta)
    save_file(values, delta / "delta.safetensors")
    bases = [5, None, [], ["x"], "x", {}, *({"model_name_or_path": name} for name in (5, None, [], {}, True))]
    bases += [{"model_name_or_path": "x", key: value} for key, value in (("revision", 5), ("commit", [1]), ("more", 1))]
    entry = description["parameters"][0]
    parameters = [5, None, [5], [[]], [{}], *([{**entry, key: []}] for key in ("name", "sha256_before"))]
    parameters += [[{**entry, "sha256_after": 5}]]
    changed = [{"base": base} for base in bases] + [{"parameters": value} for value in parameters]
    changed += [{"head": 5}, {"format": None}, {"format": "1"}]
    contents = [json.dumps({**description, **change}) for change in changed]
    for content in ("{", "[]", "{}", "5", "null", "[" * 100_000, '{"base":' * 100_000, *contents):
        (delta / "delta.json").write_text(content)
        refused("the delta is damaged", delta)
    (delta / "delta.json").write_text(json.dumps({**description, "format": 3}))
    refused("of format 3", delta)


def change_config(delta, **changes):
    file = delta / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_config_that_was_changed_is_refused_since_the_weights_would_compute_something_else(tmp_path, gpt2, capsys):
    _, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    change_config(delta, n_head=4)
    refused(r"its config\.json is not the one that the run ended with", delta)
    assert main(["apply", str(delta), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["verify", str(gpt2), str(delta), "--trainable", "final_norm"]) == 3
    assert "n_head (2 -> 4)" in capsys.readouterr().err
    change_config(delta, n_head=2, model_type="gpt_bigcode")
    refused(r"its config\.json is not the one that the run ended with", delta)
    for content in (b"{", b"[]", b"\xff"):
        (delta / "config.json").write_bytes(content)
        refused("config", delta)


def test_a_config_that_was_changed_in_what_computes_nothing_loads(tmp_path, gpt2):
    whole, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    change_config(delta, resid_pdrop=0.5, use_cache=False, transformers_version="5.20.0")
    change_config(whole, resid_pdrop=0.5, use_cache=False, transformers_version="5.20.0")
    ids = torch.tensor(some_windows(count=2, vocabulary=32)["input_ids"])
    expected = AutoModelForCausalLM.from_pretrained(whole)(ids).logits
    assert torch.equal(partialtune.load(delta)(ids).logits, expected)


def test_a_delta_from_before_configs_were_digested_loads_with_a_warning(tmp_path, gpt2, caplog):
    _, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    content = json.loads((delta / "delta.json").read_text())
    del content["config_sha256"]
    (delta / "delta.json").write_text(json.dumps(content))
    partialtune.load(delta)
    assert "that file is taken unchecked" in caplog.text


def test_a_model_that_apply_cannot_write_as_it_is_is_not_left_behind(tmp_path, gpt2, monkeypatch, capsys):
    _, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    kept = GPT2LMHeadModel.state_dict

    def halved(self, *args, **kwargs):
        return {name: values / 2 if "ln_f" in name else values for name, values in kept(self, *args, **kwargs).items()}

    monkeypatch.setattr(GPT2LMHeadModel, "state_dict", halved)
    assert main(["apply", str(delta), str(tmp_path / "out")]) == 2
    assert "was not written: read back" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta", "whole"}


# Size


def test_norms_on_the_shape_of_gpt2_take_less_than_a_megabyte(tmp_path):
    """Of 124,439,808 parameters, 474.7 MB in fp32, 38,400 are norms: 153,600 bytes."""
    from transformers import GPT2Config

    with torch.device("meta"):
        empty = GPT2LMHeadModel(GPT2Config())
    plan = plan_freeze(empty, ["norms"])
    assert plan.total_parameters * 4 == 497_759_232
    model = empty.to_empty(device="cpu")  # memory that is never touched but for the norms
    with torch.no_grad():
        for name in plan.trainable:
            model.get_parameter(name).zero_()
    sha256 = dict.fromkeys((parameter.name for parameter in plan.parameters), "0" * 64)
    write_delta(tmp_path, model, plan, sha256, sha256, Base("openai-community/gpt2", commit="0" * 40))
    assert (tmp_path / "delta.safetensors").stat().st_size < 160_000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 250_000


# A run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One recipe run twice through the command line: saved whole, and as a delta."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    values = {
        "model_name_or_path": str(folder / "base"),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["final_norm", "head"],
        "head": "untied",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "prompts": ["It was"],
        "report_to": "none",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    for name in ("full", "delta"):
        words = ["--output_dir", str(folder / name), "--checkpoint_format", name]
        assert main(["train", str(folder / "recipe.yaml"), *words]) == 0
    return folder


@pytest.mark.slow
def test_a_run_saved_as_a_delta_is_made_whole_to_the_file_of_the_other_run(runs, tmp_path):
    assert not (runs / "delta" / "model.safetensors").exists()
    assert (runs / "delta" / "config.json").read_bytes() == (runs / "full" / "config.json").read_bytes()
    assert main(["apply", str(runs / "delta"), str(tmp_path / "out")]) == 0
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "freeze_plan.json"):
        assert sha256(tmp_path / "out" / name) == sha256(runs / "full" / name), name
    assert main(["verify", str(runs / "base"), str(tmp_path / "out")]) == 0


@pytest.mark.slow
def test_a_run_saved_as_a_delta_has_scores_report_and_a_card_that_says_how_to_load_it(runs):
    scores = [json.loads((runs / name / "evaluation.json").read_text()) for name in ("full", "delta")]
    assert scores[0] == scores[1]
    assert 0.0 < json.loads((runs / "delta" / "performance.json").read_text())["callback_share"] < 1.0
    assert (runs / "delta" / "report.html").is_file()
    card, other = ((runs / name / "README.md").read_text(encoding="utf-8") for name in ("delta", "full"))
    assert "partialtune.load(" in card
    assert "AutoModelForCausalLM" not in card
    assert "library_name: partialtune" in card
    assert "partialtune.load(" not in other
    assert "library_name: transformers" in other


@pytest.mark.slow
def test_the_check_in_the_card_runs_as_it_is_written(runs, monkeypatch, capsys):
    card = (runs / "delta" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(runs / "delta")
    for block in card.split("```python\n")[1:]:
        exec(block.split("```")[0].replace("NAMESPACE/NAME", "."), {})  # what a reader would paste
    assert "changed although frozen: nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_saved_as_a_delta_may_be_pushed(runs):
    check_finished(runs / "delta", allow_failed_audit=False)
    sent = files_to_send(runs / "delta")
    assert {"delta.json", "delta.safetensors", "config.json", "tokenizer.json", "README.md"} <= sent.keys()
    assert "model.safetensors" not in sent
    assert read_delta(runs / "delta", "run").base.model_name_or_path == str(runs / "base")


def test_a_frozen_weight_that_changed_all_the_same_is_in_the_delta(tmp_path, gpt2):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    before = digests(model)
    with torch.no_grad():
        flip_a_bit(model.transformer.wpe.weight)
    (tmp_path / "delta").mkdir()
    write_delta(tmp_path / "delta", model, plan, before, digests(model), Base(str(gpt2)))
    model.save_pretrained(tmp_path / "whole")
    check_rebuilt(tmp_path / "whole", tmp_path / "delta", tmp_path / "out")


def test_an_empty_folder_is_filled_where_it_cannot_be_replaced(runs, tmp_path, monkeypatch):
    for name in ("here", "behind"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "here")
    partialtune.apply_delta(runs / "delta", ".")
    partialtune.apply_delta(runs / "delta", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("here", "behind")]
    assert names[0] == names[1]
    assert {"config.json", "model.safetensors"} <= set(names[0])
    assert Path.cwd().is_dir()  # a shell that stands there still does
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is a link to .*nowhere, which is not there"):
        partialtune.apply_delta("nothing/is-asked-for", tmp_path / "lost")


def test_a_delta_is_no_base_to_load_without_apply_and_the_message_says_so(tmp_path, gpt2):
    _, delta = write_trained(tmp_path, gpt2, ["final_norm"])
    shutil.copytree(delta, tmp_path / "copy")
    with pytest.raises(ModelError, match="partialtune apply"):
        load_model(str(tmp_path / "copy"), load_config(str(tmp_path / "copy")))
