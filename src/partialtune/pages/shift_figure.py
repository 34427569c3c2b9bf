"""The figure of the next-token shift: how many held-out tokens became likelier, and by how many bits."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import Theme, titled_axes
from partialtune.words import change, count, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def shift(run: RunFiles) -> Mapping[str, Any]:
    """`next_token_shift` of `insight.json`; empty where the run has none, or none of its scores was finite."""
    found = run.insight.get("next_token_shift") or {}
    return found if found.get("positions") else {}


def has_shift(run: RunFiles) -> bool:
    return bool(shift(run))


def draw_shift(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    found = shift(run)
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    shares = [100 * number / found["positions"] for number in counts]
    subtitle = f"{count(found['positions'])} held-out tokens, {percent(found['rose_share'])} of them became likelier"
    axes = titled_axes(canvas, theme, "How far the probabilities shifted", subtitle, top=0.8)
    colors = [theme.lines[0] if left >= 0 else theme.lines[1] for left in edges[:-1]]
    axes.bar(edges[:-1], shares, width=0.92 * (edges[1] - edges[0]), align="edge", color=colors)
    axes.axvline(0, color=theme.muted, linewidth=1)
    mean = found["mean_bits"]
    axes.axvline(mean, color=theme.ink, linewidth=1.4, linestyle=(0, (4, 2)))
    side = {"ha": "left" if mean >= 0 else "right", "va": "top", "fontsize": 9, "color": theme.ink}
    gap = 0.15 if mean >= 0 else -0.15
    axes.text(mean + gap, 0.99, f"mean {change(mean, 2)} bits", transform=axes.get_xaxis_transform(), **side)
    axes.set_ylabel("share of the tokens (%)")
    axes.set_xlabel("change of the probability (bits: log2 of after over before)")
    reach = widest_shift(edges, counts)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(bottom=0)
    ends = {"fontsize": 9, "va": "bottom", "transform": axes.transAxes}
    axes.text(0, 1.02, "less likely", color=theme.lines[1], ha="left", **ends)
    axes.text(1, 1.02, "likelier", color=theme.lines[0], ha="right", **ends)


def widest_shift(edges: Sequence[float], counts: Sequence[int]) -> float:
    """Bits from 0 to the outer end of the outermost bin that holds a token, at least 2."""
    ends = [max(abs(left), abs(right)) for (left, right), n in zip(pairwise(edges), counts, strict=True) if n]
    return max([2.0, *ends])


def shift_alt(run: RunFiles) -> str:
    """The histogram in words."""
    found = shift(run)
    return (
        f"Histogram of the change in probability of {count(found['positions'])} held-out tokens: "
        f"{percent(found['rose_share'])} became likelier, by {change(found['mean_bits'], 2)} bits on average over all."
    )
