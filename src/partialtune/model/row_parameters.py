"""Some rows of a matrix train, the others do not: a parameter of its own for these rows, beside the frozen matrix.

    train_rows(model, {"transformer.wte.weight": ((50257, 50261),)}, dict(named_weights(model)))
    model.transformer.wte.weight        # (50261, 768), frozen; its last four rows follow those of the parameter
    model.transformer.wte.weight_rows   # (4, 768), what learns and what the optimizer holds

To mask the gradient of the whole matrix would not do: weight decay and momentum move rows without gradient too, and
gradient and optimizer state have the size of the matrix. Here neither exists. Where gradients are wanted, `weight` is a
`MatrixWithRows`: it has all of the values, so that what is computed is bit for bit what the model computes, and in
backward its rows alone get a gradient. So it is for whoever takes the attribute, the module's own forward or other
code. The new values are written into the matrix each time that it is taken, digested or saved.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from partialtune.errors import ModelError
from partialtune.model.expert_products import OF_EXPERTS, grouped_fallback, refuse_kernels
from partialtune.model.rows import Rows, row_numbers, take_rows

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
    _kept: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def write_into(self, matrix: torch.Tensor) -> None:
        """Let the matrix hold the newest values.

        Always, since a step need not show in the parameter's count of versions: fused AdamW, Trainer's default, and
        optimizers that write to `parameter.data` leave it as it was.
        """
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
        """Take over the matrix' values, which were loaded."""
        self.parameter.copy_(take_rows(matrix, self.rows))
        self.written = self.parameter._version

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


