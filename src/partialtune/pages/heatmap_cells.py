"""The cells of a heat map: a run's files -> what each cell shows and where it lies -> its picture, and the key to it.

Blocks run from left to right as the data flows, components from top to bottom. Embeddings stand left of the blocks,
final norm and head right of them, each as a cell of its own. All lengths are inches from the figure's top left corner:
the axes fill the whole figure and their y axis points down, so a box is drawn exactly where it was computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partialtune.pages.figure_style import WIDTH, Theme, mixed
from partialtune.pages.run_files import Group, RunFiles, forward_order
from partialtune.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Canvas

STATES = {
    "frozen": "frozen, exactly 0",
    "partly": "partly frozen",
    "still": "trained, did not move",
    "changed": "frozen, but changed",
    "unknown": "moved from 0",
}
# inches
MARGIN, TOP, BOTTOM = 0.1, 1.05, 1.12  # the top holds the title and the headings, the bottom the key
OUTER_WIDTH, GAP, ROW_LABELS = 0.64, 0.12, 0.76
ROW_HEIGHT = {1: 0.9, 2: 0.62, 3: 0.5}  # fewer components, taller rows
WIDEST = 1.5


@dataclass(frozen=True)
class HeatCell:
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

    def is_in_row(self, row: str) -> bool:
        return self.group.block is not None and self.group.component == row


@dataclass(frozen=True)
class Box:
    """Where a cell lies, in inches from the figure's top left."""

    left: float
    top: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


def heatmap_cells(run: RunFiles, step: int | None = None) -> list[HeatCell]:
    """A cell for each group of the plan, at a report of deltas; at the last one where no step is given."""
    last = run.deltas.steps[-1] if run.deltas.steps else None
    return [cell_of(run, group, last if step is None else step) for group in run.groups()]


def cell_of(run: RunFiles, group: Group, step: int | None) -> HeatCell:
    """A group's cell at a step with a report; `step` is None where the run has no report."""
    trained = group.trained_names
    if set(group.names) - set(trained) & set(run.audit["frozen"]["changed"]):
        return HeatCell(group, None, "changed")
    if not trained:
        return HeatCell(group, 0.0, "frozen")
    relative = None if step is None else run.deltas.relative_delta(trained, step)
    if relative is None:
        return HeatCell(group, None, "unknown")
    if relative == 0:
        return HeatCell(group, 0.0, "still")
    return HeatCell(group, relative, "partly" if len(trained) < len(group.names) else "trained")


def block_components(cells: Sequence[HeatCell]) -> list[str]:
    """The components that blocks have: the rows of the map, from top to bottom."""
    components = {cell.group.component for cell in cells if cell.group.block is not None}
    return sorted(components, key=lambda component: forward_order((0, component)))


def lay_out(cells: Sequence[HeatCell]) -> tuple[list[Box], list[str], float]:
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
        if len(boxes) == len(left) + len(inside):  # the first one right of the blocks: cells are in forward order
            at = start + blocks * block_width + GAP
        boxes.append(Box(at, TOP, OUTER_WIDTH, tall))
        at += OUTER_WIDTH
    return boxes, rows, TOP + tall + BOTTOM


# --- pictures: cells, colours, marks and their key


def draw_cell(axes: "Axes", cell: HeatCell, box: Box, colors, theme: Theme) -> None:
    thin = box.width < 0.2
    edge = {"edgecolor": theme.background, "linewidth": 0.3 if thin else 1.2}
    if cell.state in ("frozen", "changed"):
        draw_hatched(axes, box, cell.state, theme, edge)
        return
    face: Any = colors.to_rgba(cell.relative) if cell.relative else theme.background
    axes.add_patch(rectangle(box, facecolor=face, **edge))
    if cell.state in ("still", "unknown"):
        axes.add_patch(inner_frame(box, theme.muted))
    if cell.state == "partly":
        axes.add_patch(corner_mark(box, min(box.width, 0.36) * 0.4, theme))
    # without the percent sign, which the title of the scale says for all cells
    text = "moved" if cell.relative is None else percent(cell.relative)[:-1]
    size = min(8.0, 0.9 * box.width * 72 / (0.6 * len(text)))  # points; a digit is about 0.6 of the size wide
    if size > 6:  # smaller figures cannot be read; the colour and the alt text tell the value
        color = text_color(face, theme) if cell.relative else theme.ink
        axes.text(*box.middle, text, color=color, **centred(size))


