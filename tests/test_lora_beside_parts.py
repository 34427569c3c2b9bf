"""LoRA beside trained parts: one plan, one delta folder of parts and adapters, whole again by `apply`."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import partialtune as pt
from conftest import REPOSITORY, some_windows, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.delta_adapters import sha256_of
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.plan_table import plan_table
from partialtune.hub.published_files import check_finished, files_to_send
from partialtune.model.digests import digest, digests
from partialtune.model.parameters import named_weights
from partialtune.recipe.recipe import recipe_from_values
from partialtune.training.training_data import collate_windows
from test_forecast import counted_in_a_real_step, small_gpt2, small_llama
from test_modeling import rename_to_hub

pytestmark = pytest.mark.contract

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "
LORA = {"target": ["attention"], "rank": 4, "alpha": 16}
WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
@pytest.mark.parametrize("parts", [["final_norm"], ["blocks[-1].attention"], ["embeddings", "norms"]], ids=str)
def test_the_plan_lists_parts_and_adapters_in_the_order_of_the_model_that_it_makes(make, parts):
    model = make()
    plan = plan_freeze(model, parts, lora=LORA)
    alone, adapters = plan_freeze(model, parts), plan_lora(model, ["attention"], rank=4)
    before = digests(model)
    apply_plan(model, plan)
    there = [(name, tuple(parameter.shape)) for name, parameter in named_weights(model)]
    assert [(parameter.name, parameter.shape) for parameter in plan.parameters] == there
    assert {name for name, parameter in named_weights(model) if parameter.requires_grad} == set(plan.trainable)
    assert set(plan.trainable) == {*alone.trainable, *adapters.trainable}
    assert plan.parts == alone.trainable
    assert plan.trainable_parameters == alone.trainable_parameters + adapters.trainable_parameters
    assert before.items() <= digests(model).items(), "the base keeps its names and its bits"
    apply_plan(model, plan)
    assert [name for name, _ in named_weights(model)] == [name for name, _ in there], "once more changes nothing"


def test_method_lora_is_short_for_lora_with_nothing_else_that_trains():
    model = tiny_gpt2()
    short = plan_lora(model, ["attention", "blocks[-1].mlp"], rank=3, alpha=5, seed=7)
    target = {"target": ["attention", "blocks[-1].mlp"], "rank": 3, "alpha": 5}
    assert plan_freeze(model, [], lora=target, seed=7) == short
    assert short.parts == []
    assert short.to_json({}, {})["adapter"] == {"rank": 3, "alpha": 5}
    assert short.selectors == ("attention", "blocks[-1].mlp")


def test_table_and_json_tell_adapters_from_parts_that_the_same_selector_chose():
    plan = plan_freeze(tiny_gpt2(), ["attention", "final_norm"], lora=LORA)
    table = plan_table(plan)
    assert "attention, final_norm, lora: attention" in table
    part, adapters = 3 * (32 * 96 + 96 + 32 * 32 + 32), 3 * 4 * (32 + 96 + 32 + 32)
    assert [f"{part:,}" in line for line in table.splitlines() if line.startswith("attention ")] == [True]
    assert [f"{adapters:,}" in line for line in table.splitlines() if line.startswith("lora: attention ")] == [True]
    content = plan.to_json({}, {})
    assert content["adapter"] == {"rank": 4, "alpha": 16, "target": ["attention"]}
    assert {e["selector"] for e in content["parameters"] if "lora_" in e["name"]} == {"lora: attention"}
    assert plan.phases[0].trainable == tuple(plan.trainable)
    assert plan.backward_from == "transformer.h.0.attn.c_attn.weight"


def test_adapters_learn_from_the_first_step_and_parts_in_their_phases():
    schedule = [{"from_step": 3, "trainable": ["blocks[-1].mlp"]}, {"from_step": 5, "trainable": ["embeddings"]}]
    plan = plan_freeze(tiny_gpt2(), [], schedule=schedule, lora={"target": "blocks[1:].attention"})
    adapters = {name for name in plan.trainable if "lora_" in name}
    assert [phase.first_step for phase in plan.phases] == [0, 3, 5]
    assert set(plan.phases[0].trainable) == adapters
    assert set(plan.phases[1].trainable) - adapters == {n for n in plan.parts if ".h.2.mlp" in n}
    assert [phase.first_block for phase in plan.phases] == [1, 1, 0]


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_the_forecast_counts_the_products_of_both(make):
    from partialtune.cost.dry_step import dry_step

    model = make()
    plan = plan_freeze(model, ["blocks[-1].mlp", "final_norm"], lora={"target": ["blocks[1:].attention"]})
    products = dry_step(model, plan, batch_size=4, block_size=32).products
    assert products.total + products.attention == counted_in_a_real_step(model, plan, 4, 32)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target": ["norms"]}, "lora, target, norms: lora adapts matrices of linear layers in the blocks"),
        ({"target": ["attention", "head"]}, "lora, target, head: lora adapts"),
        ({"target": ["attention", "!attention"]}, "nothing is left"),
        ({"target": ["atention"]}, "Did you mean attention"),
        ({"target": []}, "lora, target is missing: nothing would get an adapter"),
        ({"target": ["attention"], "rank": 0}, "lora, rank: got 0; allowed: a whole number, 1 or more"),
        ({"targets": ["attention"], "alpha": 0}, "(?s)unknown key targets.*Did you mean target.*alpha: got 0"),
        (["attention"], "lora is .* it takes a mapping"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused_in_words(lora, said):
    with pytest.raises(RecipeError, match=said):
        plan_freeze(tiny_gpt2(), ["final_norm"], lora=lora)


def test_a_model_that_has_adapters_gets_no_more_of_them():
    model = tiny_gpt2()
    apply_plan(model, plan_lora(model, ["attention"]))
    with pytest.raises(RecipeError, match="has adapters already"):
        plan_freeze(model, ["final_norm"], lora=LORA)


# ---- the steps: what peft does in a plain loop ----------------------------------------------------------------------


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 128, (2, 12), generator=generator) for _ in range(count)]


def plain_loop(model, optimizer):
    for ids in batches():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("parts", "beside"),
    [
        (["final_norm"], {"modules_to_save": ["ln_f"]}),
        (["embeddings", "final_norm"], {}),
        (["/.*h.2.attn.c_attn.weight/", "final_norm"], {}),
        (["head[-4:]", "final_norm"], None),
    ],
    ids=["modules_to_save", "tied embeddings", "a matrix under its adapter", "rows"],
)
def test_every_value_is_that_of_peft_in_a_plain_loop(parts, beside):
    ours, theirs = tiny_gpt2(**WITHOUT_DROPOUT).train(), tiny_gpt2(**WITHOUT_DROPOUT).train()
    plan = plan_freeze(ours, parts, lora=LORA)
    apply_plan(ours, plan)
    start = {name: parameter.detach().clone() for name, parameter in named_weights(ours)}
    names = sorted({name.rpartition(".lora_")[0] for name in plan.trainable if ".lora_" in name})
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=names, fan_in_fan_out=True, **(beside or {}))
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")
            plain = plain.replace(".modules_to_save", "").replace(".original_module", "")
            if not beside or "modules_to_save" not in beside:
                parameter.requires_grad_(plain in plan.trainable)
            if ".lora_A" in plain:
                parameter.copy_(start[plain])
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
    with pt.audited(ours, plan, optimizer) as tuning:
        plain_loop(ours, optimizer)
    if beside is None:  # peft has no rows of a tied head: the whole matrix learns, the gradient of other rows is 0
        matrix = theirs.get_base_model().transformer.wte.weight
        matrix.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:-4]), grad[-4:]]))
    plain_loop(theirs, torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0))
    assert tuning.audit.passed
    theirs = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save", ""): values
        for name, values in theirs.named_parameters()
        if ".original_module" not in name
    }
    theirs = {name.replace(".default", ""): values for name, values in theirs.items()}
    for name, parameter in named_weights(ours):
        assert float((parameter - theirs[name]).detach().abs().max()) <= 1e-6, name
        moved = not torch.equal(parameter, start[name])
        assert moved == (name in plan.trainable), name


# ---- the run --------------------------------------------------------------------------------------------------------

PARTS = ["final_norm", "embeddings", "blocks[-1].attention"]


def write_base(folder):
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rename_to_hub(folder)
    return folder


def write_recipe(folder, base, **changes):
    (folder / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    values = {
        "model_name_or_path": str(base),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "lora": LORA,
        "trainable": PARTS,
        "output_dir": str(folder / "run"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "prompts": ["It was"],
        "save_steps": 4,
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


def values_of(recipe):
    return yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a base whose file has the Hub's names, and its folder."""
    folder = tmp_path_factory.mktemp("beside")
    assert main(["train", write_recipe(folder, write_base(folder / "base"))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def whole(run):
    """The run's delta, made a whole model by `apply`."""
    assert main(["apply", str(run), str(run.parent / "whole")]) == 0
    return run.parent / "whole"


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(96).reshape(3, 32)).logits


def test_parts_and_adapters_move_and_all_else_keeps_every_bit(run):
    base = digests(AutoModelForCausalLM.from_pretrained(run.parent / "base"))
    entries = {entry["name"]: entry for entry in read(run, "freeze_plan.json")["parameters"]}
    trained = {name for name, entry in entries.items() if entry["trainable"]}
    assert {name: e["sha256_after"] for name, e in entries.items() if not e["trainable"]}.items() <= base.items()
    assert all((e["sha256_before"] != e["sha256_after"]) == (name in trained) for name, e in entries.items())
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 2 * 3 * 2
    assert len(trained - adapters) == 2 + 2 + 4
    audit = read(run, "audit.json")
    assert audit["passed"] is True
    assert audit["frozen"] == {"parameters": len(entries) - len(trained), "changed": [], "l2_delta": 0.0}
    assert audit["saved_files"] == {"read_back": True, "different": []}


def test_the_folder_is_one_delta_of_parts_with_the_adapters_beside_them(run):
    assert not (run / "model.safetensors").exists()
    entries = [entry for entry in read(run, "freeze_plan.json")["parameters"] if entry["trainable"]]
    names = {entry["name"] for entry in entries}
    assert set(load_file(run / "delta.safetensors")) == {name for name in names if ".lora_" not in name}
    adapters = load_file(run / "adapter_model.safetensors")
    assert set(adapters) == {f"base_model.model.{name}" for name in names if ".lora_" in name}
    delta = read(run, "delta.json")
    assert delta["format"] == 2, "a version that knows no adapters reads format 1, and must not take the half"
    assert not [entry for entry in delta["parameters"] if ".lora_" in entry["name"]]
    assert delta["adapters"]["rank"] == 4
    assert set(delta["adapters"]["sha256"]) == {"adapter_model.safetensors", "adapter_config.json"}
    check_finished(run, allow_failed_audit=False)
    sent = {"delta.safetensors", "delta.json", "adapter_model.safetensors", "adapter_config.json", "config.json"}
    assert sent <= set(files_to_send(run))


def test_load_gives_the_model_that_the_run_scored_and_peft_alone_builds_the_same(run):
    loaded = pt.load(run)
    assert isinstance(loaded, peft.PeftModel)
    stated = {entry["name"]: entry["sha256_after"] for entry in read(run, "freeze_plan.json")["parameters"]}
    assert digests(loaded) == stated
    under = pt.load(run).unload()  # the base with the values of delta.safetensors in it
    assert torch.equal(logits(peft.PeftModel.from_pretrained(under, run)), logits(loaded))
    opened, tokenizer = pt.open_run(run).load()
    assert torch.equal(logits(opened), logits(loaded))
    ids = tokenizer("It was", return_tensors="pt").input_ids
    with torch.no_grad():
        best = opened(ids).logits[0, -1].softmax(-1).max()
    assert float(best) == pytest.approx(read(run, "evaluation.json")["prompts"][0]["after"][0]["probability"], rel=1e-5)


def test_neither_half_is_loaded_for_the_whole_by_libraries_that_follow_the_names_in_files(run, tmp_path):
    for load in (AutoModelForCausalLM.from_pretrained, peft.AutoPeftModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"no file named model\.safetensors|which partialtune\.load makes"):
            load(str(run))
    config = read(run, "adapter_config.json")
    assert "delta.safetensors" in config["base_model_name_or_path"]


def copied(run, folder):
    folder.mkdir()
    for pattern in ("adapter_*", "delta.*", "*.json"):
        for file in run.glob(pattern):
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("adapter_model.safetensors", "adapter_model.safetensors is missing: one without the other is no model"),
        ("adapter_config.json", "adapter_config.json is missing"),
        ("another adapter", "is not the one that trained beside this delta"),
        ("another scale", "adapter_config.json is not the one that trained beside this delta"),
        ("adapters that it does not know", "lies beside it. Move the files adapter_\\* to a folder"),
    ],
)
def test_a_delta_without_its_own_adapters_is_refused(run, tmp_path, damage, said):
    folder = copied(run, tmp_path / "damaged")
    if damage == "another adapter":
        tensors = load_file(folder / "adapter_model.safetensors")
        next(iter(tensors.values())).view(torch.int32)[0, 0] ^= 1
        save_file(tensors, folder / "adapter_model.safetensors")
    elif damage == "another scale":
        config = read(folder, "adapter_config.json")
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    elif damage == "adapters that it does not know":
        content = read(folder, "delta.json")
        content.pop("adapters")
        (folder / "delta.json").write_text(json.dumps(content))
    else:
        (folder / damage).unlink()
    for act in (lambda: pt.load(folder), lambda: pt.apply_delta(folder, tmp_path / "out")):
        with pytest.raises(ModelError, match=said):
            act()
    assert not (tmp_path / "out").exists()


