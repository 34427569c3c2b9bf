"""A finished run's folder -> figures/*.png: losses over steps, relative deltas by block and component, and over steps.

Drawn through matplotlib's object API with the Agg canvas: no display, and no state shared with a caller's own plots.
"""

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partialtune.pages.heatmap import draw_heatmap, heatmap_alt
from partialtune.pages.run_files import Group, RunFiles, read_run
from partialtune.pages.themes import DARK, HEIGHT, LIGHT, PIXELS_PER_INCH, WIDTH, Theme, titled_axes
from partialtune.pages.wording import joined, percent, score, trained_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MOST_LINES = 8  # more lines than colours and labels can tell apart are drawn as one line a component


@dataclass(frozen=True)
class Figure:
    """A figure in a run's folder, with the words that go with it."""

    path: Path
    title: str
    alt: str


@dataclass(frozen=True)
class Series:
    """One line of the delta figure: relative delta of some parameters taken together, at each step."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]


def draw_figures(run: str | os.PathLike) -> list[Path]:
    """Draw the figures of a finished run.

    Args:
        run: The run's folder.

    Returns:
        Paths of `loss.png`, `deltas_heatmap.png` and `deltas_over_steps.png` in its folder `figures`.
    """
    files = read_run(run)
    figures = describe_figures(files)
    (files.folder / "figures").mkdir(exist_ok=True)
    for figure in figures:
        figure.path.write_bytes(render_figure(files, figure))
    return [figure.path for figure in figures]


def describe_figures(run: RunFiles) -> list[Figure]:
    """Path, title and alt text of each figure, in the order in which they are shown."""
    folder = run.folder / "figures"
    return [
        Figure(folder / "loss.png", "Loss over steps", loss_alt(run)),
        Figure(folder / "deltas_heatmap.png", "How far each part moved", heatmap_alt(run)),
        Figure(folder / "deltas_over_steps.png", "Movement over steps", deltas_alt(run)),
    ]


def render_figure(run: RunFiles, figure: Figure, dark: bool = False) -> bytes:
    """One figure as PNG, on a light or a dark ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    theme = DARK if dark else LIGHT
    canvas = Canvas(figsize=(WIDTH, HEIGHT), dpi=PIXELS_PER_INCH, facecolor=theme.ground)
    FigureCanvasAgg(canvas)
    draw: Callable[[Canvas, RunFiles, Theme], None] = {
        "loss.png": draw_loss,
        "deltas_heatmap.png": draw_heatmap,
        "deltas_over_steps.png": draw_deltas,
    }[figure.path.name]
    draw(canvas, run, theme)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Description": figure.alt, "Software": "partialtune"})
    return buffer.getvalue()


# --- loss over steps


def training_losses(run: RunFiles) -> list[tuple[int, float]]:
    """(step, nats/token) of the logged training losses, non-finite ones too."""
    return [(entry["step"], float(entry["loss"])) for entry in run.log if "loss" in entry]


def held_out_losses(run: RunFiles) -> list[tuple[int, float]]:
    """(step, nats/token) of the held-out text: what the evaluations found, and the scores before and after the run."""
    losses = {entry["step"]: float(entry["eval_loss"]) for entry in run.log if "eval_loss" in entry}
    last = max((entry["step"] for entry in run.log if "step" in entry), default=0)
    scored = run.texts.get("validation")
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
        label = f"held-out text, {score('loss', first)} → {score('loss', last)}"
        points = {"marker": "o", "markersize": 4.5, "markeredgecolor": theme.ground, "markeredgewidth": 0.8}
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
        parts.append(f"training loss {score('loss', high)} at step {first:,} and {score('loss', low)} at step {last:,}")
    if held_out := held_out_losses(run):
        (first, high), (last, low) = held_out[0], held_out[-1]
        parts.append(f"held-out loss {score('loss', high)} at step {first:,} and {score('loss', low)} at step {last:,}")
    spoilt = len(training_losses(run)) - len(finite)
    parts += [f"{spoilt} training losses are not finite"] if spoilt else []
    return f"Line chart of the loss in nats per token: {'; '.join(parts) or 'no loss was logged'}."


# --- relative deltas over steps


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


def deltas_alt(run: RunFiles) -> str:
    """The figure of deltas over steps in words."""
    if not run.deltas.steps:
        return "Line chart of the weight change over steps: no deltas were reported."
    ends = [f"{line.label} {percent(line.values[-1])}" for line in delta_series(run)]
    kept = not run.audit["frozen"]["changed"]
    frozen = f"; the frozen part {'stays at exactly 0' if kept else 'changed'}" if run.frozen else ""
    step = f"{run.deltas.steps[-1]:,}"
    return f"Line chart of the relative weight change over steps. At step {step}: {joined(ends, 400)}{frozen}."
