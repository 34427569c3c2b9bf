"""Frozen matrices held in 16 bits: what is computed, trained and saved is bit for bit that of the widened model."""

import copy
import hashlib
import json
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Trainer,
    TrainingArguments,
)

import partialtune as pt
from conftest import some_windows
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.errors import RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.model.digests import digests
from partialtune.model.held_narrow import hold_narrow, narrow_values, unrounded
from partialtune.model.loading import load_config, load_model
from partialtune.model.narrow_weights import NarrowWeight, held_matrix
from partialtune.model.new_tokens import NewToken, NewTokens, give_rows
from partialtune.model.parameters import named_weights

SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
GROUPED = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=97, n_positions=64),
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=12),  # scales its embeddings by the root of 48, which bf16 rounds
    "mamba": MambaConfig(hidden_size=48, num_hidden_layers=2, vocab_size=97, state_size=8),
    "bloom": BloomConfig(hidden_size=48, n_layer=2, n_head=4, vocab_size=97),
    "neox": GPTNeoXConfig(**SHAPE, intermediate_size=64),
    "falcon": FalconConfig(**SHAPE),
    "opt": OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=48, max_position_embeddings=64),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "olmoe": OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
}
IDS = torch.arange(32).view(2, 16) * 5 % 97


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Family -> a folder with its model in bf16, made when it is asked for."""
    folders: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in folders:
            folders[family] = str(tmp_path_factory.mktemp("base"))
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
            model.to(torch.bfloat16).save_pretrained(folders[family])
        return folders[family]

    return folder


def both(folder, experts=None):
    """The model of a folder, widened and with its matrices held in 16 bits."""
    pair = []
    for narrow in (False, True):
        model = load_model(folder, load_config(folder, dropout=0.0), narrow=narrow)
        if experts:
            model.set_experts_implementation(experts)
        pair.append(model)
    return pair


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def loss_and_gradients(model):
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.contract
@pytest.mark.parametrize(
    ("family", "experts"),
    [*((family, None) for family in CONFIGS), ("mixtral", "batched_mm"), ("olmoe", "grouped_mm"), ("olmoe", "eager")],
)
def test_losses_and_gradients_are_bit_for_bit_those_of_the_widened_model(base_of, family, experts):
    wide, narrow = both(base_of(family), experts)
    assert narrow_values(narrow)["bfloat16"] > 0.8 * narrow.num_parameters()
    assert narrow.config.to_dict() == wide.config.to_dict()
    for selectors in (["final_norm"], ["blocks[0]"], ["norms", "embeddings"]):
        pair = copy.deepcopy(wide), copy.deepcopy(narrow)
        for model in pair:
            apply_plan(model, plan_freeze(model, selectors))
            model.train()
        (loss, gradients), (same_loss, same) = map(loss_and_gradients, pair)
        assert loss == same_loss
        assert set(gradients) == set(same)
        assert gradients
        for name, gradient in gradients.items():
            assert same[name].dtype == torch.float32
            assert torch.equal(gradient, same[name]), name
        wide_now = {name for name, parameter in named_weights(pair[1]) if parameter.dtype == torch.float32}
        assert set(plan_freeze(wide, selectors).trainable) <= wide_now


def test_the_wide_copy_of_a_frozen_matrix_is_not_kept_for_backward(base_of):
    _, model = both(base_of("llama"))
    apply_plan(model, plan_freeze(model, ["blocks[0].norms"]))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dtype, t.numel())) or t, lambda t: t):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    matrices = {p.numel() for _, p in named_weights(model) if p.dim() > 1}
    assert {kind for kind, count in sizes if count in matrices - {IDS.numel() * 48, IDS.numel() * 64}} == {
        torch.bfloat16
    }


@pytest.mark.parametrize(("family", "experts"), [("gpt2", None), ("mixtral", "grouped_mm"), ("olmoe", "eager")])
def test_under_autocast_the_held_bits_are_multiplied_as_they_are(base_of, family, experts):
    wide, narrow = both(base_of(family), experts)
    for model in (wide, narrow):
        apply_plan(model, plan_freeze(model, ["blocks[0]", "final_norm"]))
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradients), (same_loss, same) = map(loss_and_gradients, (wide, narrow))
    assert loss == same_loss
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())


def test_a_large_head_is_widened_by_slices(monkeypatch, base_of):
    wide, narrow = both(base_of("llama"))
    monkeypatch.setattr("partialtune.model.narrow_weights.WIDENED_AT_ONCE", 1000)
    for model in (wide, narrow):
        apply_plan(model, plan_freeze(model, ["blocks[0]", "final_norm"]))
    (loss, gradients), (same_loss, same) = map(loss_and_gradients, (wide, narrow))
    assert float(loss) == pytest.approx(float(same_loss), abs=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, same[name], rtol=1e-4, atol=1e-7), name


def test_the_stand_in_answers_as_the_wide_matrix_does():
    matrix = torch.nn.Parameter(torch.randn(6, 4).bfloat16(), requires_grad=False)
    weight, wide = NarrowWeight.over(matrix), matrix.float()
    assert weight.dtype == torch.float32
    assert weight.shape == wide.shape
    assert isinstance(weight, torch.nn.Parameter)
    assert held_matrix(weight) is matrix
    assert held_matrix(wide) is wide
    for use in (lambda w: w.T @ w, lambda w: w[2], lambda w: w[[1, 3]], lambda w: w.detach() + 1, lambda w: w.norm()):
        found = use(weight)
        found = found.matrix.float() if isinstance(found, NarrowWeight) else found
        assert found.dtype == torch.float32
        assert torch.equal(found, use(wide))


WRITES = {
    "data": lambda module, values: module.weight.data.copy_(values),
    "item": lambda module, values: module.weight.data.__setitem__(slice(None), values),
    "added": lambda module, values: setattr(module.weight, "data", module.weight.data + (values - module.weight)),
    "in place": lambda module, values: module.weight.data.sub_(module.weight.data).add_(values),
    "init": lambda module, values: torch.nn.init.constant_(module.weight, 0.1),
}


@pytest.mark.parametrize("way", WRITES)
def test_what_is_written_to_a_frozen_matrix_is_held_in_fp32_and_not_lost(base_of, way):
    _, model = both(base_of("llama"))
    module = model.model.layers[0].mlp.up_proj
    values = torch.full(module.weight.shape, 0.1)  # which 16 bits do not hold
    WRITES[way](module, values)
    assert torch.allclose(module._parameters["weight"], values, atol=1e-7)
    assert torch.equal(module(torch.eye(48)), F.linear(torch.eye(48), module._parameters["weight"]))
    assert "float32" not in narrow_values(model)


def test_a_matrix_that_is_to_learn_after_all_does_and_a_part_of_one_cannot_be_written_to(base_of):
    _, model = both(base_of("llama"))
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    first.weight.requires_grad_(False)
    assert first._parameters["weight"].dtype == torch.bfloat16
    first.weight.requires_grad_(True)
    second.weight.requires_grad = True
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(module._parameters["weight"].grad.dtype == torch.float32 for module in (first, second))
    with pytest.raises(RuntimeError, match="would write to a part of a frozen matrix that is held in 16 bits"):
        model.lm_head.weight.T.mul_(2)


def test_peft_merges_adapters_into_matrices_in_16_bits_without_rounding(base_of):
    merged = []
    for base in both(base_of("llama")):
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        adapted = model(IDS).logits
        merged.append(model.merge_and_unload()(IDS).logits)
        assert torch.allclose(merged[-1], adapted, atol=1e-5)
    assert torch.equal(*merged)


def test_a_model_held_in_16_bits_is_copied_pickled_saved_and_loaded_into_as_any_other(base_of, tmp_path):
    wide, narrow = both(base_of("llama, tied"))
    for model in (copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        assert narrow_values(model) == narrow_values(narrow)
        assert torch.equal(model(IDS).logits, wide(IDS).logits)
    changed = {name: values + 1 for name, values in wide.state_dict().items()}
    narrow.load_state_dict(changed)
    assert torch.equal(narrow.lm_head.weight.detach(), changed["lm_head.weight"].bfloat16().float())
    assert narrow.get_input_embeddings()._parameters["weight"] is narrow.lm_head._parameters["weight"]


def test_a_base_with_tensors_of_two_dtypes_holds_each_matrix_in_its_own(base_of, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_of("llama"), dtype=torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float().weight.data.add_(1e-4)  # no value of 16 bits
    model.save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    held, wide = load_model(str(tmp_path), config, narrow=True), load_model(str(tmp_path), config)
    assert (held.lm_head.weight.dtype, held.model.norm.weight.dtype) == (torch.float32, torch.float32)
    assert narrow_values(held).keys() == {"bfloat16"}
    assert narrow_values(held)["bfloat16"] > 30_000
    assert digests(held) == digests(wide) == digests(model)
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(held(ids).logits, wide(ids).logits)


def recipe_of(folder, base, **changes):
    """A recipe file of few steps, with a phase of its own for a part of a block."""
    (folder / "text.txt").write_text("What is frozen costs two bytes, and is the same in every bit. " * 40)
    values = {"model_name_or_path": str(base), "text": str(folder / "text.txt"), "prompts": ["What is"]}
    values |= {"trainable": ["blocks[-1]", "final_norm"], "block_size": 32, "max_steps": 4, "learning_rate": 1e-3}
    values |= {"schedule": [{"from_step": 2, "trainable": ["blocks[-2].mlp"]}], "save_steps": 2, "eval_steps": 2}
    values |= {"per_device_train_batch_size": 2, **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({key: value for key, value in values.items() if value}))
    return str(folder / "recipe.yaml")


@pytest.mark.slow
def test_a_run_on_a_base_in_16_bits_writes_the_same_files_as_one_that_widens_it(tmp_path):
    base, held, wide = tmp_path / "base", tmp_path / "held", tmp_path / "wide"
    shutil.copytree(builtin_folder("builtin:lilliput"), base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    recipe = recipe_of(tmp_path, base)
    for folder, dtype in ((held, "auto"), (wide, "float32")):
        assert main(["train", recipe, "--frozen_dtype", dtype, "--output_dir", str(folder)]) == 0
    record = yaml.safe_load((held / "recipe.yaml").read_text())["run"]
    assert record["frozen_dtype"]["bfloat16"] > 1_000_000
    assert "frozen_dtype" not in yaml.safe_load((wide / "recipe.yaml").read_text())["run"]
    names = ["model.safetensors", "freeze_plan.json", "evaluation.json", "config.json", "weight_deltas.jsonl"]
    for name in [*names, "checkpoint-2/model.safetensors"]:
        assert sha256(held / name) == sha256(wide / name), name
    assert json.loads((held / "audit.json").read_text())["passed"]
    shutil.rmtree(held / "checkpoint-4")  # the last two steps are taken again, from files in fp32
    (held / "exit.json").unlink()
    (held / "model.safetensors").unlink()
    assert main(["train", recipe, "--output_dir", str(held), "--resume_from_checkpoint", "auto"]) == 0
    assert sha256(held / "model.safetensors") == sha256(wide / "model.safetensors")


@pytest.mark.slow
def test_a_run_that_rounds_its_base_saves_and_scores_it_unrounded(tmp_path, capsys):
    recipe, folder = recipe_of(tmp_path, "builtin:lilliput", frozen_dtype="bf16"), tmp_path / "run"
    assert main(["train", recipe, "--output_dir", str(folder)]) == 0
    trained = ["blocks[-2].mlp", "blocks[-1]", "final_norm"]
    assert main(["verify", "builtin:lilliput", str(folder), "--trainable", *trained]) == 0
    plain = tmp_path / "plain"
    words = ["--frozen_dtype", "auto", "--schedule", "[]", "--max_steps", "1"]
    assert main(["train", recipe, "--output_dir", str(plain), *words]) == 0
    with_rounding, without = (json.loads((one / "evaluation.json").read_text()) for one in (folder, plain))
    for text in ("validation", "training"):
        assert with_rounding[text]["before"] == without[text]["before"]
    full = recipe_of(tmp_path, "builtin:lilliput", frozen_dtype="bf16", method="full", trainable=None, schedule=None)
    assert main(["train", full, "--output_dir", str(tmp_path / "full")]) == 2
    assert "frozen_dtype: bf16 is impossible here: nothing is frozen" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_of_new_tokens_train_beside_matrices_in_16_bits(base_of, family):
    wide, narrow = both(base_of(family))
    for model in (wide, narrow):
        new = NewTokens((NewToken("<a>", 97, "the mean of all rows", ()),), 97)
        give_rows(model, new)
        apply_plan(model, plan_freeze(model, ["embeddings.tokens[97]", "final_norm"]))
    (loss, gradients), (same_loss, same) = map(loss_and_gradients, (wide, narrow))
    assert loss == same_loss
    assert any(name.endswith("weight_rows") for name in gradients)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())
    assert narrow_values(narrow)["bfloat16"] > 10_000


def test_attach_trains_a_model_that_was_loaded_in_16_bits_as_if_it_were_in_fp32(base_of, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in some_windows(vocabulary=97)["input_ids"]]
    trained = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base_of("llama"), dtype=dtype)
        arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=data)
        plan = plan_freeze(model, ["blocks[-1]"], frozen_dtype=None if dtype == torch.float32 else "auto")
        tuning = pt.attach(trainer, plan)
        trainer.train()
        assert tuning.audit.passed
        trained.append({name: values.detach().float() for name, values in named_weights(model)})
    assert all(torch.equal(values, trained[1][name]) for name, values in trained[0].items())


def rounded_and_plan(model, selectors):
    plan = plan_freeze(model, selectors, frozen_dtype="bf16")
    apply_plan(model, plan)
    return model, plan


def test_a_rounded_base_trains_on_rounded_values_and_is_scored_digested_and_saved_unrounded():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS["llama, tied"], dtype=torch.float32)
    by_hand = copy.deepcopy(base)
    model, plan = rounded_and_plan(copy.deepcopy(base), ["blocks[0]", "final_norm"])
    apply_plan(by_hand, plan_freeze(by_hand, ["blocks[0]", "final_norm"]))
    frozen = set(plan.frozen)
    for name, parameter in by_hand.named_parameters():
        if name in frozen and parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16().float()
    (loss, gradients), (same_loss, same) = map(loss_and_gradients, (by_hand, model))
    assert loss == same_loss
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())
    with unrounded(), torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not torch.equal(model(IDS).logits, base(IDS).logits)
    assert digests(model) == digests(base)
    saved = model.state_dict()
    assert all(torch.equal(saved[name], values) for name, values in base.state_dict().items())
    held = model.model.layers[1].mlp.up_proj._parameters["weight"]
    assert held.dtype == torch.bfloat16
    held.data.view(torch.int16)[3, 3] += 1
    changed = [name for name, sha256 in digests(model).items() if digests(base)[name] != sha256]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    held.data.view(torch.int16)[3, 3] -= 1
    apply_plan(model, plan_freeze(model, ["all"]))
    assert all(torch.equal(values, dict(named_weights(base))[name]) for name, values in named_weights(model))


def test_kept_states_of_rounded_and_unrounded_passes_are_told_apart(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in some_windows(vocabulary=97)["input_ids"]]
    found = {}
    for prefix in ("off", "memory"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=9, eval_strategy="steps", eval_steps=3, report_to="none", save_strategy="no"
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])
        tuning = pt.attach(trainer, plan_freeze(model, ["blocks[-1]"], frozen_dtype="bf16"), prefix_cache=prefix)
        trainer.train()
        assert tuning.audit.passed
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        found[prefix] = losses, digests(model)
    assert found["off"] == found["memory"]


def test_a_plan_says_which_dtypes_it_knows():
    with pytest.raises(RecipeError, match="frozen_dtype is 'int3'; allowed are auto, bf16, and None"):
        plan_freeze(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]), ["head"], frozen_dtype="int3")


def test_holding_a_model_in_fp32_changes_nothing():
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"], dtype=torch.float32)
    classes = [type(module) for module in model.modules()]
    hold_narrow(model)
    assert [type(module) for module in model.modules()] == classes
    assert not narrow_values(model)


def test_what_stands_beside_matrices_of_which_rows_train_is_not_rounded():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"], dtype=torch.float32)
    plan = plan_freeze(model, ["experts[0]", "!/.*down_proj/"], frozen_dtype="bf16")
    apply_plan(model, plan)
    weights = dict(named_weights(model))
    (beside, *_) = [name for name in plan.frozen if name.endswith("experts.down_proj")]
    assert weights[beside].dtype == torch.float32
    attention = next(name for name in plan.frozen if name.endswith("q_proj.weight"))
    assert weights[attention].dtype == torch.bfloat16
    assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)
