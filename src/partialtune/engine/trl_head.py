"""TRL's head faster where it is frozen: log-probabilities of targets without computing all logits twice.

TRL's trainers ask the model for `fused_lm_head=True`: hidden states (N, D), head weight (V, D), targets (N,) ->
log-probabilities (N,), and entropy and accuracy for the log. Its own function computes the logits once more in
backward, since it has to know the gradients of the log-probabilities first. Where the head is frozen it need not:

    d log p(target) / d hidden = W[target] - softmax(z) W          z = hidden W^T    (Bridle 1990, eq. 8)

is a row for each token, which backward multiplies with that token's gradient: two matrix products in place of three.
Where some rows of the head train, n of its V, the probabilities of these n tokens are kept for their gradient (n, D).
"""

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from partialtune.engine.head_loss import logits_times_head, rows_at_once, states_times_head, widens
from partialtune.errors import ModelError
from partialtune.model.row_parameters import trained_rows_of
from partialtune.model.trained_rows import matrix_and_rows

TRL = "trl.trainer.utils"
DIFFERENTIABLE = ("log_probs", "entropy")
ORDER = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of what TRL's function gives
FUNCTION = "_ChunkedLogProbFunction"  # private to TRL: what its patched forward calls


def has_frozen_trl_head(model: nn.Module) -> bool:
    """Whether TRL has put its head on the model, or on the one that peft has wrapped, and the head never trains, or
    only some rows of it.

    Args:
        model: The plan is applied to it.
    """
    forwards = (getattr(vars(module).get("forward"), "__func__", None) for module in model.modules())
    if not any(getattr(one, "__globals__", {}).get("__name__") == TRL for one in forwards):
        return False
    head: Any = model.get_output_embeddings()
    of_rows = [trained.parameter for trained in trained_rows_of(head).values()]  # a tied head has it from the embedding
    return _is_known() and not any(p.requires_grad for p in head.parameters() if all(p is not one for one in of_rows))


def _is_known() -> bool:
    """Whether TRL's function takes what it took when this was written; a later TRL's own one is left where it is."""
    own = getattr(importlib.import_module(TRL), FUNCTION, None)
    names = [*inspect.signature(own.forward).parameters][1:] if own is not None else []
    ours = [*inspect.signature(_InPlaceOf.apply).parameters][1:]
    return names == ours


@contextmanager
def fast_trl_head() -> Iterator[None]:
    """Within it TRL's head computes by the function below, where that suits.

    Without, a step on a CPU takes three times as long in the head as its products need. The name is looked up in TRL's
    module in each call; `test_trls_head_is_called_as_ours_is` (tests/test_trl.py) notices where that has changed.
    """
    module = importlib.import_module(TRL)
    own = getattr(module, FUNCTION)
    setattr(module, FUNCTION, _InPlaceOf(own))
    try:
        yield
    finally:
        setattr(module, FUNCTION, own)


class _InPlaceOf:
    """Called as TRL's own function is, to which it hands on what it has nothing to offer for."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def apply(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> Any:
        weight, trained = matrix_and_rows(weight)
        # Also without gradients: DPO's rewards are differences from the reference, of which rounding is to be the same.
        head_learns = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if trained is not None and final_logit_softcapping is not None:
            raise ModelError(
                "Rows of the head train, and TRL's loss caps the logits of this model (final_logit_softcapping): their "
                "gradient is not followed through that. Train the whole head, or none of it."
            )
        # On a GPU TRL's kernels read each tile of logits once, and these operations each of them several times.
        leaves_it = final_logit_softcapping is not None or (hidden.device.type != "cpu" and trained is None)
        if head_learns or leaves_it:
            kind = hidden.device.type
            if not weight.requires_grad and not torch.is_autocast_enabled(kind) and widens(weight, hidden.dtype):
                weight = weight.to(hidden.dtype)  # TRL's own products are of one dtype
            rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return self._own.apply(hidden, weight, bias, targets, *rest)
        learner, numbers = (None, None) if trained is None else (trained.parameter, trained.numbers_on(weight.device))
        return _FrozenHead.apply(hidden, weight, bias, targets, logit_scale / temperature, outputs, learner, numbers)


class _Head(NamedTuple):
    """What logits are made of: (N, D), (V, D), (V,) or None, (N,), and what they are multiplied with.

    `hidden` has the dtype of the products; `weight` too, or a narrower one that is widened by slices.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    scale: float


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities of the targets, (N,) in fp32, and what else was asked for of the same logits.

    `learner` (n, D) is the parameter of the rows of the head that train, `numbers` (n,) which ones; None without.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, scale, outputs, learner, numbers):
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        held = weight if widens(weight, dtype) else weight.to(dtype)
        ctx.head = head = _Head(hidden.to(dtype), held, bias, targets, scale)
        ctx.learner, ctx.numbers = learner, numbers
        # TRL gives positions that it ignores the target 0. Their gradients are 0 then: a row is made if one is not.
        ctx.late = targets == 0
        ctx.rows = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        shares = []
        found: dict[str, list[torch.Tensor]] = {}
        with torch.autocast(kind, enabled=False):
            for part in _parts(torch.arange(len(hidden), device=hidden.device), head):
                exponentials = _of_logits(head, part, outputs, found)
                early = part[~ctx.late[part]]
                if ctx.rows is not None and len(early):
                    some = exponentials if len(early) == len(part) else exponentials[~ctx.late[part]]
                    ctx.rows[early] = _rows(head, some, early).to(ctx.rows.dtype)
                if numbers is not None:
                    shares.append(exponentials.index_select(1, numbers) / exponentials.sum(1, keepdim=True))
        ctx.shares = torch.cat(shares) if shares else None  # (N, n), p of the tokens whose rows train
        results = {name: torch.cat(values) for name, values in found.items()}
        ctx.mark_non_differentiable(*(results[name] for name in results if name not in DIFFERENTIABLE))
        ctx.entropy = results.get("entropy")
        return tuple(results.get(name) for name in ORDER)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_log_probs: torch.Tensor | None, of_entropy: torch.Tensor | None, *_others: Any):
        with torch.autocast(ctx.head.hidden.device.type, enabled=False):
            of_hidden = None if ctx.rows is None else _hidden_gradient(ctx, of_log_probs, of_entropy)
            of_learner = None if ctx.shares is None else _learner_gradient(ctx, of_log_probs, of_entropy)
        return of_hidden, None, None, None, None, None, of_learner, None


