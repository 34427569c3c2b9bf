"""Texts and prompts, scored before training and after: scores, probes and the nats of single held-out tokens."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from partialtune.delta_checkpoint import Base
from partialtune.insight.next_token_shift import WATCHED_WINDOWS, next_token_shift
from partialtune.model.checkpoint_folder import checkpoint_folder
from partialtune.model.packed_weights import packed_in, serve_base, without_base
from partialtune.model.parameters import is_sharded, plain_name
from partialtune.model.weight_files import open_weights
from partialtune.scoring.evaluation import ScoredText, TextScores, score_windows, spaced_indices
from partialtune.scoring.fast_scoring import FastScoring
from partialtune.scoring.kept_scores import KEPT_FILE, KeptScores, basis_of
from partialtune.scoring.prompts import PromptProbe, continue_prompts, probe_prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What a model scored at one moment.

    Attributes:
        texts: TEXT -> what it scored.
        prompts: Next tokens and continuations.
    """

    texts: dict[str, TextScores]
    prompts: list[PromptProbe]

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """TEXT -> its figures, as in `evaluation.json`."""
        return {name: found.figures for name, found in self.texts.items()}

    @property
    def nats(self) -> np.ndarray | None:
        """Of single held-out tokens, (windows, block_size - 1); None where nothing is held out."""
        return self.texts["validation"].nats if "validation" in self.texts else None


def read_base_values(model: PreTrainedModel, base: Base, trust_remote_code: bool = False) -> None:
    """Let a model whose frozen matrices are quantised be scored with those of the base's files, which are saved.

    Each matrix is read for its product, so that the base is never in memory as a whole.

    Args:
        model: Of the run. One without such matrices stays as it is, and nothing is read.
        base: Where the files are.
        trust_remote_code: As in the recipe.
    """
    if packed_in(model):
        folder, name = checkpoint_folder(base.location)
        weights = open_weights(folder, name, trust_remote_code)
        serve_base(model, lambda parameter: weights.read(plain_name(parameter)))


@dataclass(frozen=True)
class Evaluator:
    """The same texts and prompts for the model before training and after.

    Attributes:
        tokenizer: Of the model.
        texts: TEXT -> its windows.
        prompts: To be continued.
        batch_size: Windows of a forward pass.
        fast: Scores texts by the engine's fast paths, where these agree with the model's own way.
        dtype: What the run multiplies matrices in. accelerate has the model do so from its preparation on: without,
            the base would be scored in fp32, and what became of it in bf16.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, ScoredText]
    prompts: Sequence[str]
    batch_size: int
    fast: FastScoring
    dtype: torch.dtype = torch.float32

    def before(self, model: PreTrainedModel, folder: Path, base_sha256: Mapping[str, str]) -> Evaluation:
        """Evaluate the base; what was scored of the very same before, in this folder or by another run, is used again.

        Args:
            model: The base, on its device, with the plan applied.
            folder: The run's.
            base_sha256: Digest of each parameter, by its name.
        """
        sharded = any(is_sharded(parameter) for parameter in model.parameters())
        basis = basis_of(
            base_sha256,
            model.config,
            self.tokenizer,
            self.texts,
            self.prompts,
            self.batch_size,
            model.device,
            [*(("shards",) if sharded else self.fast.enabled), *([] if self.is_plain else [str(self.dtype)])],
            Counter(str(parameter.dtype) for parameter in model.parameters()),
        )
        # other runs may compute in another precision in shards, which their parameters do not tell
        kept = KeptScores(folder / KEPT_FILE, basis, shared=bool(self.fast.enabled) and not sharded)
        if kept.used:
            logger.info("Scores of the base, taken by %s, are used again: %s.", kept.source, ", ".join(kept.used))
        texts = {name: kept.text(name, partial(self.score, name, model, "before")) for name in self.texts}
        evaluation = Evaluation(texts, kept.prompts(partial(self._probe, model)))
        kept.share()
        spoilt = [name for name, scores in evaluation.scores.items() if scores["loss"] is None]
        if spoilt:
            logger.warning(
                "The loss of the base is not a finite number, before any training, on: %s.", ", ".join(spoilt)
            )
        return evaluation

    def after(self, model: PreTrainedModel, taken: Mapping[str, TextScores]) -> Evaluation:
        """Evaluate the trained model.

        Args:
            model: The model as it was saved.
            taken: Texts that were scored after its last step already.
        """
        texts = {name: taken[name] if name in taken else self.score(name, model, "after") for name in self.texts}
        return Evaluation(texts, self._probe(model))

    def quantized(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Scores of the base as it is held in few bits: what training begins with. Empty where it is held whole."""
        if not packed_in(model):
            return {}
        with without_base(model):
            return {name: self.score(name, model, "quantised").figures for name in self.texts}

    def score(self, name: str, model: PreTrainedModel, moment: str) -> TextScores:
        """Score one of the texts as a whole."""
        watched = WATCHED_WINDOWS if name == "validation" else 0
        dtype = None if self.is_plain else self.dtype
        words = f"{name}, {moment}"
        return score_windows(model, self.texts[name], self.batch_size, words, watched, dtype, self.fast)

    @property
    def is_plain(self) -> bool:
        """Whether products are taken in fp32."""
        return self.dtype == torch.float32

    def _probe(self, model: PreTrainedModel) -> list[PromptProbe]:
        with torch.autocast(model.device.type, self.dtype, enabled=not self.is_plain):
            return probe_prompts(model, self.tokenizer, self.prompts)

    def continuations(self, model: PreTrainedModel) -> list[str]:
        """The greedy continuation of each prompt, as `Evaluation.prompts` has it. Training may go on afterwards."""
        with torch.autocast(model.device.type, self.dtype, enabled=not self.is_plain):
            return continue_prompts(model, self.tokenizer, self.prompts)

    def token_shift(self, before: Evaluation, after: Evaluation) -> dict[str, Any] | None:
        """What happened to single held-out tokens between two evaluations; None where nothing is held out."""
        if before.nats is None or after.nats is None:
            return None
        windows = self.texts["validation"].windows.with_format("numpy")
        # the same windows that `score_tokens` kept nats of: (windows, block_size) beside (windows, block_size - 1)
        watched = windows[spaced_indices(len(windows), WATCHED_WINDOWS)]["input_ids"]
        return next_token_shift(watched, before.nats, after.nats, self.tokenizer)
