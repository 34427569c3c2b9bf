"""All fast paths of a run: put on for training, told of each phase, taken off at its end.

    with paths:                      # fused GELU, the loss without logits if the model's own agrees
        trainer.train()              # paths.begin(step) at each phase, paths.batch(inputs) around each batch

Before and after it the model is what `from_pretrained` gave: scores and digests do not depend on anything here.
"""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from partialtune.engine.broken_off_pass import modules_before_blocks
from partialtune.engine.disk_store import open_disk_store
from partialtune.engine.fast_modules import CastOnce, fused_gelu
from partialtune.engine.forward_stack import strange_forwards
from partialtune.engine.no_logits import LossWithoutLogits
from partialtune.engine.prefix import PrefixCache
from partialtune.engine.prefix_choice import PrefixPhase
from partialtune.engine.prefix_facts import prefix_facts
from partialtune.engine.prefix_place import SHARE_OF_FREE_MEMORY
from partialtune.engine.prefix_weights import prefix_digest
from partialtune.engine.row_digests import ROWS, Row
from partialtune.engine.state_store import HandedOnStore, MemoryStore, StateStore, make_store
from partialtune.engine.trl_head import fast_trl_head, has_frozen_trl_head
from partialtune.errors import ModelError
from partialtune.machine import free_memory
from partialtune.model.conformance import probe_windows
from partialtune.model.parameters import is_sharded

logger = logging.getLogger(__name__)

FAST_PATHS = ("loss", "gelu", "casts")


