"""Scores by the engine's fast paths: GELU fused, a few rows of logits at a time, frozen first blocks from kept states.

    fast = FastScoring(model, ["loss", "gelu"])
    with fast.active(input_ids) as score:           # the first time: on the first window compared with the model's own
        nats, hits = score(input_ids)

All logits of 16 windows of 256 tokens are 785 MB for GPT-2, which a batch writes, widens and reads several times. Here
the head hands its input through, and is then called with a few rows of it. What stands in for the model's own way was
compared with it before; where the two differ the model's own way is taken, and the log says so.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from partialtune.engine.fast_modules import fused_gelu
from partialtune.engine.forward_stack import has_hooks_of_others, put_on
from partialtune.engine.prefix import PrefixCache
from partialtune.engine.state_store import MemoryStore
from partialtune.errors import is_ours
from partialtune.machine import free_memory
from partialtune.model.narrow_weights import NarrowWeight
from partialtune.model.parameters import is_sharded

logger = logging.getLogger(__name__)

# Nats a token, between the mean of the model's own way and ours, in fp32: rounding is a hundredth of it, the caps and
# scales of logits a thousand times as much.
AGREEMENT = 1e-5
COMPARED_WINDOWS = 1
# Elements, 32 MB in fp32: above that malloc maps fresh pages for every result, and clearing them takes longer than to
# read what was computed.
LOGITS_AT_ONCE = 1 << 23
LOGITS_OF_A_NARROW_HEAD = 1 << 25  # such a head is widened once for all rows of a product
TOP = 5
SHARE_OF_FREE_MEMORY = 0.05  # that kept states may take at most, and
MOST_KEPT = 256 * 2**20  # bytes: 340 windows of 256 tokens of GPT-2, 128 of a Llama of 1.1B

Score = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class LogitsInUse(Exception):
    """The model does something to its logits, so that states of the head's input cannot take their place."""


def score_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each target, fp32 (N,), and which of the five first guesses it is, bool (N, 5).

    Of equal logits the one of the smaller id counts as the earlier guess. Fewer than 5 where the vocabulary is smaller.

    Args:
        logits: (N, V), row n predicts targets[n].
        targets: int64 (N,).
    """
    scores = logits.float()  # (N, V)
    best = scores.topk(min(TOP, scores.shape[-1])).indices
    return F.cross_entropy(scores, targets, reduction="none"), best == targets[:, None]


def score_by_all_logits(model: nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own way: all logits of a batch, then a few rows of them at a time.

    Args:
        model: A causal language model.
        input_ids: int64 (B, T).

    Returns:
        As `score_of_logits`, (B, T - 1) and (B, T - 1, 5), on the CPU.
    """
    logits = _forward(model, input_ids)  # (B, T, V)
    rows = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    parts = []
    for row_logits, row_ids in zip(logits, input_ids, strict=True):
        for at in range(0, len(row_ids) - 1, rows):  # position t predicts token t + 1
            parts.append(score_of_logits(row_logits[:-1][at : at + rows], row_ids[1:][at : at + rows]))
    return _joined(parts, input_ids)


class _KeptStates(MemoryStore):
    """States that stay when the prefix cache is taken off the model, until its next scores."""

    def close(self) -> None:
        pass


