"""Cross entropy of a head without its logits: hidden states (N, D), head weight (V, D), targets (N,) -> nats.

The logits (N, V) of GPT-2 and 16 windows of 256 tokens are 823 MB in fp32, and a plain loss holds three of that size:
logits, their logarithms, and the gradient. Here a few hundred rows exist at a time. Their gradient is taken at once,
while they are there, so that nothing is computed twice: three matrix products, as in the plain way.

With s = softmax(h W^T + b), d nats / d logits = s - onehot(target)    (Bridle 1990, eq. 8)
"""

from dataclasses import dataclass
from typing import Any

import torch

from partialtune.model.trained_rows import TrainedRows

LOGITS_AT_ONCE = {"cpu": 1 << 25, "cuda": 1 << 27}  # elements: 128 MiB in fp32 on a CPU, 512 MiB on a GPU
ROWS_ADDED = 2048


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
        weight: (V, D), as in `nn.Linear`.
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
    low_weight = weight.detach().to(dtype) if low_weight is None else low_weight
    learner, numbers = (weight, None) if rows is None else (rows.parameter, rows.numbers_on(weight.device))
    return _HeadCrossEntropy.apply(hidden, learner, bias, targets, low_weight, numbers)


class _HeadCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden, learner, bias, targets, low_weight, numbers) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            output = _pass_over_rows(hidden, low_weight, bias, targets, ctx.needs_input_grad, numbers)
        # not save_for_backward: a gradient that nobody else holds becomes weight.grad without a copy
        ctx.gradients = [output.hidden_grad, output.weight_grad, output.bias_grad]
        return output.nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("head_cross_entropy: backward a second time. It keeps its gradients for one backward.")
        scaled = [None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients]
        return *scaled, None, None, None


def _pass_over_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    wanted: tuple[bool, ...],
    numbers: torch.Tensor | None,
) -> HeadOutput:
    """Loss and gradients, a chunk of tokens at a time. `weight` has the dtype of the matrix products; `numbers` (n,)
    are the rows of it that a gradient is made for, None for all of them."""
    wide = torch.promote_types(torch.float32, hidden.dtype)
    low_hidden = hidden.to(weight.dtype)
    chunk = rows_at_once(len(hidden), len(weight), hidden.device.type)
    room = torch.empty(chunk, len(weight), dtype=wide, device=hidden.device)  # every chunk's logits lie here
    low_room = room if wide == weight.dtype else torch.empty_like(room, dtype=weight.dtype)
    nats = torch.zeros((), dtype=wide if hidden.device.type == "mps" else torch.float64, device=hidden.device)
    hidden_grad = torch.empty_like(hidden) if wanted[0] else None
    shape = weight.shape if numbers is None else (len(numbers), weight.shape[1])
    weight_grad = torch.zeros(shape, dtype=wide, device=hidden.device) if wanted[1] else None
    low_weight_grad = weight.new_empty(shape) if wanted[1] and wide != weight.dtype else None  # a chunk's
    bias_grad = torch.zeros(len(weight), dtype=wide, device=hidden.device) if bias is not None and wanted[2] else None
    for at in range(0, len(hidden), chunk):
        rows, goal = low_hidden[at : at + chunk], targets[at : at + chunk, None]
        logits, gradient = room[: len(rows)], low_room[: len(rows)]  # (C, V)
        _product(rows, weight.T, logits, gradient)
        if bias is not None:
            logits += bias
        torch.log_softmax(logits, 1, out=logits)
        nats -= logits.gather(1, goal).sum(dtype=nats.dtype)
        if not any(wanted[:3]):
            continue
        logits.exp_().scatter_add_(1, goal, logits.new_full(goal.shape, -1.0))  # softmax - onehot
        if gradient.dtype != wide:
            gradient.copy_(logits)
        if hidden_grad is not None:
            _product(gradient, weight, hidden_grad[at : at + chunk])
        if weight_grad is not None:
            of_learner = gradient if numbers is None else gradient.index_select(1, numbers)  # (C, n)
            _add_product(weight_grad, of_learner.T, rows, low_weight_grad)
        if bias_grad is not None:
            bias_grad += logits.sum(0)
    return HeadOutput(nats.to(wide), hidden_grad, weight_grad, bias_grad)


def rows_at_once(rows: int, vocabulary: int, device_type: str) -> int:
    """Rows whose logits exist at one time: a power of two, since bf16 products of other sizes take up to 1.7 times as
    long on a CPU (tests/benchmarks/NOTES.md)."""
    most = max(64, LOGITS_AT_ONCE.get(device_type, LOGITS_AT_ONCE["cpu"]) // vocabulary)
    return max(1, min(rows, 1 << (most.bit_length() - 1)))


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, low: torch.Tensor | None = None) -> None:
    """left @ right into `out`, which may be wider than the factors; `low` is room for it in the factors' dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cuda":  # not rounded to 16 bits in between
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right, out=low))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, low: torch.Tensor | None) -> None:
    """total += left @ right, where `total` may be wider than the factors; `low` is room for it in their dtype."""
    if low is None:
        torch.addmm(total, left, right, out=total)
        return
    torch.mm(left, right, out=low)
    for at in range(0, len(total), ROWS_ADDED):  # widened in cache: a sum of two dtypes is not vectorised on a CPU
        total[at : at + ROWS_ADDED] += low[at : at + ROWS_ADDED].to(total.dtype)
