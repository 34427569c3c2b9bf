"""All that a run's end shows beside its scores: model before and after -> the content of `insight.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from partialtune.freeze.plan import FreezePlan
from partialtune.insight.effective_rank import effective_ranks
from partialtune.insight.moved_tokens import moved_tokens
from partialtune.scoring.prompts import SAMPLING, PromptProbe


def weight_insight(
    model: nn.Module,
    plan: FreezePlan,
    before: Mapping[str, Any],
    counts: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    computes: bool,
) -> dict[str, Any]:
    """`effective_ranks` and `moved_tokens` of a finished run. All processes call this; arguments as there."""
    return {
        "effective_ranks": effective_ranks(model, plan, before, computes),
        "moved_tokens": moved_tokens(model, plan, before, counts, tokenizer, computes),
    }


def sampled_continuations(before: Sequence[PromptProbe], after: Sequence[PromptProbe]) -> dict[str, Any]:
    """What was drawn after each prompt: `temperature`, `top_p`, `seed`, `prompts: [{prompt, before, after}]`."""
    pairs = zip(before, after, strict=True)
    return {**SAMPLING, "prompts": [{"prompt": a.prompt, "before": a.sample, "after": b.sample} for a, b in pairs]}
