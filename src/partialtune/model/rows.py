"""Rows of a matrix, of which some train: runs like ((50257, 50261),) along dimension 0, counted and cut.

A run is [start, stop), as a slice of Python; runs are in order, apart from each other and never empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes two seconds, and pages and a push count rows without it
    import torch

Rows = tuple[tuple[int, int], ...]


def as_runs(numbers: Iterable[int]) -> Rows:
    """as_runs([7, 3, 4]) -> ((3, 5), (7, 8))."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return tuple((start, stop) for start, stop in runs)


def as_rows(runs: Any, length: int) -> Rows:
    """What a file holds, [[3, 5], [7, 8]], as rows of a tensor with `length` of them.

    Raises:
        TypeError, ValueError: If it is no list of runs, in order, apart, not empty and within the tensor.
    """
    rows = tuple((start, stop) for start, stop in runs)
    edges = [edge for run in rows for edge in run]
    if not all(type(edge) is int for edge in edges):
        raise TypeError(f"rows are {runs!r:.60}, not whole numbers")
    if not edges or edges[0] < 0 or edges[-1] > length or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"rows are {runs!r:.60}, not runs in order of {length} rows")
    return rows


def row_numbers(rows: Rows) -> list[int]:
    """row_numbers(((3, 5), (7, 8))) -> [3, 4, 7]."""
    return [number for start, stop in rows for number in range(start, stop)]


def rows_within(rows: Rows, length: int) -> Rows:
    """rows_within(((3, 5), (7, 8)), 4) -> ((3, 4),): those of a tensor with `length` rows, which may be fewer."""
    return tuple((start, min(stop, length)) for start, stop in rows if start < length)


def count_rows(rows: Rows) -> int:
    return sum(stop - start for start, stop in rows)


def rows_in_words(rows: Rows, shown: int | None = None) -> str:
    """rows_in_words(((3, 5), (7, 8))) -> "3:5,7", as a selector has them between its brackets; `shown` runs of them."""
    runs = ",".join(str(start) if stop == start + 1 else f"{start}:{stop}" for start, stop in rows[:shown])
    return runs if shown is None or len(rows) <= shown else f"{runs},..."


def other_rows_name(name: str, rows: Rows) -> str:
    """What the frozen rows of a matrix are called, by themselves, in digests, audits and messages.

    other_rows_name("transformer.wte.weight", ((95, 99),)) -> "transformer.wte.weight (rows other than 95:99)"
    """
    return f"{name} (rows other than {rows_in_words(rows)})"


def name_with_rows(name: str, rows: Rows | None) -> str:
    """name_with_rows("wte.weight", ((3, 5), (7, 8))) -> "wte.weight[3:5,7]"; the name itself where it is all of it."""
    return name if rows is None else f"{name}[{rows_in_words(rows)}]"


def take_rows(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """These rows of a tensor in a new tensor, in their order: (n, ...)."""
    import torch

    return torch.cat([values[start:stop] for start, stop in rows])


def put_rows(values: torch.Tensor, rows: Rows, new: torch.Tensor) -> None:
    """Write `new`, (n, ...) as `take_rows` gives it, into these rows of `values`, in place."""
    at = 0
    for start, stop in rows:
        values[start:stop] = new[at : at + stop - start]
        at += stop - start


def other_runs(rows: Rows, length: int) -> Rows:
    """The runs between these rows, of a tensor with `length` rows."""
    edges = [0, *(edge for run in rows for edge in run), length]
    return tuple((start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop)


def take_other_rows(values: torch.Tensor, rows: Rows) -> Iterator[torch.Tensor]:
    """All other rows than these, run after run, without a copy."""
    return (values[start:stop] for start, stop in other_runs(rows, len(values)))


def with_rows(values: torch.Tensor, rows: Rows, new: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor `values` with `new`, (n, ...), in the place of these rows, run after run, without a copy."""
    at = done = 0
    for start, stop in rows:
        yield values[done:start]
        yield new[at : at + stop - start]
        at, done = at + stop - start, stop
    yield values[done:]
