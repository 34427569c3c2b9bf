"""LoRA, the baseline: adapters beside matrices that keep every bit, through the same run as everything else."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.cost.advice import advise
from partialtune.cost.dry_step import dry_step
from partialtune.errors import RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.lora import load_adapters, plan_lora, save_adapters
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.plan_table import plan_table
from partialtune.hub.published_files import check_finished, files_to_send
from partialtune.model.digests import digests
from partialtune.model.parameters import named_weights
from test_forecast import counted_in_a_real_step, small_gpt2, small_llama
from test_modeling import rename_to_hub

pytestmark = pytest.mark.contract

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
@pytest.mark.parametrize("selectors", [["attention"], ["blocks[-1]", "!/.*(c|o|down)_proj.*/"], ["all"]], ids=str)
def test_the_plan_lists_what_peft_then_puts_into_the_model(make, selectors):
    model = make()
    plan = plan_lora(model, selectors, rank=4)
    before = digests(model)
    apply_plan(model, plan)
    there = [(name, tuple(parameter.shape)) for name, parameter in named_weights(model)]
    assert [(parameter.name, parameter.shape) for parameter in plan.parameters] == there
    assert {name for name, parameter in named_weights(model) if parameter.requires_grad} == set(plan.trainable)
    assert before.items() <= digests(model).items(), "the base keeps its names and its bits"


def test_the_plan_of_gpt2_in_numbers():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    plan = plan_lora(model, ["attention"])
    assert plan.trainable_parameters == 12 * 8 * (768 + 3 * 768 + 768 + 768)  # c_attn, c_proj
    assert plan.total_parameters == 124_439_808 + plan.trainable_parameters
    assert plan.backward_from == "transformer.h.0.attn.c_attn.lora_A.weight"
    assert "trainable 442,368 of 124,882,176 (0.4%): attention" in plan_table(plan)
    upper = plan_lora(model, ["blocks[-2:].mlp"], rank=16)
    assert upper.trainable_parameters == 2 * 16 * 2 * (768 + 4 * 768)
    assert upper.phases[0].first_block == 10


@pytest.mark.parametrize(
    ("selectors", "said"),
    [
        (["norms"], "trainable, norms: method lora adapts matrices"),
        (["attention", "head"], "trainable, head: method lora adapts"),
        (["attention", "!attention"], "nothing is left"),
        (["atention"], "Did you mean attention"),
    ],
)
def test_selectors_without_a_matrix_are_refused_in_words(selectors, said):
    with pytest.raises(RecipeError, match=said):
        plan_lora(tiny_gpt2(), selectors)


def test_an_adapted_model_begins_as_its_base_bit_for_bit_and_its_start_is_that_of_its_seed():
    ids = torch.arange(32).reshape(2, 16)
    models = [tiny_gpt2().eval() for _ in range(3)]
    base = models[0](ids).logits
    for model, seed in zip(models, (1, 1, 2), strict=True):
        apply_plan(model, plan_lora(model, ["mlp"], seed=seed))
        assert torch.equal(model(ids).logits, base)
    one, same, other = (digests(model) for model in models)
    assert one == same
    assert one["transformer.h.0.mlp.c_fc.lora_A.weight"] != other["transformer.h.0.mlp.c_fc.lora_A.weight"]


def test_peft_alone_makes_saves_and_loads_adapters_whatever_version_of_it_transformers_asks_for(tmp_path, monkeypatch):
    def refuse(min_version):
        raise ValueError("The version of PEFT you are using is not compatible")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    one, other = tiny_gpt2(), tiny_gpt2()
    apply_plan(one, plan_lora(one, ["attention"], seed=1))
    apply_plan(other, plan_lora(other, ["attention"], seed=2))
    save_adapters(one, tmp_path)
    load_adapters(other, load_file(tmp_path / "adapter_model.safetensors"))
    assert digests(other) == digests(one)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_the_forecast_counts_the_products_of_the_adapters_too(make):
    model = make()
    plan = plan_lora(model, ["blocks[1:].attention"])
    products = dry_step(model, plan, batch_size=4, block_size=32).products
    assert products.total + products.attention == counted_in_a_real_step(model, plan, 4, 32)


def test_advice_is_about_adapters_where_adapters_train():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=2000))
    plan, everything = plan_lora(model, ["attention"]), plan_freeze(model, ["all"])

    def costing(other):
        return dry_step(model, other, 4, 64)

    said = " ".join(advise(model, plan, costing(plan), costing(everything), 4, 1, costing))
    share = 1 - costing(plan_lora(model, ["blocks[2:].attention"])).products.total / costing(plan).products.total
    assert f"`trainable: ['blocks[2:].attention']` would stop it at block 2, save {share:.0%}" in said


def test_without_peft_the_recipe_says_what_to_install(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("partialtune.errors.find_spec", lambda name: None)
    assert main(["train", recipe]) == 2
    assert "pip install 'partialtune[lora]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- the run --------------------------------------------------------------------------------------------------------


def write_base(folder):
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rename_to_hub(folder)
    return folder


def write_recipe(folder, base):
    (folder / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    values = {
        "model_name_or_path": str(base),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "method": "lora",
        "trainable": ["attention", "blocks[-1].mlp"],
        "lora_rank": 4,
        "output_dir": str(folder / "run"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "prompts": ["It was"],
        "save_steps": 4,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, write_base(tmp_path / "base"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a base whose file has the Hub's names, and its folder."""
    folder = tmp_path_factory.mktemp("lora")
    assert main(["train", write_recipe(folder, write_base(folder / "base"))]) == 0
    return folder / "run"


