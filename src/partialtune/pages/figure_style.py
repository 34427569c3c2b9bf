"""How all figures look: colours that colour-blind readers can tell apart, titles and axes, labels at ends of lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH, HEIGHT = 8.0, 4.2  # inches
PIXELS_PER_INCH = 200  # 1,600 pixels: sharp where the figure is shown 800 wide
MOST_LINES = 8  # of one figure: colours and labels can tell no more apart


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. Most `lines` are Okabe and Ito's, in lighter forms on a dark background.

    Attributes:
        background, ink, muted, rule: Background, text, secondary text, grid lines.
        lines: Colours of lines, in the order of use.
        alarm: What must not be: non-finite losses, frozen parameters that changed.
        frozen, hatch: Face and hatching of frozen cells.
        scale: Colours of the heat map, from little to much movement.
    """

    background: str
    ink: str
    muted: str
    rule: str
    lines: tuple[str, ...]
    alarm: str
    frozen: str
    hatch: str
    scale: tuple[str, ...]

    @property
    def legend(self) -> dict[str, Any]:
        return {"frameon": False, "fontsize": 9, "labelcolor": self.ink, "handlelength": 1.6, "columnspacing": 1.4}


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#656d76",
    rule="#e4e8ec",
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7d4fa8", "#8c6d31"),
    alarm="#c1121f",
    frozen="#f1f3f5",
    hatch="#c3cad1",
    scale=("#d6e6f4", "#abd0e6", "#6aaed6", "#3787c0", "#105ba4", "#08306b"),
)
DARK = Theme(
    background="#161b22",
    ink="#e6edf3",
    muted="#9aa4ae",
    rule="#2d343c",
    lines=("#56b4e9", "#f0883e", "#2bc4a0", "#e29bc4", "#f0e442", "#8ab4ff", "#b79be0", "#d0b98a"),
    alarm="#ff7b72",
    frozen="#20262d",
    hatch="#434c56",
    scale=("#12395e", "#1d5a8c", "#3280b8", "#5fa8d6", "#9ccdec", "#e3f2fd"),
)


def titled_axes(
    canvas: "Canvas", theme: Theme, title: str, subtitle: str, right: float = 0.975, top: float = 0.78
) -> "Axes":
    """Axes over optimizer steps with a title and what trained below it, both aligned with the figure's left edge.

    `right` and `top` are where the axes end, as shares of the figure's width and height.
    """
    from matplotlib.ticker import MaxNLocator

    left, bottom = 0.095, 0.115
    axes = canvas.add_axes((left, bottom, right - left, top - bottom), facecolor=theme.background)
    write_title(canvas, theme, title, subtitle)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.rule)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0, pad=5)
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("optimizer step", color=theme.ink, fontsize=9.5)
    axes.yaxis.label.set(color=theme.ink, fontsize=9.5)
    return axes


def write_title(canvas: "Canvas", theme: Theme, title: str, subtitle: str) -> None:
    """Title and subtitle at the top left. A selector may hold a dollar sign: it is no formula."""
    height = canvas.get_figheight()
    canvas.text(
        0.012, 1 - 0.13 / height, title, va="top", fontsize=13, weight="bold", color=theme.ink, parse_math=False
    )
    canvas.text(0.012, 1 - 0.40 / height, subtitle, va="top", fontsize=9.5, color=theme.muted, parse_math=False)


def mixed(scale: Sequence[str]):
    """The colour map that runs through `scale`."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("partialtune", list(scale))


# --- labels at the ends of lines
# Not `adjustText` (tried, 1.4): it draws no strokes from a line's end to its label in the line's colour, needs scipy,
# and moves labels that nothing overlaps. Moving them along one axis is the sorting that `spread` does.


def label_ends(axes: "Axes", labels: Sequence[tuple[float, str, str]], theme: Theme) -> None:
    """Write each line's label right of its end, moved apart where they would overlap, with a stroke from the end."""
    to_share = axes.transData.transform
    to_axes = axes.transAxes.inverted().transform
    ends = [to_axes(to_share((0, value)))[1] for value, _, _ in labels]
    places = spread(ends, gap=0.062)
    for end, place, (_, text, color) in zip(ends, places, labels, strict=True):
        stroke = {"transform": axes.transAxes, "color": color, "clip_on": False, "linewidth": 1.2}
        axes.plot([1.0, 1.02, 1.03], [end, place, place], **stroke)
        axes.text(1.038, place, text, transform=axes.transAxes, va="center", fontsize=9, color=theme.ink)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move numbers apart, in their order, until neighbours are at least `gap` from each other and none lies below 0.

    spread([0.0, 0.01, 0.5], gap=0.1) -> [0.0, 0.1, 0.5]
    """
    moved = [0.0] * len(places)
    below = -gap
    for at in sorted(range(len(places)), key=lambda index: places[index]):
        below = moved[at] = max(places[at], below + gap)
    # moving up may have pushed the uppermost beyond 1: then once more, from the top down
    over = max([0.0, *(place - 1.0 for place in moved)])
    above = math.inf
    for at in sorted(range(len(places)), key=lambda index: -moved[index]) if over else ():
        above = moved[at] = max(0.0, min(moved[at], 1.0, above - gap))
    return moved
