"""Deltas and audit measure the same weights however they are trained: accumulated, in bf16, compiled."""

import json

import pytest
import torch
from torch._dynamo.eval_frame import OptimizedModule

from conftest import tiny_gpt2
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import plan_freeze
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.deltas import WeightDeltaCallback
from test_deltas import make_trainer, read_lines

SELECTORS = ["blocks[-1].mlp", "final_norm"]


class Forwards:
    """Counts the forward passes of a module, and notes the dtype that its linear layer gives out."""

    def __init__(self, model):
        self.count, self.dtypes = 0, set()
        model.transformer.h[0].mlp.c_fc.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.count += 1
        self.dtypes.add(output.dtype)


def check_mode(folder, look_at=lambda model: None, **settings):
    """Train two steps, and compare what the callbacks wrote with the weights themselves."""
    model = tiny_gpt2()
    plan = plan_freeze(model, SELECTORS)
    apply_plan(model, plan)
    seen = look_at(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callbacks = [WeightDeltaCallback(plan, delta_steps=1), FreezeAuditCallback(plan)]
    trainer = make_trainer(folder, model, callbacks, max_steps=2, **settings)
    trainer.train()
    lines = {line["name"]: line for line in read_lines(folder) if line["step"] == 2}
    assert lines.keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        change = float((parameter.detach().double() - before[name].double()).norm())
        assert lines[name]["l2_delta"] == pytest.approx(change, rel=1e-12)
        assert (lines[name]["l2_delta"] > 0) == (name in plan.trainable), name
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["passed"] is True
    assert audit["trainable"]["unmoved"] == []
    return trainer, seen


def test_under_gradient_accumulation(tmp_path):
    trainer, forwards = check_mode(tmp_path, Forwards, gradient_accumulation_steps=3)
    assert (trainer.state.global_step, forwards.count) == (2, 6)
    assert {line["step"] for line in read_lines(tmp_path)} == {1, 2}


def test_under_mixed_precision(tmp_path):
    _, forwards = check_mode(tmp_path, Forwards, bf16=True)
    assert forwards.dtypes == {torch.bfloat16}


@pytest.mark.slow
def test_under_torch_compile(tmp_path):
    torch._dynamo.reset()
    trainer, _ = check_mode(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert isinstance(trainer.model_wrapped, OptimizedModule)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.parametrize("method", ["partial", "lora"])
def test_noise_reaches_embeddings_that_are_frozen_and_no_evaluation(tmp_path, method):
    """NEFTune's hook goes by the mode of the embeddings, which frozen ones keep at eval."""

    def losses(alpha):
        model = tiny_gpt2(embd_pdrop=0, resid_pdrop=0, attn_pdrop=0)
        plan = plan_lora(model, ["blocks[-1]"]) if method == "lora" else plan_freeze(model, ["blocks[-1]"])
        apply_plan(model, plan)
        trainer = make_trainer(
            tmp_path / str(alpha), model, [], max_steps=1, logging_steps=1, neftune_noise_alpha=alpha
        )
        trainer.train()
        model.train()
        assert not model.transformer.wte.training, "the noise ends with the training"
        model.eval()
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        return logged, trainer.evaluate(trainer.train_dataset)["eval_loss"]

    plain, noisy = losses(None), losses(50.0)
    assert abs(noisy[0] - plain[0]) > 1e-3
    assert losses(50.0) == noisy
    assert noisy[1] == pytest.approx(plain[1], abs=0.05)


def test_noise_makes_no_other_part_of_a_frozen_prefix_random(tmp_path):
    model, modes = tiny_gpt2(), {}
    apply_plan(model, plan_freeze(model, ["head"], head="untied"))
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, *_, name=name: modes.update({name: module.training}))
    make_trainer(tmp_path, model, [], max_steps=1, neftune_noise_alpha=5.0).train()
    assert [name for name, training in modes.items() if training] == ["transformer.wte", "lm_head", ""]