class FastScoring:
    """Scores a model faster than by all its logits, where that gives the same scores.

    Args:
        model: The model itself, not its DDP or compiled wrapper.
        enabled: As the recipe's `fast_paths`. Without `loss` nothing is done here; `casts` are the training's own.
        blocks: First blocks that are frozen in every phase and whose states may be kept, as `choose_prefix` found: a
            window that was scored before starts from them.

    Attributes:
        kept: States of the windows that were scored, in memory until `forget`.
    """

    def __init__(self, model: nn.Module, enabled: Collection[str], blocks: int = 0) -> None:
        self.model, self.enabled, self._blocks = model, tuple(enabled), blocks
        self.kept = _KeptStates(min(MOST_KEPT, int(SHARE_OF_FREE_MEMORY * free_memory())), torch.uint8)
        self._prefix: PrefixCache | None = None
        owner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._head = owner.get_output_embeddings() if hasattr(owner, "get_output_embeddings") else None
        self._refusal: str | None = None if "loss" in enabled else "fast_paths is without loss"

    @contextmanager
    def active(self, input_ids: torch.Tensor) -> Iterator[Score]:
        """Within it, what it yields scores a batch (B, T); the model is in eval mode and without gradients.

        Args:
            input_ids: Of the first batch, to compare the two ways on; on the model's device. Every process sees one of
                its own: they need not decide alike.
        """
        if self._refusal is None:
            self._refusal = self._compare(input_ids[:COMPARED_WINDOWS])
            if self._refusal:
                logger.info("Scores are taken from all logits of the model: %s.", self._refusal)
        if self._refusal or self._unsuited():
            yield lambda ids: score_by_all_logits(self.model, ids)
            return
        with self._fast():
            yield self._score

    def forget(self) -> None:
        """Give the memory of kept states back."""
        self.kept.forget()

    def _unsuited(self) -> str:
        """What forbids it at this moment, in words; empty where nothing does."""
        if self._head is None:
            return "it names no head"
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            return "its parameters are sharded"
        if any(has_hooks_of_others(module) for module in (self.model, self._head)):
            return "a forward hook on the model or its head looks at the logits"
        return ""

    def _compare(self, input_ids: torch.Tensor) -> str:
        """Why the model is scored in its own way, empty where both ways agree on a window. In fp32: autocast rounds."""
        if unsuited := self._unsuited():
            return unsuited
        with torch.autocast(input_ids.device.type, enabled=False):
            own = score_by_all_logits(self.model, input_ids)[0].double().mean()
            try:
                with self._fast():
                    ours = self._score(input_ids)[0].double().mean()
            except LogitsInUse:
                return "it changes its logits after the head, by a cap or a scale"
            except Exception as error:
                if is_ours(error):
                    raise
                return f"its forward pass fails without logits ({type(error).__name__})"
        if abs(own - ours) > AGREEMENT * max(1.0, float(own)):
            return f"on the first window its own loss is {own:.6f} and that of the fast paths {ours:.6f}"
        return ""

    @contextmanager
    def _fast(self) -> Iterator[None]:
        with ExitStack() as held:
            if "gelu" in self.enabled:
                held.enter_context(fused_gelu(self.model))
            if self._blocks:
                # over the one of a training that goes on: a window that it alone knows is found there
                self._prefix = self._prefix or PrefixCache(self.model, self._blocks, self.kept)
                self._prefix.put_on()
                held.callback(self._prefix.take_off)
            yield

    def _score(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `score_by_all_logits`."""
        head, hidden = self._before_head(input_ids)
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])  # (N, D): the last token of a window has no next one
        targets = input_ids[:, 1:].reshape(-1)
        parts, at, rows = [], 0, 1
        is_narrow = isinstance(getattr(self._head, "weight", None), NarrowWeight)
        room = LOGITS_OF_A_NARROW_HEAD if is_narrow else LOGITS_AT_ONCE
        while at < len(states):
            logits = head(states[at : at + rows])  # (C, V)
            parts.append(score_of_logits(logits, targets[at : at + rows]))
            at += rows
            rows = 1 << (max(1, room // logits.shape[-1]).bit_length() - 1)
        return _joined(parts, input_ids)

    def _before_head(self, input_ids: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """What computes logits of states, and the states (B, T, D) that the model calls its head with."""
        seen: list[tuple[Callable[..., Any], torch.Tensor]] = []

        def pass_on(forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
            seen.append((forward, hidden))
            return hidden

        worn = put_on(self._head, pass_on)  # over casts and rows of it that train: `forward` computes them
        try:
            found = _forward(self.model, input_ids)
        finally:
            worn.take_off()
        if len(seen) != 1 or found is not seen[0][1]:  # a cap, a scale or a slice would have made another tensor
            raise LogitsInUse
        return seen[0]


def _forward(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    # the mask of ones says that a window which happens to hold the pad token is not padded
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits


def _joined(
    parts: list[tuple[torch.Tensor, torch.Tensor]], input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a batch as (B, T - 1) and (B, T - 1, 5), on the CPU."""
    nats, hits = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    shape = (input_ids.shape[0], input_ids.shape[1] - 1)
    return nats.view(shape), hits.view(*shape, -1)
