"""Frozen matrices held in 8 or 4 bits by bitsandbytes, which stand for the values that the base's files hold.

    weight = pack("model.layers.0.mlp.up_proj.weight", values, "nf4")     # (D, E) in fp32 -> 0.56 bytes a value
    F.linear(x, weight)                                                   # one matrix is widened, for one product

A `PackedWeight` is what a module's `weight` is then: a tensor of the shape of its values, as which it behaves in every
operation. Its bytes are codes and scales. Nothing can write to it. In a matrix product it is widened, and the wide copy
is gone when the product is made; backward widens it again. In other operations it is widened first.

    int8    codes -127 to 127 times (largest absolute value of the row) / 127     (LLM.int8, Dettmers et al. 2022)
    nf4     16 quantiles of a normal distribution times the largest absolute value of 64 numbers    (QLoRA, 2023)
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from partialtune.errors import HOW_TO_INSTALL_BITSANDBYTES, RecipeError, is_bitsandbytes_installed
from partialtune.model.held_narrow import is_unrounded

KINDS = ("int8", "nf4")
BLOCK = 64  # numbers that share a scale in nf4
aten = torch.ops.aten


@cache
def _kernels() -> Any:
    """bitsandbytes' functions.

    Raises:
        RecipeError: If it is not installed.
    """
    if not is_bitsandbytes_installed():
        raise RecipeError(HOW_TO_INSTALL_BITSANDBYTES)
    import bitsandbytes.functional

    return bitsandbytes.functional


class PackedWeight(torch.Tensor):
    """A frozen matrix in few bits. Made by `pack`.

    Attributes:
        codes: int8 of the matrix's shape, or two nf4 codes in each uint8, (n / 2, 1).
        scales: fp32, one for each row (int8) or for 64 numbers in C order (nf4).
        kind: One of `KINDS`.
        base_sha256: `digests.digest` of the values that were packed, which the base's files hold.
        packed_sha256: Of codes and scales when they were made.
        source: Gives the values that were packed, for what is scored, see `serve_base`; None where nobody can.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    kind: str
    base_sha256: str
    packed_sha256: str
    source: Callable[[], torch.Tensor] | None

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor, traits: tuple[Any, ...]) -> "PackedWeight":
        shape = traits[0]
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, traits: tuple[Any, ...]) -> None:
        self.codes, self.scales = codes, scales
        _, self.kind, self.base_sha256, self.packed_sha256, self.source = traits

    # ---- what it stands for -----------------------------------------------------------------------------------------

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix, widened, in a plain tensor."""
        if self.source is not None and is_unrounded():
            return self.source().to(self.device, dtype)
        return _widened(self.codes, self.scales, self.kind, self.shape, dtype)

    def stored_bytes(self) -> torch.Tensor:
        """Codes and scales, uint8 (n,): all that it is made of."""
        return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in (self.codes, self.scales)])

    def sha256(self) -> str:
        """Of codes and scales as they are now."""
        return _sha256(self.codes, self.scales)

    @property
    def stored(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedWeight({self.kind}, {tuple(self.shape)}, {self.stored:,} bytes)"

    # ---- how it behaves ---------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The products of `nn.Linear` and `Conv1D` do not keep the wide matrix for backward."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                return _linear(*args, **kwargs)
            if function is torch.addmm and isinstance(args[2], cls) and not kwargs:
                bias, x, weight = args
                return _product(x, weight, bias, rows_are_inputs=True)
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation in (aten.detach.default, aten.alias.default):
            return args[0]._with(lambda part: part)
        if operation is aten.clone.default:
            return args[0]._with(torch.clone)
        if operation is aten._to_copy.default and kwargs.get("dtype") in (None, torch.float32):
            device = kwargs.get("device")
            return args[0]._with(lambda part: part.to(device or part.device, copy=True))
        written = [argument for argument in operation._schema.arguments if argument.is_write]
        places = {argument.name: place for place, argument in enumerate(operation._schema.arguments)}
        for argument in written:
            place = places[argument.name]
            target = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(target, cls):
                raise RuntimeError(  # noqa: TRY004 - what torch raises where a tensor cannot be written to
                    f"{operation} would write to a matrix that is held in {target.kind} and frozen. Nothing can: it "
                    f"stands for the values of the base. Plan anew without frozen_quantization to change it."
                )
        wide = tree_map_only(cls, lambda weight: weight.values(), (args, kwargs))
        return operation(*wide[0], **wide[1])

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedWeight":
        traits = (self.shape, self.kind, self.base_sha256, self.packed_sha256, self.source)
        return PackedWeight(change(self.codes), change(self.scales), traits)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        """For `Module.to` and `copy.deepcopy`, which take such a tensor apart."""
        return ["codes", "scales"], (self.shape, self.kind, self.base_sha256, self.packed_sha256, self.source)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], traits: Any, size: Any, stride: Any) -> "PackedWeight":
        return PackedWeight(parts["codes"], parts["scales"], traits)


def packable(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can be packed: a matrix, and whole blocks of numbers, as all but tiny ones are."""
    return len(shape) == 2 and (shape[0] * shape[1]) % BLOCK == 0


