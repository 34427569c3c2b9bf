"""The heat map of relative deltas: blocks from left to right as the data flows, components from top to bottom.

Embeddings stand left of the blocks, final norm and head right of them, each as a cell of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partialtune.pages.run_files import Group, RunFiles, forward_order
from partialtune.pages.themes import WIDTH, Theme, mixed, write_title
from partialtune.pages.wording import counted, percent, trained_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Canvas

# inches
MARGIN, TOP, BOTTOM = 0.1, 1.05, 1.12
OUTER_WIDTH, GAP, ROW_LABELS = 0.64, 0.12, 0.76
ROW_HEIGHT = {1: 0.9, 2: 0.62, 3: 0.5}
WIDEST = 1.5
STATES = {
    "frozen": "frozen, exactly 0",
    "partly": "partly frozen",
    "still": "trained, did not move",
    "changed": "frozen, but changed",
    "unknown": "moved from 0",
}


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


def heatmap_cells(run: RunFiles) -> list[Cell]:
    """A cell for each group of the plan, at the last report of deltas."""
    return [cell_of(run, group) for group in run.groups()]


def cell_of(run: RunFiles, group: Group) -> Cell:
    trained = group.trained_names
    if set(group.names) - set(trained) & set(run.audit["frozen"]["changed"]):
        return Cell(group, None, "changed")
    if not trained:
        return Cell(group, 0.0, "frozen")
    relative = run.deltas.relative_delta(trained, run.deltas.steps[-1]) if run.deltas.steps else None
    if relative is None:
        return Cell(group, None, "unknown")
    if relative == 0:
        return Cell(group, 0.0, "still")
    return Cell(group, relative, "partly" if len(trained) < len(group.names) else "trained")


def draw_heatmap(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    from matplotlib.cm import ScalarMappable

    cells = heatmap_cells(run)
    boxes, rows, height = lay_out(cells)
    canvas.set_size_inches(WIDTH, height)
    axes = canvas.add_axes((0, 0, 1, 1), facecolor=theme.ground, xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    when = f" in {counted(run.deltas.steps[-1], 'step')}" if run.deltas.steps else ""
    write_title(canvas, theme, f"How far each part moved{when}", trained_title(run))
    colors = ScalarMappable(norm=color_norm(cells), cmap=mixed(theme.scale))
    for cell, box in zip(cells, boxes, strict=True):
        draw_cell(axes, cell, box, colors, theme)
    label_rows(axes, rows, boxes, cells, theme)
    label_columns(axes, boxes, cells, run.head_is_tied, theme)
    draw_key(canvas, axes, cells, colors, height, theme)


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


def color_norm(cells: Sequence[Cell]) -> "Normalize":
    """Logarithmic where the largest relative delta is more than 8 times the smallest, else linear from 0."""
    from matplotlib.colors import LogNorm, Normalize

    moved = [cell.relative for cell in cells if cell.relative]
    if not moved:
        return Normalize(0.0, 1.0)
    if max(moved) > 8 * min(moved):
        return LogNorm(min(moved), max(moved))
    return Normalize(0.0, max(moved))


def draw_cell(axes: "Axes", cell: Cell, box: Box, colors, theme: Theme) -> None:
    from matplotlib.patches import Rectangle

    thin = box.width < 0.2
    corner = (box.left, box.top)
    edge = {"edgecolor": theme.ground, "linewidth": 0.3 if thin else 1.2}
    if cell.state in ("frozen", "changed"):
        draw_hatched(axes, box, cell.state, theme, edge)
        return
    face = colors.to_rgba(cell.relative) if cell.relative else theme.ground
    axes.add_patch(Rectangle(corner, box.width, box.height, facecolor=face, **edge))
    if cell.state in ("still", "unknown"):
        axes.add_patch(inner_frame(box, theme.muted))
    if cell.state == "partly":
        axes.add_patch(corner_mark(box, min(box.width, 0.36) * 0.4, theme))
    text = "moved" if cell.relative is None else percent(cell.relative)[:-1]
    size = min(8.0, 0.9 * box.width * 72 / (0.6 * len(text)))  # a digit is about 0.6 of the size wide
    if size > 6:
        color = text_color(face, theme) if cell.relative else theme.ink
        axes.text(box.left + box.width / 2, box.top + box.height / 2, text, color=color, **centred(size))


def draw_hatched(axes: "Axes", box: Box, state: str, theme: Theme, edge: Mapping) -> None:
    """A frozen cell; one that changed all the same gets a frame and a mark."""
    from matplotlib.patches import Rectangle

    corner, size = (box.left, box.top), (box.width, box.height)
    hatching = {"hatch": "////", "edgecolor": theme.hatch, "linewidth": 0.0}
    axes.add_patch(Rectangle(corner, *size, facecolor=theme.frozen, **hatching))
    axes.add_patch(Rectangle(corner, *size, facecolor="none", **edge))
    if state == "changed":
        axes.add_patch(inner_frame(box, theme.alarm, linewidth=min(2.0, 8 * box.width)))
        mark = dict(color=theme.alarm, weight="bold", **centred(min(12, 30 * box.width, 50 * box.height)))
        axes.text(box.left + box.width / 2, box.top + box.height / 2, "!", **mark)


def corner_mark(box: Box, side: float, theme: Theme):
    """The turned corner of a cell of which a part is frozen."""
    from matplotlib.patches import Polygon

    right, top = box.left + box.width - 0.006, box.top + 0.006  # within the cell's edge
    corners = [(right - side, top), (right, top), (right, top + side)]
    return Polygon(corners, facecolor=theme.frozen, edgecolor=theme.ground, linewidth=0.4)


def inner_frame(box: Box, color: str, linewidth: float = 1.0):
    from matplotlib.patches import Rectangle

    inset = min(0.04, box.width * 0.1)
    size = (box.width - 2 * inset, box.height - 2 * inset)
    return Rectangle((box.left + inset, box.top + inset), *size, facecolor="none", edgecolor=color, linewidth=linewidth)


def centred(size: float) -> dict:
    return {"ha": "center", "va": "center", "fontsize": size}


def text_color(face: Sequence[float], theme: Theme) -> str:
    """Black or white, whichever stands out more against `face` (relative luminance of WCAG 2)."""
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in face[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#101418" if luminance > 0.18 else "#ffffff"


def label_rows(axes: "Axes", rows: Sequence[str], boxes: Sequence[Box], cells: Sequence[Cell], theme: Theme) -> None:
    for row in rows:
        box = next(box for box, cell in zip(boxes, cells, strict=True) if is_in_row(cell, row))
        first = min(box.left for box, cell in zip(boxes, cells, strict=True) if cell.group.block is not None)
        axes.text(first - 0.08, box.top + box.height / 2, row, ha="right", va="center", fontsize=9, color=theme.ink)


def is_in_row(cell: Cell, row: str) -> bool:
    return cell.group.block is not None and cell.group.component == row


def label_columns(axes: "Axes", boxes: Sequence[Box], cells: Sequence[Cell], tied: bool, theme: Theme) -> None:
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
            axes.text(box.left + box.width / 2, bottom, part.replace("_", " "), **below)
            if tied and part == "tokens":
                axes.text(box.left + box.width / 2, bottom + 0.15, "(= head)", **below)
        headings[kind] = min(box.left, headings.get(kind, box.left))
    for kind, left in headings.items():
        axes.text(left, TOP - 0.06, kind, **above)
    widest = max((box.width for box in blocks.values()), default=1.0)
    every = next(2**power for power in range(20) if 2**power * widest >= 0.3)
    for block, box in blocks.items():
        if block % every == 0:
            axes.text(box.left + box.width / 2, bottom, str(block), **below)


def draw_key(canvas: "Canvas", axes: "Axes", cells: Sequence[Cell], colors, height: float, theme: Theme) -> None:
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


def draw_swatch(axes: "Axes", state: str, box: Box, theme: Theme) -> None:
    from matplotlib.patches import Rectangle

    if state in ("frozen", "changed"):
        draw_hatched(axes, box, state, theme, {"edgecolor": theme.hatch, "linewidth": 0.6})
    elif state == "partly":
        axes.add_patch(Rectangle((box.left, box.top), box.width, box.height, facecolor=theme.scale[2]))
        axes.add_patch(corner_mark(box, 0.11, theme))
    else:
        axes.add_patch(inner_frame(box, theme.muted))


def scale_ticks(norm: "Normalize") -> list[float]:
    """Ends of the scale and, where there is room, values between them."""
    low, high = norm.vmin, norm.vmax
    if low > 0:  # logarithmic: equal factors
        return [low * (high / low) ** (part / 3) for part in range(4)]
    return [high * part / 4 for part in range(5)]


def heatmap_alt(run: RunFiles) -> str:
    """The heat map in words: outer cells one by one, blocks as a range for each component."""
    cells = heatmap_cells(run)
    parts = [f"{cell.group.component} {in_words(cell)}" for cell in cells if cell.group.block is None]
    for row in block_components(cells):
        parts.append(row_in_words(row, [cell for cell in cells if is_in_row(cell, row)]))
    return f"Heat map of the relative weight change by block and component: {'; '.join(parts)}."


def in_words(cell: Cell) -> str:
    return percent(cell.relative) if cell.relative else STATES[cell.state]


def row_in_words(row: str, cells: Sequence[Cell]) -> str:
    """attention 0.41% to 0.87% in 2 blocks, frozen, exactly 0 in 10 blocks."""
    moved = [cell.relative for cell in cells if cell.relative]
    words = []
    if moved:
        ends = dict.fromkeys((percent(min(moved)), percent(max(moved))))
        words.append(f"{' to '.join(ends)} in {counted(len(moved), 'block')}")
    others = [cell.state for cell in cells if not cell.relative]
    words += [f"{STATES[state]} in {counted(others.count(state), 'block')}" for state in sorted(set(others))]
    return f"{row} {', '.join(words)}"
