"""GELU in one operation is the same function as the chain that it stands in for."""

import pytest
import torch
from transformers.activations import ACT2FN

from conftest import tiny_gpt2
from partialtune.fast.fast_modules import CHAINS, fused_gelu


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
