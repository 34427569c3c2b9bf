"""Learning curves in bits per byte, which compare between texts and tokenizers: a callback that scores during training.

Trainer evaluates the held-out text. At the same steps this callback scores the training text and every text of
`eval_texts`, so that a run shows not only what it learns but what it forgets meanwhile.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from partialtune.metrics import HEADLINE
from partialtune.scoring.evaluation import ScoredText, evenly_spaced, score_text

CURVE_WINDOWS = 16  # of each text: 11 evaluations of one take 3% of the time of 123 steps of 16 windows
POINTS = 10  # of a run that evaluates nothing of itself
PREFIX = f"{HEADLINE.key}/"


class LearningCurves(TrainerCallback):
    """Puts `bits_per_byte/TEXT` into the log: before the first step, at every evaluation, and after the last step.

    `validation` is the loss that Trainer found on all held-out windows, in bits per byte. Every other text is scored on
    at most `windows` windows, evenly spaced and the same each time: the curve's shape is exact for them, its level is
    that of a sample. A run without held-out text evaluates nothing; it gets `POINTS` points all the same.

    Where torch.distributed runs, all processes score together.

    Args:
        texts: Name -> text; `validation` only for its bytes and tokens.
        batch_size: Windows per forward pass.
        windows: Windows of each text.

    Attributes:
        seconds: Time spent so far.
        sampled: Name -> windows that are scored of it.
    """

    def __init__(self, texts: Mapping[str, ScoredText], batch_size: int, windows: int = CURVE_WINDOWS) -> None:
        self.held_out = texts.get("validation")
        samples = {name: text for name, text in texts.items() if name != "validation"}
        self._texts = {
            name: replace(text, windows=evenly_spaced(text.windows, windows)) for name, text in samples.items()
        }
        self.sampled = {name: len(text.windows) for name, text in self._texts.items()}
        self.batch_size = batch_size
        self.seconds = 0.0
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
            bits = bits_per_byte(metrics["eval_loss"], self.held_out)
            known |= {} if bits is None else {PREFIX + "validation": bits}
        self._scored_at = state.global_step
        self._score(args, control, model, known)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.held_out is None and state.global_step % max(1, state.max_steps // POINTS) == 0:
            self._scored_at = state.global_step
            self._score(args, control, model, {})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps and self._scored_at != state.global_step:  # not where a signal came
            self._score(args, control, model, {})

    def _score(self, args, control, model, known: dict[str, float]) -> None:
        started = time.perf_counter()
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        values = dict(known)
        for name, text in self._texts.items():
            scores = score_text(model, text, self.batch_size, None, autocast)
            if scores["bits_per_byte"] is not None:
                values[PREFIX + name] = scores["bits_per_byte"]
        self.seconds += time.perf_counter() - started
        wanted = control.should_log
        self._log({name: value for name, value in values.items() if math.isfinite(value)})
        control.should_log = wanted  # `trainer.log` resets it, and Trainer would not log this step's loss


def bits_per_byte(loss: float, text: ScoredText) -> float | None:
    """A loss in nats a token as bits per byte of its text; None where the text does not come back from its tokens."""
    return HEADLINE.of_loss(loss, text.text_tokens, text.text_bytes) if text.comes_back else None