def _hidden_gradient(ctx: Any, of_log_probs: torch.Tensor | None, of_entropy: torch.Tensor | None) -> torch.Tensor:
    gradient = torch.zeros_like(ctx.rows)
    if of_log_probs is not None:
        ctx.rows[ctx.late] = 0
        for part in _parts((ctx.late & (of_log_probs != 0)).nonzero().flatten(), ctx.head):
            ctx.rows[part] = _rows(ctx.head, _of_logits(ctx.head, part, (), {}), part).to(ctx.rows.dtype)
        gradient += ctx.rows * of_log_probs[:, None]
    if of_entropy is not None:  # as of GRPO's entropy bonus: the logits once more
        for part in _parts(of_entropy.nonzero().flatten(), ctx.head):
            rows = _entropy_rows(ctx.head, _of_logits(ctx.head, part, (), {}), ctx.entropy[part])
            gradient[part] += (rows * of_entropy[part, None]).to(gradient.dtype)
    return gradient


def _learner_gradient(ctx: Any, of_log_probs: torch.Tensor | None, of_entropy: torch.Tensor | None) -> torch.Tensor:
    """(n, D): d log p(target) / d z[r] = (1 if r is the target) - p[r], and d entropy / d z[r] as below."""
    p, of_logits = ctx.shares, torch.zeros_like(ctx.shares)
    if of_log_probs is not None:
        of_logits += ((ctx.head.targets[:, None] == ctx.numbers).to(p.dtype) - p) * of_log_probs[:, None]
    if of_entropy is not None:
        of_logits -= (torch.xlogy(p, p) + p * ctx.entropy[:, None]) * of_entropy[:, None]
    return torch.mm(of_logits.T, ctx.head.hidden.to(p.dtype)).mul_(ctx.head.scale).to(ctx.learner.dtype)


def _parts(numbers: torch.Tensor, head: _Head) -> Sequence[torch.Tensor]:
    """Numbers of tokens, as many at a time as there is room for their logits."""
    return numbers.split(rows_at_once(len(head.hidden), len(head.weight), numbers.device.type))


def _of_logits(
    head: _Head, part: torch.Tensor, outputs: tuple[str, ...], found: dict[str, list[torch.Tensor]]
) -> torch.Tensor:
    """What is asked for of the logits of some tokens, into `found`.

    Returns:
        e to the power of the logits less the largest of each token, (C, V) in fp32.
    """
    logits = head.hidden.new_empty(len(part), len(head.weight))
    states_times_head(head.hidden[part], head.weight, logits)
    if head.bias is not None:
        logits += head.bias.to(logits.dtype)
    shifted, goal = logits.float(), head.targets[part, None]
    if head.scale != 1.0:
        shifted = shifted * head.scale
    largest = shifted.amax(1, keepdim=True)
    if "mean_logits" in outputs:
        found.setdefault("mean_logits", []).append(shifted.mean(1))
    shifted -= largest
    chosen = shifted.gather(1, goal)
    if "is_top1" in outputs:  # the first of several largest ones counts
        top = chosen[:, 0] == 0
        top[top.clone()] = shifted[top].argmax(1) == goal[top, 0]
        found.setdefault("is_top1", []).append(top)
    exponentials = shifted.exp() if "entropy" in outputs else shifted.exp_()
    total = exponentials.sum(1)
    found.setdefault("log_probs", []).append(chosen[:, 0] - total.log())
    if "entropy" in outputs:
        mean = torch.einsum("cv,cv->c", exponentials, shifted) / total
        found.setdefault("entropy", []).append(total.log() - mean)
    if "log_sum_sq_probs" in outputs:
        squares = torch.einsum("cv,cv->c", exponentials, exponentials)
        found.setdefault("log_sum_sq_probs", []).append(squares.log() - 2 * total.log())
    return exponentials


def _rows(head: _Head, exponentials: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """d log p(target) / d hidden for some tokens, (C, D) in fp32."""
    mean = _times_head(head, exponentials) / exponentials.sum(1, keepdim=True)
    return (head.weight[head.targets[part]].float() - mean).mul_(head.scale)


def _entropy_rows(head: _Head, exponentials: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """d entropy / d hidden for some tokens, (C, D) in fp32: d entropy / d z = -p (log p + entropy)."""
    p = exponentials / exponentials.sum(1, keepdim=True)
    of_logits = torch.xlogy(p, p).add_(p * entropy[:, None]).neg_()
    return _times_head(head, of_logits).mul_(head.scale)


def _times_head(head: _Head, of_logits: torch.Tensor) -> torch.Tensor:
    """(C, V) @ (V, D), in fp32."""
    low = of_logits.to(head.hidden.dtype)
    return logits_times_head(low, head.weight, low.new_empty(len(low), head.weight.shape[1])).float()