def test_every_weight_of_the_base_keeps_every_bit_and_every_adapter_moves(run):
    base = digests(AutoModelForCausalLM.from_pretrained(run.parent / "base"))
    entries = {entry["name"]: entry for entry in read(run, "freeze_plan.json")["parameters"]}
    frozen = {name: entry["sha256_after"] for name, entry in entries.items() if not entry["trainable"]}
    assert frozen == base
    adapters = [entry for entry in entries.values() if entry["trainable"]]
    assert len(adapters) == 2 * (3 * 2 + 2)
    assert all(entry["sha256_before"] != entry["sha256_after"] for entry in adapters)
    audit = read(run, "audit.json")
    assert audit["passed"] is True
    assert audit["frozen"] == {"parameters": len(base), "changed": [], "l2_delta": 0.0}
    assert audit["trainable"]["unmoved"] == []


def test_the_folder_holds_adapters_and_no_copy_of_the_base(run):
    assert not (run / "model.safetensors").exists()
    assert read(run, "adapter_config.json")["base_model_name_or_path"] == str(run.parent / "base")
    tensors = load_file(run / "adapter_model.safetensors")
    entries = [entry for entry in read(run, "freeze_plan.json")["parameters"] if entry["trainable"]]
    assert {f"base_model.model.{entry['name']}" for entry in entries} == set(tensors)
    check_finished(run, allow_failed_audit=False)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(files_to_send(run))


def test_peft_and_transformers_load_the_model_that_the_run_scored(run):
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run)(ids).logits
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(run)(ids).logits, adapted)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(run)(ids).logits, adapted)
    assert not torch.equal(adapted, plain)
    asked = tokenizer("It was", return_tensors="pt").input_ids
    with torch.no_grad():
        best = AutoModelForCausalLM.from_pretrained(run)(asked).logits[0, -1].softmax(-1).max()
    assert float(best) == pytest.approx(read(run, "evaluation.json")["prompts"][0]["after"][0]["probability"], rel=1e-5)


def test_it_learns_and_reports_deltas_of_adapters_and_of_a_base_that_stood_still(run):
    scores = read(run, "evaluation.json")["validation"]
    assert scores["after"]["bits_per_byte"] < scores["before"]["bits_per_byte"]
    lines = [json.loads(line) for line in (run / "weight_deltas.jsonl").read_text().splitlines()]
    assert all((line["l2_delta"] > 0) == line["trainable"] == ("lora_" in line["name"]) for line in lines)
    assert {line["component"] for line in lines if line["trainable"]} == {"attention", "mlp"}


