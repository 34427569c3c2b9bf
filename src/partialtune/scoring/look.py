"""One look at a model: texts and prompts -> scores, probes and the nats of single held-out tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from partialtune.insight.next_token_shift import WATCHED_WINDOWS, next_token_shift
from partialtune.scoring.evaluation import ScoredText, score_tokens, spaced_indices
from partialtune.scoring.prompts import PromptProbe, probe_prompts


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

    def at(self, model: PreTrainedModel, moment: str) -> Sight:
        scores, nats = {}, {}
        for name, text in self.texts.items():
            watched = WATCHED_WINDOWS if name == "validation" else 0
            scores[name], nats[name] = score_tokens(model, text, self.batch_size, f"{name}, {moment}", watched)
        return Sight(scores, probe_prompts(model, self.tokenizer, self.prompts), nats.get("validation"))

    def shift(self, before: Sight, after: Sight) -> dict[str, Any] | None:
        """What happened to the held-out tokens between two looks; None where nothing is held out."""
        if before.nats is None or after.nats is None:
            return None
        windows = self.texts["validation"].windows.with_format("numpy")
        watched = windows[spaced_indices(len(windows), WATCHED_WINDOWS)]["input_ids"]
        return next_token_shift(watched, before.nats, after.nats, self.tokenizer)
