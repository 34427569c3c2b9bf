"""Progress on stderr: one bar style for every long stage, drawn by one process, sparing where nobody watches."""

import os
import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

SECONDS_BETWEEN_LINES = 20  # where stderr is a file or a pipe, each refresh is a line of its own


def progress_bar(total: int, description: str, unit: str, **settings: Any) -> tqdm:
    """A bar that the first process of a run draws.

    Args:
        total: Units until it is full.
        description: What is going on.
        unit: What is counted.
        settings: Further arguments of `tqdm`.
    """
    watched = sys.stderr.isatty()
    defaults = {
        "disable": os.environ.get("RANK", "0") != "0",
        "mininterval": 0.2 if watched else SECONDS_BETWEEN_LINES,
        "dynamic_ncols": watched,
    }
    return tqdm(total=total, desc=description, unit=f" {unit}", **{**defaults, **settings})


class TrainingProgress(TrainerCallback):
    """The bar of training: steps done, training loss, held-out loss."""

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
