"""Does padding count? States of padding are kept only where something may be computed from them.

In: labels of a batch, whether logits are looked at, and the first gradients. Out: whether a row goes with its padding.

Labels alone do not say it. A loss of one's own may take the mean over all logits, a distillation compares those of
padding too, and a recurrent block carries padding on: from zeros in place of its states all of them would come out
otherwise, and nobody would see it. So the first loss of padded rows is computed from all states, and its gradient with
respect to them tells: where padding does not count, it is zero there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from partialtune.engine.row_digests import Row

TARGETS = {"labels": 1, "shift_labels": 0}
IGNORED = -100  # a label that is no target


class PaddingInLoss:
    """Whether padding counts in what is computed behind the frozen blocks.

    Attributes:
        in_training: Whether the loss of training was found to depend on it; None while nobody knows.
    """

    def __init__(self) -> None:
        self.in_training: bool | None = None
        self._labels: dict[str, torch.Tensor] = {}
        self._logits_wanted = False

    @contextmanager
    def of(self, inputs: Mapping[str, Any], logits_wanted: bool) -> Iterator[None]:
        """Within it a batch is computed with.

        Args:
            inputs: The batch: a label may be predicted from padding.
            logits_wanted: Whether anybody looks at the logits, those of padding too.
        """
        before = self._labels, self._logits_wanted
        self._labels = {name: inputs[name] for name in TARGETS if isinstance(inputs.get(name), torch.Tensor)}
        self._logits_wanted = logits_wanted
        try:
            yield
        finally:
            self._labels, self._logits_wanted = before

    def counts(self, padding: torch.Tensor, training: bool) -> bool:
        """Whether states of padding (B, T) may count: each row is then a whole one, with its padding."""
        for name, labels in self._labels.items():
            shift = TARGETS[name]  # the target of column t stands in column t + shift
            if labels.shape != padding.shape:
                return True
            counted = (labels != IGNORED).cpu()[:, shift:]
            if bool((counted & padding[:, : counted.shape[1]]).any()):
                return True
        return self._logits_wanted or (bool(self.in_training) if training else not self._labels)

    def watched(self, padding: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The states (B, T, D), of which backward notices whether the loss depends on those of padding (B, T)."""

        def notice(gradient: torch.Tensor) -> None:
            self.in_training = bool(self.in_training) or bool(gradient[padding.to(gradient.device)].any())

        leaf = states.detach().requires_grad_()
        leaf.register_hook(notice)
        return leaf.clone()  # a leaf cannot be added to in place, as some blocks do


def padding_beside(rows: Sequence[Row], shape: torch.Size) -> torch.Tensor | None:
    """Where no row is, (B, T); None where rows are all."""
    if sum(row.end - row.start for row in rows) == shape.numel():
        return None
    padding = torch.ones(shape, dtype=torch.bool)
    for row in rows:
        padding[row.number, row.start : row.end] = False
    return padding
