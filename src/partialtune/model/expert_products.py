"""What the code of experts does with their fused tensors, where some experts learn: gradients of their slices alone.

    matrix (E, ...), frozen, with the newest values; parameter (n, ...), the slices that learn
    eager        matrix[3]                      one expert at a time
    batched_mm   matrix[ids]                    a matrix for each pair of token and expert
    grouped_mm   grouped_mm(x, matrix, offs)    rows of x sorted by expert, those of expert e end at offs[e]

No gradient of the size of `matrix` exists at any time: backward of each makes those of the n slices.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from partialtune.errors import ModelError
from partialtune.model.rows import row_numbers


def refuse_kernels(owner: nn.Module, name: str) -> None:
    """Kernels of others read a tensor's memory: the gradient of single experts would be lost without a word.

    Raises:
        ModelError: If a module uses such a kernel for its experts.
    """
    chosen = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    if "Experts" in type(owner).__name__ and chosen not in (None, "eager", "grouped_mm", "batched_mm"):
        raise ModelError(
            f"{name}: single experts learn under the experts implementations eager, batched_mm and grouped_mm, and "
            f"this model has {chosen}. Call model.set_experts_implementation('grouped_mm') before, or train all "
            f"experts."
        )


# ---- each takes what it stands in for takes, and gives NotImplemented where it does not know what that does --------


def _item(weight: Any, key: Any) -> Any:
    """`weight[key]` for the number of an expert, or numbers (S,)."""
    matrix, trained = weight.matrix, weight.trained
    if weight.is_turned or matrix.dim() < 2:
        return NotImplemented
    is_number = isinstance(key, torch.Tensor) and not key.is_floating_point() and key.dtype != torch.bool
    if is_number and key.dim() == 1:
        return _Gathered.apply(trained.parameter, matrix, key, trained)
    if is_number and key.dim() == 0:
        key = int(key)
    if not isinstance(key, int) or isinstance(key, bool):
        return NotImplemented
    place = int(trained.places(len(matrix), torch.device("cpu"))[key])
    if place < len(trained.parameter):
        weight.is_connected = True
        return trained.parameter[place].to(matrix.dtype)
    if not weight.is_connected:
        # A step in which no token comes to an expert that learns gives it a gradient of zeros, as the whole tensor
        # would have: DDP waits for one, and weight decay goes on.
        weight.is_connected = True
        return _Connected.apply(trained.parameter, matrix[key])
    return matrix[key]


def _transposed(weight: Any, one: int, other: int) -> Any:
    if weight.matrix.dim() != 3 or {one % 3, other % 3} != {1, 2}:
        return NotImplemented
    return type(weight).over(weight.matrix.transpose(one, other), weight.trained, not weight.is_turned)


def _grouped(product: Any) -> Callable[..., Any]:
    """`product(x, weight, offs=offs)`: x (S, in), weight (E, in, out), offs (E,) -> (S, out)."""

    def with_rows(x: Any, weight: Any, offs: torch.Tensor, bias: Any = None, out_dtype: Any = None) -> Any:
        if not hasattr(weight, "trained") or bias is not None or out_dtype is not None:
            return NotImplemented
        parameter, matrix = weight.trained.parameter, weight.matrix
        return _Grouped.apply(x, parameter, matrix, offs, weight.trained, weight.is_turned, product)

    return with_rows


def grouped_fallback(func: Any) -> Callable[..., Any] | None:
    """For transformers' own product, where torch has none for the device: it is there once its experts are imported."""
    return _grouped(func) if str(func) == "transformers.grouped_mm_fallback" else None


OF_EXPERTS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__getitem__: _item,
    torch.Tensor.transpose: _transposed,
    **{one: _grouped(one) for one in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if one},
}


# ---- gradients of the slices ----------------------------------------------------------------------------------------


class _Connected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter, values):
        ctx.save_for_backward(parameter)
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        return torch.zeros_like(ctx.saved_tensors[0]), None


class _Gathered(torch.autograd.Function):
    """(E, ...) and numbers (S,) -> (S, ...)."""

    @staticmethod
    def forward(ctx: Any, parameter, matrix, numbers, trained):
        ctx.trained, ctx.length = trained, len(matrix)
        ctx.save_for_backward(numbers)
        return matrix[numbers]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        (numbers,) = ctx.saved_tensors
        parameter = ctx.trained.parameter
        places = ctx.trained.places(ctx.length, numbers.device)[numbers]
        of_trained = (places < len(parameter)).nonzero().squeeze(1)
        total = torch.zeros_like(parameter)
        total.index_add_(0, places[of_trained], grad[of_trained].to(parameter.dtype))
        return total, None, None, None


class _Grouped(torch.autograd.Function):
    """grouped_mm; backward gives the input's gradient, and that of the experts that learn."""

    @staticmethod
    def forward(ctx: Any, x, parameter, matrix, offs, trained, is_turned, product):
        ctx.save_for_backward(x, matrix, offs)
        ctx.trained, ctx.is_turned, ctx.product = trained, is_turned, product
        return product(x, matrix, offs=offs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        x, matrix, offs = ctx.saved_tensors
        parameter = ctx.trained.parameter
        x_grad = ctx.product(grad, matrix.transpose(-2, -1), offs=offs) if ctx.needs_input_grad[0] else None
        total = torch.zeros_like(parameter)
        ends = offs.tolist()
        for place, number in enumerate(row_numbers(ctx.trained.rows)):
            of_expert = slice(ends[number - 1] if number else 0, ends[number])
            left, right = (grad, x) if ctx.is_turned else (x, grad)  # stored as (out, in), or as (in, out)
            total[place] = left[of_expert].T @ right[of_expert]
        return x_grad, total, None, None, None, None, None
