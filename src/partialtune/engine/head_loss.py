"""Cross entropy of a head without its logits: hidden states (N, D), head weight (V, D), targets (N,) -> nats.

The logits (N, V) of GPT-2 and 16 windows of 256 tokens are 785 MB in fp32, and a plain loss holds three of that size:
logits, their logarithms, and the gradient. Here a few hundred rows exist at a time. Their gradient is taken at once,
while they are there, so that nothing is computed twice: three matrix products, as in the plain way.

With s = softmax(h W^T + b), d nats / d logits = s - onehot(target)    (Bridle 1990, eq. 8)

A frozen head may be held in 16 bits beside wider hidden states: its values are widened a slice of the vocabulary at a
time, since the whole of a head of 128,256 x 3,072 would take 1.6 GB in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from partialtune.model.trained_rows import TrainedRows

LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 27}  # elements: 128 MB in fp32 on a CPU, 512 MB on a GPU
SOFTMAX_AT_ONCE = 1 << 20  # elements: 4 MB in fp32, which five operations then find in a CPU's cache
SLICE = 1024  # rows of the vocabulary
WIDENED_AT_ONCE = 1 << 22  # elements of a 16-bit head: 16 MB in fp32


@dataclass(frozen=True)
class HeadOutput:
    """What one pass over all rows gives.

    Attributes:
        nats: Cross entropy summed over all targets, a scalar in fp32, summed in fp64 where the device has it.
        hidden_grad, weight_grad, bias_grad: Gradients of `nats`; None where they were not wanted. (N, D) in the dtype
            of the hidden states, (V, D) and (V,) in fp32. Of a head of which n rows train, (n, D) instead of (V, D).
    """

    nats: torch.Tensor
    hidden_grad: torch.Tensor | None
    weight_grad: torch.Tensor | None
    bias_grad: torch.Tensor | None


def head_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    low_weight: torch.Tensor | None = None,
    rows: TrainedRows | None = None,
) -> torch.Tensor:
    """Sum over the rows of -log softmax(hidden @ weight.T + bias)[target], differentiable once.

    head_cross_entropy(h, w, t) == F.cross_entropy(h @ w.T, t, reduction="sum")

    Args:
        hidden: (N, D).
        weight: (V, D), as in `nn.Linear`; a frozen one may be of a narrower dtype than the products.
        targets: int64 (N,), each 0 to V - 1. Rows without a target are to be left out before.
        bias: (V,) or None.
        compute_dtype: The matrix products' dtype, that of `hidden` if None. Logits, softmax and all sums over rows are
            fp32 (fp64 for fp64) in any case.
        low_weight: `weight` in `compute_dtype`, where the caller holds it already.
        rows: Those of `weight` that train, whose parameter alone gets a gradient.

    Returns:
        A scalar: nats, summed over the rows.
    """
    dtype = compute_dtype or hidden.dtype
    if low_weight is None:
        low_weight = weight.detach()
        # What trains gets its gradient beside the products' dtype, and is cast as a whole.
        low_weight = low_weight if not weight.requires_grad and widens(low_weight, dtype) else low_weight.to(dtype)
    learner, numbers = (weight, None) if rows is None else (rows.parameter, rows.numbers_on(weight.device))
    return _HeadCrossEntropy.apply(hidden, learner, bias, targets, low_weight, numbers, dtype)


def widens(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds every value of a weight of another, narrower dtype."""
    return weight.dtype != dtype and torch.promote_types(weight.dtype, dtype) == dtype


class _HeadCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden, learner, bias, targets, low_weight, numbers, dtype) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            low_hidden = hidden.to(dtype)
            output = _pass_over_rows(hidden, low_hidden, low_weight, bias, targets, ctx.needs_input_grad, numbers)
        # not save_for_backward: a gradient that nobody else holds becomes weight.grad without a copy
        ctx.gradients = [output.hidden_grad, output.weight_grad, output.bias_grad]
        return output.nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "A second backward pass through the loss without logits, which keeps its gradients for one. Leave "
                "'loss' out of fast_paths, as in attach(trainer, plan, fast_paths=['gelu', 'casts'])."
            )
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients]
        return *scaled, None, None, None, None


