"""The frontier figure: held-out bits per byte against trainable parameters, seconds a step and peak memory.

A policy is on the frontier of a cost if none that costs as much or less has fewer bits per byte.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from partialtune.compare.outcomes import Row, Spread
from partialtune.metrics import HEADLINE
from partialtune.pages.figure_style import DARK, LIGHT, Theme, write_title
from partialtune.words import joined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

WIDTH, HEIGHT = 11.0, 4.6  # inches
PIXELS_PER_INCH = 150  # 1,650 pixels, shown 1,100 wide; below 150 kB
LEFT, RIGHT, BOTTOM, TOP, GAP = 0.055, 0.992, 0.115, 0.83, 0.022  # shares of the figure
LABEL_SIZE = 8.0  # points
DISTANCES = (7, 13, 20, 28, 37, 47, 58)  # points from a marker's middle to its label


@dataclass(frozen=True)
class Axis:
    """A cost: its key in files, its title, its value of a policy, and whether its axis is logarithmic."""

    key: str
    title: str
    value: Callable[[Row], Spread | None]
    log: bool = False


AXES = (
    Axis("parameters", "trainable parameters", lambda row: Spread(float(row.trainable), None), log=True),
    Axis("time", "seconds a step", lambda row: row.spread("step_seconds")),
    Axis("memory", "peak memory of the process (MB)", lambda row: row.spread("peak_memory_mb")),
)


@dataclass(frozen=True)
class Point:
    """A policy in one panel: its cost, its bits per byte, and the standard deviation of these."""

    name: str
    cost: float
    quality: float
    deviation: float | None
    on_frontier: bool


def points_of(rows: Sequence[Row], axis: Axis) -> list[Point]:
    """Policies that have both a cost and a score, cheapest first."""
    known = [(row.name, axis.value(row), row.spread("after")) for row in rows]
    # cheapest first, and of equal cost the best first, so that one pass finds the frontier
    known = sorted(((n, c, q) for n, c, q in known if c and q), key=lambda entry: (entry[1].mean, entry[2].mean))
    points, best = [], float("inf")
    for name, cost, quality in known:
        points.append(Point(name, cost.mean, quality.mean, quality.deviation, quality.mean < best))
        best = min(best, quality.mean)
    return points


def frontier_of(rows: Sequence[Row], axis: Axis) -> list[str]:
    """Names of the policies on the frontier of a cost, cheapest first."""
    return [point.name for point in points_of(rows, axis) if point.on_frontier]


def frontier_alt(rows: Sequence[Row]) -> str:
    """The figure in words."""
    before, after = before_of(rows), [row.spread("after") for row in rows]
    scores = sorted(spread.mean for spread in after if spread)
    if not scores:
        return "Three scatter charts of bits per byte against cost: no run has a score."
    span = f"from {HEADLINE.words(scores[0])} to {HEADLINE.words(scores[-1])}"
    parts = [f"by {axis.title}: {', '.join(frontier_of(rows, axis)) or 'unknown'}" for axis in AXES]
    start = f", {HEADLINE.words(before)} before training" if before else ""
    return (
        f"Three scatter charts of held-out bits per byte after training, {span}{start}. "
        f"On the frontier, cheapest first, {'; '.join(parts)}."
    )


def before_of(rows: Sequence[Row]) -> float | None:
    """The base's bits per byte of the held-out text."""
    return next((spread.mean for row in rows if (spread := row.spread("before"))), None)


def render_frontier(rows: Sequence[Row], subtitle: str, dark: bool = False) -> bytes:
    """The figure as PNG, on a light or a dark background."""
    buffer = io.BytesIO()
    described = {"Description": frontier_alt(rows), "Software": "partialtune"}
    draw_frontier(rows, subtitle, DARK if dark else LIGHT).savefig(buffer, format="png", metadata=described)
    return buffer.getvalue()


def draw_frontier(rows: Sequence[Row], subtitle: str, theme: Theme) -> "Canvas":
    """Three panels side by side, which share the axis of bits per byte."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, HEIGHT), dpi=PIXELS_PER_INCH, facecolor=theme.background)
    FigureCanvasAgg(canvas)
    write_title(canvas, theme, "Quality against cost", subtitle)
    width = (RIGHT - LEFT - (len(AXES) - 1) * GAP) / len(AXES)
    panels: list[tuple[Axes, list[Point]]] = []
    for number, axis in enumerate(AXES):
        place = (LEFT + number * (width + GAP), BOTTOM, width, TOP - BOTTOM)
        axes = canvas.add_axes(place, facecolor=theme.background, sharey=panels[0][0] if panels else None)
        panels.append((axes, points_of(rows, axis)))
        draw_panel(axes, panels[-1][1], axis, theme, leftmost=number == 0)
    label_all(canvas, panels, theme)
    return canvas


def draw_panel(axes: "Axes", points: Sequence[Point], axis: Axis, theme: Theme, leftmost: bool) -> None:
    """Markers with bars of one standard deviation, the frontier as a stepped line."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.rule)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0, pad=4, labelleft=leftmost, which="both")
    axes.grid(color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(axis.title, color=theme.ink, fontsize=9)
    if leftmost:
        axes.set_ylabel("held-out bits per byte, after", color=theme.ink, fontsize=9)
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=theme.muted)
        return
    if axis.log:
        axes.set_xscale("log")
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(lambda value, _: tick_words(value))
    edge = [point for point in points if point.on_frontier]
    costs, scores = [point.cost for point in edge], [point.quality for point in edge]
    axes.plot(costs, scores, drawstyle="steps-post", color=theme.lines[0], linewidth=1.2, alpha=0.6)
    for point in points:
        colour = theme.lines[0] if point.on_frontier else theme.muted
        axes.errorbar(
            point.cost,
            point.quality,
            yerr=point.deviation,
            marker="o",
            markersize=5.5,
            color=colour,
            markeredgecolor=theme.background,
            markeredgewidth=0.8,
            elinewidth=1.2,
        )
    axes.margins(x=0.16, y=0.14)


