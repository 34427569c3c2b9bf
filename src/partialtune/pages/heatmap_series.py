"""The heat map of relative deltas over time: small multiples of it, one scale of colours for all."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from partialtune.pages.heatmap import draw_cell
from partialtune.pages.heatmap_key import color_norm, draw_key
from partialtune.pages.heatmap_layout import MARGIN, TOP, Box, Cell, heatmap_cells, is_in_row, lay_out
from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import WIDTH, Theme, mixed, write_title
from partialtune.pages.wording import trained_title
from partialtune.words import joined, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MOST_PANELS, COLUMNS = 8, 4
# inches
GAP, LABELS, TITLE, ROW_GAP, BOTTOM = 0.22, 0.62, 0.22, 0.24, 0.95
ROW_HEIGHT = {1: 0.5, 2: 0.36}


def has_series(run: RunFiles) -> bool:
    """Whether there are two reports to compare."""
    return len(run.deltas.steps) > 1


def chosen_steps(steps: Sequence[int]) -> list[int]:
    """At most `MOST_PANELS` of the steps with a report, evenly spaced from the first to the last."""
    places = np.linspace(0, len(steps) - 1, num=min(MOST_PANELS, len(steps)))
    return [steps[place] for place in places.round().astype(int).tolist()]


def draw_series(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    from matplotlib.cm import ScalarMappable

    steps = chosen_steps(run.deltas.steps)
    panels = [heatmap_cells(run, step) for step in steps]
    boxes, rows, _ = lay_out(panels[0])
    tall = ROW_HEIGHT.get(len(rows) or 1, 0.3) * max(1, len(rows))
    columns = min(COLUMNS, max(2, len(panels)))
    lines = -(-len(panels) // columns)
    height = TOP - 0.2 + lines * (TITLE + tall) + (lines - 1) * ROW_GAP + BOTTOM
    canvas.set_size_inches(WIDTH, height)
    axes = canvas.add_axes((0, 0, 1, 1), facecolor=theme.ground, xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    write_title(canvas, theme, "How the movement spread", trained_title(run))
    colors = ScalarMappable(norm=color_norm([cell for cells in panels for cell in cells]), cmap=mixed(theme.scale))
    wide = (WIDTH - 2 * MARGIN - LABELS - (columns - 1) * GAP) / columns
    for number, (step, cells) in enumerate(zip(steps, panels, strict=True)):
        line, column = divmod(number, columns)
        frame = Box(
            MARGIN + LABELS + column * (wide + GAP),
            TOP - 0.2 + TITLE + line * (TITLE + tall + ROW_GAP),
            wide,
            tall,
        )
        draw_panel(axes, cells, fitted(boxes, frame), colors, theme)
        write_panel_title(axes, frame, run, step, theme)
        if column == 0:
            label_panel_rows(axes, rows, cells, fitted(boxes, frame), theme)
    draw_key(canvas, axes, panels[-1], colors, height, theme)


def fitted(boxes: Sequence[Box], frame: Box) -> list[Box]:
    """Boxes of the large map, moved and shrunk into a panel's frame."""
    left = min(box.left for box in boxes)
    wide = max(box.left + box.width for box in boxes) - left
    tall = max(box.top + box.height for box in boxes) - TOP
    x, y = frame.width / wide, frame.height / tall
    return [
        Box(frame.left + (b.left - left) * x, frame.top + (b.top - TOP) * y, b.width * x, b.height * y) for b in boxes
    ]


def draw_panel(axes: "Axes", cells: Sequence[Cell], boxes: Sequence[Box], colors, theme: Theme) -> None:
    for cell, box in zip(cells, boxes, strict=True):
        draw_cell(axes, cell, box, colors, theme)


def write_panel_title(axes: "Axes", frame: Box, run: RunFiles, step: int, theme: Theme) -> None:
    """The step, and how far all that trains has moved by then."""
    relative = percent(total_delta(run, step))
    above = {"va": "bottom", "fontsize": 8.5}
    axes.text(frame.left, frame.top - 0.05, f"step {step:,}", ha="left", color=theme.ink, weight="bold", **above)
    axes.text(frame.left + frame.width, frame.top - 0.05, relative, ha="right", color=theme.muted, **above)


def label_panel_rows(
    axes: "Axes", rows: Sequence[str], cells: Sequence[Cell], boxes: Sequence[Box], theme: Theme
) -> None:
    for row in rows:
        box = next(box for cell, box in zip(cells, boxes, strict=True) if is_in_row(cell, row))
        place = {"ha": "right", "va": "center", "fontsize": 8, "color": theme.ink}
        axes.text(MARGIN + LABELS - 0.08, box.top + box.height / 2, row, **place)


def total_delta(run: RunFiles, step: int) -> float | None:
    """Relative delta of all that trains, taken together."""
    return run.deltas.relative_delta([parameter["name"] for parameter in run.trained], step)


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
