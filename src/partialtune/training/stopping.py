"""Ctrl-C, SIGTERM and SIGUSR1: a checkpoint in mid-training, an orderly end anywhere else, exit code 130 or 143.

Schedulers send SIGTERM before they kill (Kubernetes, a preempted SLURM job) or what they were told to, mostly SIGUSR1,
some time before a limit. Both mean: save what there is, and go on later.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from partialtune.errors import Interrupted

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
GO_ON = "Go on with: --resume_from_checkpoint auto"


def exit_code_of(number: int) -> int:
    """130 for Ctrl-C, 143 for either way of asking a process to end."""
    return 130 if number == signal.SIGINT else 143


def hears_signals() -> bool:
    """Whether Python lets this thread handle signals; those of notebooks' and web servers' workers it does not."""
    return threading.current_thread() is threading.main_thread()


class _Ended(BaseException):
    """Ends the run where it is. No Exception: libraries would catch it and go on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped outside of the training steps. {GO_ON}")
        self.exit_code = exit_code_of(number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end what runs inside with a message and exit code 143.

    Raises:
        Interrupted: In the place of a signal.
    """
    if not hears_signals():
        yield
        return

    def end(number: int, frame) -> None:
        raise _Ended(number)

    before = {number: signal.signal(number, end) for number in PREEMPTIONS}
    try:
        yield
    except _Ended as ended:
        raise Interrupted(str(ended), ended.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a checkpoint and an orderly end. A second Ctrl-C ends at once.

    Before the first step there is nothing to save: the signal ends the run as it does outside of training.

    Use as a context manager around `trainer.train()`. In a thread that is not the main one it hears nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed = False  # whether all processes know of it, so that all save and stop
        self._saved = False
        self._stepping = False  # whether a step of this process has begun
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        numbers = (signal.SIGINT, *PREEMPTIONS) if hears_signals() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._before.items():
            # a launcher ends the other processes when the first one has: what is on its way out finishes its words
            done = self.received is not None and number in PREEMPTIONS
            signal.signal(number, signal.SIG_IGN if done else handler)

    def _note(self, number: int, frame) -> None:
        if not self._stepping and callable(self._before[number]):
            self._before[number](number, frame)
        elif self.received is None:
            self.received = number
            name = signal.Signals(number).name
            print(f"\n{name}: saving a checkpoint after this step.", file=sys.stderr, flush=True)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def on_step_begin(self, args, state, control, **kwargs):
        self._stepping = True

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if_asked(args, control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._stop_if_asked(args, control)  # which may have taken long: no further step

    def on_save(self, args, state, control, **kwargs):
        self._saved = self.received is not None

    def _stop_if_asked(self, args: TrainingArguments, control) -> None:
        self.agreed = self.asked_to_stop(args)
        if self.agreed:
            control.should_save = True
            control.should_training_stop = True

    def asked_to_stop(self, args: TrainingArguments) -> bool:
        """Whether any process has received a signal; every process has to call this together."""
        self.received = self._any_process(args, self.received)
        return self.received is not None

    @staticmethod
    def _any_process(args: TrainingArguments, received: int | None) -> int | None:
        """The signal that any process received: all have to save together."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return received
        flag = torch.tensor([received or 0], device=args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag) or None

    def raise_if_stopped(self, args: TrainingArguments) -> None:
        """End the run with 130 or 143 where a signal stopped it; all processes of it.

        Raises:
            Interrupted: In that case.
        """
        if self.asked_to_stop(args):  # it may have come to one of them after the last step
            name = signal.Signals(self.received).name
            where = f"a checkpoint in {args.output_dir}" if self._saved else "the last step"
            message = f"{name}: stopped after {where}. {GO_ON}"
            raise Interrupted(message, exit_code_of(self.received))
