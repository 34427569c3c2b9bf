"""All fast paths of a run: put on for training, told of each phase, taken off at its end.

    with paths:                      # fused GELU, the loss without logits if the model's own agrees
        trainer.train()              # paths.begin(phase) at each phase, paths.step(windows) around each forward pass

Before and after it the model is what `from_pretrained` gave: scores and digests do not depend on anything here.
"""

import logging
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from partialtune.engine.fast_modules import CastOnce, fused_gelu
from partialtune.engine.no_logits import LossWithoutLogits
from partialtune.engine.prefix import PrefixCache, modules_before_blocks
from partialtune.engine.prefix_choice import PrefixPhase
from partialtune.errors import ModelError
from partialtune.model.conformance import probe_windows
from partialtune.model.parameters import is_sharded

logger = logging.getLogger(__name__)


class FastPaths:
    """What a run does faster than a plain one.

    Args:
        model: The model itself, on its device; the plan is applied.
        enabled: Of `loss`, `gelu`, `casts`.
        prefix: What each phase does with its frozen prefix.
        windows: Training windows, and held-out ones if there are any.
        batch_size: Windows of a forward pass that fills the cache.
        autocast_dtype: In which the training computes, None for the model's own.

    Attributes:
        in_use: What of `enabled` was taken.
        before_blocks: Names of modules without parameters that belong to the prefix: they stay in eval mode with it.
    """

    def __init__(
        self,
        model: nn.Module,
        enabled: Collection[str],
        prefix: Sequence[PrefixPhase],
        windows: Sequence[Dataset],
        batch_size: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._model, self._enabled, self._prefix = model, enabled, prefix
        self._windows, self._batch_size, self._autocast_dtype = windows, batch_size, autocast_dtype
        self._loss: LossWithoutLogits | None = None
        self._casts: CastOnce | None = None
        self._cache: PrefixCache | None = None
        self._held = ExitStack()
        self.in_use: list[str] = []
        self.before_blocks: list[str] = []
        if any(is_sharded(parameter) for parameter in model.parameters()):
            return  # a pass that is broken off would leave whole parameters in the places of shards
        with suppress(ModelError):  # the model calls its blocks otherwise than as modules: what is before is not known
            self.before_blocks = modules_before_blocks(
                model, torch.zeros((1, 2), dtype=torch.long, device=_device(model))
            )

    @property
    def keeps_prefix(self) -> bool:
        """Whether any phase starts from kept states."""
        return any(phase.blocks for phase in self._prefix)

    def __enter__(self) -> "FastPaths":
        if "gelu" in self._enabled and self._held.enter_context(fused_gelu(self._model)):
            self.in_use.append("gelu")
        if "loss" in self._enabled:
            self._take_loss()
        if "casts" in self._enabled and self._autocast_dtype is not None:
            self._casts = CastOnce(self._model)
            self.in_use.append("casts")
        return self

    def _take_loss(self) -> None:
        """Take the loss without logits, if it agrees with the model's own on the first window.

        Every process sees the same window and weights, and decides alike.
        """
        loss = LossWithoutLogits(self._model)
        if self._windows:
            rows = torch.as_tensor(self._windows[0][0]["input_ids"], dtype=torch.long)[None]
        else:
            rows = probe_windows(self._model, 16, [])
        why_not = loss.refusal(rows.to(_device(self._model)))
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
        phase = [phase for phase in self._prefix if phase.from_step <= step][-1]
        # The cache before the casts: it computes all states by the model's own modules, and patches blocks alone.
        if phase.blocks:
            self._cache = PrefixCache(self._model, phase.blocks, self._autocast_dtype or torch.float32)
            self._cache.fill(self._windows, self._batch_size, self._autocast_dtype)
            self._cache.install()
        if self._casts is not None:
            self._casts.begin()

    def leave(self) -> None:
        """Take off what depends on the phase."""
        if self._cache is not None:
            self._cache.remove()
            self._cache = None
        if self._casts is not None:
            self._casts.end()
        if self._loss is not None:
            self._loss.forget_copies()

    @contextmanager
    def batch(self, inputs: MutableMapping[str, Any], logits_wanted: bool) -> Iterator[None]:
        """Around what a Trainer does with a batch.

        Args:
            inputs: Of the model.
            logits_wanted: Whether the Trainer looks at the logits.
        """
        with self._loss.active() if self._loss is not None and not logits_wanted else nullcontext():
            yield

    @contextmanager
    def step(self, numbers: torch.Tensor | None) -> Iterator[None]:
        """Around a forward pass with labels.

        Args:
            numbers: int64 (B,), of the windows in the batch; None where they are unknown.
        """
        with ExitStack() as held:
            if self._cache is not None and numbers is not None:  # else the blocks compute as they are
                held.enter_context(self._cache.giving(numbers))
            if self._loss is not None:
                held.enter_context(self._loss.active())
            yield


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
