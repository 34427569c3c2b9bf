"""Ctrl-C and SIGTERM during training: a checkpoint, an orderly end, exit code 130 or 143."""

import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from partialtune.errors import Interrupted


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into a checkpoint and an orderly end. A second Ctrl-C ends at once.

    Use as a context manager around `trainer.train()`; it raises Interrupted at the end of the block.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print(f"\n{signal.Signals(number).name}: saving a checkpoint after this step.", file=sys.stderr, flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.received = self._any_process(args, self.received)
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    @staticmethod
    def _any_process(args: TrainingArguments, received: int | None) -> int | None:
        """The signal that any process received: all have to save together."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return received
        flag = torch.tensor([received or 0], device=args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) or None

    def raise_if_stopped(self, folder: str) -> None:
        """End the run with 130 or 143 where a signal stopped it."""
        if self.received is not None:
            raise Interrupted(
                f"{signal.Signals(self.received).name}: stopped after a checkpoint in {folder}. "
                f"Go on with: --resume_from_checkpoint auto",
                self.received,
            )
