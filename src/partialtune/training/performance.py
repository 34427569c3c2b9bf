"""What training cost: seconds a step, tokens a second, peak memory, arithmetic -> the content of `performance.json`."""

import resource
import statistics
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from partialtune.fast.paths import FastPaths


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step, evaluation, reports and saves not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self._started)

    def median(self) -> float | None:
        """Median seconds a step; the first, which warms up, counts only where it is the only one."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory_mb() -> float:
    """Largest memory of this process so far, in units of 2^20 bytes: of the GPU where CUDA is used, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def performance(
    args: TrainingArguments,
    timer: StepTimer,
    flops: int | None,
    block_size: int,
    fast: FastPaths,
    callback_seconds: float,
) -> dict[str, Any]:
    """The content of `performance.json`.

    Args:
        args: Of the run.
        timer: It timed the run's steps.
        flops: Of one optimizer step on one process.
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
        "utilisation": None,
        "prefix_cache": "memory" if fast.keeps_prefix else "off",
        "fast_paths": fast.in_use,
        "callback_share": callback_seconds / (callback_seconds + sum(timer.seconds)) if timer.seconds else None,
    }
