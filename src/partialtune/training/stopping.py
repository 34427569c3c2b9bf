"""What ends training before its last step: a signal, a held-out loss that no longer falls, a loss or gradients that are
not finite.

Ctrl-C, SIGTERM and SIGUSR1 give a checkpoint in mid-training, an orderly end anywhere else, exit code 130 or 143.
Schedulers send SIGTERM before they kill (Kubernetes, a preempted SLURM job) or what they were told to, mostly SIGUSR1,
some time before a limit. Both mean: save what there is, and go on later.

A step whose loss or gradients are not finite ends the run before the optimizer takes it; its windows are named.
"""

import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from partialtune.distributed import from_all, largest_of_all
from partialtune.errors import InputError, Interrupted, TrainingDiverged
from partialtune.model.parameters import is_sharded
from partialtune.training.forward_callback import ForwardCallback

if TYPE_CHECKING:
    from datasets import Dataset  # a second, which a mistake in the recipe need not wait for

PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
GO_ON = "Go on with: --resume_from_checkpoint auto"
ROWS_AT_ONCE = 4096  # of the training windows, when those of a batch are looked for
NAMED = 16  # windows of a step that diverged, in the message


def signal_exit_code(number: int) -> int:
    """130 for Ctrl-C, 143 for either way of asking a process to end."""
    return 130 if number == signal.SIGINT else 143


def hears_signals() -> bool:
    """Whether Python lets this thread handle signals; those of notebooks' and web servers' workers it does not."""
    return threading.current_thread() is threading.main_thread()


