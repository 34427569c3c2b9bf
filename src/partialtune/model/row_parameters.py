"""Some rows of a matrix train, the others do not: a parameter of its own for these rows, beside the frozen matrix.

    train_rows(model, {"transformer.wte.weight": ((50257, 50261),)})
    model.transformer.wte.weight        # (50261, 768), frozen; its last four rows follow those of the parameter
    model.transformer.wte.weight_rows   # (4, 768), what learns and what the optimizer holds

To mask the gradient of the whole matrix would not do: weight decay and momentum move rows without gradient too, and
gradient and optimizer state have the size of the matrix. Here neither exists. In forward the matrix stands in with all
of its values, through `MatrixWithRows`, so that what is computed is bit for bit what the model computes; in backward
its rows alone get a gradient. The new values are written into the matrix before it is used, digested or saved.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from partialtune.errors import ModelError
from partialtune.model.expert_products import grouped, pick, turned
from partialtune.model.rows import Rows, put_rows, row_numbers, take_rows

SUFFIX = "_rows"  # of the parameter's name, behind that of the matrix


@dataclass(eq=False)
class TrainedRows:
    """The rows of one matrix that train. A tied matrix has one of these, which all modules share that hold it.

    Attributes:
        rows: Which ones.
        parameter: (n, ...), their values: what learns.
        written: Version of the parameter that stands in the matrix.
    """

    rows: Rows
    parameter: nn.Parameter
    written: int = -1
    _places: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict)

    def write_into(self, matrix: torch.Tensor, always: bool = False) -> None:
        """Let the matrix hold the newest values. `always`: whatever the parameter's version says."""
        if always or self.parameter._version != self.written:
            # Past autograd's count of changes: a forward pass that saved the matrix for its backward had these values.
            put_rows(matrix.data, self.rows, self.parameter.data.to(matrix.dtype))
            self.written = self.parameter._version

    def read_from(self, matrix: torch.Tensor) -> None:
        """Take over the matrix' values, which were loaded."""
        self.parameter.data.copy_(take_rows(matrix.data, self.rows))
        self.written = self.parameter._version

    @property
    def numbers(self) -> list[int]:
        return row_numbers(self.rows)

    def places(self, length: int, device: torch.device) -> torch.Tensor:
        """int64 (length,): where in the parameter each row of the matrix is; n for those that do not train."""
        key = (length, device)
        if key not in self._places:
            numbers = torch.tensor(row_numbers(self.rows), device=device)
            table = torch.full((length,), len(numbers), dtype=torch.int64, device=device)
            table[numbers] = torch.arange(len(numbers), device=device)
            self._places[key] = table
        return self._places[key]


class WithTrainedRows(nn.Module):
    """Mixed into the class of a module that holds such a matrix.

    Attributes:
        trained_rows: By the matrix' attribute: `{"weight": ...}`.
    """

    trained_rows: dict[str, TrainedRows]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.rows_in_place():
            return super().forward(*args, **kwargs)

    @contextmanager
    def rows_in_place(self) -> Iterator[None]:
        """Within it the attribute is the matrix with its newest values, whose rows get gradients where they learn."""
        found = {name: self._parameters[name] for name in self.trained_rows}
        for name, trained in self.trained_rows.items():
            matrix: Any = found[name]
            trained.write_into(matrix)
            if torch.is_grad_enabled() and trained.parameter.requires_grad:
                self._parameters[name] = MatrixWithRows.over(matrix, trained)
        try:
            yield
        finally:
            self._parameters.update(found)