def tick_words(value: float) -> str:
    """1000000 -> 1M, 10000 -> 10k, 2500 -> 2,500, 0.25 -> 0.25."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * factor or value == factor:
            return f"{value / factor:,g}{unit}"
    return f"{value:,g}"


# --- labels: each beside its point, none upon another
# Not `adjustText` (tried, 1.4): it takes no account of the frontier's line and of bars, and put labels upon both.


def label_all(canvas: "Canvas", panels: Sequence[tuple["Axes", Sequence[Point]]], theme: Theme) -> None:
    """Write each policy's name beside its point, at the nearest place that is free of labels, markers and lines."""
    canvas.draw_without_rendering()
    for axes, points in panels:
        centres = {point.name: axes.transData.transform((point.cost, point.quality)) for point in points}
        edge = [centres[point.name] for point in points if point.on_frontier]
        # pixels: a marker of 5.5 points at 150 pixels an inch is 11.5 wide, and a little air
        taken = [_box(x - 7, y - 7, x + 7, y + 7) for x, y in centres.values()]
        for (x0, y0), (x1, y1) in pairwise(edge):  # to the right, then down
            taken += [_box(x0, y0 - 1, x1, y0 + 1), _box(x1 - 1, y1, x1 + 1, y0)]
        for point in points:
            taken.append(label_one(axes, point, taken, theme))


def label_one(axes: "Axes", point: Point, taken: Sequence["Bbox"], theme: Theme) -> "Bbox":
    """Write one label where fewest things stand, at the first place where none does, and return its box."""
    from matplotlib.text import Text

    tried = []
    for number, (offset, alignment) in enumerate(label_places()):
        label = annotate(axes, point, offset, alignment, theme)
        label.get_window_extent()  # puts it there; the box of the text alone follows, without the line to the point
        box = Text.get_window_extent(label)
        label.remove()
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 + 6 and axes.bbox.y0 <= box.y0 <= axes.bbox.y1
        # outside weighs more than any few overlaps: a label that the figure's edge cuts cannot be read at all
        tried.append((sum(map(box.overlaps, taken)) + 10 * (not inside), number, offset, alignment, box))
        if tried[-1][0] == 0:
            break
    _, _, offset, alignment, box = min(tried, key=lambda place: place[:2])
    annotate(axes, point, offset, alignment, theme)
    return box


def label_places() -> Iterator[tuple[tuple[float, float], tuple[str, str]]]:
    """(offset in points, alignment) around a marker, the nearest first; to the right and above before the others."""
    for distance in DISTANCES:
        slant = 0.6 * distance
        yield (distance, 0), ("left", "center")
        for x, y in ((slant, slant), (slant, -slant), (-slant, slant), (-slant, -slant)):
            yield (x, y), ("left" if x > 0 else "right", "bottom" if y > 0 else "top")
        yield (-distance, 0), ("right", "center")
        yield (0, distance), ("center", "bottom")
        yield (0, -distance), ("center", "top")


def annotate(
    axes: "Axes", point: Point, offset: tuple[float, float], alignment: tuple[str, str], theme: Theme
) -> "Annotation":
    """The label of a point; from further away with a thin line to it."""
    far = max(map(abs, offset)) > DISTANCES[0]
    line = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if far else None
    return axes.annotate(
        joined([point.name], 24),
        (point.cost, point.quality),
        xytext=offset,
        textcoords="offset points",
        ha=alignment[0],
        va=alignment[1],
        fontsize=LABEL_SIZE,
        color=theme.ink if point.on_frontier else theme.muted,
        weight="bold" if point.on_frontier else "normal",
        arrowprops=line,
        parse_math=False,
        annotation_clip=False,
    )


def _box(x0: float, y0: float, x1: float, y1: float) -> "Bbox":
    """A box in pixels of the canvas."""
    from matplotlib.transforms import Bbox

    return Bbox([[x0, y0], [x1, y1]])
