"""Scores by the fast paths: those of the model's own way, or that way itself, which the log says."""

import logging

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from conftest import some_windows, tiny_gpt2
from partialtune import apply_plan, plan_freeze
from partialtune.freeze.plan import FreezePlan
from partialtune.scoring import fast_scoring
from partialtune.scoring.evaluation import ScoredText, TextScores, score_windows
from partialtune.scoring.fast_scoring import FastScoring
from test_no_logits import build

ALL = ("loss", "gelu", "casts")
TEXT = ScoredText(some_windows(7), text_tokens=7 * 16, text_bytes=300)


def scores(model: torch.nn.Module, fast: FastScoring | None = None, **settings) -> TextScores:
    return score_windows(model, TEXT, 3, None, watched=7, fast=fast, **settings)


def planned(model: torch.nn.Module, *selectors: str) -> FreezePlan:
    plan = plan_freeze(model, list(selectors))
    apply_plan(model, plan)
    return plan


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "gemma2", "cohere"])
@pytest.mark.parametrize("rows_at_once", [2, 64])
def test_fast_scores_are_those_of_the_models_own_way(name, rows_at_once, monkeypatch, caplog):
    monkeypatch.setattr(fast_scoring, "LOGITS_AT_ONCE", rows_at_once * 128)
    caplog.set_level(logging.INFO)
    model = build(name)
    own, fast = scores(model), scores(model, FastScoring(model, ALL))
    assert fast.nats == pytest.approx(own.nats, abs=2e-6)
    assert fast.sums == pytest.approx(own.sums, abs=1e-5)
    for key, value in own.figures.items():
        assert fast.figures[key] == pytest.approx(value, abs=1e-6, rel=1e-6)
    # these two do something to their logits: all of them are made
    assert ("Scores are taken from all logits" in caplog.text) == (name in ("gemma2", "cohere"))


def test_no_more_than_a_few_rows_of_logits_exist_and_the_model_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(fast_scoring, "LOGITS_AT_ONCE", 8 * 128)
    rows, model = [], tiny_gpt2().train()
    plain = type(model.lm_head).forward
    monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: rows.append(len(x)) or plain(self, x))
    activations = [type(block.mlp.act) for block in model.transformer.h]
    fast = FastScoring(model, ALL)
    scores(model, fast)
    rows.clear()
    again = scores(model, fast)
    assert max(rows) == 8  # of 45 that a batch scores; the first window was compared before, and is not again
    assert again.figures["tokens"] == 7 * 15
    assert [type(block.mlp.act) for block in model.transformer.h] == activations
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.training
    assert model.transformer.h[0].training


@pytest.mark.parametrize("selectors", [("embeddings.tokens[-4:]",), ("blocks[-1]", "head"), ("embeddings", "head")])
def test_rows_that_train_and_heads_that_train_score_as_they_are(selectors):
    model = tiny_gpt2()
    planned(model, *selectors)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    own, fast = scores(model), scores(model, FastScoring(model, ALL))
    assert fast.nats == pytest.approx(own.nats, abs=2e-6)


def test_adapters_score_as_they_are():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert scores(model, FastScoring(model, ALL)).nats == pytest.approx(scores(model).nats, abs=2e-6)


@pytest.mark.parametrize("enabled", [(), ("gelu", "casts")])
def test_without_loss_among_the_fast_paths_the_models_own_way_is_taken_to_the_bit(enabled):
    model = tiny_gpt2()
    own, plain = scores(model), scores(model, FastScoring(model, enabled))
    assert np.array_equal(own.nats, plain.nats)
    assert own.figures == plain.figures


def test_who_looks_at_the_logits_by_a_hook_sees_them_all():
    model, seen = tiny_gpt2(), []
    fast = FastScoring(model, ALL)
    expected = scores(model, fast)
    model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    found = scores(model, fast)
    assert [tuple(shape) for shape in seen] == [(3, 16, 128), (3, 16, 128), (1, 16, 128)]
    assert found.nats == pytest.approx(expected.nats, abs=2e-6)


def test_a_model_whose_fast_scores_differ_is_scored_in_its_own_way(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_gpt2()
    own = scores(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(30)  # far out, where a wrong GELU is seen
    own = scores(model)
    monkeypatch.setattr("partialtune.engine.fast_modules.nn.GELU", lambda approximate: torch.nn.ReLU())
    found = scores(model, FastScoring(model, ALL))
    assert np.array_equal(found.nats, own.nats)
    assert "on the first window its own loss is" in caplog.text


def test_under_autocast_fast_scores_are_close_to_those_of_all_logits():
    model = tiny_gpt2()
    fast = FastScoring(model, ALL)
    low = {"autocast_dtype": torch.bfloat16}
    assert scores(model, fast, **low).figures["loss"] == pytest.approx(scores(model, **low).figures["loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_windows_that_were_scored_start_from_the_states_behind_the_frozen_blocks_to_the_bit(name):
    model = build(name)
    plan = planned(model, "blocks[-1]", "final_norm")
    fast = FastScoring(model, ALL, blocks=plan.phases[0].first_block)
    before = scores(model, fast)
    assert before.nats == pytest.approx(scores(model).nats, abs=2e-6)
    blocks = model.get_submodule("transformer.h" if name == "gpt2" else "model.layers")
    computed = []
    parts = [next(block.children()) for block in blocks[:-1]]
    # a hook or another forward on a block would have its states computed: all modules have this one
    hook = register_module_forward_pre_hook(lambda module, _: computed.append(1) if module in parts else None)
    assert np.array_equal(scores(model, fast).nats, before.nats)
    assert computed == []
    with torch.no_grad():
        for parameter in blocks[-1].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = scores(model, fast)
    assert computed == []
    assert after.nats == pytest.approx(scores(model).nats, abs=2e-6)
    assert np.abs(after.nats - before.nats).max() > 0.01
    fast.forget()
    computed.clear()
    assert np.array_equal(scores(model, fast).nats, after.nats)
    assert computed != []
    hook.remove()
    assert fast.kept.size == 7 * 16 * 32 * 4


def test_a_frozen_weight_that_changed_between_scores_is_noticed():
    model = tiny_gpt2()
    planned(model, "blocks[-1]")
    fast = FastScoring(model, ALL, blocks=2)
    scores(model, fast)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    assert scores(model, fast).nats == pytest.approx(scores(model).nats, abs=2e-6)
