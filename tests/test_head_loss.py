"""The loss without logits is the plain one: value, and every gradient, in every dtype, whatever the chunks."""

import pytest
import torch
import torch.nn.functional as F

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
    shapes, made = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kwargs: shapes.append(shape[0]) or made(*shape, **kwargs))
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


def test_a_second_backward_is_an_error_and_no_wrong_gradient():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    loss = head_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets = inputs(torch.float32, bias=False)
    wanted = plain(1e3 * hidden.double(), weight.double(), None, targets)
    assert head_cross_entropy(1e3 * hidden, weight, targets).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_chunks_are_powers_of_two_and_hold_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", {"cpu": 1 << 25})
    assert rows_at_once(4080, 50257, "cpu") == 512  # 667 rows would fit
    assert rows_at_once(10, 50257, "cpu") == 10
    assert rows_at_once(10_000, 1_000_000, "cpu") == 64  # fewer would be slow