class MatrixWithRows(torch.Tensor):
    """A frozen matrix of which some rows learn, as a module's forward finds it: it knows what may be done with it.

    Raises:
        ModelError: At any other operation, whose gradient would be lost silently.
    """

    matrix: torch.Tensor
    trained: TrainedRows
    is_turned: bool  # whether its two last dimensions are those of the parameter the other way round
    is_connected: bool  # of fused experts: whether the pass gives the parameter a gradient already

    @classmethod
    def over(cls, matrix: torch.Tensor, trained: TrainedRows, is_turned: bool = False) -> "MatrixWithRows":
        made = matrix.detach().as_subclass(cls)
        made.matrix, made.trained, made.is_turned, made.is_connected = matrix.detach(), trained, is_turned, False
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        known = KNOWN.get(func)
        if known is None and str(func) == "transformers.grouped_mm_fallback":  # where torch has none for the device
            known = _grouped(func)
        with torch._C.DisableTorchFunctionSubclass():
            found = NotImplemented if known is None else known(*args, **kwargs)
            if found is not NotImplemented:
                return found
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and func is not torch.Tensor.detach:  # else its shape, dtype, device
            raise ModelError(
                f"Rows of a matrix are to train, and this model uses the matrix in {getattr(func, '__name__', func)}, "
                f"through which their gradient cannot be followed. Train the whole matrix, or none of it."
            )
        return result


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


def _item(weight: MatrixWithRows, key: Any) -> Any:
    found = pick(weight, key) if weight.dim() > 1 and not weight.is_turned else None
    return NotImplemented if found is None else found


def _transposed(weight: MatrixWithRows, one: int, other: int) -> Any:
    if not turned(weight, one, other):
        return NotImplemented
    return MatrixWithRows.over(weight.matrix.transpose(one, other), weight.trained, not weight.is_turned)


def _grouped(product: Any) -> Any:
    def with_rows(x: Any, weight: Any, offs: torch.Tensor, bias: Any = None, out_dtype: Any = None) -> Any:
        if not isinstance(weight, MatrixWithRows) or bias is not None or out_dtype is not None:
            return NotImplemented
        return grouped(product, x, weight, offs)

    return with_rows


