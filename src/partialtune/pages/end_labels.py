"""Labels at the ends of lines, moved apart where they would overlap."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from partialtune.pages.themes import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    over = max([0.0, *(place - 1.0 for place in moved)])
    above = math.inf
    for at in sorted(range(len(places)), key=lambda index: -moved[index]) if over else ():
        above = moved[at] = max(0.0, min(moved[at], 1.0, above - gap))
    return moved
