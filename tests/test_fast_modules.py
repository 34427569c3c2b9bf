"""GELU in one operation is the same function as the chain; frozen weights are cast to bf16 once, as autocast does."""

import pytest
import torch
from transformers.activations import ACT2FN

from conftest import tiny_gpt2
from partialtune.engine.fast_modules import CHAINS, CastOnce, fused_gelu
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.model.digests import digests
from test_no_logits import IDS, build, labels

# ---- GELU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_value_and_gradient_are_those_of_the_chain(name):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    model = torch.nn.Sequential(ACT2FN[name])
    assert type(model[0]) in CHAINS
    own = model(x)
    (own_gradient,) = torch.autograd.grad(own.sum(), x)
    with fused_gelu(model) as replaced:
        assert replaced == 1
        ours = model(x)
        (gradient,) = torch.autograd.grad(ours.sum(), x)
    # gelu_fast and gelu_accurate write sqrt(2 / pi) with 10 digits
    assert torch.allclose(ours, own, rtol=0, atol=1e-9)
    assert torch.allclose(gradient, own_gradient, rtol=0, atol=1e-8)
    assert type(model[0]) in CHAINS


def test_logits_agree_and_the_model_is_as_before_afterwards():
    model = tiny_gpt2().eval()
    ids = torch.arange(32).view(2, 16)
    own, config = model(input_ids=ids).logits, model.config.to_dict()
    chain = model.transformer.h[0].mlp.act
    with fused_gelu(model) as replaced:
        assert replaced == 3
        assert torch.allclose(model(input_ids=ids).logits, own, atol=1e-6)
        assert model.config.to_dict() == config
    assert model.transformer.h[0].mlp.act is chain
    assert torch.equal(model(input_ids=ids).logits, own)


# ---- frozen weights under autocast ----------------------------------------------------------------------------------


def under_autocast(model):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(input_ids=IDS, labels=labels())
    outputs.loss.backward()
    return outputs.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def planned(model, *selectors):
    apply_plan(model, plan_freeze(model, list(selectors)))
    return model.eval()


def test_logits_and_gradients_are_bit_for_bit_those_of_autocast():
    for name in ("gpt2", "llama", "phi"):
        model = planned(build(name), "blocks[0].norms", "biases") if name != "llama" else planned(build(name), "norms")
        own, own_gradients = under_autocast(model)
        casts = CastOnce(model)
        casts.begin()
        ours, gradients = under_autocast(model)
        assert torch.equal(ours, own), name
        assert all(torch.equal(gradients[n], g) for n, g in own_gradients.items()), name


def test_copies_are_of_frozen_matrices_alone_and_made_once():
    model = planned(tiny_gpt2(), "blocks[-1]")
    casts = CastOnce(model)
    casts.begin()
    assert casts.bytes == 0
    under_autocast(model)
    blocks = model.transformer.h[:2].named_parameters()
    matrices = sum(parameter.numel() for _, parameter in blocks if parameter.ndim == 2)
    assert casts.bytes == 2 * (matrices + model.lm_head.weight.numel())
    copies = dict(casts._copies)
    under_autocast(model)
    assert all(casts._copies[module] is copy for module, copy in copies.items())


def test_a_frozen_matrix_that_is_held_in_bf16_is_used_as_it_is():
    model = planned(tiny_gpt2(), "blocks[-1]")
    casts = CastOnce(model)
    casts.begin()
    own, own_gradients = under_autocast(model)
    for module in casts._copies.copy():
        if module is not model.lm_head:  # tied: the embedding stays in fp32
            module.weight.data = module.weight.data.bfloat16()
    casts.begin()
    ours, gradients = under_autocast(model)
    assert torch.equal(ours, own)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in own_gradients.items())
    assert casts.bytes == 2 * model.lm_head.weight.numel()


def test_without_autocast_the_fp32_weights_are_used_and_nothing_stays_behind():
    model = planned(tiny_gpt2(), "blocks[-1]")
    before, own = digests(model), model(input_ids=IDS).logits
    casts = CastOnce(model)
    casts.begin()
    assert torch.equal(model(input_ids=IDS).logits, own)
    under_autocast(model)
    assert digests(model) == before
    casts.end()
    assert not any("forward" in vars(module) for module in model.modules())
    assert casts.bytes == 0


def test_what_begins_to_train_is_cast_anew_in_every_pass():
    model = planned(tiny_gpt2(), "blocks[-1]")
    casts = CastOnce(model)
    casts.begin()
    model.requires_grad_(True)
    casts.begin()
    _, gradients = under_autocast(model)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert casts.bytes == 0
