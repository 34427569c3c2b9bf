"""Learning curves in bits per byte, which compare between texts and tokenizers: a callback that scores during training.

Trainer evaluates the held-out text, or a sample of it. At the same steps this callback scores samples of the training
text and of every text of `eval_texts`, so that a run shows not only what it learns but what it forgets meanwhile.

Few windows show well how a loss changes and badly how high it is: a curve begins and ends elsewhere than the scores of
all windows do, and the report says on how many it was taken.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from partialtune.metrics import HEADLINE, WINDOW_SUMS
from partialtune.scoring.evaluation import ScoredText, TextScores, evenly_spaced, score_windows, spaced_indices
from partialtune.scoring.fast_scoring import FastScoring

CURVE_WINDOWS = 16  # of each text, at most
FEWEST_WINDOWS = 4  # of each text, also where they cost more than CURVE_SHARE
HELD_OUT_TIMES = 2  # as many windows of the held-out text, which is what a run is steered by
CURVE_SHARE = 1 / 24  # of the windows that a run trains on are scored for its curves: 2% of the training's time
POINTS = 10  # of a run that evaluates nothing of itself
PREFIX = f"{HEADLINE.key}/"


def windows_a_point(trained: int, points: int, texts: int) -> int:
    """Windows of each text at each point of the curves, so that all together cost little beside the training.

    Args:
        trained: Windows that the run trains on, those of every epoch counted.
        points: Of a curve.
        texts: That are scored.
    """
    return max(FEWEST_WINDOWS, int(CURVE_SHARE * trained / (max(1, points) * max(1, texts))))


class LearningCurves(TrainerCallback):
    """Puts `bits_per_byte/TEXT` into the log: before the first step, at every evaluation, and after the last step.

    A text is scored on some of its windows, evenly spaced and the same at every point, the first and the last too: the
    curve's shape is exact for them, its level is theirs. `validation` is the loss that Trainer found, in bits per byte.
    A run without held-out text evaluates nothing; it gets `POINTS` points all the same.

    Where torch.distributed runs, all processes score together.

    Args:
        texts: Name -> text; `validation` only for its bytes and tokens.
        batch_size: Windows per forward pass.
        windows: Windows of each text.
        held_out: Windows of the held-out text that Trainer evaluates, evenly spaced; None for all.
        fast: As in `score_windows`.
        before: Name -> what each text scored before training: the first point is taken from its windows.
        score_whole: Scores a text as after training, by its name, when the last evaluation is over: the last point is
            taken from its windows. None where the model may become another one after that.

    Attributes:
        seconds: Time spent so far.
        sampled: Name -> windows that are scored of it.
        at_end: Name -> what `score_whole` gave.
    """

    def __init__(
        self,
        texts: Mapping[str, ScoredText],
        batch_size: int,
        windows: int = CURVE_WINDOWS,
        *,
        held_out: int | None = None,
        fast: FastScoring | None = None,
        before: Mapping[str, TextScores] | None = None,
        score_whole: Callable[[str], TextScores] | None = None,
    ) -> None:
        self.held_out = texts.get("validation")
        samples = {name: text for name, text in texts.items() if name != "validation"}
        self._texts = {
            name: replace(text, windows=evenly_spaced(text.windows, min(windows, CURVE_WINDOWS)))
            for name, text in samples.items()
        }
        self.sampled = {name: len(text.windows) for name, text in self._texts.items()}
        if self.held_out is not None and held_out is not None and held_out < len(self.held_out.windows):
            self.sampled["validation"] = held_out
        self.batch_size = batch_size
        self.seconds = 0.0
        self.at_end: dict[str, TextScores] = {}
        self._whole = texts
        self._fast, self._before, self._score_whole = fast, before or {}, score_whole
        self._scored_at = -1
        self._log: Callable[[dict[str, float]], None] | None = None

    def attach(self, trainer: Trainer) -> "LearningCurves":
        """Send the values through `trainer.log`, so that trackers get them too."""
        self._log = trainer.log
        trainer.add_callback(self)
        return self

    def to_json(self) -> dict[str, Any]:
        """`windows` scored of each sampled text, `seconds` in all."""
        return {"windows": self.sampled, "seconds": round(self.seconds, 3)}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._scored_at = state.global_step  # a run that goes on has its earlier points in its log
        if state.global_step == 0:
            self._score(args, control, model, {})

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        known = {}
        if self.held_out is not None and "eval_loss" in (metrics or {}):
            known["validation"] = metrics["eval_loss"]
        self._scored_at = state.global_step
        if self._score_whole is not None and not self.at_end and state.global_step >= state.max_steps:
            self.at_end = {name: self._score_whole(name) for name in self._whole}
            known = {name: self._of_sample(name, found) for name, found in self.at_end.items()} | known
        self._score(args, control, model, known)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.held_out is None and state.global_step % max(1, state.max_steps // POINTS) == 0:
            self._scored_at = state.global_step
            self._score(args, control, model, {})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps and self._scored_at != state.global_step:  # not where a signal came
            self._score(args, control, model, {})

    def _of_sample(self, name: str, scores: TextScores) -> float:
        """The loss of the windows that the curve takes, in nats a token."""
        count = self.sampled.get(name)
        return _mean(scores.sums if count is None else scores.sums[spaced_indices(len(scores.sums), count)])

    def _score(self, args, control, model, known: Mapping[str, float | None]) -> None:
        """Log a point. `known` are losses in nats a token that need not be taken any more."""
        started = time.perf_counter()
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        losses = dict(known)
        if not known and self._scored_at == 0:
            losses |= {name: self._of_sample(name, found) for name, found in self._before.items()}
        for name, text in self._texts.items():
            if name not in losses:
                scores = score_windows(model, text, self.batch_size, None, 0, autocast, self._fast)
                losses[name] = _mean(scores.sums)
        bits = {name: bits_per_byte(loss, self._whole[name]) for name, loss in losses.items() if loss is not None}
        self.seconds += time.perf_counter() - started
        wanted = control.should_log
        self._log({PREFIX + name: value for name, value in bits.items() if value is not None and math.isfinite(value)})
        control.should_log = wanted  # `trainer.log` resets it, and Trainer would not log this step's loss


def _mean(sums: np.ndarray) -> float:
    """Nats a token of windows that contributed `sums`."""
    names = list(WINDOW_SUMS)
    nats, tokens = (math.fsum(sums[:, names.index(name)]) for name in ("nats", "tokens"))
    return nats / tokens


def bits_per_byte(loss: float, text: ScoredText) -> float | None:
    """A loss in nats a token as bits per byte of its text; None where the text does not come back from its tokens."""
    return HEADLINE.of_loss(loss, text.text_tokens, text.text_bytes) if text.comes_back else None
