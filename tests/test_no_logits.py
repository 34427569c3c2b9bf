"""A model's own forward pass with the loss without logits: the same loss and gradients, or its own loss."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from conftest import tiny_gpt2
from partialtune import apply_plan, plan_freeze
from partialtune.engine.no_logits import LossWithoutLogits

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
IDS = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))


def labels():
    targets = IDS.clone()
    targets[:, 0] = -100
    return targets


def build(name):
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    few_heads = {**SMALL, "num_key_value_heads": 2}
    models = {
        "gpt2": lambda: tiny_gpt2().eval(),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**few_heads, **ids)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL, **ids)),  # its head has a bias
        "mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(**few_heads, num_local_experts=2, output_router_logits=True, **ids)
        ),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**few_heads, head_dim=16, **ids)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**few_heads, **ids)),
    }
    return models[name]().eval()


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=labels(), **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "mixtral"])
@pytest.mark.parametrize("count", [None, torch.tensor(100)])
def test_loss_and_gradients_are_the_models_own(name, count):
    model = build(name)
    inputs = {} if count is None else {"num_items_in_batch": count}
    own, own_gradients = loss_and_gradients(model, **inputs)
    loss = LossWithoutLogits(model)
    assert loss.refusal(IDS) == ""
    with loss.active():
        ours, gradients = loss_and_gradients(model, **inputs)
    assert float(ours) == pytest.approx(float(own), rel=1e-6)
    assert gradients.keys() == own_gradients.keys()
    for parameter, gradient in own_gradients.items():
        assert torch.allclose(gradients[parameter], gradient, rtol=1e-4, atol=1e-7), parameter


@pytest.mark.parametrize(("name", "words"), [("gemma2", "cap or a scale"), ("cohere", "cap or a scale")])
def test_a_model_that_caps_or_scales_its_logits_keeps_its_own_loss(name, words):
    model = build(name)
    loss = LossWithoutLogits(model)
    assert words in loss.refusal(IDS)
    own = model(input_ids=IDS, labels=labels())
    assert own.logits.shape == (3, 16, 128)  # and nothing of ours is left on it


def test_a_loss_or_a_head_of_another_kind_is_left_to_the_model():
    model = build("gpt2")
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert "its loss is not the usual one" in LossWithoutLogits(model).refusal(IDS)
    model = build("gpt2")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert "its head is a Sequential" in LossWithoutLogits(model).refusal(IDS)


def test_a_wrong_loss_is_found_out_on_the_first_window(monkeypatch):
    from partialtune.engine import no_logits

    monkeypatch.setattr(no_logits, "head_cross_entropy", lambda *_: torch.tensor(1.0))
    assert "on the first window its own loss is" in LossWithoutLogits(build("gpt2")).refusal(IDS)


def test_logits_are_the_models_own_before_and_after():
    model = build("gpt2")
    before = model(input_ids=IDS).logits
    loss = LossWithoutLogits(model)
    with loss.active():
        assert model(input_ids=IDS, labels=labels()).logits.shape == (3, 16, 32)  # hidden states in their place
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_head_of_a_peft_model_is_found():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    own, own_gradients = loss_and_gradients(model)
    loss = LossWithoutLogits(model)
    assert loss.refusal(IDS) == ""
    with loss.active():
        ours, gradients = loss_and_gradients(model)
    assert float(ours) == pytest.approx(float(own), rel=1e-6)
    assert all(torch.allclose(gradients[n], g, rtol=1e-4, atol=1e-7) for n, g in own_gradients.items())


def test_a_frozen_head_is_cast_to_bf16_once_and_a_trainable_one_each_time():
    model = build("gpt2").requires_grad_(False)
    loss = LossWithoutLogits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), loss.active():
        model(input_ids=IDS, labels=labels())
        copy = loss._frozen_copy
        model(input_ids=IDS, labels=labels())
    assert copy.dtype == torch.bfloat16
    assert loss._frozen_copy is copy
    model.requires_grad_(True)
    loss.forget_copies()
    with torch.autocast("cpu", dtype=torch.bfloat16), loss.active():
        model(input_ids=IDS, labels=labels())
    assert loss._frozen_copy is None


def test_a_frozen_head_that_is_held_in_bf16_gives_the_same_loss_and_gradients_and_no_copy_is_kept():
    model = build("phi")  # untied, its head has a bias
    apply_plan(model, plan_freeze(model, ["blocks[-1]", "final_norm"]))
    head = model.lm_head
    head.weight.data = head.weight.data.bfloat16().float()
    loss = LossWithoutLogits(model)
    with loss.active():
        own, own_gradients = loss_and_gradients(model)
    head.weight.data = head.weight.data.bfloat16()
    with loss.active():
        ours, gradients = loss_and_gradients(model)
    assert loss._frozen_copy is None
    assert float(ours) == pytest.approx(float(own), rel=1e-6)
    assert len(own_gradients) > 5
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16), loss.active():
        in_bf16, _ = loss_and_gradients(model)
    assert loss._frozen_copy is None
    assert float(in_bf16) == pytest.approx(float(own), rel=1e-2)


@pytest.mark.parametrize(("name", "selector"), [("gpt2", "embeddings.tokens"), ("llama", "head"), ("phi", "head")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_a_head_get_the_gradient_that_they_have_with_all_logits(name, selector, dtype):
    """Tied and untied, with a bias; the dtype is the model's own, of bf16 autocast's."""
    # the usual loss takes the logits of an fp64 model in fp32 too
    rtol, atol = (0.05, 2e-4) if dtype == torch.bfloat16 else (1e-4, 1e-7)
    model = build(name)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    apply_plan(model, plan_freeze(model, [f"{selector}[3,100:]", "final_norm"]))
    with autocast:
        own, own_gradients = loss_and_gradients(model)
        loss = LossWithoutLogits(model)
        assert loss.refusal(IDS) == ""
        with loss.active():
            ours, gradients = loss_and_gradients(model)
    assert float(ours) == pytest.approx(float(own), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert gradients.keys() == own_gradients.keys()
    (rows,) = [gradient for key, gradient in gradients.items() if key.endswith(".weight_rows")]
    assert rows.shape == (29, 32)
    assert rows.any()
    for key, gradient in own_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=rtol, atol=atol)


def test_a_16_bit_copy_of_a_head_has_the_newest_values_of_rows_that_train():
    model = build("llama")
    apply_plan(model, plan_freeze(model, ["head[3:5]"]))
    loss = LossWithoutLogits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), loss.active():
        before = model(input_ids=IDS, labels=labels()).loss
        copy = loss._frozen_copy
        with torch.no_grad():
            model.lm_head.weight_rows.data += 1.0  # as an optimizer may do it, past the count of versions
            evaluated = model(input_ids=IDS, labels=labels()).loss
        after = model(input_ids=IDS, labels=labels()).loss
    assert loss._frozen_copy is copy
    assert torch.equal(copy, model.state_dict()["lm_head.weight"].to(torch.bfloat16))
    assert float(before) != float(after) == float(evaluated)


def test_a_model_that_cannot_do_with_states_for_logits_keeps_its_own_loss():
    model = build("llama")
    own = model.forward

    def forward(**inputs):
        output = own(**inputs)
        assert output.logits.shape[-1] == 128, "no logits"
        return output

    model.forward = forward
    assert LossWithoutLogits(model).refusal(IDS) == "its forward pass fails without logits (AssertionError)"