def _pass_over_rows(
    hidden: torch.Tensor,
    low_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    wanted: tuple[bool, ...],
    numbers: torch.Tensor | None,
) -> HeadOutput:
    """Loss and gradients, a chunk of tokens at a time. `low_hidden` has the dtype of the matrix products, `weight` too
    or a narrower one; `numbers` (n,) are the rows of it that a gradient is made for, None for all of them."""
    device, dtype = hidden.device, low_hidden.dtype
    wide = torch.promote_types(torch.float32, hidden.dtype)
    chunk = rows_at_once(len(hidden), len(weight), device.type, dtype.itemsize)
    room = low_hidden.new_empty(chunk, len(weight))  # every chunk's logits lie here, and then their gradient
    # Softmax is wide. A GPU takes the whole chunk, of logits that were never rounded; a CPU a few rows in its cache.
    at_once = chunk if device.type != "cpu" else min(chunk, max(1, SOFTMAX_AT_ONCE // len(weight)))
    wide_room = None if wide == dtype else room.new_empty(at_once, len(weight), dtype=wide)
    nats = torch.zeros((), dtype=wide if device.type == "mps" else torch.float64, device=device)
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    shape = weight.shape if numbers is None else (len(numbers), weight.shape[1])
    made = torch.empty if len(hidden) else torch.zeros  # the first chunk is put into it, where there is one
    weight_grad = made(shape, dtype=wide, device=device) if wanted[1] else None
    bias_grad = torch.zeros(len(weight), dtype=wide, device=device) if bias is not None and wanted[2] else None
    for at in range(0, len(hidden), chunk):
        rows, goal = low_hidden[at : at + chunk], targets[at : at + chunk, None]
        gradient = room[: len(rows)]  # (C, V)
        unrounded = wide_room if device.type == "cuda" else None  # what the product is written to there
        states_times_head(rows, weight, gradient if unrounded is None else unrounded[: len(rows)])
        for first in _first_rows(gradient, at_once):
            few = gradient[first : first + at_once]
            logits = few if wide_room is None else wide_room[: len(few)]
            if logits is not few and unrounded is None:
                logits.copy_(few)
            nats += _softmax_less_targets(logits, bias, goal[first : first + at_once], any(wanted[:3])).to(nats.dtype)
            if bias_grad is not None:
                bias_grad += logits.sum(0)
            if logits is not few and any(wanted[:3]):
                few.copy_(logits)
        if hidden_grad is not None:
            logits_times_head(gradient, weight, hidden_grad[at : at + chunk])
        if weight_grad is not None:
            of_learner = gradient if numbers is None else gradient.index_select(1, numbers)  # (C, n)
            _add_product(weight_grad, of_learner, rows, is_first=at == 0)
    return HeadOutput(nats.to(wide), hidden_grad, weight_grad, bias_grad)


def _first_rows(logits: torch.Tensor, at_once: int) -> range:
    """Where each group of rows begins; of a forecast, whose tensors have no values, the first alone: memory and
    products are the same, and thousands of operations fewer are followed."""
    return range(0, 1 if isinstance(logits, FakeTensor) else len(logits), at_once)


def _softmax_less_targets(
    logits: torch.Tensor, bias: torch.Tensor | None, goal: torch.Tensor, gradient: bool
) -> torch.Tensor:
    """Turn logits (C, V) into the gradient of their cross entropy, softmax - onehot, in place.

    Args:
        logits: In fp32 or wider.
        bias: (V,), to be added.
        goal: int64 (C, 1), the targets.
        gradient: Whether it is wanted; without it, logarithms of probabilities are left.

    Returns:
        The cross entropy, summed in fp64 where there is one.
    """
    if bias is not None:
        logits += bias
    torch.log_softmax(logits, 1, out=logits)
    nats = -logits.gather(1, goal).sum(dtype=logits.dtype if logits.device.type == "mps" else torch.float64)
    if gradient:
        logits.exp_().scatter_add_(1, goal, logits.new_full(goal.shape, -1.0))
    return nats


def rows_at_once(rows: int, vocabulary: int, device_type: str, itemsize: int = 4) -> int:
    """Rows whose logits exist at one time: a power of two, since bf16 products of other sizes take up to 1.7 times as
    long on a CPU (tests/benchmarks/NOTES.md).

    Args:
        rows: Of all tokens.
        vocabulary: Logits of a row.
        device_type: As `torch.device.type`.
        itemsize: Bytes of a logit. A CPU holds few of them in fp32 at a time; a GPU all of a chunk, whatever it is.
    """
    elements = LOGITS_AT_ONCE.get(device_type, LOGITS_AT_ONCE["cpu"])
    most = max(64, elements * (4 // itemsize if device_type == "cpu" and itemsize < 4 else 1) // vocabulary)
    return max(1, min(rows, 1 << (most.bit_length() - 1)))


def states_times_head(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """hidden (C, D) @ weight.T (D, V) into `out` (C, V), as `_product`; a narrower weight is widened by slices."""
    if weight.dtype != hidden.dtype:
        for at, wide in _widened(weight, hidden.dtype):
            torch.mm(hidden, wide.T, out=out[:, at : at + len(wide)])
    elif hidden.device.type == "cpu" and hidden.dtype.itemsize < 4:
        # A 16-bit product with a head as a whole takes 1.7 times as long: few vocabularies are multiples of 32.
        for at in range(0, len(weight), SLICE):
            torch.mm(hidden, weight[at : at + SLICE].T, out=out[:, at : at + SLICE])
    else:
        _product(hidden, weight.T, out)
    return out


def logits_times_head(gradient: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gradient (C, V) @ weight (V, D) into `out` (C, D), as `_product`; a narrower weight is widened by slices."""
    if weight.dtype == gradient.dtype:
        _product(gradient, weight, out)
    else:
        out.zero_()
        for at, wide in _widened(weight, gradient.dtype):
            torch.addmm(out, gradient[:, at : at + len(wide)], wide, out=out)  # in place it would not be counted
    return out


def _widened(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """Slices of the vocabulary: (first row, its rows in `dtype`). The next slice takes the place of the one before."""
    several = max(1, WIDENED_AT_ONCE // weight.shape[1])
    room = weight.new_empty(min(several, len(weight)), weight.shape[1], dtype=dtype)
    if isinstance(room, FakeTensor):
        # Of a forecast: one slice is held and all rows are multiplied, as below, in one product instead of hundreds.
        room.copy_(weight[:several])
        yield 0, room[:1].expand(len(weight), -1)
        return
    for at in range(0, len(weight), several):
        rows = weight[at : at + several]
        yield at, room[: len(rows)].copy_(rows)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """left @ right into `out`, which may be wider than the factors."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cuda":  # not rounded to 16 bits in between
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, is_first: bool) -> None:
    """total (V, D) += left.T (V, C) @ right (C, D), where `total` may be wider than the factors. The first product is
    put into it."""
    if left.dtype == total.dtype:
        torch.mm(left.T, right, out=total) if is_first else torch.addmm(total, left.T, right, out=total)
        return
    if total.device.type != "cpu":
        product = torch.mm(left.T, right)
        total.copy_(product) if is_first else total.add_(product)
        return
    turned = right.T.contiguous()  # (D, C)
    for at in range(0, len(total), SLICE):  # widened in cache: a sum of two dtypes is not vectorised
        part = total[at : at + SLICE]
        # The product the other way round and its turning take three quarters of the time of the straight one.
        product = torch.mm(turned, left[:, at : at + SLICE]).T.contiguous().to(total.dtype)
        part.copy_(product) if is_first else part.add_(product)
