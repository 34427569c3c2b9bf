"""Which rows of a matrix, of those that train, have had a gradient: a token that the text does not hold gets none.

Weight decay moves a row without gradient all the same, so that its bits do not tell.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from partialtune.model.parameters import is_sharded
from partialtune.model.row_shards import first_row_of_shard
from partialtune.model.rows import Rows, as_runs, row_numbers

KEY = "rows_with_gradient"  # of what a checkpoint keeps


class RowGradients:
    """Notes the rows that have a gradient other than 0 in a step that is taken at a rate above 0."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._first: dict[str, int] = {}  # of these rows: where the shard of this process begins
        self._watched: dict[str, tuple[nn.Parameter, Mapping[str, Any]]] = {}
        self._noted: dict[str, torch.Tensor] = {}  # bool (n,), of a shard its rows, of the step that is being taken
        self._since: dict[str, torch.Tensor] = {}  # of all steps since `_known`, on the parameter's device
        self._known: dict[str, set[int]] = {}  # as numbers of the matrix' rows

    def watch(self, learning: Mapping[str, tuple[nn.Parameter, Mapping[str, Any]]], rows: Mapping[str, Rows]) -> None:
        """Watch the rows of these matrices from now on.

        Args:
            learning: By name: the parameter that an optimizer holds, and its group there.
            rows: By name, which rows of its matrix the parameter is.
        """
        self._rows.update({name: row_numbers(rows[name]) for name in learning if name in rows})
        self._watched = {name: pair for name, pair in learning.items() if name in rows}
        for name, (parameter, _) in self._watched.items():
            found = first_row_of_shard(parameter) if is_sharded(parameter) else None
            self._first[name] = found[1] if found is not None else 0

    def before_step(self) -> None:
        """Note the gradients, which are final."""
        for name, (parameter, group) in self._watched.items():
            rate = group.get("lr")
            if parameter.grad is not None and (rate is None or rate > 0):
                gradient = parameter.grad.to_local() if is_sharded(parameter.grad) else parameter.grad
                self._noted[name] = gradient.flatten(1).any(dim=1)

    def after_step(self, skipped: bool) -> None:
        """The step was taken, or skipped for an overflow of fp16."""
        noted, self._noted = self._noted, {}
        for name, with_gradient in noted.items() if not skipped else ():
            if name in self._since:
                self._since[name] |= with_gradient
            elif bool(with_gradient.all()):  # as all rows of a head have: asked once, since it waits for the device
                self._known.setdefault(name, set()).update(self._rows_of(name, len(with_gradient)))
                del self._watched[name]
            else:
                self._since[name] = with_gradient

    def without(self) -> dict[str, Rows]:
        """Name of each matrix of which some rows have had no gradient -> these rows."""
        self._gather()
        missing = {name: set(numbers) - self._known.get(name, set()) for name, numbers in self._rows.items()}
        return {name: as_runs(numbers) for name, numbers in missing.items() if numbers}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing where no rows are watched."""
        self._gather()
        return {KEY: {name: sorted(self._known.get(name, ())) for name in self._rows}} if self._rows else {}

    def take_over(self, states: Iterable[Mapping[str, Any]], anew: bool = False) -> None:
        """Add what other processes found, or, `anew`, go back to what a checkpoint keeps.

        Raises:
            AttributeError, TypeError, ValueError: If it is not what `state` gives.
        """
        if anew:
            self._noted, self._since, self._known = {}, {}, {}
        for state in states:
            for name, numbers in state.get(KEY, {}).items():
                self._known.setdefault(name, set()).update(map(int, numbers))

    def _gather(self) -> None:
        for name, with_gradient in self._since.items():
            found = with_gradient.nonzero().flatten().tolist()
            here = self._rows_of(name, len(with_gradient))
            self._known.setdefault(name, set()).update(here[place] for place in found)
            with_gradient.zero_()

    def _rows_of(self, name: str, count: int) -> list[int]:
        """The matrix' rows whose gradients this process has, of a sharded parameter a part of them."""
        first = self._first.get(name, 0)
        return self._rows[name][first : first + count]
