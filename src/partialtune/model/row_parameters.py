"""Some rows of a matrix train, the others do not: a parameter of its own for these rows, beside the frozen matrix.

    train_rows(model, {"transformer.wte.weight": ((50257, 50261),)}, dict(named_weights(model)))
    model.transformer.wte.weight        # (50261, 768), frozen; its last four rows follow those of the parameter
    model.transformer.wte.weight_rows   # (4, 768), what learns and what the optimizer holds

To mask the gradient of the whole matrix would not do: weight decay and momentum move rows without gradient too, and
gradient and optimizer state have the size of the matrix. Here neither exists. Where gradients are wanted, `weight` is a
`MatrixWithRows`: it has all of the values, so that what is computed is bit for bit what the model computes, and in
backward its rows alone get a gradient. So it is for whoever takes the attribute, the module's own forward or other
code. The new values are written into the matrix each time that it is taken, digested or saved.

Under FSDP2 matrix and parameter are sharded, each by itself, and written together after each step: see `row_shards`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from partialtune.errors import ModelError
from partialtune.model.expert_products import refuse_kernels
from partialtune.model.rows import Rows, take_rows
from partialtune.model.trained_rows import MatrixWithRows, TrainedRows

SUFFIX = "_rows"  # of the parameter's name, behind that of the matrix


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
        found = {name: self._with_rows(name, in_pass=True) for name in self.trained_rows}
        self._standing = {name: one for name, one in found.items() if isinstance(one, MatrixWithRows)}
        try:
            yield
        finally:
            self.__dict__.pop("_standing", None)

    def _with_rows(self, attribute: str, in_pass: bool = False) -> Any:
        """What the attribute is: the matrix with its newest values, whose rows get gradients where they learn."""
        if attribute in self._standing and torch.is_grad_enabled():
            return self._standing[attribute]
        trained = self.trained_rows[attribute]
        matrix: Any = self._parameters[attribute]
        if hasattr(matrix, "full_tensor") or (trained.awaits_shards and not in_pass):
            return matrix  # to who shards, ties and loads it a parameter like any other
        if self._parameters.get(attribute + SUFFIX, trained.parameter) is not trained.parameter:
            raise ModelError(
                f"Rows of a {self.own_class.__name__} train, and their parameter was replaced after apply_plan, as "
                f"FSDP version 1 does. Rows train under FSDP2 (fully_shard), under DDP and on one process."
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
        for attribute, trained in self.trained_rows.items():
            if not trained.awaits_shards:  # else the main process sends them to others, as it does all parameters
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
        value = value.parameter if isinstance(value, MatrixWithRows) else value
        if isinstance(value, nn.Parameter) and self._takes_over(name, value):
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    def _takes_over(self, name: str, value: nn.Parameter) -> bool:
        """Whether FSDP2 puts something in the place of a matrix, or of its rows' parameter, which they then follow: its
        shard, or within a pass the copy that was gathered."""
        for attribute, trained in self.__dict__.get("trained_rows", {}).items():
            is_shard, is_rows = hasattr(value, "full_tensor"), name == attribute + SUFFIX
            if not (is_rows or name == attribute) or not (is_shard or trained.shards):
                continue
            if is_rows:
                trained.parameter = value
            if is_shard and attribute + SUFFIX in self._parameters:  # not of a tied head, which has it from there
                trained.follow(value, "rows" if is_rows else "matrix")
            return True
        return False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Its class is made when it is needed, and pickle looks for classes by their names."""
        return _new_with_rows, (self.own_class, tuple(self.trained_rows)), *super().__reduce_ex__(2)[2:]


# ---- put into a model -----------------------------------------------------------------------------------------------


def train_rows(model: nn.Module, rows: Mapping[str, Rows], matrices: Mapping[str, nn.Parameter]) -> None:
    """Give these rows parameters of their own, in every module that holds the matrix, and no other rows.

    Doing it again changes nothing. Rows that trained under another plan are the matrix' own again.

    Args:
        model: The model itself.
        rows: By name of the matrix.
        matrices: The model's parameters by their names, as `named_weights` gives them.

    Raises:
        ModelError: If a matrix is sharded already, and other rows of it trained until now, or none.
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
            raise ModelError(
                f"Rows of {name} are to train, and it is sharded already: the parameter that they learn through is "
                f"sharded beside it. Call apply_plan(model, plan) before fully_shard."
            )
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
        if any(module.trained_rows[key].shards for key in attributes):
            raise ModelError(
                "Other rows of a sharded matrix are to train than until now. Load the model anew, and call "
                "apply_plan(model, plan) before fully_shard."
            )
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


def await_shards(model: nn.Module) -> None:
    """Let rows that train be sharded with all other parameters: FSDP2 is about to do it to the model."""
    for _, trained in _held(model):
        trained.awaits_shards = not trained.shards


def rows_by_matrix(model: nn.Module) -> dict[int, TrainedRows]:
    """id of each such matrix -> its rows that train."""
    return {id(matrix): trained for matrix, trained in _held(model)}
