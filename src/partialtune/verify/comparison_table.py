"""A comparison of two checkpoints in words and columns, for the terminal."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from partialtune.model.rows import rows_in_words
from partialtune.tables import draw_table
from partialtune.verify.comparison import ComparedParameter, Comparison, relative_change
from partialtune.words import counted, joined, significant

HEADINGS = ("place", "parameters", "moved", "relative change", "largest change", "claim")


def comparison_table(comparison: Comparison) -> str:
    """What moved by block and component, the notes, and the verdict in the last line.

    Blocks in a row of which nothing moved share a line.
    """
    notes = [f"note: {note}" for note in comparison.notes]
    shown = len(HEADINGS) if comparison.claim else len(HEADINGS) - 1
    parts = [
        f"base     {comparison.base}\nadapted  {comparison.adapted}\nclaim    {comparison.claim or 'none'}",
        draw_table([row[:shown] for row in (HEADINGS, *_rows(comparison.parameters))]),
        *(["\n".join(notes)] if notes else []),
        verdict_line(comparison),
    ]
    return "\n\n".join(parts)


def verdict_line(comparison: Comparison) -> str:
    """Whether the claim holds, in one line."""
    total, moved = len(comparison.parameters), sum(bool(p.changed or p.new_rows) for p in comparison.parameters)
    if comparison.passed is None:
        return (
            f"verdict: none, for want of a claim. {moved:,} of {counted(total, 'parameter')} moved. "
            f"Say with --trainable what may move."
        )
    if not comparison.passed:
        return f"verdict: VIOLATED. {' '.join(comparison.violations)}"
    may_move = sum(bool(parameter.allowed) for parameter in comparison.parameters)
    in_part = [parameter.frozen_name for parameter in comparison.parameters if parameter.rows is not None]
    others = f", and {joined(in_part, 160)}," if in_part else ""
    return (
        f"verdict: passed. {moved:,} of the {counted(may_move, 'parameter')} that may move did; "
        f"the other {total - may_move:,}{others} kept every bit."
    )


def _rows(parameters: Sequence[ComparedParameter]) -> Iterator[tuple[str, ...]]:
    """A row for each component outside the blocks and inside a block that moved, and one for a block that did not."""
    places: dict[str, list[ComparedParameter]] = {}
    for parameter in parameters:
        place = parameter.component if parameter.block is None else f"block {parameter.block}"
        places.setdefault(place, []).append(parameter)
    entries: list[tuple[bool, tuple[str, ...]]] = []  # whether it is a whole block at rest, the row
    for place, members in places.items():
        if members[0].block is not None and any(member.changed for member in members):
            entries += [(False, _row(f"{place} {name}", part)) for name, part in _by_component(members).items()]
        else:
            entries.append((members[0].block is not None, _row(place, members)))
    for (at_rest, _), run in groupby(entries, key=lambda entry: (entry[0], entry[1][1:])):
        rows = [row for _, row in run]
        if at_rest and len(rows) > 1:
            yield f"{rows[0][0]} to {rows[-1][0].removeprefix('block ')}, each", *rows[0][1:]
        else:
            yield from rows


def _by_component(parameters: Sequence[ComparedParameter]) -> dict[str, list[ComparedParameter]]:
    return {
        component: [parameter for parameter in parameters if parameter.component == component]
        for component in dict.fromkeys(parameter.component for parameter in parameters)
    }


def _row(place: str, parameters: Sequence[ComparedParameter]) -> tuple[str, ...]:
    largest = [parameter.max_abs_delta for parameter in parameters]
    return (
        place,
        f"{sum(parameter.numel for parameter in parameters):,}",
        f"{sum(parameter.changed for parameter in parameters)} of {len(parameters)}",
        significant(relative_change(parameters), 3),
        significant(None if None in largest else max(largest), 3),
        _claim_cell(parameters),
    )


def _claim_cell(parameters: Sequence[ComparedParameter]) -> str:
    broken = sum(parameter.breaks_claim for parameter in parameters)
    if broken:
        return f"{broken} CHANGED, though frozen"
    may_move = sum(bool(parameter.allowed) for parameter in parameters)
    in_part = [parameter.rows for parameter in parameters if parameter.rows is not None]
    if len(in_part) == len(parameters) == 1:
        return f"rows {rows_in_words(in_part[0], 4)} may move"
    if in_part:
        return f"{may_move} of {len(parameters)} may move, rows of {len(in_part)} only"
    if may_move == len(parameters):
        return "may move"
    if may_move:
        return f"{may_move} of {len(parameters)} may move"
    return "frozen"
