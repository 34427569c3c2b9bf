"""The loss without logits is the plain one: value, and every gradient, in every dtype, whatever the chunks."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from partialtune.engine import head_loss
from partialtune.engine.head_loss import head_cross_entropy, rows_at_once
from partialtune.model.row_parameters import train_rows
from partialtune.model.trained_rows import matrix_and_rows

ROWS, WIDTH, VOCABULARY = 70, 24, 301


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of at most 64 rows, so that 70 make two."""
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", {"cpu": 1})


def inputs(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    offset = torch.randn(VOCABULARY, dtype=torch.float64) if bias else None
    targets = torch.randint(VOCABULARY, (ROWS,))
    floats = [tensor.to(dtype).requires_grad_() if tensor is not None else None for tensor in (hidden, weight, offset)]
    return (*floats, targets)


def plain(hidden, weight, bias, targets):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def far(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_plain_loss_in_fp64(bias):
    *floats, targets = inputs(torch.float32, bias)
    *exact, _ = inputs(torch.float64, bias)
    floats, exact = [t for t in floats if t is not None], [t for t in exact if t is not None]
    wanted = plain(*exact[:2], exact[2] if bias else None, targets) / 7
    wanted.backward()
    loss = head_cross_entropy(*floats[:2], targets, floats[2] if bias else None) / 7
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, theirs in zip(floats, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert far(ours.grad, theirs.grad) < 1e-5


def test_in_fp64_it_agrees_to_the_last_digits():
    *floats, targets = inputs()
    *exact, _ = inputs()
    ours, theirs = head_cross_entropy(*floats[:2], targets, floats[2]), plain(*exact, targets)
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    assert all(far(a.grad, b.grad) < 1e-14 for a, b in zip(floats, exact, strict=True))


def test_rows_that_train_get_their_part_of_the_weights_gradient_and_none_of_its_size_is_made(monkeypatch):
    *exact, targets = inputs()
    plain(*exact, targets).backward()
    head = torch.nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
    head.load_state_dict({"weight": exact[1].detach(), "bias": exact[2].detach()})
    train_rows(head, {"weight": ((7, 9), (300, 301))}, dict(head.named_parameters()))
    shapes = []
    for name in ("zeros", "empty"):
        made = getattr(torch, name)
        noted = lambda *shape, made=made, **kwargs: shapes.append(shape[0]) or made(*shape, **kwargs)  # noqa: E731
        monkeypatch.setattr(torch, name, noted)
    weight, rows = matrix_and_rows(head.weight)
    hidden = exact[0].detach().requires_grad_()
    loss = head_cross_entropy(hidden, weight, targets, head.bias, rows=rows)
    loss.backward()
    assert loss.item() == pytest.approx(plain(*exact, targets).item(), rel=1e-14)
    assert far(hidden.grad, exact[0].grad) < 1e-14
    assert far(head.bias.grad, exact[2].grad) < 1e-14
    assert far(head.weight_rows.grad, exact[1].grad[[7, 8, 300]]) < 1e-14
    assert (3, WIDTH) in shapes
    assert (VOCABULARY, WIDTH) not in shapes


def test_bf16_products_are_summed_in_fp32_and_lie_as_near_as_the_plain_bf16_loss():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    exact_hidden, exact_weight, _, _ = inputs(torch.float64, bias=False)
    wanted = plain(exact_hidden, exact_weight, None, targets)
    wanted.backward()
    loss = head_cross_entropy(hidden, weight, targets, compute_dtype=torch.bfloat16)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded_hidden, rounded_weight, _, _ = inputs(torch.float32, bias=False)
        rounded = F.cross_entropy(F.linear(rounded_hidden, rounded_weight).float(), targets, reduction="sum")
    rounded.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert abs(loss.item() - wanted.item()) <= 2 * abs(rounded.item() - wanted.item()) + 1e-3 * wanted.item()
    assert far(hidden.grad, exact_hidden.grad) < 1.5 * far(rounded_hidden.grad, exact_hidden.grad)
    assert far(weight.grad, exact_weight.grad) < 1.5 * far(rounded_weight.grad, exact_weight.grad)


def test_a_frozen_head_gets_no_gradient_and_none_is_computed_for_it(monkeypatch):
    hidden, weight, _, targets = inputs(torch.float32, bias=False)

    def unwanted(*_):
        raise AssertionError("a gradient of the frozen head was computed")

    monkeypatch.setattr(head_loss, "_add_product", unwanted)
    head_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    with torch.no_grad():
        loss = head_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(hidden, weight, None, targets).item(), rel=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_a_frozen_head_in_16_bits_gives_what_it_gives_widened_and_is_never_widened_whole(monkeypatch, rows):
    hidden, weight, bias, targets = inputs(torch.float32)
    head = torch.nn.Linear(WIDTH, VOCABULARY)
    head.load_state_dict({"weight": weight.detach().bfloat16(), "bias": bias.detach()})
    head.requires_grad_(False)
    if rows:
        train_rows(head, {"weight": ((7, 9),)}, dict(head.named_parameters()))
    matrix, trained = matrix_and_rows(head.weight) if rows else (head.weight, None)
    wanted = head_cross_entropy(hidden, matrix, targets, head.bias, rows=trained)
    wanted.backward()
    wide = [hidden.grad, head.weight_rows.grad if rows else hidden.grad]
    hidden.grad = None
    head.zero_grad()
    monkeypatch.setattr(head_loss, "WIDENED_AT_ONCE", 50 * WIDTH)  # 301 rows are six slices and a short one
    sizes, copied = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, *given: sizes.append(len(to)) or copied(to, *given))
    loss = head_cross_entropy(hidden, matrix.detach().bfloat16(), targets, head.bias, rows=trained)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert far(hidden.grad, wide[0]) < 1e-6
    assert not rows or far(head.weight_rows.grad, wide[1]) < 1e-6
    assert sizes[:7] == [50] * 6 + [1]
    assert max(sizes) == 50


def test_a_second_backward_is_an_error_and_no_wrong_gradient():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    loss = head_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="A second backward pass"):
        loss.backward()


def test_without_targets_loss_and_gradients_are_zero():
    hidden, weight, bias, targets = inputs(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        loss = head_cross_entropy(hidden[:0], weight, targets[:0], bias, dtype)
        assert loss.item() == 0
        loss.backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_groups_of_rows_change_nothing(monkeypatch, dtype):
    *wanted, targets = inputs(torch.float32)
    whole = head_cross_entropy(*wanted[:2], targets, wanted[2], dtype)
    whole.backward()
    monkeypatch.setattr(head_loss, "SLICE", 96)  # 301 rows are three of these and a short one
    monkeypatch.setattr(head_loss, "SOFTMAX_AT_ONCE", 9 * VOCABULARY)
    *floats, _ = inputs(torch.float32)
    loss = head_cross_entropy(*floats[:2], targets, floats[2], dtype)
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for ours, theirs in zip(floats, wanted, strict=True):
        assert far(ours.grad, theirs.grad) < 1e-6


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    wanted = plain(1e3 * hidden.double(), weight.double(), None, targets)
    assert head_cross_entropy(1e3 * hidden, weight, targets).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_chunks_are_powers_of_two_and_hold_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", {"cpu": 1 << 25})
    assert rows_at_once(4080, 50257, "cpu") == 512  # 667 rows would fit
    assert rows_at_once(10, 50257, "cpu") == 10
    assert rows_at_once(10_000, 1_000_000, "cpu") == 64  # fewer would be slow


def test_the_forecast_of_a_frozen_head_in_16_bits_follows_few_operations(monkeypatch):
    monkeypatch.setattr(head_loss, "WIDENED_AT_ONCE", 50 * WIDTH)
    counts, sizes = {}, {}
    for made in ("with values", "forecast"):
        mode = FakeTensorMode() if made == "forecast" else nullcontext()
        with mode:
            weight = torch.zeros(301, WIDTH, dtype=torch.bfloat16)
            slices = [wide for _, wide in head_loss._widened(weight, torch.float32)]
            with FlopCounterMode(display=False) as counter:
                head_loss.states_times_head(torch.zeros(4, WIDTH), weight, out=torch.empty(4, 301))
        counts[made] = (len(slices), counter.get_total_flops())
        sizes[made] = {wide.untyped_storage().nbytes() for wide in slices}
    products = 2 * 4 * WIDTH * 301
    assert counts == {"with values": (7, products), "forecast": (1, products)}
    assert sizes["with values"] == sizes["forecast"] == {50 * WIDTH * 4}
