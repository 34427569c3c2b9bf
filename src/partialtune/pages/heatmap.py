"""The heat map of relative deltas at the end of a run, and small multiples of it over time; both in words too."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from partialtune.pages.figure_style import WIDTH, Theme, write_title
from partialtune.pages.findings import trained_title
from partialtune.pages.heatmap_cells import (
    MARGIN,
    STATES,
    TOP,
    Box,
    HeatCell,
    block_components,
    color_scale,
    draw_cell,
    draw_key,
    heatmap_cells,
    lay_out,
)
from partialtune.pages.run_files import RunFiles
from partialtune.words import counted, joined, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure as Canvas

# The small multiples; lengths in inches.
MOST_PANELS, COLUMNS = 8, 4
PANEL_TOP, PANEL_BOTTOM = TOP - 0.2, 0.95  # no headings there
PANEL_GAP, PANEL_LABELS, PANEL_TITLE, PANEL_ROW_GAP = 0.22, 0.62, 0.22, 0.24
PANEL_ROW_HEIGHT = {1: 0.5, 2: 0.36}


# --- the map at the end of the run


def draw_heatmap(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    cells = heatmap_cells(run)
    boxes, rows, height = lay_out(cells)
    axes = map_axes(canvas, height, theme)
    when = f" in {counted(run.deltas.steps[-1], 'step')}" if run.deltas.steps else ""
    write_title(canvas, theme, f"How far each part moved{when}", trained_title(run))
    colors = run_scale(run, theme)
    for cell, box in zip(cells, boxes, strict=True):
        draw_cell(axes, cell, box, colors, theme)
    first = min((box.left for box, cell in zip(boxes, cells, strict=True) if cell.group.block is not None), default=0.0)
    label_rows(axes, rows, cells, boxes, first - 0.08, 9, theme)
    label_columns(axes, boxes, cells, run.head_is_tied, theme)
    draw_key(canvas, axes, cells, colors, height, theme)


def map_axes(canvas: "Canvas", height: float, theme: Theme) -> "Axes":
    """Axes in inches over the whole figure, which becomes `height` inches tall."""
    canvas.set_size_inches(WIDTH, height)
    axes = canvas.add_axes((0, 0, 1, 1), facecolor=theme.background, xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    return axes


def label_rows(
    axes: "Axes",
    rows: Sequence[str],
    cells: Sequence[HeatCell],
    boxes: Sequence[Box],
    right: float,
    size: float,
    theme: Theme,
) -> None:
    """The rows' names, which end at `right` inches."""
    for row in rows:
        box = next(box for box, cell in zip(boxes, cells, strict=True) if cell.is_in_row(row))
        axes.text(right, box.middle[1], row, ha="right", va="center", fontsize=size, color=theme.ink)


def label_columns(axes: "Axes", boxes: Sequence[Box], cells: Sequence[HeatCell], tied: bool, theme: Theme) -> None:
    """Names below the outer cells, numbers below the blocks, as many as fit; headings above both."""
    below = {"ha": "center", "va": "baseline", "fontsize": 8.5, "color": theme.ink}
    above = {"ha": "left", "va": "bottom", "fontsize": 8.5, "color": theme.muted}
    bottom = max((box.top + box.height for box in boxes), default=TOP) + 0.18
    blocks: dict[int, Box] = {}
    headings: dict[str, float] = {}
    for box, cell in zip(boxes, cells, strict=True):
        kind, _, part = cell.group.component.rpartition(".")
        if cell.group.block is not None:
            blocks[cell.group.block] = box
            kind = "blocks"
        else:
            axes.text(box.middle[0], bottom, part.replace("_", " "), **below)
            if tied and part == "tokens":
                axes.text(box.middle[0], bottom + 0.15, "(= head)", **below)
        headings[kind] = min(box.left, headings.get(kind, box.left))
    for kind, left in headings.items():
        axes.text(left, TOP - 0.06, kind, **above)
    widest = max((box.width for box in blocks.values()), default=1.0)
    every = next(2**power for power in range(20) if 2**power * widest >= 0.3)  # a number takes about 0.3 inches
    for block, box in blocks.items():
        if block % every == 0:
            axes.text(box.middle[0], bottom, str(block), **below)


# --- small multiples over time


def has_series(run: RunFiles) -> bool:
    """Whether there are two reports to compare."""
    return len(run.deltas.steps) > 1


def chosen_steps(steps: Sequence[int]) -> list[int]:
    """At most `MOST_PANELS` of the steps with a report, evenly spaced from the first to the last."""
    if not steps:
        return []
    places = np.linspace(0, len(steps) - 1, num=min(MOST_PANELS, len(steps)))
    return [steps[place] for place in places.round().astype(int).tolist()]


def run_scale(run: RunFiles, theme: Theme) -> "ScalarMappable":
    """One scale of colours for a run: a colour means the same in every panel, and in the map at its end."""
    cells = [*heatmap_cells(run)]
    for step in chosen_steps(run.deltas.steps):
        cells += heatmap_cells(run, step)
    return color_scale(cells, theme)


