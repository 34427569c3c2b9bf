"""A frozen matrix that is held in 16 bits, as it is found where its values are wanted: widened for each product.

    weight = NarrowWeight.over(matrix)     # matrix: bf16 (out, in), frozen; weight.dtype is float32
    F.linear(x, weight)                    # bit for bit F.linear(x, matrix.float()); backward widens it once more

The wide copy of a matrix exists for the length of one product; a head of a large vocabulary is widened by slices, with
which a product is equal up to rounding. Autograd would keep it until backward: of all frozen
matrices above the first trainable part at the same time, which is what 16 bits are to save.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from partialtune.model.parameters import exact_values_of

NARROW = (torch.bfloat16, torch.float16)
WIDENED_AT_ONCE = 2**26  # values, 256 MB in fp32: more than any matrix in a block of 7B has


class NarrowWeight(torch.Tensor):
    """Stands for `matrix.float()`. It is a parameter to whoever asks (`isinstance`), and needs no gradient.

    Lookups, products with one matrix and single experts are known. Any other operation works on a wide copy, which
    autograd then keeps: right, but for memory. What is to be written to, as when peft merges adapters, is held in fp32
    from then on: 16 bits would round what is written.

    Attributes:
        matrix: The frozen parameter of 16 bits, or a view of it.
    """

    matrix: torch.Tensor

    @classmethod
    def over(cls, matrix: torch.Tensor) -> "NarrowWeight":
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, matrix.shape, matrix.stride(), dtype=torch.float32, device=matrix.device
        )
        made.matrix, made._is_param = matrix, True
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in ABOUT:
                return func(*args, **kwargs)
            if func in SAME:
                return cls.over(args[0].matrix)  # not a copy: who writes to it means the parameter
            if _writes(func):
                return _write(func, args, kwargs)
            known = KNOWN.get(func)
            found = NotImplemented if known is None else known(*args, **kwargs)
            return _on_wide_copy(func, args, kwargs) if found is NotImplemented else found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        targets = [value for value, one in zip(args, func._schema.arguments, strict=False) if one.is_write]
        if any(isinstance(target, cls) for target in targets):
            raise RuntimeError(CANNOT_WRITE.format(func))
        return _on_wide_copy(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"NarrowWeight({self.matrix!r})"


def held_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The matrix of 16 bits behind a weight that stands for its wide values; any other weight as it is.

    For code that takes products of its own.
    """
    return weight.matrix if isinstance(weight, NarrowWeight) else weight


# ---- what writes ----------------------------------------------------------------------------------------------------

CANNOT_WRITE = (
    "{} would write to a part of a frozen matrix that is held in 16 bits. Write to the matrix itself "
    "(module.weight.data[...] = values), which is then held in fp32; or load the model with dtype=torch.float32."
)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in WRITING or (name.endswith("_") and not name.endswith("__"))