class _Ended(BaseException):
    """Ends the run where it is. No Exception: libraries would catch it and go on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped outside of the training steps. {GO_ON}")
        self.exit_code = signal_exit_code(number)


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
        """Whether any process has received a signal: all have to save together."""
        self.received = largest_of_all(self.received or 0, args.device) or None
        return self.received is not None

    def raise_if_stopped(self, args: TrainingArguments) -> None:
        """End the run with 130 or 143 where a signal stopped it; all processes of it.

        Raises:
            Interrupted: In that case.
        """
        if self.asked_to_stop(args) and self.received is not None:  # also one that came after the last step
            name = signal.Signals(self.received).name
            where = f"a checkpoint in {args.output_dir}" if self._saved else "the last step"
            message = f"{name}: stopped after {where}. {GO_ON}"
            raise Interrupted(message, signal_exit_code(self.received))


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own early stopping, which goes on with its count from a checkpoint and knows where it stopped.

    Trainer saves the state of callbacks, but puts none back without `restore_callback_states_from_checkpoint`, which
    makes all of them anew, snapshot and audit too.

    Attributes:
        best_step: That of the last evaluation that counted as better.
        stopped: `step`, `of` (steps of the run), `best_step` and `weights_of_step`, where it has ended the run.
    """

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.best_step = 0
        self.stopped: dict[str, int] | None = None

    @property
    def out_of_patience(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def state(self) -> dict[str, Any]:
        state = super().state()
        return {**state, "attributes": {**state["attributes"], "best_step": self.best_step}}

    def on_train_begin(self, args, state, control, **kwargs):
        # Trainer's words about load_best_model_at_end are left out: the recipe has said whether it goes back
        name = type(self).__name__
        saved = (state.stateful_callbacks or {}).get(name) if state.global_step else None
        if saved:
            self._go_back_to(saved)
        state.stateful_callbacks[name] = self.state()  # Trainer fills only what is there
        if state.global_step and self.out_of_patience:  # it had stopped, and was ended before its results were written
            control.should_training_stop = True

    def _go_back_to(self, saved: Any) -> None:
        kept = saved.get("attributes") if isinstance(saved, dict) else None
        counts = [kept.get(key) for key in ("early_stopping_patience_counter", "best_step")] if kept else [None]
        if not all(isinstance(count, int) for count in counts):
            raise InputError("The checkpoint's trainer_state.json is damaged: its early stopping.")
        self.early_stopping_patience_counter, self.best_step = counts

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter == 0:
            self.best_step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        if self.out_of_patience and state.global_step < state.max_steps:
            went_back = args.load_best_model_at_end and state.best_model_checkpoint is not None
            of_step = state.best_global_step if went_back else state.global_step
            self.stopped = {
                "step": state.global_step,
                "of": state.max_steps,
                "best_step": self.best_step,
                "weights_of_step": of_step,
            }


class BatchWatch(ForwardCallback):
    """Remembers the windows of the present optimizer step, and stops the run where its gradients are not finite.

    It looks at the gradients just before the optimizer does, which is after clipping. An element that is not finite
    stays so: clipping multiplies it by 0 or NaN, which gives NaN. Finite gradients whose norm overflows become 0, a
    harmless step, and the norm in Trainer's log tells; without clipping Trainer's own arithmetic makes them NaN.

    Args:
        windows: Training windows, `input_ids` (T,); None where no window has a number.
        texts: So many of them are of the text, and those behind are replayed ones; None where all are of the text.
    """

    def __init__(self, windows: "Dataset | None", texts: int | None = None) -> None:
        self.windows, self.texts = windows, texts
        self._batches: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # input_ids (B, T), loss; accumulated too

    def on_step_begin(self, args, state, control, **kwargs):
        self._batches = []

    def after_forward(self, inputs, output):
        if isinstance(inputs.get("input_ids"), torch.Tensor):
            loss = output.get("loss") if isinstance(output, Mapping) else None  # else the loss is taken elsewhere
            self._batches.append((inputs["input_ids"], None if loss is None else loss.detach()))

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Judge the step by its gradients.

        Raises:
            TrainingDiverged: If one is not finite, on any process; the weights are those from before the step.
        """
        batches, self._batches = self._batches, []
        if _scaled(optimizer):
            return
        # All processes see the same gradients under DDP, under FSDP each its own shards.
        if largest_of_all(int(not _gradients_are_finite(model)), args.device):
            self._stop(batches, state.global_step + 1, optimizer.param_groups[0]["lr"])

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        """Judge what Trainer logs; the callback is called before trackers, and what is not finite reaches no record.

        Raises:
            TrainingDiverged: If a loss is not finite, or the norm of the gradients.
        """
        logs, rate = logs or {}, optimizer.param_groups[0]["lr"] if optimizer is not None else 0.0
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                state.log_history.pop()
                raise TrainingDiverged(
                    f"Training diverged: {name} is {logs[name]} at step {state.global_step} "
                    f"(learning rate {rate:.3g}). Lower learning_rate, or add warmup_steps. "
                    f"Checkpoints from before are kept."
                )
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(norm) and not _scaled(optimizer):
            raise TrainingDiverged(
                f"Training diverged: the norm of the gradients of step {state.global_step} is {norm} (learning rate "
                f"{rate:.3g}): they are too large to add up, and clipping made them 0. "
                f"Lower learning_rate, or add warmup_steps. Checkpoints from before are kept."
            )

    def _stop(self, batches: list[tuple[torch.Tensor, torch.Tensor | None]], step: int, rate: float) -> None:
        wrong = [ids for ids, loss in batches if loss is not None and not bool(torch.isfinite(loss).all())]
        what = "the loss" if any(from_all(bool(wrong))) else "the gradients"
        of_each = from_all(self._numbers_of(wrong if what == "the loss" else [ids for ids, _ in batches]))
        numbers = sorted({number for numbers in of_each for number in numbers})
        shown = ", ".join(map(self._name_of, numbers[:NAMED])) + f" and {len(numbers) - NAMED} more" * (
            len(numbers) > NAMED
        )
        raise TrainingDiverged(
            f"Training diverged: {what} of step {step} became non-finite (learning rate {rate:.3g}), in training "
            f"windows {shown or 'without a number'}. The step was not taken. Lower learning_rate, add warmup_steps, or "
            f"look at these windows. Checkpoints from before are kept."
        )

    def _name_of(self, number: int) -> str:
        """`7`, and of a replayed window `replay 7`."""
        return str(number) if self.texts is None or number < self.texts else f"replay {number - self.texts}"

    def _numbers_of(self, batches: Sequence[torch.Tensor]) -> list[int]:
        """The places of windows in the training windows, found by their tokens; of equal ones the first."""
        rows = {row.astype(np.int32).tobytes() for ids in batches for row in ids.cpu().numpy()}
        numbers: dict[bytes, int] = {}
        if self.windows is None or not rows:
            return []
        for start in range(0, len(self.windows), ROWS_AT_ONCE):
            stretch = self.windows.with_format("numpy")[start : start + ROWS_AT_ONCE]["input_ids"]
            for place, row in enumerate(np.asarray(stretch, dtype=np.int32), start=start):
                if row.tobytes() in rows:
                    numbers.setdefault(row.tobytes(), place)
        return sorted(numbers.values())


def _scaled(optimizer: Any) -> bool:
    """Whether fp16's scaler looks at the gradients: it skips a step that is not finite, and goes on."""
    return getattr(optimizer, "scaler", None) is not None


def _gradients_are_finite(model: nn.Module) -> bool:
    """Whether the norm of this process's gradients is: one element that is not finite makes it NaN or infinite."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [gradient.to_local() if is_sharded(gradient) else gradient for gradient in gradients]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(shards)))
