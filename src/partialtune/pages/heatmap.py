"""The heat map of relative deltas: blocks from left to right, components from top to bottom, one cell a group."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from partialtune.pages.heatmap_key import STATES, centred, color_norm, corner_mark, draw_hatched, draw_key, inner_frame
from partialtune.pages.heatmap_layout import TOP, Box, Cell, block_components, heatmap_cells, is_in_row, lay_out
from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import WIDTH, Theme, mixed, write_title
from partialtune.pages.wording import trained_title
from partialtune.words import counted, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


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
