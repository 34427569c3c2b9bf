"""How training goes, and what it cost: its bar, seconds of steps and their parts, memory -> `performance.json`."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_compiled_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from partialtune.cost.flops import FORMULAS
from partialtune.machine import peak_memory_mb
from partialtune.progress import progress_bar
from partialtune.terminal import NARROW, columns_of
from partialtune.training.forward_callback import ForwardCallback

if TYPE_CHECKING:
    from partialtune.engine.fast_paths import FastPaths

PARTS = ("data", "forward", "backward", "optimizer", "callbacks")


class TrainingProgress(TrainerCallback):
    """The bar of training: steps done, training loss, held-out loss, tokens a second, and when it will end.

    It stands in place of a printed line for every log entry. In a narrow terminal it is a line without the bar.

    Args:
        step_tokens: Tokens of an optimizer step, of all processes together; 0 where nobody knows.
    """

    def __init__(self, step_tokens: int) -> None:
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}
        self._step_tokens = step_tokens
        self._narrow = (columns_of(sys.stderr) or NARROW) < NARROW

    def on_train_begin(self, args, state, control, **kwargs):
        bar = "" if self._narrow else "|{bar}|"
        form = f"{{desc}}: {{percentage:3.0f}}%{bar} {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{{remaining}}{{postfix}}]"
        self._bar = progress_bar(state.max_steps, "training", "steps", initial=state.global_step, bar_format=form)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.set_postfix_str(self._words(), refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        digits = 3 if self._narrow else 4
        names = {"loss": "loss", "eval_loss": "held-out"}
        self._shown |= {shown: f"{logs[name]:.{digits}f}" for name, shown in names.items() if name in (logs or {})}

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.set_postfix_str(self._words(), refresh=False)
        self._bar.close()
        self._bar = None

    def _words(self) -> str:
        if self._bar is None or self._bar.disable:  # of all processes but the first
            return ""
        words, facts = [f"{name}={value}" for name, value in self._shown.items()], self._bar.format_dict
        done = self._bar.n - self._bar.initial
        rate = facts["rate"] or (done / facts["elapsed"] if facts["elapsed"] else 0.0)  # steps a second
        if done and rate:
            if self._step_tokens:
                words.append(f"{rate * self._step_tokens:,.0f} tokens/s")
            left = (self._bar.total - self._bar.n) / rate
            if not self._narrow and left > 60:
                words.append(f"ends {datetime.now() + timedelta(seconds=left):%H:%M}")
        return ", ".join(words)


class StepTimer(ForwardCallback):
    """Seconds of each optimizer step, by part.

    It has to be among the first callbacks, and its `last` among the last: what lies between the two is the time of the
    others. What happens between two steps, evaluation, logging and saves, belongs to none. On CUDA the moments are
    events on the stream, so that nothing waits for them but the end of the step.

    Attributes:
        parts: Seconds of each step by part. `data` is waiting for its batches, from the last event before the step.
            `backward` has clipping with it: no event lies between the two.
        seconds: Seconds of each step, callbacks not counted.
        last: The callback to add after all others.
    """

    def __init__(self) -> None:
        self.parts: list[dict[str, float]] = []
        self.last = EndOfCallbacks(self)
        self._moments: list[tuple[str, Any]] = []  # of the step that goes on: (part that ended, when)
        self._waiting: Any = None  # since when the batches of the next step are waited for

    @property
    def seconds(self) -> list[float]:
        return [sum(parts.values()) - parts["callbacks"] for parts in self.parts]

    @property
    def running(self) -> bool:
        """Whether a step goes on."""
        return bool(self._moments)

    def wait(self) -> None:
        """What comes now is waiting for the batches of the next step."""
        self._waiting = _moment()

    def begin(self) -> None:
        """A step began when its batches were first waited for."""
        self._moments = [("", _moment() if self._waiting is None else self._waiting)]

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
        self.wait()

    def after_forward(self, inputs, output):
        self.mark("forward")

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin()
        self.mark("data")

    def on_substep_end(self, args, state, control, **kwargs):
        self.mark("backward")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.mark("backward")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def on_epoch_end(self, args, state, control, **kwargs):
        self._moments = []  # of a step that was broken off between two of its batches

    def median(self) -> float | None:
        """Median seconds a step, callbacks not counted. The first, which warms up, counts only where it is alone."""
        return statistics.median(_warm(self.seconds)) if self.parts else None

    def counted(self) -> Sequence[float]:
        """Seconds of the steps that `median` is of."""
        return _warm(self.seconds)

    def shares(self) -> dict[str, float] | None:
        """Share of each part in the time of all steps but the first; None before the first."""
        if not self.parts:
            return None
        sums = {part: sum(step[part] for step in _warm(self.parts)) for part in PARTS}
        return {part: seconds / sum(sums.values()) for part, seconds in sums.items()}


class EndOfCallbacks(TrainerCallback):
    """The last callback of each event: what the clock has seen since the first one was the time of callbacks.

    Args:
        timer: The clock, which is the first.
    """

    def __init__(self, timer: StepTimer) -> None:
        self._timer = timer

    def on_step_begin(self, args, state, control, **kwargs):
        self._timer.mark("callbacks")

    def on_substep_end(self, args, state, control, **kwargs):
        self._timer.mark("callbacks")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._timer.mark("callbacks")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._timer.mark("callbacks")

    def on_step_end(self, args, state, control, **kwargs):
        self._timer.end()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._timer.wait()

    def on_log(self, args, state, control, **kwargs):
        self._timer.wait()

    def on_evaluate(self, args, state, control, **kwargs):
        self._timer.wait()

    def on_save(self, args, state, control, **kwargs):
        self._timer.wait()


class ProductCount(TrainerCallback):
    """Counts the matrix products of the first batch, forward and backward. Not where the model is compiled.

    Where a frozen prefix is kept, it counts once more when batches have begun to start from states: what most steps
    of the run do.

    It has to come before callbacks that may end the run in `on_pre_optimizer_step`. Use as a context manager around
    `trainer.train()`: an error in the first batch would leave torch's counter on, and all that follows would be slow.

    Args:
        hits: Gives the number of rows that have started from kept states so far.

    Attributes:
        flops_per_step: Multiplications and additions of the matrix products of one optimizer step on one process,
            attention's own included; None before the first batch and where the model is compiled.
    """

    def __init__(self, hits: Callable[[], int] = lambda: 0) -> None:
        self.flops_per_step: int | None = None
        self._hits, self._hits_before = hits, 0
        self._wanted, self._from_states = True, False  # whether to count the next batch; whether one was from states
        self._counter: _Products | None = None

    def __enter__(self) -> "ProductCount":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._leave()

    def _leave(self) -> int | None:
        """Take the counter off.

        Returns:
            What it has counted, None where it was not on.
        """
        counter, self._counter = self._counter, None
        if counter is None:
            return None
        counter.__exit__(None, None, None)
        return counter.total

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._hits_before = self._hits()
        if self._wanted and not args.torch_compile and not is_compiled_module(model):
            self._wanted = False
            self._counter = _Products()
            self._counter.__enter__()

    def on_substep_end(self, args, state, control, **kwargs):
        self._batch_is_over(args)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._batch_is_over(args)

    def _batch_is_over(self, args: TrainingArguments) -> None:
        counted = self._leave()
        if counted is not None:
            self.flops_per_step = counted * args.gradient_accumulation_steps
        if self._hits() > self._hits_before and not self._from_states:
            self._wanted = self._from_states = True


class _Products(TorchDispatchMode):
    """Adds up the products of the operations that run within it, and runs each of them as it is.

    torch's own FlopCounterMode takes operations apart that it has no formula for, such as a fused RMS norm, and so
    rounds otherwise: the first step of a Llama would end with other bits than without it.

    Attributes:
        total: Multiplications and additions so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket  # no public name: see cost/flops.py
        formula = FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


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
        "training_seconds": sum(timer.seconds),
        "peak_memory_mb": peak_memory_mb(),
        "flops_per_step": flops,
        "utilisation": utilisation,
        "time_shares": timer.shares(),
        "prefix_cache": "disk" if fast.keeps_on_disk else "memory" if fast.keeps_prefix else "off",
        "fast_paths": fast.in_use,
        "callback_share": callback_seconds / (callback_seconds + sum(timer.seconds)) if timer.seconds else None,
    }
