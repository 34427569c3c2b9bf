"""What a run shows while it trains: samples of its prompts, and `report.html` as far as it has come.

Both are callbacks that look and change nothing: a run with them has the same bits as one without.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import IntervalStrategy, PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import integration_utils as trackers

from partialtune.distributed import is_main
from partialtune.files import append_lines, keep_lines_up_to
from partialtune.insight.learning_curves import POINTS
from partialtune.model.parameters import is_sharded
from partialtune.pages.report import reloads_itself, write_report
from partialtune.run_folder import SAMPLES_FILE

logger = logging.getLogger(__name__)

LOGGED_PROMPTS = 3  # a block of a few lines at each evaluation; the file has all
LOGGED_CHARACTERS = 40  # of a prompt, its end
PAGE_SHARE = 1 / 50  # of the time that passes may go into drawing pages
FIRST_PAGE_SECONDS = 20.0  # a run that is over sooner has its final page as soon


@contextmanager
def warned_once(what: str, warned: set[str]) -> Iterator[None]:
    """Let nothing that goes wrong within end the run.

    Args:
        what: Is written.
        warned: Holds it from the first warning on; there is no second one.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of a disk, a figure or a tracker, which may raise anything
        if what not in warned:
            logger.warning("%s could not be written: %s: %s.", what, type(error).__name__, error)
        warned.add(what)


