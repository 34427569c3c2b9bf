"""The figures over optimizer steps: the loss, learning curves in bits per byte, and how far the weights moved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partialtune.metrics import HEADLINE, METRICS
from partialtune.pages.figure_style import MOST_LINES, WIDTH, Theme, label_ends, titled_axes, write_title
from partialtune.pages.findings import text_label, trained_title
from partialtune.pages.run_files import Group, RunFiles
from partialtune.words import counted, joined, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

nats = METRICS["loss"].words
CURVE_KEYS = f"{HEADLINE.key}/"  # and the text's name: keys of the log
MOST_PANELS, COLUMNS = 9, 3
LEAST_RANGE = 0.04  # of the value at the start: a smaller change is not to look like a large one
# inches
TOP, PANEL, PANEL_GAP, BOTTOM = 0.72, 1.55, 0.72, 0.52


# --- the loss: every training step, its running mean, and the held-out text


def training_losses(run: RunFiles) -> list[tuple[int, float]]:
    """(step, nats/token) of the logged training losses, non-finite ones too."""
    return [(entry["step"], float(entry["loss"])) for entry in run.log if "loss" in entry]


def held_out_losses(run: RunFiles) -> list[tuple[int, float]]:
    """(step, nats/token) of the held-out text: what the evaluations found, and the scores before and after the run.

    Where evaluations take some windows of it, the first point is that of these windows too.
    """
    losses = {entry["step"]: float(entry["eval_loss"]) for entry in run.log if "eval_loss" in entry}
    last = max((entry["step"] for entry in run.log if "step" in entry), default=0)
    scored = run.texts.get("validation")
    key, bits = f"{CURVE_KEYS}validation", (scored or {}).get("before", {}).get(HEADLINE.key)
    first = next((entry[key] for entry in run.log if entry.get("step") == 0 and key in entry), None)
    if scored and first is not None and bits:
        losses.setdefault(
            0, float(first) * scored["before"]["loss"] / bits
        )  # one text: bits per byte and nats are in step
    for step, side in ((0, "before"), (last, "after")) if scored else ():
        if scored[side]["loss"] is not None:
            losses.setdefault(step, scored[side]["loss"])
    return [(step, loss) for step, loss in sorted(losses.items()) if math.isfinite(loss)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, `window` of them where there are as many."""
    return [
        sum(values[max(0, at - window + 1) : at + 1]) / min(window, at + 1) for at in range(len(values))
    ]  # fmt: skip


def draw_loss(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    axes = titled_axes(canvas, theme, "Loss", trained_title(run))
    training, held_out = training_losses(run), held_out_losses(run)
    finite = [(step, loss) for step, loss in training if math.isfinite(loss)]
    spoilt = [step for step, loss in training if not math.isfinite(loss)]
    steps, losses = [step for step, _ in finite], [loss for _, loss in finite]
    marker = "o" if len(finite) < 3 else None  # a line through one point is invisible
    if finite:
        axes.plot(steps, losses, color=theme.lines[0], alpha=0.5, linewidth=0.9, marker=marker, label="training")
    if len(finite) >= 10:
        window = min(50, max(5, len(finite) // 10))
        label = f"training, running mean of {window}"
        axes.plot(steps, running_mean(losses, window), color=theme.lines[0], linewidth=2.2, label=label)
    if held_out:
        (_, first), (_, last) = held_out[0], held_out[-1]
        some = run.insight.get("learning_curves", {}).get("windows", {}).get("validation")
        of = "" if some is None else f" ({counted(some, 'window')})"
        label = f"held-out text{of}, {nats(first)} → {nats(last)}"
        points = {"marker": "o", "markersize": 4.5, "markeredgecolor": theme.background, "markeredgewidth": 0.8}
        axes.plot(*zip(*held_out, strict=True), color=theme.lines[1], linewidth=1.8, label=label, **points)
    if spoilt:
        top = axes.get_xaxis_transform()  # x in steps, y in shares of the axes
        label = f"not finite ({len(spoilt)})"
        axes.plot(spoilt, [0.97] * len(spoilt), "x", color=theme.alarm, transform=top, label=label, clip_on=False)
    axes.set_ylabel("loss (nats per token)")
    if finite or held_out or spoilt:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, borderaxespad=0.1, **theme.legend)
    else:
        axes.text(0.5, 0.5, "No loss was logged.", transform=axes.transAxes, ha="center", color=theme.muted)
        axes.set_yticks([])
    axes.set_xlim(0, max([step for step, _ in [*training, *held_out]], default=1))


def loss_alt(run: RunFiles) -> str:
    """The loss figure in words."""
    finite = [(step, loss) for step, loss in training_losses(run) if math.isfinite(loss)]
    parts = []
    if finite:
        (first, high), (last, low) = finite[0], finite[-1]
        parts.append(f"training loss {nats(high)} at step {first:,} and {nats(low)} at step {last:,}")
    if held_out := held_out_losses(run):
        (first, high), (last, low) = held_out[0], held_out[-1]
        parts.append(f"held-out loss {nats(high)} at step {first:,} and {nats(low)} at step {last:,}")
    spoilt = len(training_losses(run)) - len(finite)
    parts += [f"{spoilt} training losses are not finite"] if spoilt else []
    return f"Line chart of the loss in nats per token: {'; '.join(parts) or 'no loss was logged'}."


# --- learning curves: bits per byte of every scored text, a panel a text


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
        pair = " → ".join(HEADLINE.words(value) for value in (first, last))
        return f"{pair} ({HEADLINE.change_words(first, last)})"


def learning_curves(run: RunFiles) -> list[Curve]:
    """A curve for each text with two points or more, in the order of `run.texts`."""
    points: dict[str, dict[int, float]] = {name: {} for name in run.texts}
    for entry in run.log:
        for key, value in entry.items():
            if key.startswith(CURVE_KEYS):
                points.setdefault(key.removeprefix(CURVE_KEYS), {})[entry["step"]] = float(value)
    held_out = points.get("validation")
    if held_out:  # Trainer does not evaluate before the first step; the score of the whole text is the same figure
        for step, side in ((0, "before"), (max(held_out), "after")):
            value = run.texts.get("validation", {}).get(side, {}).get(HEADLINE.key)
            if value is not None:
                held_out.setdefault(step, value)
    sampled = run.insight.get("learning_curves", {}).get("windows", {})
    curves = []
    for name, values in points.items():
        known = sorted((step, value) for step, value in values.items() if math.isfinite(value))
        if len(known) > 1:
            steps, bits = zip(*known, strict=True)
            curves.append(Curve(name, steps, bits, sampled.get(name)))
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
    write_title(canvas, theme, "Learning curves", f"Bits per byte over optimizer steps, lower is better{more}")
    left, gap = 0.62, 0.62
    wide = (WIDTH - left - 0.2 - (columns - 1) * gap) / columns
    for number, curve in enumerate(shown):
        line, column = divmod(number, columns)
        top = TOP + 0.36 + line * (PANEL + PANEL_GAP)
        place = ((left + column * (wide + gap)) / WIDTH, 1 - (top + PANEL) / height, wide / WIDTH, PANEL / height)
        draw_curve(canvas.add_axes(place, facecolor=theme.background), curve, theme)


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


# --- relative deltas: a line for each trained group, and the frozen part at exactly 0


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

    # beyond a factor of 30 the smallest line would lie on the axis; symlog since the frozen part is at exactly 0
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
