"""The figure of relative deltas over steps: a line for each trained group, and the frozen part at exactly 0."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partialtune.pages.end_labels import label_ends
from partialtune.pages.run_files import Group, RunFiles
from partialtune.pages.themes import Theme, titled_axes
from partialtune.pages.wording import trained_title
from partialtune.words import joined, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MOST_LINES = 8  # more lines than colours and labels can tell apart are drawn as one line a component


@dataclass(frozen=True)
class Series:
    """One line of the delta figure: relative delta of some parameters taken together, at each step."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


def delta_series(run: RunFiles) -> list[Series]:
    """Relative deltas of the trained groups, largest at the end first; one line a component where groups are many."""
    groups = [group for group in run.groups() if group.trained_names]
    named = {group.label: group.trained_names for group in groups}
    if len(named) > MOST_LINES:
        named = by_component(groups)
    series = [series_of(run, label, names) for label, names in named.items()]
    return sorted(series, key=lambda line: -(line.values[-1] or 0.0))


def by_component(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Label -> trained parameters of a component in all blocks taken together."""
    places: dict[tuple[bool, str], list[Group]] = {}
    for group in groups:
        places.setdefault((group.block is None, group.component), []).append(group)
    return {
        component if outside else f"{component}, {len(members)} block{'s' if len(members) > 1 else ''}": [
            name for group in members for name in group.trained_names
        ]
        for (outside, component), members in places.items()
    }


def series_of(run: RunFiles, label: str, names: Sequence[str]) -> Series:
    """The line of `names`. Before the first step nothing has moved, so every line starts at (0, 0)."""
    steps = run.deltas.steps
    return Series(label, (0, *steps), (0.0, *(run.deltas.relative_delta(names, step) for step in steps)))


def draw_deltas(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    axes = titled_axes(canvas, theme, "Weight change since the start", trained_title(run), right=0.73, top=0.83)
    axes.set_ylabel("relative delta (change / norm before, %)")
    if not run.deltas.steps:
        axes.text(0.5, 0.5, "No deltas were reported.", transform=axes.transAxes, ha="center", color=theme.muted)
        axes.set_yticks([])
        return
    labels = []  # (value at the end in %, text, colour)
    for at, line in enumerate(delta_series(run)):
        color = theme.lines[at % len(theme.lines)]
        shown = [(step, 100 * value) for step, value in zip(line.steps, line.values, strict=True) if value is not None]
        axes.plot(*zip(*shown, strict=True), color=color, linewidth=2)
        labels.append((shown[-1][1], f"{line.label}  {percent(line.values[-1])}", color))
    if run.frozen:
        labels.append(draw_frozen(axes, run, theme))
    axes.set_xlim(0, run.deltas.steps[-1])
    set_delta_scale(axes, [value for value, _, _ in labels if value > 0])
    label_ends(axes, labels, theme)


def draw_frozen(axes: "Axes", run: RunFiles, theme: Theme) -> tuple[float, str, str]:
    """The frozen parameters as one line, at exactly 0 unless the audit failed. Returns its label."""
    line = series_of(run, "frozen", [parameter["name"] for parameter in run.frozen])
    known = [(step, 100 * value) for step, value in zip(line.steps, line.values, strict=True) if value is not None]
    kept = len(known) == len(line.steps) and not any(value for _, value in known) and not run.audit["frozen"]["changed"]
    color = theme.muted if kept else theme.alarm
    axes.plot(*zip(*known, strict=True), color=color, linewidth=2.4, linestyle=(0, (5, 2)), clip_on=False, zorder=3)
    return known[-1][1], "frozen  exactly 0" if kept else "frozen, but changed", color


def set_delta_scale(axes: "Axes", ends: Sequence[float]) -> None:
    """Linear from 0 where the lines' ends lie near each other, else logarithmic with 0 at the bottom."""
    from matplotlib.ticker import FuncFormatter

    if ends and max(ends) / min(ends) > 30:
        smallest = 10.0 ** math.floor(math.log10(min(ends)))
        axes.set_yscale("symlog", linthresh=smallest, linscale=0.6)
        axes.set_ylim(0, max(ends) * 1.6)
        axes.set_yticks([0, *(smallest * 10**power for power in range(round(math.log10(max(ends) / smallest)) + 1))])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, max(ends, default=1.0) * 1.08)


def deltas_alt(run: RunFiles) -> str:
    """The figure of deltas over steps in words."""
    if not run.deltas.steps:
        return "Line chart of the weight change over steps: no deltas were reported."
    ends = [f"{line.label} {percent(line.values[-1])}" for line in delta_series(run)]
    kept = not run.audit["frozen"]["changed"]
    frozen = f"; the frozen part {'stays at exactly 0' if kept else 'changed'}" if run.frozen else ""
    step = f"{run.deltas.steps[-1]:,}"
    return f"Line chart of the relative weight change over steps. At step {step}: {joined(ends, 400)}{frozen}."
