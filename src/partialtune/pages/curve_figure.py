"""The figure of learning curves: bits per byte of every scored text over the steps, a panel a text."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import WIDTH, Theme, write_title
from partialtune.pages.wording import score, score_change, text_label
from partialtune.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PREFIX = "bits_per_byte/"
MOST_PANELS, COLUMNS = 9, 3
LEAST_RANGE = 0.04  # of the value at the start: a smaller change is not to look like a large one
# inches
TOP, PANEL, PANEL_GAP, BOTTOM = 0.72, 1.55, 0.72, 0.52


@dataclass(frozen=True)
class Curve:
    """Bits per byte of one text over steps; `sampled` windows, None where the whole text was scored."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    sampled: int | None

    @property
    def learnt(self) -> bool:
        return self.values[-1] < self.values[0]

    @property
    def is_level(self) -> bool:
        """Whether the ends are equal to a tenth of a percent."""
        return abs(self.values[-1] - self.values[0]) < 0.001 * self.values[0]

    @property
    def words(self) -> str:
        """3.755 → 2.291 (−39.0%)."""
        first, last = self.values[0], self.values[-1]
        pair = " → ".join(score("bits_per_byte", value) for value in (first, last))
        return f"{pair} ({score_change('bits_per_byte', first, last)})"


def learning_curves(run: RunFiles) -> list[Curve]:
    """A curve for each text with two points or more, in the order of `run.texts`."""
    points: dict[str, dict[int, float]] = {name: {} for name in run.texts}
    for entry in run.log:
        for key, value in entry.items():
            if key.startswith(PREFIX):
                points.setdefault(key.removeprefix(PREFIX), {})[entry["step"]] = float(value)
    held_out = points.get("validation")
    if held_out:  # Trainer does not evaluate before the first step; the score of the whole text is the same figure
        for step, side in ((0, "before"), (max(held_out), "after")):
            value = run.texts.get("validation", {}).get(side, {}).get("bits_per_byte")
            if value is not None:
                held_out.setdefault(step, value)
    sampled = run.insight.get("learning_curves", {}).get("windows", {})
    curves = []
    for name, values in points.items():
        known = sorted((step, value) for step, value in values.items() if math.isfinite(value))
        if len(known) > 1:
            curves.append(Curve(name, *(tuple(column) for column in zip(*known, strict=True)), sampled.get(name)))
    return curves


def has_curves(run: RunFiles) -> bool:
    return bool(learning_curves(run))


def draw_curves(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    curves = learning_curves(run)
    shown = curves[:MOST_PANELS]
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    height = TOP + 0.36 + lines * PANEL + (lines - 1) * PANEL_GAP + BOTTOM
    canvas.set_size_inches(WIDTH, height)
    more = f", the first {MOST_PANELS} of {len(curves)} texts" if len(curves) > MOST_PANELS else ""
    write_title(canvas, theme, "Learnt and forgotten", f"Bits per byte over optimizer steps, lower is better{more}")
    left, gap = 0.62, 0.62
    wide = (WIDTH - left - 0.2 - (columns - 1) * gap) / columns
    for number, curve in enumerate(shown):
        line, column = divmod(number, columns)
        top = TOP + 0.36 + line * (PANEL + PANEL_GAP)
        place = ((left + column * (wide + gap)) / WIDTH, 1 - (top + PANEL) / height, wide / WIDTH, PANEL / height)
        draw_curve(canvas.add_axes(place, facecolor=theme.ground), curve, theme)


def draw_curve(axes: "Axes", curve: Curve, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    color = theme.muted if curve.is_level else theme.lines[0] if curve.learnt else theme.lines[1]
    axes.axhline(curve.values[0], color=theme.muted, linewidth=1, linestyle=(0, (2, 3)))
    axes.plot(curve.steps, curve.values, color=color, linewidth=2, marker="o", markersize=3)
    low, high = min(curve.values), max(curve.values)
    spare = max(0.0, LEAST_RANGE * curve.values[0] - (high - low)) / 2 + 0.08 * (high - low)
    axes.set_ylim(low - spare, high + spare)
    axes.set_xlim(0, curve.steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.rule)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0, pad=4)
    axes.grid(axis="y", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    name = text_label(curve.name)
    name = name if len(name) <= 30 else f"{name[:29]}…"
    above = {"transform": axes.transAxes, "va": "bottom", "fontsize": 9, "parse_math": False}
    axes.text(0, 1.16, name, color=theme.ink, weight="bold", **above)
    axes.text(0, 1.04, curve.words, color=color, **above)


def curves_alt(run: RunFiles) -> str:
    """The curves in words."""
    parts = [
        f"{text_label(curve.name)} {curve.words}" + (f" on {counted(curve.sampled, 'window')}" if curve.sampled else "")
        for curve in learning_curves(run)
    ]
    return f"Line charts of bits per byte over steps, a panel a text: {'; '.join(parts)}."