def test_apply_merges_as_peft_does_into_a_folder_that_transformers_loads(run, whole):
    names = {file.name for file in whole.iterdir()}
    assert "model.safetensors" in names
    assert not {name for name in names if name.startswith(("adapter_", "delta"))}
    merged = AutoModelForCausalLM.from_pretrained(whole)
    unmerged = pt.load(run)
    assert float((logits(merged) - logits(unmerged)).abs().max()) <= 1e-5
    expected = dict(unmerged.merge_and_unload().named_parameters())
    for name, values in merged.named_parameters():
        assert torch.equal(values, expected[name]), name
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_the_merged_folder_is_proved_against_the_base_too(run, whole, capsys):
    plan = read(whole, "freeze_plan.json")
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert {entry["name"]: entry["sha256_after"] for entry in plan["parameters"]} == digests(model)
    assert plan["merged_adapters"] == {"rank": 4, "alpha": 16, "target": ["attention"]}
    assert plan["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert main(["verify", str(run.parent / "base"), str(whole), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert set(found["moved"]) == {entry["name"] for entry in plan["parameters"] if entry["trainable"]}


def test_verify_checks_parts_adapters_and_the_base_under_them(run, capsys):
    assert main(["verify", str(run.parent / "base"), str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    entries = [entry for entry in read(run, "freeze_plan.json")["parameters"] if entry["trainable"]]
    assert set(found["moved"]) == {
        f"{e['name'].partition('.lora_')[0]}.weight" for e in entries if "lora_" in e["name"]
    } | {entry["name"] for entry in entries if "lora_" not in entry["name"]}
    assert "adapters beside a delta" in found["notes"][0]
    assert main(["verify", str(run.parent / "base"), str(run), "--trainable", "attention", *PARTS]) == 0
    assert main(["verify", str(run.parent / "base"), str(run), "--trainable", *PARTS]) == 3
    assert "transformer.h.0.attn.c_attn.weight" in capsys.readouterr().err
    assert main(["verify", str(run), str(run), "--trainable", "norms"]) == 0, "as a base it is what it makes"


UNDER = "a frozen matrix under an adapter"
FAULTS = ["a frozen matrix", UNDER, f"{UNDER}, in the plan too", "a part", "another base", "an adapter", "another head"]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bit_that_is_not_the_runs_own_breaks_the_claim(run, tmp_path, capsys, fault):
    """The delta is made consistent in itself after each fault: what finds it is the freeze plan."""
    base, adapted, code = run.parent / "base", copied(run, tmp_path / "adapted"), 3
    content = read(adapted, "delta.json")
    entries = {entry["name"]: entry for entry in content["parameters"]}
    tensors = load_file(adapted / "delta.safetensors")
    matrices = {
        "a frozen matrix": "transformer.h.0.mlp.c_fc.weight",
        UNDER: "transformer.h.0.attn.c_attn.weight",
        f"{UNDER}, in the plan too": "transformer.h.0.attn.c_attn.weight",
        "a part": "transformer.ln_f.weight",
    }
    if fault in matrices:
        name = matrices[fault]
        values = tensors.get(name)
        if values is None:
            values = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())[name].detach().clone()
        values.view(torch.int32).view(-1)[5] ^= 1
        tensors[name] = values
        save_file(tensors, adapted / "delta.safetensors")
        entries[name]["sha256_after"] = said = digest(values)
        if fault.endswith("plan too"):
            plan = read(adapted, "freeze_plan.json")
            next(entry for entry in plan["parameters"] if entry["name"] == name)["sha256_after"] = said
            (adapted / "freeze_plan.json").write_text(json.dumps(plan))
        said = name
    elif fault == "another base":
        other = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            other.transformer.h[1].mlp.c_fc.weight.view(torch.int32)[3, 3] ^= 1
        other.save_pretrained(tmp_path / "other")
        base, said = tmp_path / "other", "sha256_before) in 1 parameter: transformer.h.1.mlp.c_fc.weight"
    elif fault == "another head":
        plan = read(adapted, "freeze_plan.json")
        (adapted / "freeze_plan.json").write_text(json.dumps({**plan, "head": "untied"}))
        said = "tie_word_embeddings"
    else:
        factors = load_file(adapted / "adapter_model.safetensors")
        name = next(iter(factors))
        factors[name].view(torch.int32)[0, 0] ^= 1
        save_file(factors, adapted / "adapter_model.safetensors")
        content["adapters"]["sha256"]["adapter_model.safetensors"] = sha256_of(adapted / "adapter_model.safetensors")
        said = name.removeprefix("base_model.model.")
    (adapted / "delta.json").write_text(json.dumps(content))
    assert main(["verify", str(base), str(adapted)]) == code
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_ends_with_the_same_parts_and_adapters_bit_for_bit(run, tmp_path):
    again = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(run / "checkpoint-4")]
    assert main(["train", str(run.parent / "recipe.yaml"), *again]) == 0
    for file in ("delta.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / file) for folder in (run, tmp_path / "again"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    plans = [read(folder, "freeze_plan.json") for folder in (run, tmp_path / "again")]
    assert plans[0] == plans[1]


def test_a_checkpoint_holds_parts_and_adapters_and_loads_by_itself(run):
    halfway, end = pt.load(run / "checkpoint-4"), pt.load(run / "checkpoint-8")
    assert digests(end) == digests(pt.load(run))
    trained = {entry["name"] for entry in read(run, "freeze_plan.json")["parameters"] if entry["trainable"]}
    one, other = digests(halfway), digests(end)
    assert {name for name in one if one[name] != other[name]} == trained


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_best_model_is_loaded_with_parts_and_adapters(run, tmp_path):
    folder = tmp_path / "best"
    words = ["--output_dir", str(folder), "--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    words += ["--eval_steps", "2", "--save_steps", "2", "--learning_rate", "0.5", "--lr_scheduler_type", "constant"]
    assert main(["train", str(run.parent / "recipe.yaml"), *words]) == 0
    best = read(folder, "trainer_state.json")["best_global_step"]
    assert best < 8
    assert digests(pt.load(folder)) == digests(pt.load(folder / f"checkpoint-{best}"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_untied_head_trains_beside_adapters_and_is_saved_as_its_own_matrix(run, tmp_path, capsys):
    recipe = write_recipe(tmp_path, run.parent / "base", trainable=["head"], head="untied", save_strategy="no")
    assert main(["train", recipe]) == 0
    folder = tmp_path / "run"
    assert set(load_file(folder / "delta.safetensors")) == {"lm_head.weight"}
    assert main(["verify", str(run.parent / "base"), str(folder)]) == 0
    assert main(["apply", str(folder), str(tmp_path / "whole")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert merged.lm_head.weight is not merged.transformer.wte.weight
    assert float((logits(merged) - logits(pt.load(folder))).abs().max()) <= 1e-5
    assert main(["verify", str(run.parent / "base"), str(tmp_path / "whole")]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_parts_of_a_schedule_learn_in_their_phase_beside_adapters(run, tmp_path):
    schedule = [{"from_step": 6, "trainable": ["blocks[-1].mlp"], "learning_rate": 1e-3}]
    recipe = write_recipe(tmp_path, run.parent / "base", trainable=["final_norm"], schedule=schedule)
    assert main(["train", recipe]) == 0
    stored = set(load_file(tmp_path / "run" / "delta.safetensors"))
    assert {name for name in stored if ".mlp." in name} == {name for name in stored if ".h.2." in name}
    early, base = (
        digests(pt.load(tmp_path / "run" / "checkpoint-4")),
        digests(AutoModelForCausalLM.from_pretrained(run.parent / "base")),
    )
    name = "transformer.h.2.mlp.c_fc.weight"
    assert early[name] == base[name] != digests(pt.load(tmp_path / "run"))[name]
    again = [
        "--output_dir",
        str(tmp_path / "again"),
        "--resume_from_checkpoint",
        str(tmp_path / "run" / "checkpoint-4"),
    ]
    assert main(["train", recipe, *again]) == 0
    assert digests(pt.load(tmp_path / "again")) == digests(pt.load(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_rows_of_the_tied_embeddings_train_beside_adapters_and_nothing_else_of_the_matrix(run, tmp_path):
    recipe = write_recipe(tmp_path, run.parent / "base", trainable=["final_norm", "embeddings.tokens[-4:]"])
    assert main(["train", recipe]) == 0
    folder, name = tmp_path / "run", "transformer.wte.weight"
    stored = load_file(folder / "delta.safetensors")
    assert {key: tuple(values.shape) for key, values in stored.items()} == {
        name: (4, 32), "transformer.ln_f.weight": (32,), "transformer.ln_f.bias": (32,),
    }  # fmt: skip
    base, loaded = AutoModelForCausalLM.from_pretrained(run.parent / "base"), pt.load(folder)
    before, now = base.get_parameter(name), loaded.get_base_model().get_parameter(name)
    assert torch.equal(before[:-4], now[:-4])
    assert torch.equal(now[-4:], stored[name])
    assert not torch.equal(before[-4:], now[-4:])
    again = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(folder / "checkpoint-4")]
    assert main(["train", recipe, *again]) == 0
    for file in ("delta.safetensors", "adapter_model.safetensors"):
        one, other = load_file(folder / file), load_file(tmp_path / "again" / file)
        assert all(torch.equal(one[key], other[key]) for key in one | other)
    assert main(["verify", str(run.parent / "base"), str(folder)]) == 0
    assert main(["apply", str(folder), str(tmp_path / "whole")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(merged.get_parameter(name), now)
    assert float((logits(merged) - logits(loaded)).abs().max()) <= 1e-5
    plan = read(tmp_path / "whole", "freeze_plan.json")
    adapted = 3 * (32 * 96 + 32 * 32)
    assert plan["trainable_parameters"] == 4 * 32 + 2 * 32 + adapted
    assert main(["verify", str(run.parent / "base"), str(tmp_path / "whole")]) == 0


def test_card_and_report_speak_of_both(run, monkeypatch):
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "library_name: partialtune" in card
    assert "`lora: attention`" in card
    assert "neither is of use without the other" in card
    assert "lora: attention" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_cards_snippet_proves_the_freeze(run):
    card = (run / "README.md").read_text(encoding="utf-8")
    snippet = next(block.split("```")[0] for block in card.split("```python\n") if "hashlib" in block)
    result = subprocess.run(
        [sys.executable, "-c", snippet], cwd=run, capture_output=True, text=True, timeout=300, check=True
    )
    assert "changed although frozen: nothing" in result.stdout


@pytest.mark.slow
def test_lora_alone_leaves_the_folder_that_method_lora_leaves(run, tmp_path, undrawn):
    for name, keys in {
        "short": {"method": "lora", "trainable": ["attention"], "lora_rank": 4, "lora_alpha": 16, "lora": None},
        "long": {"trainable": None},
    }.items():
        (tmp_path / name).mkdir()
        values = values_of(write_recipe(tmp_path / name, run.parent / "base"))
        values = {key: value for key, value in {**values, **keys}.items() if value is not None}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump({**values, "max_steps": 2}))
        assert main(["train", str(tmp_path / name / "recipe.yaml")]) == 0
    short, long = tmp_path / "short" / "run", tmp_path / "long" / "run"
    scores = {".before.safetensors"}  # of the base: the second run has them from the cache
    assert {file.name for file in short.iterdir()} - scores == {file.name for file in long.iterdir()} - scores
    for file in ("freeze_plan.json", "adapter_model.safetensors", "audit.json", "evaluation.json"):
        one, other = (
            json.loads((folder / file).read_text()) if file.endswith("json") else (folder / file).read_bytes()
            for folder in (short, long)
        )
        assert one == other, file
    assert not (long / "delta.json").exists()
    assert main(["verify", str(run.parent / "base"), str(long)]) == 0


# ---- the other doors ------------------------------------------------------------------------------------------------


def trainer_of(model, folder, **more):
    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=some_windows(), data_collator=collate_windows, **more)


def test_attach_saves_a_folder_that_load_makes_whole_again(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = trainer_of(model, tmp_path / "run")
    tuning = pt.attach(trainer, plan_freeze(model, ["final_norm", "embeddings"], lora=LORA))
    trainer.train()
    trainer.save_model()
    assert tuning.audit.passed
    assert {name for name, delta in tuning.deltas.items() if delta.l2_delta} == set(tuning.plan.trainable)
    assert digests(pt.load(tmp_path / "run")) == digests(model)
    assert torch.equal(logits(pt.load(tmp_path / "run")), logits(model))


def test_an_optimizer_that_was_made_before_the_adapters_is_refused(tmp_path):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"], lora=LORA)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RecipeError, match=r"adds adapters, .*lora_A.*, and the optimizer was made before"):
        pt.attach(trainer_of(model, tmp_path, optimizers=(optimizer, None)), plan)
    with pytest.raises(RecipeError, match="adds adapters"), pt.audited(model, plan, optimizer):
        pass


# ---- recipes that cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"method": "lora", "lora": {"target": ["attention"]}, "trainable": ["mlp"]},
            ["lora: method: lora is short for lora: {target: [mlp]} with nothing else that trains. Keep one of"],
        ),
        (
            {"method": "full", "lora": {"target": ["attention"]}, "trainable": None, "lora_rank": 4},
            [
                "lora: method full trains every matrix",
                "lora_rank: is for method: lora, and method is full. Say rank in",
            ],
        ),
        (
            {"lora": {"targets": ["attention"], "rank": 0, "alpha": "x"}},
            ["unknown key targets", "rank: got 0", "alpha: got 'x'", "target is missing"],
        ),
        ({"lora": {"target": ["blocks["]}}, ["lora: target, 'blocks[': unknown selector"]),
        ({"lora": LORA, "trainable": None, "head": "untied"}, ["head: an adapter stands beside its base"]),
        (
            {"lora": LORA, "trainable": None, "checkpoint_format": "delta"},
            ["checkpoint_format: delta: adapters are all that a run with lora and no trainable saves"],
        ),
        ({"lora": LORA, "trust_remote_code": True}, ["lora: with trainable it saves a delta"]),
    ],
    ids=str,
)
def test_a_recipe_that_contradicts_itself_is_refused_with_all_that_is_wrong(tmp_path, capsys, keys, said):
    recipe = write_recipe(tmp_path, "builtin:lilliput")
    values = {**values_of(recipe), **keys}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    assert main(["train", recipe]) == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error
    assert not (tmp_path / "run").exists()


def test_without_peft_the_recipe_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("partialtune.errors.find_spec", lambda name: None)
    assert main(["train", write_recipe(tmp_path, "builtin:lilliput")]) == 2
    assert "lora: lora needs peft" in capsys.readouterr().err


# ---- the page -------------------------------------------------------------------------------------------------------


def section_of_the_page():
    page = (REPOSITORY / "docs" / "what-may-learn.md").read_text(encoding="utf-8")
    return page.split("## LoRA beside trained parts\n")[1].split("\n## ")[0]


def test_the_snippets_of_the_page_run_as_they_stand(run, monkeypatch):
    loop, loading = re.findall(r"```python\n(.*?)```", section_of_the_page(), re.DOTALL)
    lilliput = str(builtin_folder("builtin:lilliput"))
    windows = some_windows(8).with_transform(lambda rows: {key: torch.tensor(rows["input_ids"]) for key in KEYS})
    there = {"loader": torch.utils.data.DataLoader(windows, batch_size=4)}
    exec(loop.replace("openai-community/gpt2", lilliput), there)
    assert there["tuning"].audit.passed
    assert {name for name, delta in there["tuning"].deltas.items() if delta.l2_delta} == set(there["plan"].trainable)
    assert there["plan"].parts == ["transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"]
    exec(loading.replace("outputs/run", str(run)), there)
    assert torch.equal(logits(there["same"]), logits(there["model"]))


KEYS = ("input_ids", "labels")


def test_the_recipe_of_the_page_is_one(tmp_path):
    [recipe] = re.findall(r"```yaml\n(.*?)```", section_of_the_page(), re.DOTALL)
    values = {"model_name_or_path": "builtin:lilliput", "text": "a.txt", "output_dir": str(tmp_path / "run")}
    freeze = recipe_from_values({**values, **yaml.safe_load(recipe)}, {}).freeze
    assert (freeze.lora["target"], freeze.trainable) == (["attention"], ["final_norm", "embeddings.positions"])


def test_an_adapter_has_the_rate_of_its_matrix_and_a_part_its_own():
    rates = {"final_norm": 1e-3, "blocks[-1]": 1e-4}
    plan = plan_freeze(tiny_gpt2(), ["final_norm", "embeddings"], lora=LORA, part_learning_rates=rates)
    found = {parameter.name: parameter.learning_rate for parameter in plan.parameters if parameter.trainable}
    assert found["transformer.ln_f.weight"] == 1e-3
    assert found["transformer.h.2.attn.c_attn.lora_A.weight"] == 1e-4
    assert found["transformer.h.0.attn.c_attn.lora_A.weight"] is found["transformer.wte.weight"] is None


def test_block_sampling_does_not_go_with_lora():
    with pytest.raises(RecipeError, match="block_sampling: does not go with lora"):
        plan_freeze(tiny_gpt2(), [], lora=LORA, block_sampling={"blocks": 1, "every": 2})