class FastPaths:
    """What a run does faster than a plain one.

    Args:
        model: The model itself; the plan is applied.
        enabled: Of `loss`, `gelu`, `casts`.
        prefix: What each phase does with its frozen prefix.
        autocast_dtype: In which the training computes, None for the model's own.

    Attributes:
        sha256: Digest of each weight at the start, by name, by which kept states are known.
        keeps_training_rows: Whether the rows of training come again.
        compiled: Whether the passes go through `torch.compile`.
        handed_on: By number of blocks, stores in memory that one training of this process hands on to the next; None
            where each has its own.
        in_use: What of `enabled` was taken.
        before_blocks: Names of modules without parameters that belong to the prefix: they stay in eval mode with it.
        passed_by: Why passes were computed without a look at what is kept, and how many.
        kept_bytes: The most that the kept states took, on this process.
    """

    def __init__(
        self,
        model: nn.Module,
        enabled: Collection[str],
        prefix: Sequence[PrefixPhase] = (),
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._enabled, self._prefix = model, enabled, prefix
        self._known = [one for module in model.modules() for one in strange_forwards(module)]  # what was tried with it
        self._autocast_dtype = autocast_dtype
        self._loss: LossWithoutLogits | None = None
        self._casts: CastOnce | None = None
        self._cache: PrefixCache | None = None
        self._held = ExitStack()
        self.sha256: Mapping[str, str] = {}
        self.keeps_training_rows = True
        self.compiled = False
        self.handed_on: MutableMapping[int, StateStore] | None = None
        self.in_use: list[str] = []
        self.before_blocks: list[str] = []
        self._hits = self._misses = self.kept_bytes = 0  # of phases that are over
        self.passed_by: Counter[str] = Counter()
        # Also where nothing is kept: a prefix without dropout is the same training, kept or computed.
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            with suppress(ModelError):  # blocks that are not called as modules: what is before them is not known
                self.before_blocks = modules_before_blocks(model, probe_windows(model, 2, []))

    @property
    def keeps_prefix(self) -> bool:
        """Whether any phase starts from kept states."""
        return any(phase.blocks for phase in self._prefix)

    @property
    def keeps_on_disk(self) -> bool:
        """Whether any phase keeps them on disk."""
        return any(phase.on_disk for phase in self._prefix)

    @property
    def hits(self) -> int:
        """Rows of the run that started from kept states, so far."""
        return self._hits + (self._cache.hits if self._cache else 0)

    @property
    def misses(self) -> int:
        """Rows whose prefix was computed, so far."""
        return self._misses + (self._cache.misses if self._cache else 0)

    @property
    def starts_from_states(self) -> bool:
        """Whether half of the rows of the run or more started from kept states, so that the median step did."""
        return self.hits >= max(1, self.misses)

    def __enter__(self) -> "FastPaths":
        if "gelu" in self._enabled and self._held.enter_context(fused_gelu(self._model)):
            self.in_use.append("gelu")
        if "loss" in self._enabled and has_frozen_trl_head(self._model):
            self._held.enter_context(fast_trl_head())
            self.in_use.append("loss")
        elif "loss" in self._enabled:
            self._take_loss()
        if "casts" in self._enabled and self._autocast_dtype is not None:
            self._casts = CastOnce(self._model)
            self.in_use.append("casts")
        return self

    def _take_loss(self) -> None:
        """Take the loss without logits, if it agrees with the model's own on a window.

        Every process sees the same window and weights, and decides alike.
        """
        loss = LossWithoutLogits(self._model)
        why_not = loss.refusal(probe_windows(self._model, 16, []))
        if why_not:
            logger.info("The model keeps its own loss, with all logits: %s.", why_not)
        else:
            self._loss = loss
            self.in_use.append("loss")

    def __exit__(self, kind, error, trace) -> None:
        self.leave()
        self._held.close()
        self._loss = self._casts = None

    def begin(self, step: int) -> None:
        """Suit the phase of this step; its parameters require gradients by now. On every process."""
        self.leave()
        phase = [phase for phase in self._prefix if phase.from_step <= step][-1] if self._prefix else None
        if phase is not None and phase.blocks:
            digest = prefix_digest(self._model, phase.blocks, self.sha256)
            store = self._store(phase, digest)
            keeps_training_rows = self.keeps_training_rows or store.outlives_run
            self._cache = PrefixCache(self._model, phase.blocks, store, digest, keeps_training_rows, self._known)
            self._cache.put_on()
        if self._casts is not None:
            self._casts.begin()

    def _store(self, phase: PrefixPhase, digest: bytes) -> StateStore:
        """Where the states of a phase are kept."""
        limit = int(SHARE_OF_FREE_MEMORY * free_memory())
        if phase.on_disk:
            try:
                return open_disk_store(prefix_facts(self._model, phase.blocks, digest, self.compiled))
            except (OSError, ModelError) as error:
                logger.warning("The states of the frozen prefix are kept in memory, and not on disk: %s.", error)
        if self.handed_on is not None:
            if phase.blocks not in self.handed_on:
                self.handed_on[phase.blocks] = HandedOnStore(limit, torch.uint8)
            return self.handed_on[phase.blocks]
        if not phase.on_disk:
            return make_store(limit, torch.uint8)
        # The others of the run may have their disk, so that nothing can be done together here.
        return MemoryStore(limit // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.uint8)

    def leave(self) -> None:
        """Take off what depends on the phase."""
        cache, self._cache = self._cache, None
        if cache is not None:
            self._hits, self._misses = self._hits + cache.hits, self._misses + cache.misses
            self.kept_bytes = max(self.kept_bytes, cache.store.size)
            self.passed_by += cache.passed_by
            cache.take_off()
        if self._casts is not None:
            self._casts.end()
        if self._loss is not None:
            self._loss.forget_copies()

    @contextmanager
    def rows_known(self, inputs: Any) -> Iterator[None]:
        """Around all that a Trainer does with a batch: a pass over its tensors need not digest them.

        Args:
            inputs: The batch. Its rows, which came with it from the collator, are taken out.
        """
        rows = inputs.pop(ROWS, None) if isinstance(inputs, MutableMapping) else None
        if self._cache is None or rows is None:
            yield
            return
        with self._cache.expecting(inputs, [Row(*row) for row in rows]):
            yield

    @contextmanager
    def batch(self, inputs: Mapping[str, Any], logits_wanted: bool, padding_wanted: bool) -> Iterator[None]:
        """Around what computes the loss of a batch.

        Args:
            inputs: Of the model.
            logits_wanted: Whether anybody looks at the logits.
            padding_wanted: Whether anybody may look at those of padding, besides the loss.
        """
        with ExitStack() as held:
            if self._cache is not None:
                held.enter_context(self._cache.padding.of(inputs, padding_wanted))
            if self._loss is not None and not logits_wanted:
                held.enter_context(self._loss.active())
            yield
