"""`frozen_quantization`: training beside packed matrices is training beside the values that these are widened to."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator
from transformers.pytorch_utils import Conv1D

import partialtune as pt
from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.engine.prefix_weights import prefix_digest
from partialtune.errors import HOW_TO_INSTALL_BITSANDBYTES, ModelError, RecipeError
from partialtune.model.digests import bit_sum, digest, digests
from partialtune.model.packed_weights import PackedWeight, pack, packed_in, packed_size
from partialtune.model.structure import read_structure
from partialtune.recipe.recipe import recipe_from_values
from partialtune.scoring.evaluation import score_text, scored_text
from tiny_models import tiny_config
from two_processes import on_two_processes

pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")

KINDS = ("int8", "nf4")
AROUND = ["blocks[0]", "blocks[-1]", "final_norm"]  # block 1, between them, is packed


def model_of(name):
    torch.manual_seed(0)
    if name == "gpt2":
        return tiny_gpt2(vocab_size=99, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return AutoModelForCausalLM.from_config(tiny_config(name))


def widened(model, plan):
    """A copy of a plain model whose frozen matrices have the values that packing leaves of them."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in plan.quantized:
            weight = twin.get_parameter(name)
            weight.copy_(pack(weight, plan.frozen_quantization, "").values())
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in plan.trainable)
    return twin


def windows(count=8, length=16, seed=0):
    ids = torch.randint(3, 99, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


# ---- a packed matrix ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size", "lost"), [("int8", 1.0 + 4 / 48, 0.007), ("nf4", 0.5 + 4 / 64, 0.1)])
@pytest.mark.parametrize("shape", [(96, 48), (8, 48), (256, 16)])  # rows of less than a block of numbers too
def test_a_matrix_keeps_its_values_as_far_as_its_bits_allow(kind, size, lost, shape):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    packed = pack(values, kind, digest(values))
    assert (packed.shape, packed.dtype, packed.requires_grad) == (values.shape, torch.float32, False)
    if shape[1] == 48:
        assert packed.stored == packed_size(shape, kind) == pytest.approx(size * values.numel())
    assert float((packed.values() - values).norm() / values.norm()) < lost
    block_or_row = values.abs().view(-1, 64) if kind == "nf4" else values.abs()
    assert torch.equal(packed.scales, block_or_row.amax(1))
    assert torch.equal(packed.values(torch.bfloat16), packed.values().bfloat16())
    # in any operation it is its values
    assert torch.equal(packed + 1, packed.values() + 1)
    assert torch.equal(
        torch.bmm(packed[None], packed.T[None]), torch.bmm(packed.values()[None], packed.values().T[None])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_its_digest_is_the_bases_while_every_bit_is_kept_and_another_one_after_a_flip_of_any(kind):
    values = torch.randn(16, 64)
    packed = pack(values, kind, digest(values))
    assert digest(packed) == digest(values)
    sums, sha256 = {bit_sum(packed)}, {digest(packed), digest(packed.values())}
    for part in (packed.codes, packed.scales):
        bits = part.view(-1).view(torch.uint8)
        bits[5] ^= 1
        sums.add(bit_sum(packed))
        assert digest(packed) not in sha256 - {digest(packed.values())}, "the base's digest for other bytes"
        bits[5] ^= 1
    assert digest(packed) == digest(values)
    assert len(sums) == 3


def test_nothing_writes_to_it_and_copies_and_moves_stay_packed():
    layer = nn.Linear(64, 8)
    layer.weight = nn.Parameter(pack(layer.weight, "nf4", "base"), requires_grad=False)
    for write in (lambda: layer.weight.data.zero_(), lambda: layer.weight.data.copy_(torch.ones(8, 64))):
        with pytest.raises(RuntimeError, match="held in nf4 and frozen"):
            write()
    twin = copy.deepcopy(layer).to("cpu").to(torch.float32)
    assert isinstance(twin.weight, PackedWeight)
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    assert twin.weight.sha256() == layer.weight.sha256() == layer.weight.packed_sha256


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])  # of GPT-2 the rows are inputs; Qwen 2 has biases
def test_gradients_below_and_above_packed_blocks_are_those_of_the_widened_values(name, kind, bf16):
    plain = model_of(name)
    biases = ["biases"] if name != "llama" else []
    plan = pt.plan_freeze(plain, [*AROUND, *biases], frozen_quantization=kind)
    inside = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear | Conv1D) and f".{1}." in n]
    assert set(plan.quantized) == {f"{path}.weight" for path in inside}
    other = widened(plain, plan)
    pt.apply_plan(plain, plan)
    assert len(packed_in(plain)) == len(plan.quantized)
    ids = torch.tensor(windows()["input_ids"])
    results = []
    for model in (plain.eval(), other.eval()):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, found), (other_loss, expected) = results
    assert found.keys() == expected.keys() == set(plan.trainable)
    close = {"rtol": 2e-2, "atol": 2e-3} if bf16 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss, other_loss, rtol=1e-3 if bf16 else 1e-6, atol=0)
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], **close, msg=parameter)