def text_color(face: Sequence[float], theme: Theme) -> str:
    """Black or white, whichever stands out more against `face` (relative luminance of WCAG 2)."""
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in face[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # black and white stand out alike where (L + 0.05)^2 = 1.05 x 0.05, at L = 0.179
    return "#101418" if luminance > 0.18 else "#ffffff"


def color_scale(cells: Sequence[HeatCell], theme: Theme):
    """What gives a relative delta its colour (a `ScalarMappable`)."""
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(norm=color_norm(cells), cmap=mixed(theme.scale))


def color_norm(cells: Sequence[HeatCell]) -> "Normalize":
    """Logarithmic where the largest relative delta is more than 8 times the smallest, else linear from 0."""
    from matplotlib.colors import LogNorm, Normalize

    moved = [cell.relative for cell in cells if cell.relative]
    if not moved:
        return Normalize(0.0, 1.0)
    if max(moved) > 8 * min(moved):
        return LogNorm(min(moved), max(moved))
    return Normalize(0.0, max(moved))


def draw_key(canvas: "Canvas", axes: "Axes", cells: Sequence[HeatCell], colors, height: float, theme: Theme) -> None:
    """What the marks mean, at the lower left, and the scale of the colours at the lower right."""
    used = [state for state in STATES if any(cell.state == state for cell in cells)]
    left, right = MARGIN, MARGIN
    for at, state in enumerate(used):  # two rows, column by column, so that all five fit beside the scale
        if at % 2 == 0:
            left = right + (0.25 if at else 0)
        top = height - (0.58 if at % 2 == 0 and len(used) > 1 else 0.32)
        draw_swatch(axes, state, Box(left, top, 0.26, 0.17), theme)
        text = axes.text(left + 0.33, top + 0.085, STATES[state], va="center", fontsize=8.5, color=theme.ink)
        right = max(right, text.get_window_extent(canvas.canvas.get_renderer()).x1 / canvas.dpi)
    if any(cell.relative for cell in cells):
        draw_scale(canvas, colors, height, theme)


def draw_scale(canvas: "Canvas", colors, height: float, theme: Theme) -> None:
    """The colour bar; its outer labels end with it."""
    bar = canvas.add_axes((1 - (MARGIN + 2.6) / WIDTH, 0.27 / height, 2.6 / WIDTH, 0.11 / height))
    scale = canvas.colorbar(colors, cax=bar, orientation="horizontal")
    scale.outline.set_visible(False)
    scale.minorticks_off()
    ticks = scale_ticks(colors.norm)
    scale.set_ticks(ticks, labels=[percent(tick)[:-1] for tick in ticks])
    bar.tick_params(labelsize=8, colors=theme.muted, length=0, pad=2)
    for label, side in ((bar.get_xticklabels()[0], "left"), (bar.get_xticklabels()[-1], "right")):
        label.set_horizontalalignment(side)
    bar.set_title("relative delta (change / norm before, %)", fontsize=8.5, color=theme.ink, pad=3, loc="right")


def scale_ticks(norm: "Normalize") -> list[float]:
    """Ends of the scale and, where there is room, values between them."""
    low, high = norm.vmin, norm.vmax
    if low > 0:  # logarithmic: equal factors
        return [low * (high / low) ** (part / 3) for part in range(4)]
    return [high * part / 4 for part in range(5)]


def draw_swatch(axes: "Axes", state: str, box: Box, theme: Theme) -> None:
    if state in ("frozen", "changed"):
        draw_hatched(axes, box, state, theme, {"edgecolor": theme.hatch, "linewidth": 0.6})
    elif state == "partly":
        axes.add_patch(rectangle(box, facecolor=theme.scale[2]))
        axes.add_patch(corner_mark(box, 0.11, theme))
    else:
        axes.add_patch(inner_frame(box, theme.muted))


def draw_hatched(axes: "Axes", box: Box, state: str, theme: Theme, edge: Mapping) -> None:
    """A frozen cell; one that changed all the same gets a frame and a mark."""
    # two patches: matplotlib draws the hatching in the colour of the edge, and the edge is to be another
    axes.add_patch(rectangle(box, facecolor=theme.frozen, hatch="////", edgecolor=theme.hatch, linewidth=0.0))
    axes.add_patch(rectangle(box, facecolor="none", **edge))
    if state == "changed":
        axes.add_patch(inner_frame(box, theme.alarm, linewidth=min(2.0, 8 * box.width)))
        size = min(12, 30 * box.width, 50 * box.height)
        axes.text(*box.middle, "!", color=theme.alarm, weight="bold", **centred(size))


def rectangle(box: Box, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((box.left, box.top), box.width, box.height, **style)


def inner_frame(box: Box, color: str, linewidth: float = 1.0):
    inset = min(0.04, box.width * 0.1)
    inner = Box(box.left + inset, box.top + inset, box.width - 2 * inset, box.height - 2 * inset)
    return rectangle(inner, facecolor="none", edgecolor=color, linewidth=linewidth)


def corner_mark(box: Box, side: float, theme: Theme):
    """The turned corner of a cell of which a part is frozen."""
    from matplotlib.patches import Polygon

    right, top = box.left + box.width - 0.006, box.top + 0.006  # within the cell's edge
    corners = [(right - side, top), (right, top), (right, top + side)]
    return Polygon(corners, facecolor=theme.frozen, edgecolor=theme.background, linewidth=0.4)


def centred(size: float) -> dict:
    return {"ha": "center", "va": "center", "fontsize": size}
