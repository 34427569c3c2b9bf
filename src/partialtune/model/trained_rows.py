"""A frozen matrix of which some rows learn: what is computed with it, and the gradients of these rows alone.

    weight = MatrixWithRows.over(matrix, trained)
    F.linear(x, weight)          # bit for bit what `matrix` gives; backward makes the gradient (n, width)

Where an operation is not known through which the gradient of rows can be followed, it is refused in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from partialtune.errors import ModelError
from partialtune.model.expert_products import OF_EXPERTS, grouped_fallback
from partialtune.model.row_shards import put_into_shard, write_after_steps
from partialtune.model.rows import Rows, row_numbers, take_rows


@dataclass(eq=False)
class TrainedRows:
    """The rows of one matrix that train. A tied matrix has one of these, which all modules share that hold it.

    Attributes:
        rows: Which ones.
        parameter: (n, ...), their values: what learns.
        written: Version of the parameter that stands in the matrix.
        awaits_shards: Whether FSDP2 is going to shard the model.
        shards: Under FSDP2 the sharded matrix and the sharded parameter. Within a pass the modules, and `parameter`,
            have whole copies in their places.
    """

    rows: Rows
    parameter: nn.Parameter
    written: int = -1
    awaits_shards: bool = False
    shards: dict[str, nn.Parameter] = field(default_factory=dict)
    _kept: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def write_into(self, matrix: torch.Tensor) -> None:
        """Let the matrix hold the newest values.

        Always, since a step need not show in the parameter's count of versions: fused AdamW, Trainer's default, and
        optimizers that write to `parameter.data` leave it as it was.
        """
        if self.shards:  # they have them since the last step, and what is gathered of them too
            return
        moved, self.written = self.parameter._version != self.written, self.parameter._version
        # The same values once more are no change: a forward pass that saved the matrix may still want its backward.
        # Other values are one, and that backward is an error of autograd, as it is with a whole matrix that trains.
        self.put_into(matrix.detach() if moved else matrix.data)

    @torch.no_grad()
    def put_into(self, matrix: torch.Tensor) -> None:
        """Write the values into a matrix of any dtype."""
        if len(self.rows) == 1:
            matrix[slice(*self.rows[0])] = self.parameter
        else:
            matrix.index_copy_(0, self.numbers_on(matrix.device), self.parameter.to(matrix.dtype))

    @torch.no_grad()
    def read_from(self, matrix: torch.Tensor) -> None:
        """Take over the matrix' values, which were loaded. Where it is sharded, all processes call this together."""
        if self.shards:
            values: Any = matrix
            whole = values.full_tensor() if hasattr(matrix, "full_tensor") else matrix
            put_into_shard(self.shards["rows"], ((0, len(self.parameter)),), take_rows(whole, self.rows))
            return
        self.parameter.copy_(take_rows(matrix, self.rows))
        self.written = self.parameter._version

    def follow(self, shard: nn.Parameter, part: str) -> None:
        """Note that FSDP2 has put a sharded parameter in the place of the matrix or of the rows' own.

        Args:
            shard: On the meta device at first, where the main process sends the weights later.
            part: `matrix` or `rows`.
        """
        self.shards[part] = shard
        if part == "rows" and not shard.is_meta:
            self.awaits_shards = False
            write_after_steps(shard, self)

    def write_into_shards(self) -> None:
        """Let the shards of the matrix hold the newest values. All processes call this together."""
        values: Any = self.shards["rows"].detach()
        put_into_shard(self.shards["matrix"], self.rows, values.full_tensor())

    def numbers_on(self, device: torch.device) -> torch.Tensor:
        """int64 (n,): which row of the matrix each row of the parameter is."""
        if (device,) not in self._kept:
            self._kept[device,] = torch.tensor(row_numbers(self.rows), device=device)
        return self._kept[device,]

    def places(self, length: int, device: torch.device) -> torch.Tensor:
        """int64 (length,): where in the parameter each row of the matrix is; n for those that do not train."""
        key = (length, device)
        if key not in self._kept:
            numbers = self.numbers_on(device)
            table = torch.full((length,), len(numbers), dtype=torch.int64, device=device)
            table[numbers] = torch.arange(len(numbers), device=device)
            self._kept[key] = table
        return self._kept[key]