def test_beside_matrices_in_16_bits_nothing_else_changes_and_the_digests_are_the_bases(tmp_path):
    base = model_of("llama").bfloat16()
    wide = copy.deepcopy(base).float()
    plan = pt.plan_freeze(base, AROUND, frozen_quantization="nf4", frozen_dtype="auto")
    other = widened(wide, plan)
    pt.apply_plan(base, plan)
    held = {name: p.dtype for name, p in base.named_parameters() if p.dtype == torch.bfloat16}
    assert set(held) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert digests(base) == digests(wide)
    ids = torch.tensor(windows()["input_ids"])
    for model in (base, other):
        model(input_ids=ids, labels=ids).loss.backward()
    for name in plan.trainable:
        expected = other.get_parameter(name).grad
        torch.testing.assert_close(base.get_parameter(name).grad, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_packed_matrices_learn_as_on_the_widened_values(kind):
    pytest.importorskip("peft")
    model, other = model_of("llama"), model_of("llama")
    plan = pt.plan_freeze(model, ["final_norm"], lora={"target": ["attention"]}, frozen_quantization=kind)
    assert "model.layers.0.self_attn.q_proj.weight" in plan.quantized
    with torch.no_grad():
        for name in plan.quantized:
            other.get_parameter(name).copy_(pack(other.get_parameter(name), kind, "").values())
    pt.apply_plan(other, pt.plan_freeze(other, ["final_norm"], lora={"target": ["attention"]}))
    pt.apply_plan(model, plan)
    assert len(packed_in(model)) == len(plan.quantized) == 21
    ids = torch.tensor(windows()["input_ids"])
    gradients = []
    for one in (model, other):
        one(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == len(plan.trainable) == 25
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_no_wide_matrix_is_kept_from_forward_to_backward():
    model = model_of("llama")
    pt.apply_plan(model, pt.plan_freeze(model, AROUND, frozen_quantization="nf4"))
    shapes = []
    packed = {tuple(weight.shape) for weight in packed_in(model).values()}

    def keep(tensor):
        shapes.append((tuple(tensor.shape), tensor.requires_grad or isinstance(tensor, nn.Parameter)))
        return tensor

    ids = torch.tensor(windows()["input_ids"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    learning = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    assert {shape for shape, is_learning in shapes if not is_learning} & packed <= learning | {(32, 32)}


# ---- through each door ----------------------------------------------------------------------------------------------


def trainer_of(folder, model, **changes):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    return Trainer(model=model, args=args, train_dataset=windows(), data_collator=default_data_collator)


def values_of(model, names):
    return {name: model.get_parameter(name).detach().clone() for name in names}


def attached_run(folder, kind, name="llama", resume=None, **changes):
    model = model_of(name)
    model.save_pretrained(folder / "base")
    model.config.name_or_path = str(folder / "base")
    # The gradient of a key's bias is zero, and AdamW makes whole steps of its rounding.
    noise = ["!/.*c_attn.bias/"] if name == "gpt2" else []
    plan = pt.plan_freeze(model, [*AROUND, *noise], frozen_quantization=kind)
    trainer = trainer_of(folder / "run", model, **changes)
    tuning = pt.attach(trainer, plan, prefix_cache="off")
    trainer.train(resume_from_checkpoint=resume)
    return SimpleNamespace(model=model, plan=plan, trainer=trainer, tuning=tuning)


@pytest.mark.parametrize(("name", "kind"), [("llama", "nf4"), ("gpt2", "int8")])
def test_a_trainer_ends_as_on_the_widened_values_goes_on_with_the_same_bits_and_saves_a_delta_of_the_base(
    tmp_path, name, kind
):
    base = model_of(name)
    run = attached_run(tmp_path, kind, name, save_strategy="steps", save_steps=2)
    other = trainer_of(tmp_path / "plain", widened(base, run.plan))
    other.train()
    found = values_of(run.model, run.plan.trainable)
    for parameter, values in values_of(other.model, run.plan.trainable).items():
        torch.testing.assert_close(found[parameter], values, rtol=0, atol=1e-6, msg=parameter)
    assert run.tuning.audit.passed
    assert all(run.tuning.deltas[frozen].l2_delta == 0.0 for frozen in run.plan.frozen)

    again = attached_run(tmp_path, kind, name, resume=str(tmp_path / "run" / "checkpoint-2"))
    for parameter, values in values_of(again.model, run.plan.trainable).items():
        assert torch.equal(values, found[parameter]), parameter

    run.trainer.save_model(str(tmp_path / "saved"))
    rebuilt = pt.load(tmp_path / "saved")
    for parameter, values in base.named_parameters():
        assert torch.equal(rebuilt.get_parameter(parameter), found.get(parameter, values)), parameter
    assert digests(run.model) == digests(rebuilt)
    with pytest.raises(ModelError, match=r"partialtune\.load"):
        run.model.save_pretrained(tmp_path / "whole")


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_one_bit_of_a_packed_matrix_is_a_violation(tmp_path, part):
    model = model_of("llama")
    plan = pt.plan_freeze(model, AROUND, frozen_quantization="int8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor(windows()["input_ids"])
    other = widened(model, plan)
    by_hand = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    tuning = pt.audited(model, plan, optimizer, output_dir=tmp_path, fast_paths=()).__enter__()
    for one, step in ((model, optimizer), (other, by_hand)):
        one(input_ids=ids, labels=ids).loss.backward()
        step.step()
    for parameter, values in values_of(other, plan.trainable).items():
        torch.testing.assert_close(model.get_parameter(parameter), values, rtol=0, atol=1e-6)
    getattr(model.get_parameter(plan.quantized[0]), part).view(-1).view(torch.uint8)[3] ^= 1
    with pytest.raises(pt.FreezeViolation, match=plan.quantized[0]):
        tuning.__exit__(None, None, None)
    assert tuning.audit.changed == [plan.quantized[0]]


def as_one_of_two(folder, kind):
    run = attached_run(folder / f"{dist.get_rank()}" if dist.is_initialized() else folder, kind)
    values = {name: v.tolist() for name, v in values_of(run.model, run.plan.trainable).items()}
    everybody = [None, None]
    dist.all_gather_object(everybody, values)
    return {
        "wrapped": type(run.trainer.model_wrapped).__name__,
        "alike": everybody[0] == everybody[1],
        "passed": run.tuning.audit.passed,
        "packed": len(packed_in(run.model)),
        "values": values,
    }


@pytest.mark.slow
def test_two_processes_end_alike_and_as_one_with_their_batches(tmp_path):
    found = on_two_processes(as_one_of_two, tmp_path, "nf4")
    one = attached_run(tmp_path / "one", "nf4", per_device_train_batch_size=8)
    assert [(f["wrapped"], f["alike"], f["passed"], f["packed"]) for f in found] == [
        ("DistributedDataParallel", True, True, 7)
    ] * 2
    for name, values in values_of(one.model, one.plan.trainable).items():
        torch.testing.assert_close(torch.tensor(found[0]["values"][name]), values, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_recipe_says_what_base_quantised_base_and_result_score_and_verifies_against_the_base(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 60)
    (tmp_path / "other.txt").write_text(other := "It was the season of Light, it was the season of Darkness. " * 30)
    recipe = {
        "model_name_or_path": "builtin:lilliput",
        "text": str(text),
        "block_size": 32,
        "prompts": ["It was"],
        "trainable": ["blocks[-1]", "final_norm"],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "validation_share": 0,
        "eval_texts": {"other": str(tmp_path / "other.txt")},
    }
    runs = {}
    for name, more in {"plain": {"max_steps": 1}, "packed": {"frozen_quantization": "nf4"}}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**recipe, **more, "output_dir": str(tmp_path / name)}))
        assert main(["train", str(file)]) == 0
        runs[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "packed.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen_quantization"] == "nf4"
    assert runs["packed"]["other"]["before"] == runs["plain"]["other"]["before"]
    assert runs["packed"]["prompts"][0]["before"] == runs["plain"]["prompts"][0]["before"]
    assert "quantized_base" not in runs["plain"]["other"]

    run = pt.open_run(tmp_path / "packed")
    scored = run.scores["other"]
    result, tokenizer = run.load()
    text_scored = scored_text([other], [np.array(tokenizer(other)["input_ids"])], 32)
    assert score_text(result, text_scored, 8, None)["loss"] == pytest.approx(scored["after"]["loss"], abs=1e-6)
    base = AutoModelForCausalLM.from_pretrained(builtin_folder("builtin:lilliput"))
    plan = pt.plan_freeze(base, recipe["trainable"], frozen_quantization="nf4")
    quantised = score_text(widened(base, plan), text_scored, 8, None)["loss"]
    assert scored["quantized_base"]["loss"] == pytest.approx(quantised, abs=1e-6)
    assert scored["quantized_base"]["loss"] != scored["before"]["loss"]

    planned = {entry["name"]: entry for entry in run.plan["parameters"]}
    own = digests(base)
    for name in plan.frozen:
        assert planned[name]["sha256_before"] == planned[name]["sha256_after"] == own[name]
        assert ("sha256_packed" in planned[name]) == (name in plan.quantized)
    assert main(["verify", "builtin:lilliput", str(tmp_path / "packed"), "--trainable", *recipe["trainable"]]) == 0
    for page in ("report.html", "README.md"):
        assert "12 frozen weights of the blocks" in (tmp_path / "packed" / page).read_text()


# ---- what it does not do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"frozen_quantization": "int4"}, "got 'int4'; allowed: int8, nf4"),
        ({"method": "full", "trainable": None}, "nothing is frozen"),
        ({"checkpoint_format": "full"}, "a delta is saved.*partialtune apply"),
        ({"fsdp": "full_shard"}, "cannot be sharded"),
        ({"torch_compile": True}, "does not know matrices in nf4"),
        ({"trust_remote_code": True}, "saves a delta"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_is_refused_in_words(tmp_path, values, words):
    recipe = {"model_name_or_path": "builtin:lilliput", "text": "builtin:python-docs", "trainable": ["blocks[-1]"]}
    recipe |= {"frozen_quantization": "nf4", "output_dir": str(tmp_path), **values}
    with pytest.raises(RecipeError, match=words):
        recipe_from_values({key: value for key, value in recipe.items() if value is not None})


def test_without_the_library_the_key_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    for place in ("recipe.checks", "freeze.quantization", "model.packed_weights"):
        monkeypatch.setattr(f"partialtune.{place}.is_bitsandbytes_installed", lambda: False)
    recipe = {"model_name_or_path": "builtin:lilliput", "text": "builtin:python-docs", "trainable": ["blocks[-1]"]}
    with pytest.raises(RecipeError, match=r"pip install 'partialtune\[quantized\]'"):
        recipe_from_values({**recipe, "frozen_quantization": "nf4", "output_dir": str(tmp_path)})
    with pytest.raises(RecipeError) as refused:
        pt.plan_freeze(model_of("llama"), AROUND, frozen_quantization="nf4")
    assert str(refused.value) == HOW_TO_INSTALL_BITSANDBYTES


def test_a_plan_quantises_what_no_phase_trains_and_refuses_other_kinds_and_plans_that_leave_nothing():
    model = model_of("llama")
    plan = pt.plan_freeze(
        model, ["final_norm"], schedule=[{"from_step": 2, "trainable": ["blocks[-1]"]}], frozen_quantization="int8"
    )
    assert {parameter.block for parameter in plan.parameters if parameter.quantized} == {0, 1}
    assert "int8: 14 frozen matrices" in str(plan._repr_html_())
    with pytest.raises(RecipeError, match=r"'fp4'; allowed are int8, nf4"):
        pt.plan_freeze(model, AROUND, frozen_quantization="fp4")
    with pytest.raises(RecipeError, match="nothing is left to quantise"):
        pt.plan_freeze(model, ["all"], frozen_quantization="nf4")


def test_the_same_plan_may_be_applied_again_and_another_one_needs_the_model_anew():
    model = model_of("llama")
    plan = pt.plan_freeze(model, AROUND, frozen_quantization="nf4")
    before = read_structure(model)
    pt.apply_plan(model, plan)
    held = packed_in(model)
    pt.apply_plan(model, plan)
    assert {name: id(weight) for name, weight in packed_in(model).items()} == {n: id(w) for n, w in held.items()}
    assert read_structure(model) == before
    for other in (pt.plan_freeze(model, AROUND), pt.plan_freeze(model, ["blocks[1]"], frozen_quantization="nf4")):
        with pytest.raises(RecipeError, match="Load the model anew"):
            pt.apply_plan(model, other)


def test_states_kept_behind_packed_blocks_are_not_those_of_the_base():
    model, packed = model_of("llama"), model_of("llama")
    pt.apply_plan(packed, pt.plan_freeze(packed, ["blocks[-1]"], frozen_quantization="nf4"))
    sha256 = digests(model)
    assert digests(packed) == sha256
    assert prefix_digest(packed, 2, sha256) != prefix_digest(model, 2, sha256)