class WithTrainedRows(nn.Module):
    """Mixed into the class of a module that holds such a matrix. The attribute of the matrix is a property.

    Attributes:
        trained_rows: By the matrix' attribute: `{"weight": ...}`.
        own_class: The module's class without this.
    """

    trained_rows: dict[str, TrainedRows]
    own_class: type
    _standing: Mapping[str, "MatrixWithRows"] = {}

    # A lookup or a product by itself: nothing that a graph could join to others, and it would hold one step's values.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.rows_in_place():
            return super().forward(*args, **kwargs)

    @contextmanager
    def rows_in_place(self) -> Iterator[None]:
        """Within it an attribute is one and the same `MatrixWithRows`, however often it is taken."""
        found = {name: self._with_rows(name) for name in self.trained_rows}
        self._standing = {name: one for name, one in found.items() if isinstance(one, MatrixWithRows)}
        try:
            yield
        finally:
            self.__dict__.pop("_standing", None)

    def _with_rows(self, attribute: str) -> Any:
        """What the attribute is: the matrix with its newest values, whose rows get gradients where they learn."""
        if attribute in self._standing and torch.is_grad_enabled():
            return self._standing[attribute]
        trained = self.trained_rows[attribute]
        matrix: Any = self._parameters[attribute]
        if self._parameters.get(attribute + SUFFIX, trained.parameter) is not trained.parameter:
            raise ModelError(
                f"Rows of a {self.own_class.__name__} train, and their parameter was replaced after apply_plan, as "
                f"FSDP does. Rows train on one process or under DDP: launch without FSDP, or train the whole matrix."
            )
        trained.write_into(matrix)
        learns = torch.is_grad_enabled() and trained.parameter.requires_grad
        return MatrixWithRows.over(matrix, trained) if learns else matrix

    def _replace(self, value: Any) -> None:  # a parameter comes in by nn.Module's own way
        raise ModelError(
            f"Rows of a {self.own_class.__name__} train, and its matrix is to be replaced by a "
            f"{type(value).__name__}, as DataParallel does. Start a process for each GPU: accelerate launch."
        )

    # The rows' parameter is in no state dict: what is saved is the matrix, and what is loaded the rows follow.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for attribute, trained in self.trained_rows.items():
            matrix: Any = self._parameters[attribute]
            trained.write_into(matrix)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attribute in self.trained_rows:
            destination.pop(f"{prefix}{attribute}{SUFFIX}", None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        missing = kwargs["missing_keys"] if "missing_keys" in kwargs else args[2]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for attribute, trained in self.trained_rows.items():
            if f"{prefix}{attribute}{SUFFIX}" in missing:
                missing.remove(f"{prefix}{attribute}{SUFFIX}")
            if prefix + attribute in state_dict:
                matrix: Any = self._parameters[attribute]
                trained.read_from(matrix)

    def __setattr__(self, name: str, value: Any) -> None:
        # Of a tie that is made again: `head.weight = embedding.weight`.
        super().__setattr__(name, value.parameter if isinstance(value, MatrixWithRows) else value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Its class is made when it is needed, and pickle looks for classes by their names."""
        return _new_with_rows, (self.own_class, tuple(self.trained_rows)), *super().__reduce_ex__(2)[2:]


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
        # One row more, for what falls on rows that do not learn: as padding it is left out.
        rows = torch.ops.aten.embedding_dense_backward(grad, where, n + 1, n, False)[:n]
        return None, None, rows.to(ctx.trained.parameter.dtype), None, None


class _Product(torch.autograd.Function):
    """`F.linear`; backward gives the input's gradient, and that of the rows that learn, (n, width)."""

    @staticmethod
    def forward(ctx: Any, x, matrix, bias, parameter, trained):
        ctx.trained, ctx.dtypes = trained, (x.dtype, None if bias is None else bias.dtype)
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
        of_x, of_bias = ctx.dtypes
        x_grad = (grad @ matrix).to(of_x) if wants[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        bias_grad = flat.sum(0).to(of_bias) if wants[2] else None
        rows_grad = None
        if wants[3]:
            of_rows = flat.index_select(1, trained.numbers_on(grad.device))  # (N, n)
            rows_grad = (of_rows.T @ x.reshape(-1, x.shape[-1])).to(trained.parameter.dtype)
        return x_grad, None, bias_grad, rows_grad, None


READING = (torch.Tensor.detach, torch.Tensor.data.__get__)  # what is read is not trained by
KNOWN: dict[Any, Any] = {F.embedding: _embedding, F.linear: _linear, torch._C._nn.linear: _linear, **OF_EXPERTS}


# ---- put into a model -----------------------------------------------------------------------------------------------


def train_rows(model: nn.Module, rows: Mapping[str, Rows], matrices: Mapping[str, nn.Parameter]) -> None:
    """Give these rows parameters of their own, in every module that holds the matrix, and no other rows.

    Doing it again changes nothing. Rows that trained under another plan are the matrix' own again.

    Args:
        model: The model itself.
        rows: By name of the matrix.
        matrices: The model's parameters by their names, as `named_weights` gives them.

    Raises:
        ModelError: If a matrix is sharded.
    """
    wanted = {id(matrices[name]): numbers for name, numbers in rows.items()}
    for matrix, trained in [(id(m), trained) for m, trained in _held(model)]:
        if wanted.get(matrix) != trained.rows:
            forget_rows(model, matrix)
    present = rows_by_matrix(model)
    for name, numbers in rows.items():
        matrix = matrices[name]
        if id(matrix) in present:
            continue
        if hasattr(matrix, "full_tensor"):  # of DTensor
            raise ModelError(f"Rows of {name} are to train, and it is sharded (FSDP). Launch without it (DDP).")
        holders = _holders(model, matrix)
        refuse_kernels(holders[0][0], name)
        trained = TrainedRows(numbers, nn.Parameter(take_rows(matrix.detach(), numbers)))
        trained.written = trained.parameter._version
        matrix.requires_grad_(False)
        for number, (module, key) in enumerate(holders):
            _let_hold_rows(module, {**trained_rows_of(module), key: trained})
            if not number:  # once: a tied head shares it
                module.register_parameter(key + SUFFIX, trained.parameter)


def forget_rows(model: nn.Module, matrix: int) -> None:
    """Let a matrix be as it was before `train_rows`, with the newest values. Its id is given."""
    for module in list(modules_with_rows(model)):
        attributes = [key for key in module.trained_rows if id(module._parameters[key]) == matrix]
        for key in attributes:
            module.trained_rows[key].write_into(module._parameters[key])
            module._parameters.pop(key + SUFFIX, None)
        if attributes:
            _let_hold_rows(module, {key: t for key, t in module.trained_rows.items() if key not in attributes})


def _holders(model: nn.Module, matrix: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """The modules that hold a matrix, each with the attribute."""
    return [(m, key) for m in model.modules() for key, parameter in m._parameters.items() if parameter is matrix]


def _let_hold_rows(module: nn.Module, trained_rows: dict[str, TrainedRows]) -> None:
    own: type = getattr(module, "own_class", type(module))
    module.__dict__["trained_rows"] = trained_rows
    module.__class__ = _with_rows(own, tuple(trained_rows)) if trained_rows else own
    if not trained_rows:
        del module.__dict__["trained_rows"]


@cache
def _with_rows(own: type, attributes: tuple[str, ...]) -> type:
    """A module's class, of which these attributes are matrices with rows that train."""

    def matrix(attribute: str) -> property:
        return property(lambda module: module._with_rows(attribute), lambda module, value: module._replace(value))

    members: dict[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__, "own_class": own}
    members |= {name: matrix(name) for name in attributes}
    bases: tuple[type, ...] = (WithTrainedRows, own)
    return type(own.__name__, bases, members)


def _new_with_rows(own: type, attributes: tuple[str, ...]) -> nn.Module:
    """What pickle makes before it fills it."""
    return nn.Module.__new__(_with_rows(own, attributes))


def class_without_rows(module: nn.Module) -> type:
    """The class that a module has, or had before rows of it were to train."""
    return module.own_class if isinstance(module, WithTrainedRows) else type(module)


def trained_rows_of(module: nn.Module) -> Mapping[str, TrainedRows]:
    """The rows of a module that train, by the matrix' attribute; empty for any other module."""
    return module.trained_rows if isinstance(module, WithTrainedRows) else {}


def modules_with_rows(model: nn.Module) -> Iterator[WithTrainedRows]:
    """Every module of a model that holds a matrix of which some rows train."""
    return (module for module in model.modules() if isinstance(module, WithTrainedRows))


def _held(model: nn.Module) -> Iterator[tuple[Any, TrainedRows]]:
    """Every such matrix with its rows that train, as often as a module holds it."""
    for module in modules_with_rows(model):
        yield from ((module._parameters[attribute], trained) for attribute, trained in module.trained_rows.items())


def write_rows(model: nn.Module) -> None:
    """Let every matrix hold the newest values of its rows that train."""
    for matrix, trained in _held(model):
        trained.write_into(matrix)


def rows_by_matrix(model: nn.Module) -> dict[int, TrainedRows]:
    """id of each such matrix -> its rows that train."""
    return {id(matrix): trained for matrix, trained in _held(model)}
