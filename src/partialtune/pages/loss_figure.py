"""The figure of the loss over steps: every training step, its running mean, and the held-out text."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import Theme, titled_axes
from partialtune.pages.wording import score, trained_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


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