class WhileTraining(TrainerCallback):
    """A callback with `look`, which is called at each evaluation.

    A run that evaluates nothing has the points of the learning curves instead.

    Attributes:
        seconds: Time spent so far.
    """

    seconds: float = 0.0

    def look(self, args, state, model) -> None:
        """An evaluation is over."""
        raise NotImplementedError

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.look(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.eval_strategy == IntervalStrategy.NO and state.global_step % max(1, state.max_steps // POINTS) == 0:
            self.look(args, state, model)


class Samples(WhileTraining):
    """Continues the recipe's prompts while training: in log and trackers, and in `samples.jsonl` for the report.

    A line of the file is `step, prompt, continuation`; step 0 is the base. A run that goes on from a checkpoint keeps
    the lines up to its step. The main process alone continues prompts; where parameters are sharded all do, since each
    pass gathers them.

    Args:
        continue_all: Gives the continuation of each prompt by the model as it is; `Evaluator.continuations`.
        prompts: Of the recipe.
        before: What the base made of them.
        folder: Of the run.
        every: Optimizer steps between samples; None for each evaluation.

    Attributes:
        seconds: Time spent so far.
    """

    def __init__(
        self,
        continue_all: Callable[[PreTrainedModel], list[str]],
        prompts: Sequence[str],
        before: Sequence[str],
        folder: Path,
        every: int | None,
    ) -> None:
        self.seconds = 0.0
        self._continue_all, self._prompts, self._before, self._every = continue_all, prompts, before, every
        self._file = folder / SAMPLES_FILE
        self._sampled_at = -1
        self._warned: set[str] = set()
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> "Samples":
        """Be called by a Trainer, and send samples to its trackers."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        self._sampled_at = state.global_step
        if is_main():
            with warned_once("A sample", self._warned):
                keep_lines_up_to(state.global_step if state.global_step else -1, self._file)
            if state.global_step == 0:
                self._record(0, self._before)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if self._every is None:
            self.look(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._every is None:
            super().on_step_end(args, state, control, model, **kwargs)
        elif state.global_step % self._every == 0:
            self.look(args, state, model)

    def look(self, args, state, model) -> None:
        if state.global_step == self._sampled_at:  # an evaluation before the first step, or at a checkpoint's
            return
        self._sampled_at = state.global_step
        if not is_main() and not any(is_sharded(parameter) for parameter in model.parameters()):
            return
        started = time.perf_counter()
        found = self._continue_all(model)
        if is_main():
            self._record(state.global_step, found)
            with tqdm.external_write_mode(sys.stderr) if sys.stderr.isatty() else nullcontext():
                logger.info("%s", words_of(state.global_step, state.max_steps, self._prompts, found))
        self.seconds += time.perf_counter() - started

    def _record(self, step: int, found: Sequence[str]) -> None:
        """Into the file and to the trackers. What refuses them is warned about once, and ends nothing."""
        pairs = list(zip(self._prompts, found, strict=True))
        rows = [{"step": step, "prompt": prompt, "continuation": text} for prompt, text in pairs]
        with warned_once("A sample", self._warned):
            append_lines(self._file, [json.dumps(row) + "\n" for row in rows])
        for send in senders(self._trainer):
            with warned_once("A sample", self._warned):
                send(step, rows)


def words_of(step: int, steps: int, prompts: Sequence[str], found: Sequence[str]) -> str:
    """A sample for the log: a line a prompt, as literals, so that line ends in them do not break it."""
    shown = [
        f"  {prompt if len(prompt) <= LOGGED_CHARACTERS else '...' + prompt[-LOGGED_CHARACTERS:]!r} -> {text!r}"
        for prompt, text in list(zip(prompts, found, strict=True))[:LOGGED_PROMPTS]
    ]
    more = len(prompts) - len(shown)
    last = [f"  and {more} more in {SAMPLES_FILE}"] if more else []
    return "\n".join([f"Step {step:,} of {steps:,}, the most probable continuations:", *shown, *last])


# ---- trackers: Trainer's log takes numbers alone, so that text goes to each in its own way ---------------------------

Rows = Sequence[Mapping[str, Any]]


def senders(trainer: Trainer | None) -> Iterator[Callable[[int, Rows], None]]:
    """For each tracker of a Trainer that takes text, what sends it the rows of a sample."""
    for callback in trainer.callback_handler.callbacks if trainer is not None else []:
        for kind, send in TAKE_TEXT.items():
            if isinstance(callback, kind):
                yield partial(send, callback)


def _to_tensorboard(callback: Any, step: int, rows: Rows) -> None:
    for number, row in enumerate(rows, 1):  # indented it is shown as it is: TensorBoard reads Markdown
        text = "\n".join(f"    {line}" for line in (row["prompt"] + row["continuation"]).splitlines())
        callback.tb_writer.add_text(f"samples/{number}", text, step)
    callback.tb_writer.flush()


def _to_trackio(callback: Any, step: int, rows: Rows) -> None:
    import trackio
    from datasets import Dataset

    # as a data frame: of `data` it forgets the names of the columns
    frame = Dataset.from_list([dict(row) for row in rows]).to_pandas()
    trackio.log({"samples": trackio.Table(dataframe=frame), "train/global_step": step})


def _to_wandb(callback: Any, step: int, rows: Rows) -> None:
    import wandb

    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    wandb.log({"samples": table, "train/global_step": step})


def _to_mlflow(callback: Any, step: int, rows: Rows) -> None:
    import mlflow

    # a file a step: `log_table` would fetch and send those of all earlier steps each time, with a bar for each
    mlflow.log_text(json.dumps(rows, indent=2, ensure_ascii=False), f"samples/step_{step:06}.json")


TAKE_TEXT: Mapping[type, Callable[[Any, int, Rows], None]] = {
    trackers.TensorBoardCallback: _to_tensorboard,
    trackers.TrackioCallback: _to_trackio,
    trackers.WandbCallback: _to_wandb,
    trackers.MLflowCallback: _to_mlflow,
}


# ---- the page --------------------------------------------------------------------------------------------------------


class LivePage(WhileTraining):
    """Writes `report.html` at evaluations, so that a run can be watched; and Trainer's log, which the page reads.

    Drawing takes a second or two. Evaluations that come so close upon each other that it would take more than
    `PAGE_SHARE` of the time are left out, and the last one, after which comes the final page.

    Args:
        folder: Of the run.

    Attributes:
        seconds: Time spent so far.
    """

    def __init__(self, folder: Path) -> None:
        self.seconds = 0.0
        self._folder = folder
        self._next_at = time.monotonic() + FIRST_PAGE_SECONDS
        self._warned: set[str] = set()
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> "LivePage":
        """Be called by a Trainer, last: the page shows what other callbacks have written."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        self._next_at = time.monotonic() + FIRST_PAGE_SECONDS

    def look(self, args, state, model) -> None:
        if not is_main() or state.global_step >= state.max_steps or time.monotonic() < self._next_at:
            return
        started = time.monotonic()
        with warned_once("report.html", self._warned):
            if self._trainer is not None:
                self._trainer.save_state()
            write_report(self._folder, training=True)
        took = time.monotonic() - started
        self.seconds += took
        self._next_at = time.monotonic() + took / PAGE_SHARE


@contextmanager
def page_says_when_it_ends(folder: Path) -> Iterator[None]:
    """Where a run ends by an error or a signal, a page that says it goes on is written once more, and says why."""
    try:
        yield
    except BaseException:
        if is_main() and reloads_itself(folder):
            with warned_once("report.html", set()):  # the error that ends the run is the one to report
                write_report(folder)
        raise
