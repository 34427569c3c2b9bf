"""The bar of training: steps done, training loss, held-out loss, in place of a printed line for every log entry.

And the first step, kept in the run's folder.
"""

from contextlib import suppress
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from partialtune.progress import progress_bar


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


class FirstStepRecord(TrainerCallback):
    """Writes `trainer_state.json` after the first step: a run without it took none, and its folder counts as empty."""

    def __init__(self) -> None:
        self._written = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not self._written:
            with suppress(OSError):  # no reason to end the run; the next step tries again
                state.save_to_json(str(Path(args.output_dir) / TRAINER_STATE_NAME))
                self._written = True
