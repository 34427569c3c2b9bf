"""One look at a model: texts and prompts -> scores, probes and the nats of single held-out tokens."""

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
class Sight:
    """What a model made of the texts and prompts at one moment; `nats` of single held-out tokens, None without such."""

    scores: dict[str, dict[str, Any]]
    prompts: list[PromptProbe]
    nats: np.ndarray | None


@dataclass(frozen=True)
class Look:
    """The same texts and prompts for every look at a model, before training and after."""

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, ScoredText]
    prompts: Sequence[str]
    batch_size: int

    def before(self, model: PreTrainedModel, folder: Path, base_sha256: Mapping[str, str]) -> Sight:
        """The look at the base, whose parameters have these digests; scores that an earlier start of the very same run
        left in its folder are used again."""
        basis = basis_of(
            base_sha256, model.config, self.tokenizer, self.texts, self.prompts, self.batch_size, model.device
        )
        kept = KeptScores(folder / KEPT_FILE, basis)
        if kept.used:
            logger.info("Scores of the base, taken by an earlier start, are used again: %s.", ", ".join(kept.used))
        sight = self.at(model, "before", kept)
        spoilt = [name for name, scores in sight.scores.items() if scores["loss"] is None]
        if spoilt:
            logger.warning(
                "The loss of the base is not a finite number, before any training, on: %s.", ", ".join(spoilt)
            )
        return sight

    def at(self, model: PreTrainedModel, moment: str, kept: KeptScores | None = None) -> Sight:
        """What the model makes of them; `kept` gives back what was scored before, and keeps what is scored now."""
        scores, nats = {}, {}
        for name, text in self.texts.items():
            watched = WATCHED_WINDOWS if name == "validation" else 0
            score = partial(score_tokens, model, text, self.batch_size, f"{name}, {moment}", watched)
            scores[name], nats[name] = kept.text(name, score) if kept else score()
        probe = partial(probe_prompts, model, self.tokenizer, self.prompts)
        return Sight(scores, kept.prompts(probe) if kept else probe(), nats.get("validation"))

    def shift(self, before: Sight, after: Sight) -> dict[str, Any] | None:
        """What happened to the held-out tokens between two looks; None where nothing is held out."""
        if before.nats is None or after.nats is None:
            return None
        windows = self.texts["validation"].windows.with_format("numpy")
        watched = windows[spaced_indices(len(windows), WATCHED_WINDOWS)]["input_ids"]
        return next_token_shift(watched, before.nats, after.nats, self.tokenizer)
