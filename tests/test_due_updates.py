"""A trainable parameter that kept every bit is a fault only where an optimizer's step was large enough to move it."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback

from conftest import tiny_gpt2
from partialtune.errors import FreezeViolation
from partialtune.model.digests import bit_sums
from partialtune.proof.audit_result import KEPT_EVERY_BIT, NEVER_A_GRADIENT, ONLY_SKIPPED
from partialtune.proof.due_updates import ELEMENTWISE, SAMPLED, DueUpdates, half_spacing, places_of_largest
from test_audit import audited_training


def reasons_in(audit):
    return {entry["name"]: entry["reason"] for entry in audit["trainable"]["unmoved"]}


# ---- in a Trainer ---------------------------------------------------------------------------------------------------


def test_key_biases_under_sgd_whose_gradients_are_rounding_noise_are_a_warning(tmp_path, caplog):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "vocab_size": 128}
    model = OPTForCausalLM(OPTConfig(**shape, num_attention_heads=2, max_position_embeddings=64, dropout=0.0))
    key_biases = [f"model.decoder.layers.{block}.self_attn.k_proj.bias" for block in range(2)]
    for name in key_biases:  # softmax is the same whatever is added to all its inputs, so their true gradient is 0
        nn.init.uniform_(model.get_parameter(name), 1.0, 2.0)
    audit = audited_training(tmp_path, model, ["biases"], optim="sgd", lr_scheduler_type="constant")
    assert audit["passed"] is True
    reasons = reasons_in(audit)
    assert reasons.keys() == set(key_biases)
    assert all(reason.startswith("no update large enough was due") for reason in reasons.values())
    assert "k_proj.bias" in caplog.text


def test_weights_near_1_at_a_rate_of_1e_8_are_a_warning_that_says_the_update_and_half_the_spacing(tmp_path):
    audit = audited_training(tmp_path, tiny_gpt2(), ["final_norm"], learning_rate=1e-8, weight_decay=0.0)
    assert audit["passed"] is True  # ln_f.bias is 0 and moves
    assert reasons_in(audit).keys() == {"transformer.ln_f.weight"}
    assert "at most 1e-08" in reasons_in(audit)["transformer.ln_f.weight"]
    assert any(text in reasons_in(audit)["transformer.ln_f.weight"] for text in ("3e-08", "6e-08"))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop", "adamw_torch_fused"])
def test_an_update_that_was_due_and_is_lost_in_every_step_is_a_violation(tmp_path, optim):
    model = tiny_gpt2()
    weight = model.transformer.ln_f.weight
    start = weight.detach().clone()

    class Lose(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            with torch.no_grad():
                weight.copy_(start)  # before the audit sees that it has moved

    with pytest.raises(FreezeViolation, match=r"kept every bit: transformer\.ln_f\.weight"):
        audited_training(tmp_path, model, ["final_norm"], Lose(), optim=optim, learning_rate=1e-2)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert reasons_in(audit) == {"transformer.ln_f.weight": KEPT_EVERY_BIT}


def test_weight_decay_alone_is_an_update_that_was_due(tmp_path):
    model = tiny_gpt2()
    weight = model.transformer.h[2].mlp.c_fc.weight
    weight.register_hook(torch.zeros_like)
    start = weight.detach().clone()

    class Lose(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            with torch.no_grad():
                weight.copy_(start)

    with pytest.raises(FreezeViolation, match=r"h\.2\.mlp\.c_fc\.weight"):
        audited_training(tmp_path, model, ["/.*h.2.mlp.*/"], Lose(), weight_decay=0.1)


def test_an_optimizer_that_cannot_be_stepped_again_is_a_warning_that_names_it(tmp_path):
    class Stubborn(torch.optim.SGD):
        def __init__(self, params, secret):
            super().__init__(params, lr=1e-10)

    model = tiny_gpt2()
    optimizer = Stubborn([model.transformer.ln_f.weight, model.transformer.ln_f.bias], secret=1)
    audit = audited_training(tmp_path, model, ["final_norm"], optimizer=optimizer, lr_scheduler_type="constant")
    assert audit["passed"] is True
    assert reasons_in(audit)["transformer.ln_f.weight"].endswith("cannot be told of Stubborn")


def test_what_a_checkpoint_keeps_of_the_updates_comes_back():
    updates = DueUpdates()
    values, tiny = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([values, tiny], lr=1.0)
    learning = {"values": (values, optimizer.param_groups[0]), "tiny": (tiny, optimizer.param_groups[0])}
    updates.watch(learning, optimizer, bit_sums([("values", values), ("tiny", tiny)]))
    values.grad, tiny.grad = torch.ones(3), torch.full((3,), 1e-9)
    updates.before_step()
    optimizer.step()
    state = json.loads(json.dumps(updates.state(), allow_nan=False))
    assert (state["due"], state["had_gradient"]) == (["values"], ["tiny", "values"])
    other = DueUpdates()
    other.go_back_to(state)
    assert other.state() == updates.state()
    other.go_back_to({"had_gradient": ["tiny"]})  # what an older version kept
    assert (other.had_gradient, other.due, other.largest) == ({"tiny"}, set(), {})


# ---- fp16: the scaler ------------------------------------------------------------------------------------------------


def scaled(gradient, scale=2.0**16, rate=1.0):
    """One step of a parameter of ones under accelerate and a gradient scaler, without clipping."""
    parameter = nn.Parameter(torch.ones(4))
    plain = torch.optim.SGD([parameter], lr=rate)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = accelerator.prepare_optimizer(plain)
    accelerator.scaler.scale(torch.zeros(()))  # as a backward pass does it
    updates = DueUpdates()
    updates.watch({"w": (parameter, plain.param_groups[0])}, optimizer, bit_sums([("w", parameter)]))
    parameter.grad = torch.full((4,), gradient)
    updates.before_step(accelerator.scaler.get_scale())
    optimizer.step()
    updates.after_step()
    return updates, parameter


def test_a_step_that_the_scaler_skips_is_no_step():
    updates, parameter = scaled(float("inf"))
    assert torch.equal(parameter, torch.ones(4))
    assert (updates.had_gradient, updates.skipped, updates.due, updates.largest) == (set(), {"w"}, set(), {})


def test_gradients_are_taken_without_their_scale():
    updates, _ = scaled(2.0**16 * 1e-9)  # unscaled 1e-9, far below half the spacing at 1
    assert updates.due == set()
    assert updates.largest["w"].update == pytest.approx(1e-9)


def test_a_parameter_whose_steps_were_all_skipped_says_so(tmp_path):
    class Overflow(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.optimizer.step = lambda closure=None: None
            optimizer._is_overflow = True  # as accelerate's wrapper notes it

    audit = audited_training(tmp_path, tiny_gpt2(), ["final_norm"], Overflow(), lr_scheduler_type="constant")
    assert audit["passed"] is True
    assert set(reasons_in(audit).values()) == {ONLY_SKIPPED}


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_the_spacing_is_what_an_addition_has_to_exceed(dtype):
    values = torch.tensor([1.0, -1.0, 1.5, 0.1, -3.7, 2.0**-10, 1000.0, 0.0], dtype=torch.float64).to(dtype)
    for direction in (torch.ones_like(values), -torch.ones_like(values)):
        half = half_spacing(values, direction)
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        outwards = (values * direction > 0) | (values == 0)
        steps = torch.where(outwards, 1, -1).to(integers)
        neighbours = (values.abs().view(integers) + steps).view(dtype).double()  # the next pattern is the next number
        expected = (neighbours - values.abs().double()).abs() / 2
        assert torch.equal(half, expected.clamp_min(5e-324))


def test_the_sample_holds_the_largest_gradients_and_every_value_of_a_small_tensor():
    gradient = torch.randn(3, 5 * SAMPLED + 17)
    places = places_of_largest(gradient)
    assert len(places) <= SAMPLED
    assert len(set(places.tolist())) == len(places)
    assert int(gradient.abs().argmax()) in places
    assert places_of_largest(torch.zeros(7, 3)).tolist() == list(range(21))
    odd = torch.zeros(SAMPLED * 2 + 1)
    odd[-1] = -1.0  # in the part that is shorter than the others
    assert len(odd) - 1 in places_of_largest(odd)


@pytest.mark.parametrize("kind", sorted(ELEMENTWISE - {torch.optim.ASGD}, key=lambda kind: kind.__name__))
def test_a_step_of_a_sample_in_fp64_is_what_the_optimizer_does(kind):
    """At values so large that no update moves them; from the second step on there is a state to go on from."""
    settings = {"lr": 1e-3, "weight_decay": 0.0} if kind is torch.optim.AdamW else {"lr": 1e-3}
    parameter, wide = (
        nn.Parameter(torch.full((3, SAMPLED), 1.5 * 2**24, dtype=d)) for d in (torch.float32, torch.float64)
    )
    optimizer, reference = kind([parameter], **settings), kind([wide], **settings)
    updates, largest = DueUpdates(), 0.0
    updates.watch({"w": (parameter, optimizer.param_groups[0])}, optimizer, bit_sums([("w", parameter)]))
    torch.manual_seed(0)
    for _ in range(3):
        parameter.grad = torch.randn(3, SAMPLED)
        wide.grad, before = parameter.grad.double(), wide.detach().clone()
        places = places_of_largest(parameter.grad)
        updates.before_step()
        for one in (optimizer, reference):
            one.step()
        updates.after_step()
        largest = max(largest, float((wide.detach() - before).flatten()[places].abs().max()))
        assert updates.largest["w"].update == pytest.approx(largest, rel=2e-3)
    assert updates.due == set()


def test_a_parameter_that_moved_leaves_the_watch_and_costs_nothing_more():
    parameter = nn.Parameter(torch.randn(8))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    updates = DueUpdates()
    updates.watch({"w": (parameter, optimizer.param_groups[0])}, optimizer, bit_sums([("w", parameter)]))
    parameter.grad = torch.randn(8)
    updates.before_step()
    optimizer.step()
    updates.after_step()
    assert updates.due == {"w"}
    updates.before_step()
    assert updates._noted == {}


def test_a_value_beside_the_sample_that_moves_is_seen():
    parameter = nn.Parameter(torch.full((2 * SAMPLED,), 2.0**40))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    updates = DueUpdates()
    updates.watch({"w": (parameter, optimizer.param_groups[0])}, optimizer, bit_sums([("w", parameter)]))
    parameter.grad = torch.zeros(2 * SAMPLED)
    parameter.grad[::2] = 1.0
    updates.before_step()
    with torch.no_grad():
        parameter[1] = 0.0
    updates.after_step()
    assert updates.due == {"w"}


def test_a_rate_of_0_is_no_step(tmp_path):
    audit = audited_training(tmp_path, tiny_gpt2(), ["final_norm"], optim="sgd", learning_rate=0.0)
    assert set(reasons_in(audit).values()) == {NEVER_A_GRADIENT}
