"""Runs of smollm2_frontier.py -> the figures of docs/real-model.md, each with a digest of what it draws in its file."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smollm2_frontier import Row
from smollm2_statistics import TARGETS, block_rows, forgotten, gain, mean_of, summaries

from partialtune.compare.frontier import Point, label_all
from partialtune.pages.figure_style import HEIGHT, LIGHT, PIXELS_PER_INCH, WIDTH, mixed, spread, write_title

DIGEST = "Digest"  # of what a figure draws, among the texts of its file
FRONTIER, FRONTIER_WORDS = "real-model-frontier.png", "Gain on held-out text against what is forgotten"
BLOCKS_FIGURE, BLOCKS_WORDS = "real-model-blocks.png", "Gain and forgetting of each block alone"


def draw_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The frontier, and the blocks, as far as they have been measured."""
    found = []
    if summaries(rows):
        found.append(draw_frontier(rows, folder / FRONTIER))
    if block_rows(rows):
        found.append(draw_blocks(rows, folder / BLOCKS_FIGURE))
    return found


def frontier_lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Policy -> what it forgets of Python's reference and what it gains, from its lowest rate to the chosen one."""
    found = {}
    for one in summaries(rows):
        scored = [row for row in one.own if row.rate <= one.rate and row.held_out_after is not None]
        at = [[row for row in scored if row.rate == rate] for rate in sorted({row.rate for row in scored})]
        found[one.name] = [(mean_of(runs, forgotten("python")), mean_of(runs, gain)) for runs in at]
    return found


def draw_frontier(rows: Sequence[Row], file: Path) -> Path:
    """Gain against what is forgotten of Python's reference: a point a policy, and its lower rates on a line to it."""
    from matplotlib.patheffects import withStroke

    words = "SmolLM2-135M-Instruct on Gulliver's Travels, 100 steps; lines: lower rates; darker: more of it trains"
    canvas, axes = _axes("Gain against forgetting", words, 0.975)
    colours, points = mixed(LIGHT.scale), []
    drawn = frontier_lines(rows)
    for one in summaries(rows):
        share = one.rows[0].trainable / one.rows[0].total
        x, y = one.mean(forgotten("python")), one.mean(gain)
        colour = colours(max(0.0, 1 + math.log10(max(share, 1e-6)) / 6))
        line = {"marker": "o", "markersize": 2.5, "linewidth": 0.8, "color": colour, "alpha": 0.5, "zorder": 1}
        axes.plot(*zip(*drawn[one.name], strict=True), **line)
        marker = {"marker": "o", "markersize": 7, "color": colour, "markeredgecolor": LIGHT.ink}
        bars = {"xerr": one.deviation(forgotten("python")), "yerr": one.deviation(gain)}
        axes.errorbar(x, y, **bars, **marker, elinewidth=1, zorder=2)
        points.append(Point(one.label, x, y, None, on_frontier=False))
    axes.set_xlabel("forgotten of Python's reference, bits per byte", color=LIGHT.ink)
    axes.set_ylabel("gain on held-out text, bits per byte", color=LIGHT.ink)
    axes.margins(0.1)
    label_all(canvas, [(axes, points)], LIGHT)
    for label in axes.texts:  # over bars and lines, which would strike it out
        label.set(zorder=4, path_effects=[withStroke(linewidth=3, foreground=LIGHT.background)])
    canvas.savefig(file, metadata={DIGEST: frontier_digest(rows)})
    return file


def frontier_digest(rows: Sequence[Row]) -> str:
    """Of what the figure draws."""
    values = (forgotten("python"), gain)
    marks = [(one.name, *(one.cell(value) for value in values)) for one in summaries(rows)]
    return _digest([marks, frontier_lines(rows)])


def blocks_digest(rows: Sequence[Row]) -> str:
    """Of what the figure draws."""
    return _digest(
        {
            block: [[value(row) for row in runs] for value in TARGETS.values()]
            for block, runs in block_rows(rows).items()
        }
    )


def _digest(drawn: Any) -> str:
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def draw_blocks(rows: Sequence[Row], file: Path) -> Path:
    """Gain and forgetting of every block alone: a point a seed, a line through their means."""
    canvas, axes = _axes(
        "Where it pays to train", "Each block alone, 3,540,096 parameters, 100 steps; a point a seed", 0.75
    )
    found = block_rows(rows)
    labels = {"gain": gain, "Python forgotten": forgotten("python"), "Persuasion forgotten": forgotten("novel")}
    ends = []
    for (label, value), colour in zip(labels.items(), LIGHT.lines, strict=False):
        means = [mean_of(runs, value) for runs in found.values()]
        axes.plot(list(found), means, color=colour, linewidth=1.4)
        seeds = [(block, value(row)) for block, runs in found.items() for row in runs]
        axes.plot(*zip(*seeds, strict=True), marker="o", markersize=3, linewidth=0, color=colour)
        ends.append((max(found), means[-1], label))
    axes.axhline(0, color=LIGHT.muted, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block", color=LIGHT.ink)
    axes.set_ylabel("bits per byte", color=LIGHT.ink)
    _name_at_the_right(axes, ends)
    canvas.savefig(file, metadata={DIGEST: blocks_digest(rows)})
    return file


def _axes(title: str, subtitle: str, right: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH, HEIGHT + 0.8), dpi=PIXELS_PER_INCH, facecolor=LIGHT.background)
    FigureCanvasAgg(canvas)
    write_title(canvas, LIGHT, title, subtitle)
    axes = canvas.add_axes((0.105, 0.12, right - 0.105, 0.71), facecolor=LIGHT.background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT.rule)
    axes.tick_params(colors=LIGHT.muted, labelsize=9, length=0)
    axes.grid(color=LIGHT.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    return canvas, axes


def _name_at_the_right(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names in a column right of the axes, in the order of their heights, each with a line to its point."""
    axes.autoscale_view()  # else the limits are found when the figure is drawn, after the heights
    to_axes = axes.transAxes.inverted().transform
    heights = [to_axes(axes.transData.transform((x, y)))[1] for x, y, _ in points]
    for (x, y, label), place in zip(points, spread(heights, gap=0.062), strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=LIGHT.ink,
            arrowprops={"arrowstyle": "-", "color": LIGHT.hatch, "linewidth": 0.7, "shrinkB": 4},
            annotation_clip=False,
        )
