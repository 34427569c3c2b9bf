"""What the marks and colours of a heat map mean, drawn below it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from partialtune.pages.heatmap_layout import MARGIN, Box, Cell
from partialtune.pages.themes import WIDTH, Theme
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


def color_norm(cells: Sequence[Cell]) -> "Normalize":
    """Logarithmic where the largest relative delta is more than 8 times the smallest, else linear from 0."""
    from matplotlib.colors import LogNorm, Normalize

    moved = [cell.relative for cell in cells if cell.relative]
    if not moved:
        return Normalize(0.0, 1.0)
    if max(moved) > 8 * min(moved):
        return LogNorm(min(moved), max(moved))
    return Normalize(0.0, max(moved))


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