def _write(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Let an operation write to the parameter, which is in fp32 from then on."""
    target = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(target, NarrowWeight):  # it is read alone
        return _on_wide_copy(func, args, kwargs)
    if func is torch.Tensor.requires_grad_ and not (args[1:] or tuple(kwargs.values()) or (True,))[0]:
        return target  # it needs no gradient already
    parameter = target.matrix
    if not isinstance(parameter, nn.Parameter):
        # What torch raises where a tensor cannot be written to.
        raise RuntimeError(CANNOT_WRITE.format(getattr(func, "__name__", func)))  # noqa: TRY004
    widen_parameter(parameter)
    of_parameter = func is torch.Tensor.requires_grad_ or func.__name__ == "__set__"
    written = parameter if of_parameter else parameter.data
    args, kwargs = tree_map_only(
        NarrowWeight, lambda one: written if one is target else one.matrix.detach().float(), (args, kwargs)
    )
    func(*args, **kwargs)
    return target


def widen_parameter(parameter: Any) -> None:
    """Hold a parameter in fp32, with its exact values where it held their rounding. It stays the same object."""
    if parameter.dtype not in NARROW:
        return
    exact = exact_values_of(parameter)
    parameter.data = parameter.data.float() if exact is None else exact.to(parameter.device, copy=True)
    if exact is not None:
        del parameter.exact_values


def _on_wide_copy(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map_only(NarrowWeight, lambda one: one.matrix.detach().float(), (args, kwargs))
    return func(*args, **kwargs)


# ---- each takes what it stands in for takes, and gives NotImplemented where a wide copy does as well ----------------


def _embedding(
    ids: torch.Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, **of_gradients: Any
) -> Any:
    """The rows are looked up, then widened."""
    if not isinstance(weight, NarrowWeight) or max_norm is not None:
        return NotImplemented
    return F.embedding(ids, weight.matrix.detach(), padding_idx).float()


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, NarrowWeight) and weight.matrix.numel() > WIDENED_AT_ONCE:
        return _product(_linear_by_slices, _through_slices, x, weight, bias, in_slices=True)
    return _product(F.linear, lambda grad, matrix: grad @ matrix, x, weight, bias)


def _linear_by_slices(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.new_empty(*x.shape[:-1], len(matrix))
    for at, part in _slices(matrix):
        out[..., at : at + len(part)] = F.linear(x, part.float(), None if bias is None else bias[at : at + len(part)])
    return out


def _through_slices(grad: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    total = grad.new_zeros(*grad.shape[:-1], matrix.shape[1])
    for at, part in _slices(matrix):
        total += grad[..., at : at + len(part)] @ part.float()
    return total


def _slices(matrix: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    rows = max(1, WIDENED_AT_ONCE // 4 // matrix.shape[1])
    return ((at, matrix[at : at + rows]) for at in range(0, len(matrix), rows))


def _addmm(bias: Any, x: Any, weight: Any, **factors: Any) -> Any:
    if factors or not isinstance(bias, torch.Tensor) or bias.dim() != 1:
        return NotImplemented
    return _product(lambda x, matrix, bias: torch.addmm(bias, x, matrix), _through_transposed, x, weight, bias)


def _matmul(x: Any, weight: Any) -> Any:
    if not isinstance(weight, NarrowWeight) or weight.matrix.dim() != 2:
        return NotImplemented
    return _product(lambda x, matrix, _: x @ matrix, _through_transposed, x, weight, None)


def _grouped(product: Any) -> Callable[..., Any]:
    """`product(x, weight, offs=offs)`: x (S, in), weight (E, in, out), offs (E,) -> (S, out)."""

    def of_experts(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        if bias is not None or out_dtype is not None:
            return NotImplemented
        forward: Any = lambda x, matrix, _: product(x, matrix, offs=offs)  # noqa: E731
        backward: Any = lambda grad, matrix: product(grad.contiguous(), matrix.transpose(-2, -1), offs=offs)  # noqa: E731
        return _product(forward, backward, x, weight, None, autocasts=False)

    return of_experts


def _through_transposed(grad: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return grad @ matrix.T


def _product(
    forward: Any, input_grad: Any, x: Any, weight: Any, bias: Any, in_slices: bool = False, autocasts: bool = True
) -> Any:
    if not isinstance(weight, NarrowWeight) or isinstance(x, NarrowWeight) or isinstance(bias, NarrowWeight):
        return NotImplemented
    matrix = weight.matrix.detach()
    # Products of experts are not on autocast's list: in fp32 they stay, as with a wide matrix.
    if autocasts and torch.is_autocast_enabled(matrix.device.type):
        if torch.get_autocast_dtype(matrix.device.type) != matrix.dtype:
            return NotImplemented
        # Autocast takes it as it is, and no copy is made.
        return F.linear(x, matrix, bias) if in_slices else forward(x, matrix, bias)
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return NotImplemented
    return _WidenedProduct.apply(x, bias, matrix, forward, input_grad, in_slices)


class _WidenedProduct(torch.autograd.Function):
    """The product with a wide copy of a frozen matrix, which is made again for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x, bias, matrix, forward, input_grad, in_slices):
        ctx.save_for_backward(matrix)
        ctx.input_grad, ctx.in_slices = input_grad, in_slices
        return forward(x, matrix if in_slices else matrix.float(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        (matrix,) = ctx.saved_tensors
        matrix = matrix if ctx.in_slices else matrix.float()
        x_grad = ctx.input_grad(grad, matrix) if ctx.needs_input_grad[0] else None
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return x_grad, bias_grad, None, None, None, None


# ---- parts and views of it, which are not widened before they are used ----------------------------------------------


def _item(weight: Any, key: Any) -> Any:
    """`weight[key]`: the number of an expert, or a slice; a matrix for each of several numbers is widened at once."""
    if not isinstance(weight, NarrowWeight):
        return NotImplemented
    part = weight.matrix.detach()[key]
    is_view = isinstance(key, int | slice) or (isinstance(key, torch.Tensor) and key.dim() == 0)
    return NarrowWeight.over(part) if is_view and part.dim() > 1 else part.float()


def _view(turn: Any) -> Callable[..., Any]:
    def turned(weight: Any, *args: Any, **kwargs: Any) -> Any:
        return NarrowWeight.over(turn(weight.matrix.detach(), *args, **kwargs))

    return turned


SAME = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)
WRITING = {"__set__", "__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))}
VIEWS = (torch.Tensor.transpose, torch.transpose, torch.Tensor.t, torch.t, torch.Tensor.T.__get__)
GROUPED = [one for one in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if one]
KNOWN: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    **dict.fromkeys((F.linear, torch._C._nn.linear), _linear),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _matmul),
    torch.Tensor.__getitem__: _item,
    **{view: _view(view) for view in VIEWS},
    **{one: _grouped(one) for one in GROUPED},
}
DEVICES = ("cuda", "cpu", "mps", "meta", "xpu")
ATTRIBUTES = ("dtype", "device", "shape", "ndim", "requires_grad", "is_leaf", "layout", "grad", "grad_fn", "itemsize")
# What is asked of a tensor beside its values: the answer is that of the wide one.
ABOUT = {
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.stride,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
    torch.Tensor.__len__,
    torch.Tensor.get_device,
    *(getattr(torch.Tensor, name).__get__ for name in ATTRIBUTES + tuple(f"is_{device}" for device in DEVICES)),
}