# ---- packing and widening -------------------------------------------------------------------------------------------


def pack(values: torch.Tensor, kind: str, base_sha256: str) -> PackedWeight:
    """Hold a matrix in few bits. On a CPU, whatever device it comes from, so that the bits are the same everywhere.

    Args:
        values: (rows, columns), of 16 or 32 bits, `packable`. They are left as they are.
        kind: One of `KINDS`.
        base_sha256: Their digest, see `digests.digest`.

    Raises:
        RecipeError: If bitsandbytes is not installed.
    """
    kernels, wide = _kernels(), values.detach().to("cpu", torch.float32).contiguous()
    if kind == "nf4":
        codes, state = kernels.quantize_4bit(wide, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        scales = state.absmax
    else:
        codes, scales, _ = kernels.int8_vectorwise_quant(wide)
    traits = (values.shape, kind, base_sha256, _sha256(codes, scales), None)
    return PackedWeight(codes.to(values.device), scales.to(values.device), traits)


def _widened(
    codes: torch.Tensor, scales: torch.Tensor, kind: str, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    if kind == "int8":
        # As bitsandbytes' int8_vectorwise_dequant does it, but in place: less than half of its time on a CPU.
        return codes.to(torch.float32).mul_((scales / 127).unsqueeze(1)).to(dtype)
    # As rows of one block each: bitsandbytes 0.50.2 widens rows of less than a block wrongly on a CPU.
    blocks = torch.Size([shape.numel() // BLOCK, BLOCK])
    state = _kernels().QuantState(scales, shape=blocks, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return _kernels().dequantize_4bit(codes, state).view(shape)


def _sha256(*parts: torch.Tensor) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# ---- products -------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """x (..., D) times a packed matrix -> (..., E); its gradient is taken with the matrix widened once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedWeight, bias: Any, rows_are_inputs: bool) -> torch.Tensor:
        ctx.weight, ctx.rows_are_inputs = weight, rows_are_inputs
        wide = weight.values(x.dtype)  # (E, D), or (D, E) where its rows are inputs
        return F.linear(x, wide.T if rows_are_inputs else wide, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            wide = ctx.weight.values(grad.dtype)
            of_x = grad @ (wide.T if ctx.rows_are_inputs else wide)
        if ctx.needs_input_grad[2]:
            of_bias = grad.flatten(0, -2).sum(0)
        return of_x, None, of_bias, None


def _product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, rows_are_inputs: bool) -> torch.Tensor:
    """Under autocast in its dtype, as autocast does it with plain matrices."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _Product.apply(x, weight, bias, rows_are_inputs)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(weight, PackedWeight):
        return _product(input, weight, bias, rows_are_inputs=False)
    return F.linear(input, weight, bias)


# ---- a model's packed matrices --------------------------------------------------------------------------------------


def packed_in(model: nn.Module) -> dict[str, PackedWeight]:
    """Name, as `named_parameters()` gives it, of each packed matrix of a model."""
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, PackedWeight)}


def serve_base(model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """Within `unrounded` packed matrices have the values that they stand for from now on: those that are saved.

    Args:
        model: Has packed matrices.
        read: Name of a parameter -> its values in the base. Called in each product, so that no two are held at once.
    """
    for name, weight in packed_in(model).items():
        weight.source = partial(read, name)


def source_words(model: nn.Module) -> str:
    """What tells states of the base's values from those of packed ones: ` of the base`, empty where there are none."""
    is_served = is_unrounded() and any(weight.source is not None for weight in packed_in(model).values())
    return " of the base" if is_served else ""


@contextmanager
def without_base(model: nn.Module) -> Iterator[None]:
    """Within it packed matrices have their own values in any case."""
    sources = {weight: weight.source for weight in packed_in(model).values()}
    try:
        for weight in sources:
            weight.source = None
        yield
    finally:
        for weight, source in sources.items():
            weight.source = source


def packed_size(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a matrix of this shape (rows, columns), codes and scales.

    packed_size((2048, 5632), "nf4") -> 6,488,064, which is 0.5625 a value
    """
    rows, columns = shape
    return rows * columns + 4 * rows if kind == "int8" else rows * columns // 2 + 4 * (rows * columns // BLOCK)
