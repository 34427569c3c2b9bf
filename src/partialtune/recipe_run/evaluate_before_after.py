"""Texts and prompts, scored before training and after: scores, probes and the nats of single held-out tokens."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from partialtune.insight.next_token_shift import WATCHED_WINDOWS, next_token_shift
from partialtune.scoring.evaluation import ScoredText, score_tokens, spaced_indices
from partialtune.scoring.kept_scores import KEPT_FILE, KeptScores, basis_of
from partialtune.scoring.prompts import PromptProbe, probe_prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What a model scored at one moment.

    Attributes:
        scores: TEXT -> its figures, as in `evaluation.json`.
        prompts: Next tokens and continuations.
        nats: Of single held-out tokens, (windows, block_size - 1); None where nothing is held out.
    """

    scores: dict[str, dict[str, Any]]
    prompts: list[PromptProbe]
    nats: np.ndarray | None


@dataclass(frozen=True)
class Evaluator:
    """The same texts and prompts for the model before training and after.

    Attributes:
        tokenizer: Of the model.
        texts: TEXT -> its windows.
        prompts: To be continued.
        batch_size: Windows of a forward pass.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, ScoredText]
    prompts: Sequence[str]
    batch_size: int

    def before(self, model: PreTrainedModel, folder: Path, base_sha256: Mapping[str, str]) -> Evaluation:
        """Evaluate the base; what an earlier start of the very same run left in its folder is used again.

        Args:
            model: The base, on its device, with the plan applied.
            folder: The run's.
            base_sha256: Digest of each parameter, by its name.
        """
        basis = basis_of(
            base_sha256, model.config, self.tokenizer, self.texts, self.prompts, self.batch_size, model.device
        )
        kept = KeptScores(folder / KEPT_FILE, basis)
        if kept.used:
            logger.info("Scores of the base, taken by an earlier start, are used again: %s.", ", ".join(kept.used))
        evaluation = self._evaluate(model, "before", kept)
        spoilt = [name for name, scores in evaluation.scores.items() if scores["loss"] is None]
        if spoilt:
            logger.warning(
                "The loss of the base is not a finite number, before any training, on: %s.", ", ".join(spoilt)
            )
        return evaluation

    def after(self, model: PreTrainedModel) -> Evaluation:
        """Evaluate the trained model."""
        return self._evaluate(model, "after")

    def _evaluate(self, model: PreTrainedModel, moment: str, kept: KeptScores | None = None) -> Evaluation:
        """`kept` gives back what was scored by an earlier start, and keeps what is scored now."""
        scores, nats = {}, {}
        for name, text in self.texts.items():
            watched = WATCHED_WINDOWS if name == "validation" else 0
            score = partial(score_tokens, model, text, self.batch_size, f"{name}, {moment}", watched)
            scores[name], nats[name] = kept.text(name, score) if kept else score()
        probe = partial(probe_prompts, model, self.tokenizer, self.prompts)
        return Evaluation(scores, kept.prompts(probe) if kept else probe(), nats.get("validation"))

    def token_shift(self, before: Evaluation, after: Evaluation) -> dict[str, Any] | None:
        """What happened to single held-out tokens between two evaluations; None where nothing is held out."""
        if before.nats is None or after.nats is None:
            return None
        windows = self.texts["validation"].windows.with_format("numpy")
        # the same windows that `score_tokens` kept nats of: (windows, block_size) beside (windows, block_size - 1)
        watched = windows[spaced_indices(len(windows), WATCHED_WINDOWS)]["input_ids"]
        return next_token_shift(watched, before.nats, after.nats, self.tokenizer)