def test_card_and_page_say_that_they_are_adapters(run, monkeypatch):
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "These are LoRA adapters" in card
    snippet = next(block.split("```")[0] for block in card.split("```python\n") if "hashlib" in block)
    monkeypatch.chdir(run)
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=300, check=True)
    assert "changed although frozen: nothing" in result.stdout
    assert "lora_A" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_ends_with_the_same_adapters_bit_for_bit(run, tmp_path):
    again = ["--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(run / "checkpoint-4")]
    assert main(["train", str(run.parent / "recipe.yaml"), *again]) == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    plans = [read(folder, "freeze_plan.json") for folder in (run, tmp_path / "again")]
    assert plans[0] == plans[1]


def test_plan_shows_the_adapters_of_the_recipe(run, capsys):
    assert main(["plan", str(run.parent / "recipe.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == read(run, "freeze_plan.json")["trainable_parameters"]
    assert plan["flops"]["backward_weights"] > 0


def test_activation_checkpointing_recomputes_no_block_below_the_first_adapter():
    model = tiny_gpt2()
    plan = plan_lora(model, ["blocks[-1].attention"], rank=4)
    plain, checkpointed = dry_step(model, plan, 8, 64), dry_step(model, plan, 8, 64, checkpointing=True)
    assert plain.products.recomputed == 0
    assert 0 < checkpointed.products.recomputed <= 2 * 8 * 64 * (12 * 32**2 + 4 * (32 + 96 + 32 + 32))
    assert checkpointed.products.backward_activations == plain.products.backward_activations


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_verify_says_which_matrices_the_adapters_move_and_that_the_plan_holds(run, capsys):
    assert main(["verify", str(run.parent / "base"), str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    adapted = {name.partition(".lora_")[0] + ".weight" for name in trained_names(run)}
    assert set(found["moved"]) == adapted
    assert "holds adapters" in found["notes"][0]
    base = dict(AutoModelForCausalLM.from_pretrained(run.parent / "base").named_parameters())
    whole = dict(PeftModel.from_pretrained(reloaded(run), run).merge_and_unload().named_parameters())
    for entry in found["parameters"]:
        change = (whole[entry["name"]].detach().double() - base[entry["name"]].detach().double()).norm()
        assert entry["l2_delta"] == pytest.approx(float(change), rel=1e-4, abs=1e-9), entry["name"]


def reloaded(run):
    return AutoModelForCausalLM.from_pretrained(run.parent / "base")


def trained_names(run):
    return [entry["name"] for entry in read(run, "freeze_plan.json")["parameters"] if entry["trainable"]]


@pytest.mark.parametrize("fault", ["selectors", "another scale", "another base", "another adapter", "another shape"])
def test_verify_finds_what_breaks_the_claim_of_adapters(run, tmp_path, capsys, fault):
    import shutil

    base, adapted, words, code = run.parent / "base", tmp_path / "adapted", [], 3
    adapted.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "freeze_plan.json"):
        shutil.copy(run / name, adapted)
    if fault == "another scale":
        config = read(adapted, "adapter_config.json")
        (adapted / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
        said = "lora_alpha / r ("
    elif fault == "selectors":
        words, said = ["--trainable", "mlp"], "transformer.h.0.attn.c_attn.weight"
    elif fault == "another base":
        other = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            other.transformer.wpe.weight.view(torch.int32)[3, 3] ^= 1
        other.save_pretrained(tmp_path / "other")
        base, said = tmp_path / "other", "sha256_before) in 1 parameter: transformer.wpe.weight"
    elif fault == "another adapter":
        tensors = load_file(adapted / "adapter_model.safetensors")
        name = next(iter(tensors))
        tensors[name].view(torch.int32)[0, 0] ^= 1
        save_file(tensors, adapted / "adapter_model.safetensors", metadata={"format": "pt"})
        said = f"sha256_after) in 1 parameter: {name.removeprefix('base_model.model.')}"
    else:
        tiny_gpt2(n_embd=64).save_pretrained(tmp_path / "wide")
        base, said, code = tmp_path / "wide", "which", 2
    assert main(["verify", str(base), str(adapted), *words]) == code
    assert said in capsys.readouterr().err
