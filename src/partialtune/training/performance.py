"""How training goes, and what it cost: its bar, seconds of steps and their parts, memory -> `performance.json`."""

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from partialtune.machine import peak_memory_mb
from partialtune.progress import progress_bar

if TYPE_CHECKING:
    from partialtune.engine.fast_paths import FastPaths

PARTS = ("data", "forward", "backward", "optimizer", "callbacks")


class TrainingProgress(TrainerCallback):
    """The bar of training: steps done, training loss, held-out loss, in place of a printed line for every log entry."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = progress_bar(state.max_steps, "training", "steps", initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "held-out"}
        self._shown |= {shown: f"{logs[name]:.4f}" for name, shown in names.items() if name in (logs or {})}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
        self._bar = None


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step, by part.

    The Trainer calls `begin` when a step begins, `mark` when a part of it is done and `end` when all is;
    what it does in between two steps, evaluation, logging and saves, belongs to none. On CUDA the moments are events
    on the stream, so that nothing waits for them but the end of the step.

    Attributes:
        parts: Seconds of each step by part: `data` is waiting for its batches, `optimizer` has clipping with it.
        seconds: Seconds of each step, callbacks not counted.
    """

    def __init__(self) -> None:
        self.parts: list[dict[str, float]] = []
        self._moments: list[tuple[str, Any]] = []  # of the step that goes on: (part that ended, when)

    @property
    def seconds(self) -> list[float]:
        return [sum(parts.values()) - parts["callbacks"] for parts in self.parts]

    @property
    def running(self) -> bool:
        """Whether a step goes on."""
        return bool(self._moments)

    def begin(self) -> None:
        """A step begins: its batches are fetched next."""
        self._moments = [("", _moment())]

    def mark(self, part: str) -> None:
        """What has gone on since the last mark was `part`. Outside a step, such as in evaluation, nothing happens."""
        if self.running:
            self._moments.append((part, _moment()))

    def end(self) -> None:
        """The step and its callbacks are over."""
        if not self.running:
            return
        self.mark("callbacks")
        parts = dict.fromkeys(PARTS, 0.0)
        for (_, earlier), (part, later) in zip(self._moments, self._moments[1:], strict=False):
            parts[part] += _seconds_between(earlier, later)
        self.parts.append(parts)
        self._moments = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks
        inner.register_step_pre_hook(lambda *_: self.mark("callbacks"))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")  # clipping

    def on_step_end(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def median(self) -> float | None:
        """Median seconds a step, callbacks not counted. The first, which warms up, counts only where it is alone."""
        return statistics.median(_warm(self.seconds)) if self.parts else None

    def shares(self) -> dict[str, float] | None:
        """Share of each part in the time of all steps but the first; None before the first."""
        if not self.parts:
            return None
        sums = {part: sum(step[part] for step in _warm(self.parts)) for part in PARTS}
        return {part: seconds / sum(sums.values()) for part, seconds in sums.items()}


def _warm(steps: Sequence[Any]) -> Sequence[Any]:
    return steps[1:] or steps


def _moment() -> Any:
    """Now: an event on CUDA's stream, else seconds."""
    if torch.cuda.is_available():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _seconds_between(earlier: Any, later: Any) -> float:
    if isinstance(later, float):
        return later - earlier
    later.synchronize()
    return earlier.elapsed_time(later) / 1e3


def performance(
    args: TrainingArguments,
    timer: StepTimer,
    flops: int | None,
    utilisation: float | None,
    block_size: int,
    fast: "FastPaths",
    callback_seconds: float,
) -> dict[str, Any]:
    """The content of `performance.json`.

    Args:
        args: Of the run.
        timer: It timed the run's steps.
        flops: Of one optimizer step on one process.
        utilisation: As `cost.utilisation.utilisation` finds it.
        block_size: Tokens per window.
        fast: The run's fast paths.
        callback_seconds: Time that snapshot, deltas and audit took, in and around the steps.
    """
    median = timer.median()
    tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * block_size
    return {
        "median_step_seconds": median,
        "tokens_per_second": tokens / median if median else None,
        "peak_memory_mb": peak_memory_mb(),
        "flops_per_step": flops,
        "utilisation": utilisation,
        "time_shares": timer.shares(),
        "prefix_cache": "memory" if fast.keeps_prefix else "off",
        "fast_paths": fast.in_use,
        "callback_share": callback_seconds / (callback_seconds + sum(timer.seconds)) if timer.seconds else None,
    }
