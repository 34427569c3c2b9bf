"""Where the cells of a heat map lie, and what state each is in: a run's files -> cells and boxes, in inches.

Blocks run from left to right as the data flows, components from top to bottom. Embeddings stand left of the blocks,
final norm and head right of them, each as a cell of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from partialtune.pages.run_files import Group, RunFiles, forward_order
from partialtune.pages.themes import WIDTH

# inches
MARGIN, TOP, BOTTOM = 0.1, 1.05, 1.12
OUTER_WIDTH, GAP, ROW_LABELS = 0.64, 0.12, 0.76
ROW_HEIGHT = {1: 0.9, 2: 0.62, 3: 0.5}
WIDEST = 1.5


@dataclass(frozen=True)
class Cell:
    """One group's cell.

    Attributes:
        group: What it shows.
        relative: Relative delta of the group's trained parameters; None where frozen or without a norm before.
        state: `frozen`, `changed` (frozen, but did), `still` (trained, moved by exactly 0), `partly` (some of its
            parameters are frozen), `unknown` (moved, but its norm before was 0) or `trained`.
    """

    group: Group
    relative: float | None
    state: str


@dataclass(frozen=True)
class Box:
    """Where a cell lies, in inches from the figure's top left."""

    left: float
    top: float
    width: float
    height: float


def heatmap_cells(run: RunFiles, step: int | None = None) -> list[Cell]:
    """A cell for each group of the plan, at a report of deltas, the last one where no step is said."""
    last = run.deltas.steps[-1] if run.deltas.steps else None
    return [cell_of(run, group, last if step is None else step) for group in run.groups()]


def cell_of(run: RunFiles, group: Group, step: int | None) -> Cell:
    """A group's cell at a step with a report; None where there is none."""
    trained = group.trained_names
    if set(group.names) - set(trained) & set(run.audit["frozen"]["changed"]):
        return Cell(group, None, "changed")
    if not trained:
        return Cell(group, 0.0, "frozen")
    relative = None if step is None else run.deltas.relative_delta(trained, step)
    if relative is None:
        return Cell(group, None, "unknown")
    if relative == 0:
        return Cell(group, 0.0, "still")
    return Cell(group, relative, "partly" if len(trained) < len(group.names) else "trained")


def lay_out(cells: Sequence[Cell]) -> tuple[list[Box], list[str], float]:
    """Boxes of the cells, the components that are rows, and the figure's height in inches."""
    inside = [cell.group for cell in cells if cell.group.block is not None]
    rows = block_components(cells)
    row_height = ROW_HEIGHT.get(len(rows) or 1, 0.44)
    tall = row_height * max(1, len(rows))
    blocks = 1 + max((group.block for group in inside), default=-1)
    left = [cell.group for cell in cells if cell.group.block is None and cell.group.component.startswith("embeddings")]
    right = len(cells) - len(inside) - len(left)
    start = MARGIN + len(left) * OUTER_WIDTH + (ROW_LABELS if rows else 0) + GAP
    room = WIDTH - start - MARGIN - right * OUTER_WIDTH - (GAP if right else 0)
    block_width = min(WIDEST, room / blocks) if blocks else 0.0
    boxes, at = [], MARGIN
    for cell in cells:
        if cell.group.block is not None:
            row = rows.index(cell.group.component)
            boxes.append(Box(start + cell.group.block * block_width, TOP + row * row_height, block_width, row_height))
            continue
        if len(boxes) == len(left) + len(inside):
            at = start + blocks * block_width + GAP
        boxes.append(Box(at, TOP, OUTER_WIDTH, tall))
        at += OUTER_WIDTH
    return boxes, rows, TOP + tall + BOTTOM


def block_components(cells: Sequence[Cell]) -> list[str]:
    """The components that blocks have: the rows of the map, from top to bottom."""
    components = {cell.group.component for cell in cells if cell.group.block is not None}
    return sorted(components, key=lambda component: forward_order((0, component)))


def is_in_row(cell: Cell, row: str) -> bool:
    return cell.group.block is not None and cell.group.component == row
