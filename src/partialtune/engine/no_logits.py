"""A model's own forward pass with a loss that never holds all logits: a context for a step, and the check before it.

The head hands its input through, and the model's `loss_function` gets hidden states where it expects logits. All else
stays the model's: masks, router losses, what DDP and autocast do around it. A model that does more to its logits than
to hand them on (caps, scales, a second head) is found out, and keeps its own loss.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from partialtune.engine.forward_stack import computes_otherwise, has_hooks_of_others, put_on, strange_forwards
from partialtune.engine.head_loss import head_cross_entropy, widens
from partialtune.errors import is_ours
from partialtune.model.held_narrow import own_class_of
from partialtune.model.narrow_weights import held_matrix
from partialtune.model.row_parameters import trained_rows_of
from partialtune.model.train_mode import evaluating, no_layer_drop
from partialtune.model.trained_rows import matrix_and_rows

logger = logging.getLogger(__name__)

AGREEMENT = 1e-4  # nats a token between the model's own loss and ours: caps and scales of logits differ by far more
CHECKED_LOGITS = 1 << 24  # of the model's own loss in the check: 64 MB in fp32
IGNORED = -100  # a label that is no target


class LogitsInUse(Exception):
    """The model did something to its logits before it took the loss."""


class LossWithoutLogits:
    """The loss of a causal language model without its logits, while `active`.

    Args:
        model: The model itself, not its DDP wrapper; PEFT's wrapper is looked through.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._head = self._owner.get_output_embeddings()
        # What stands there by now takes part when both losses are compared.
        self._found = {one: strange_forwards(one) for one in (self._model, self._owner, self._head) if one is not None}
        self._passed_on: torch.Tensor | None = None
        self._frozen_copy: torch.Tensor | None = None

    def refusal(self, input_ids: torch.Tensor) -> str:
        """Why this model needs its own loss, empty where it does not: both are taken on one batch and compared.

        In eval mode, and in train mode from one seed: a model may use its logits in training alone.

        Args:
            input_ids: int64 (B, T), on the model's device; as much of it is used as keeps the logits small.
        """
        if needs_them := self.needs_logits():
            return needs_them
        few = input_ids[:1, : max(2, CHECKED_LOGITS // self._head.out_features)]
        with evaluating(self._owner), no_layer_drop(self._owner), torch.autocast(few.device.type, enabled=False):
            for mode in ("eval", "train"):
                self._owner.train(mode == "train")
                own = self._loss_of(few)
                try:
                    with self.active():
                        ours = self._loss_of(few)
                except LogitsInUse:
                    return "it changes its logits after the head, by a cap or a scale"
                except Exception as error:  # BART computes its loss itself, and finds that states are no logits
                    if is_ours(error):
                        raise
                    return f"its forward pass fails without logits ({type(error).__name__})"
                if abs(own - ours) > AGREEMENT:
                    both = f"its own loss is {own:.6f} and the loss without logits {ours:.6f}"
                    return f"on the first window {both} ({mode} mode)"
        return ""

    def _loss_of(self, input_ids: torch.Tensor) -> float:
        """Nats a token, drawn from one seed; the random numbers of the run are not used up."""
        kind = input_ids.device.type
        of_mps = torch.mps.get_rng_state() if kind == "mps" else None  # fork_rng cannot keep it
        with torch.random.fork_rng([input_ids.device] if kind == "cuda" else []):
            torch.manual_seed(0)
            loss = float(self._owner(input_ids=input_ids, labels=input_ids).loss)
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
        return loss

    def needs_logits(self) -> str:
        """What in the model's build needs all logits, empty where nothing does. Nothing is computed."""
        if own_class_of(self._head) is not nn.Linear:
            return f"its head is a {type(self._head).__name__}, no plain linear layer"
        if self._owner.loss_function is not ForCausalLMLoss:
            return "its loss is not the usual one of causal language models"
        if self._is_looked_at():
            return "a hook or another forward on the model or its head may look at the logits"
        return ""

    def _is_looked_at(self) -> bool:
        return any(has_hooks_of_others(one) or computes_otherwise(one, known) for one, known in self._found.items())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, a forward pass with labels gives the same loss, and hidden states in place of logits.

        `loss_function` is transformers' property of every model. Its setter keeps what it is given in `_loss_function`,
        which has no public way to be taken back: it is deleted, and the property looks the usual loss up again
        (`test_logits_are_the_models_own_before_and_after`).
        """
        if self._is_looked_at():
            yield  # who looks at the logits by a hook finds them there
            return
        worn = put_on(self._head, self._pass_on)  # over the casts of a frozen head
        self._owner.loss_function = self._loss
        try:
            yield
        finally:
            worn.take_off()
            del self._owner._loss_function
            self._passed_on = None

    def forget_copies(self) -> None:
        """Drop the 16-bit copy of a frozen head, as when it begins to train."""
        self._frozen_copy = None

    def _pass_on(self, forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        self._passed_on = hidden
        return hidden

    @torch.compiler.disable  # how many targets there are differs from batch to batch: the graph would break here anyway
    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """As `ForCausalLMLoss`: the mean over the targets, or their sum over `num_items_in_batch`.

        Args:
            logits: (B, T, D), the hidden states that the head has passed on.
            labels: int64 (B, T), not shifted.
        """
        passed_on, self._passed_on = self._passed_on, None
        if passed_on is None or logits is not passed_on:  # a cap, a scale or a slice would have made another tensor
            raise LogitsInUse
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # (B, T): the last token has no next one
        targets = shift_labels.reshape(-1).to(logits.device)  # (B * T,)
        places = (targets != ignore_index).nonzero().squeeze(1)  # (N,)
        hidden = logits.reshape(-1, logits.shape[-1]).index_select(0, places)  # (N, D)
        weight, rows = matrix_and_rows(held_matrix(self._head.weight))  # of 16 bits: slices of it are widened
        dtype = _compute_dtype(hidden)
        low_weight = self._low_weight(weight, dtype)
        nats = head_cross_entropy(hidden, weight, targets[places], self._head.bias, dtype, low_weight, rows)
        count: Any = len(places) if num_items_in_batch is None else num_items_in_batch
        return nats / (count.to(nats.device) if torch.is_tensor(count) else count)

    def _low_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """A frozen head in the compute dtype, cast once; of rows that train the newest values are put into it.

        None where the head trains as a whole, needs no cast, or is narrower and widened by slices.
        """
        if weight.requires_grad or weight.dtype == dtype or widens(weight, dtype):
            return None
        if self._frozen_copy is None or self._frozen_copy.dtype != dtype:
            self._frozen_copy = weight.detach().to(dtype)
        elif trained := trained_rows_of(self._head).get("weight"):  # in passes without gradients too
            trained.put_into(self._frozen_copy)
        return self._frozen_copy


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