def draw_series(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    steps = chosen_steps(run.deltas.steps)
    panels = [heatmap_cells(run, step) for step in steps]
    boxes, rows, _ = lay_out(panels[0])
    tall = PANEL_ROW_HEIGHT.get(len(rows) or 1, 0.3) * max(1, len(rows))
    columns = min(COLUMNS, max(2, len(panels)))
    lines = -(-len(panels) // columns)
    height = PANEL_TOP + lines * (PANEL_TITLE + tall) + (lines - 1) * PANEL_ROW_GAP + PANEL_BOTTOM
    axes = map_axes(canvas, height, theme)
    write_title(canvas, theme, "How the movement spread", trained_title(run))
    colors = run_scale(run, theme)
    wide = (WIDTH - 2 * MARGIN - PANEL_LABELS - (columns - 1) * PANEL_GAP) / columns
    for number, (step, cells) in enumerate(zip(steps, panels, strict=True)):
        line, column = divmod(number, columns)
        left = MARGIN + PANEL_LABELS + column * (wide + PANEL_GAP)
        frame = Box(left, PANEL_TOP + PANEL_TITLE + line * (PANEL_TITLE + tall + PANEL_ROW_GAP), wide, tall)
        inside = fitted(boxes, frame)
        for cell, box in zip(cells, inside, strict=True):
            draw_cell(axes, cell, box, colors, theme)
        write_panel_title(axes, frame, run, step, theme)
        if column == 0:
            label_rows(axes, rows, cells, inside, MARGIN + PANEL_LABELS - 0.08, 8, theme)
    draw_key(canvas, axes, panels[-1], colors, height, theme)


def write_panel_title(axes: "Axes", frame: Box, run: RunFiles, step: int, theme: Theme) -> None:
    """The step, and how far all that trains has moved by then."""
    relative = percent(total_delta(run, step))
    above = {"va": "bottom", "fontsize": 8.5}
    axes.text(frame.left, frame.top - 0.05, f"step {step:,}", ha="left", color=theme.ink, weight="bold", **above)
    axes.text(frame.left + frame.width, frame.top - 0.05, relative, ha="right", color=theme.muted, **above)


def total_delta(run: RunFiles, step: int) -> float | None:
    """Relative delta of all that trains, taken together."""
    return run.deltas.relative_delta([parameter["name"] for parameter in run.trained], step)


def fitted(boxes: Sequence[Box], frame: Box) -> list[Box]:
    """Boxes of the large map, moved and shrunk into a panel's frame."""
    left = min(box.left for box in boxes)
    wide = max(box.left + box.width for box in boxes) - left
    tall = max(box.top + box.height for box in boxes) - TOP
    x, y = frame.width / wide, frame.height / tall
    return [
        Box(frame.left + (b.left - left) * x, frame.top + (b.top - TOP) * y, b.width * x, b.height * y) for b in boxes
    ]


# --- both in words


def heatmap_alt(run: RunFiles) -> str:
    """The heat map in words: outer cells one by one, blocks as a range for each component."""
    cells = heatmap_cells(run)
    parts = [f"{cell.group.component} {in_words(cell)}" for cell in cells if cell.group.block is None]
    for row in block_components(cells):
        parts.append(row_in_words(row, [cell for cell in cells if cell.is_in_row(row)]))
    return f"Heat map of the relative weight change by block and component: {'; '.join(parts)}."


def in_words(cell: HeatCell) -> str:
    return percent(cell.relative) if cell.relative else STATES[cell.state]


def row_in_words(row: str, cells: Sequence[HeatCell]) -> str:
    """attention 0.41% to 0.87% in 2 blocks, frozen, exactly 0 in 10 blocks."""
    moved = [cell.relative for cell in cells if cell.relative]
    words = []
    if moved:
        ends = dict.fromkeys((percent(min(moved)), percent(max(moved))))
        words.append(f"{' to '.join(ends)} in {counted(len(moved), 'block')}")
    others = [cell.state for cell in cells if not cell.relative]
    words += [f"{STATES[state]} in {counted(others.count(state), 'block')}" for state in sorted(set(others))]
    return f"{row} {', '.join(words)}"


def series_alt(run: RunFiles) -> str:
    """The small multiples in words: all that trains at each step, and the part that grew most at the end."""
    steps = chosen_steps(run.deltas.steps)
    totals = joined([f"{percent(total_delta(run, step))} at step {step:,}" for step in steps], 300)
    text = f"Heat maps of the relative weight change at {len(steps)} steps. All that trains moved by {totals}"
    latest = max(growth(run, *next(reversed(list(pairwise(steps))))), default=None)
    return f"{text}; in the last interval {latest[1]} moved most, by {percent(latest[0])}." if latest else f"{text}."


def growth(run: RunFiles, earlier: int, later: int) -> list[tuple[float, str]]:
    """(growth of the relative delta, label) of each trained group between two reports, where it is known."""
    known = []
    for group in run.groups():
        if group.trained_names:
            ends = [run.deltas.relative_delta(group.trained_names, step) for step in (earlier, later)]
            known += [(ends[1] - ends[0], group.label)] if None not in ends else []
    return known