class MatrixWithRows(torch.Tensor):
    """A frozen matrix of which some rows learn, as it is found where gradients are wanted.

    It knows what may be done with it, and is a parameter to whoever asks (`get_parameter`, `isinstance`).

    Attributes:
        parameter: The frozen matrix itself, which the module holds.
        matrix: Its values.
        trained: Its rows that learn.

    Raises:
        ModelError: At any other operation, whose gradient would be lost silently.
    """

    parameter: nn.Parameter
    matrix: torch.Tensor
    trained: TrainedRows
    is_turned: bool  # whether its two last dimensions are those of the parameter the other way round
    is_connected: bool  # of fused experts: whether the pass gives the parameter a gradient already

    @classmethod
    def over(cls, matrix: torch.Tensor, trained: TrainedRows, is_turned: bool = False) -> "MatrixWithRows":
        # Without memory of its own: a tensor of no values, as of a forecast, can be of one class alone.
        shape = matrix.shape, matrix.stride()
        made: Any = torch.Tensor._make_wrapper_subclass(cls, *shape, dtype=matrix.dtype, device=matrix.device)
        made.parameter, made.matrix, made.trained, made._is_param = matrix, matrix.detach(), trained, True
        made.is_turned, made.is_connected = is_turned, False
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        known = KNOWN.get(func) or grouped_fallback(func)
        with torch._C.DisableTorchFunctionSubclass():
            found = NotImplemented if known is None else known(*args, **kwargs)
            if found is not NotImplemented:
                return found
            args, kwargs = tree_map_only(MatrixWithRows, lambda one: one.matrix, (args, kwargs))
            result = NotImplemented if name == "__set__" else func(*args, **kwargs)
        if result is NotImplemented or (isinstance(result, torch.Tensor) and func not in READING):  # else its shape ...
            raise ModelError(
                f"Rows of a matrix are to train, and it is used in {name}, through which their gradient cannot be "
                f"followed. Train the whole matrix, or none of it. To read its values: weight.detach()."
            )
        return result  # its shape, dtype, device, what it is equal to

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        raise ModelError(f"Rows of a matrix are to train, and it is used in {func}, past what follows their gradient.")


def matrix_and_rows(weight: torch.Tensor) -> tuple[torch.Tensor, TrainedRows | None]:
    """The values of what an attribute is, and those rows that are to get a gradient; None where it is no such matrix.

    For code that takes products of its own. In passes without gradients it is never one.
    """
    return (weight.matrix, weight.trained) if isinstance(weight, MatrixWithRows) else (weight, None)


def _embedding(
    ids: torch.Tensor,
    weight: MatrixWithRows,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight.matrix)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise ModelError("Rows of an embedding train in a plain lookup only: no max_norm, sparse, scale_grad_by_freq.")
    return _Lookup.apply(ids, weight.matrix, weight.trained.parameter, weight.trained, padding_idx)


def _linear(x: torch.Tensor, weight: MatrixWithRows, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _Product.apply(x, weight.matrix, bias, weight.trained.parameter, weight.trained)


class _Lookup(torch.autograd.Function):
    """`F.embedding`; backward sums the gradients of each row that learns, (n, width)."""

    @staticmethod
    def forward(ctx: Any, ids, matrix, parameter, trained, padding_idx):
        ctx.save_for_backward(ids)
        ctx.trained, ctx.length, ctx.padding_idx, ctx.dtype = trained, len(matrix), padding_idx, parameter.dtype
        return F.embedding(ids, matrix, padding_idx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        (ids,) = ctx.saved_tensors
        places = ctx.trained.places(ctx.length, ids.device)
        n = len(ctx.trained.numbers_on(ids.device))
        where = places[ids]
        if ctx.padding_idx is not None:
            where = where.masked_fill(ids == ctx.padding_idx, n)
        # One row more, for what falls on rows that do not learn: as padding it is left out.
        rows = torch.ops.aten.embedding_dense_backward(grad, where, n + 1, n, False)[:n]
        return None, None, rows.to(ctx.dtype), None, None


class _Product(torch.autograd.Function):
    """`F.linear`; backward gives the input's gradient, and that of the rows that learn, (n, width)."""

    @staticmethod
    def forward(ctx: Any, x, matrix, bias, parameter, trained):
        ctx.trained, ctx.dtypes = trained, (x.dtype, None if bias is None else bias.dtype, parameter.dtype)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # cast here, as autocast would: backward needs the same copies
            dtype = torch.get_autocast_dtype(kind)
            x, matrix, bias = x.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, matrix)
        return F.linear(x, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        x, matrix = ctx.saved_tensors
        trained, wants = ctx.trained, ctx.needs_input_grad
        of_x, of_bias, dtype_of_rows = ctx.dtypes
        x_grad = (grad @ matrix).to(of_x) if wants[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        bias_grad = flat.sum(0).to(of_bias) if wants[2] else None
        rows_grad = None
        if wants[3]:
            of_rows = flat.index_select(1, trained.numbers_on(grad.device))  # (N, n)
            rows_grad = (of_rows.T @ x.reshape(-1, x.shape[-1])).to(dtype_of_rows)
        return x_grad, None, bias_grad, rows_grad, None


READING = (torch.Tensor.detach, torch.Tensor.data.__get__)  # what is read is not trained by
KNOWN: dict[Any, Any] = {F.embedding: _embedding, F.linear: _linear, torch._C._nn.linear: _linear, **OF_EXPERTS}