class _Lookup(torch.autograd.Function):
    """`F.embedding`; backward sums the gradients of each row that learns, (n, width)."""

    @staticmethod
    def forward(ctx: Any, ids, matrix, parameter, trained, padding_idx):
        ctx.save_for_backward(ids)
        ctx.trained, ctx.length, ctx.padding_idx = trained, len(matrix), padding_idx
        return F.embedding(ids, matrix, padding_idx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        (ids,) = ctx.saved_tensors
        places = ctx.trained.places(ctx.length, ids.device)
        n = len(ctx.trained.parameter)
        where = places[ids]
        if ctx.padding_idx is not None:
            where = where.masked_fill(ids == ctx.padding_idx, n)
        # One row more, which takes what falls on rows that do not learn.
        rows = torch.ops.aten.embedding_dense_backward(grad, where, n + 1, -1, False)[:n]
        return None, None, rows.to(ctx.trained.parameter.dtype), None, None


class _Product(torch.autograd.Function):
    """`F.linear`; backward gives the input's gradient, and that of the rows that learn, (n, width)."""

    @staticmethod
    def forward(ctx: Any, x, matrix, bias, parameter, trained):
        ctx.save_for_backward(x, matrix)
        ctx.trained = trained
        return F.linear(x, matrix, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        x, matrix = ctx.saved_tensors
        trained, wants = ctx.trained, ctx.needs_input_grad
        x_grad = (grad @ matrix.to(grad.dtype)).to(x.dtype) if wants[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        bias_grad = flat.sum(0) if wants[2] else None
        rows_grad = None
        if wants[3]:
            numbers = torch.tensor(row_numbers(trained.rows), device=grad.device)
            of_rows = flat.index_select(1, numbers)  # (N, n)
            rows_grad = (of_rows.T @ x.reshape(-1, x.shape[-1]).to(of_rows.dtype)).to(trained.parameter.dtype)
        return x_grad, None, bias_grad, rows_grad, None


KNOWN: dict[Any, Any] = {
    F.embedding: _embedding,
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    torch.Tensor.__getitem__: _item,
    torch.Tensor.transpose: _transposed,
}
for grouped_mm in filter(None, [getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)]):
    KNOWN[grouped_mm] = _grouped(grouped_mm)


# ---- put into a model -----------------------------------------------------------------------------------------------


def train_rows(model: nn.Module, rows: Mapping[str, Rows]) -> None:
    """Give these rows parameters of their own, in every module that holds the matrix. Doing it again changes nothing.

    Args:
        model: The model itself.
        rows: By name of the matrix, as `model.named_parameters()` has it; any one of its names.

    Raises:
        ModelError: If other rows of the matrix have a parameter already.
    """
    for name, wanted in rows.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        present = getattr(owner, "trained_rows", {}).get(attribute)
        if present is not None:
            if present.rows != wanted:
                raise ModelError(
                    f"{name}: rows {present.rows} train already, and {wanted} are to. Load the model anew."
                )
            continue
        _refuse_kernels(owner, name)
        matrix: nn.Parameter = getattr(owner, attribute)
        trained = TrainedRows(wanted, nn.Parameter(take_rows(matrix.detach(), wanted)))
        trained.written = trained.parameter._version
        holders = [
            (module, key)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is matrix
        ]
        matrix.requires_grad_(False)
        for number, (module, key) in enumerate(holders):
            _let_hold_rows(module, key, trained, registered=number == 0)


def _refuse_kernels(owner: nn.Module, name: str) -> None:
    """Kernels of others read a tensor's memory: the gradient of single experts would be lost without a word."""
    chosen = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    if chosen not in (None, "eager", "grouped_mm", "batched_mm"):
        raise ModelError(
            f"{name}: single experts learn under the experts implementations eager, batched_mm and grouped_mm, and "
            f"this model has {chosen}. Call model.set_experts_implementation('grouped_mm') before, or train all "
            f"experts."
        )


def _let_hold_rows(module: nn.Module, attribute: str, trained: TrainedRows, registered: bool) -> None:
    if not isinstance(module, WithTrainedRows):
        own = type(module)
        module.__class__ = CLASSES.get(own) or type(
            own.__name__, (WithTrainedRows, own), {"__module__": own.__module__}
        )
        module.trained_rows = {}
        module.register_state_dict_pre_hook(_before_saving)
        module.register_state_dict_post_hook(_without_rows)
        module.register_load_state_dict_post_hook(_after_loading)
    module.trained_rows[attribute] = trained
    if registered:  # once: a tied head shares it
        module.register_parameter(attribute + SUFFIX, trained.parameter)


class EmbeddingWithRows(WithTrainedRows, nn.Embedding):
    """Of these two the classes have names, so that a model can be pickled."""


class LinearWithRows(WithTrainedRows, nn.Linear):
    """See `EmbeddingWithRows`."""


CLASSES: dict[type, type] = {nn.Embedding: EmbeddingWithRows, nn.Linear: LinearWithRows}


def _before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    write_rows(module)


def _without_rows(module: nn.Module, state_dict: dict, prefix: str, local_metadata: Any) -> None:
    for attribute in module.trained_rows:
        state_dict.pop(f"{prefix}{attribute}{SUFFIX}", None)


def _after_loading(module: nn.Module, incompatible: Any) -> None:
    for attribute, trained in module.trained_rows.items():
        trained.read_from(module._parameters[attribute])
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if key.rpartition(".")[2] != attribute + SUFFIX]


def modules_with_rows(model: nn.Module) -> Iterator[WithTrainedRows]:
    """Every module of a model that holds a matrix of which some rows train."""
    return (module for module in model.modules() if isinstance(module, WithTrainedRows))


def write_rows(model: nn.Module) -> None:
    """Let every matrix hold the newest values of its rows that train."""
    for module in modules_with_rows(model):
        for attribute, trained in module.trained_rows.items():
            trained.write_into(module._parameters[attribute], always=True)


def rows_by_matrix(model: nn.Module) -> dict[int, TrainedRows]:
    """id of each such matrix -> its rows that train."""
    return {
        id(module._parameters[attribute]): trained
        for module in modules_with_rows(model)
        for attribute, trained in module.trained_rows.items()
    }
