"""A step whose loss or gradients are not finite: the run ends before the optimizer takes it, and names its windows."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset

from partialtune.distributed import from_all
from partialtune.errors import TrainingDiverged

ROWS_AT_ONCE = 4096  # of the training windows, when those of a batch are looked for
NAMED = 16


class BatchWatch:
    """Remembers the windows of the present optimizer step, and stops the run where its gradients are not finite.

    Under DDP and FSDP a value that is not finite reaches the gradients of every process, so that all stop together.

    Args:
        windows: Training windows, `input_ids` (T,); None where no window has a number.
    """

    def __init__(self, windows: Dataset | None) -> None:
        self.windows = windows
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []  # input_ids (B, T), loss; accumulated ones too

    def add(self, input_ids: torch.Tensor, loss: torch.Tensor) -> None:
        """Take note of a batch that went through forward and backward."""
        self._batches.append((input_ids, loss.detach()))

    def end_step(self, step: int, grad_norm: float | torch.Tensor | None, rate: float, stop: bool) -> None:
        """Judge the step by its gradients.

        Args:
            step: Optimizer steps that were taken so far.
            grad_norm: Norm of all gradients, None where it is unknown.
            rate: Learning rate, for the message.
            stop: Whether a norm that is not finite ends the run.

        Raises:
            TrainingDiverged: In that case; the weights are those from before the step.
        """
        batches, self._batches = self._batches, []
        if not stop or grad_norm is None or math.isfinite(grad_norm):
            return
        losses = [float(loss) for _, loss in batches]
        wrong = [ids for (ids, _), loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        what = "the loss" if any(from_all(bool(wrong))) else "the gradients"
        of_each = from_all(self._numbers_of(wrong if what == "the loss" else [ids for ids, _ in batches]))
        numbers = sorted({number for numbers in of_each for number in numbers})
        shown = ", ".join(map(str, numbers[:NAMED])) + f" and {len(numbers) - NAMED} more" * (len(numbers) > NAMED)
        raise TrainingDiverged(
            f"Training diverged: {what} of step {step + 1} became non-finite (learning rate {rate:.3g}), in training "
            f"windows {shown or 'without a number'}. The step was not taken. Lower learning_rate, add warmup_steps, or "
            f"look at these windows. Checkpoints from before are kept."
        )

    def _numbers_of(self, batches: Sequence[torch.Tensor]) -> list[int]:
        """The places of windows in the training windows, found by their tokens; of equal ones the first."""
        rows = {row.astype(np.int32).tobytes() for ids in batches for row in ids.cpu().numpy()}
        numbers: dict[bytes, int] = {}
        if self.windows is None or not rows:
            return []
        for start in range(0, len(self.windows), ROWS_AT_ONCE):
            stretch = self.windows.with_format("numpy")[start : start + ROWS_AT_ONCE]["input_ids"]
            for place, row in enumerate(np.asarray(stretch, dtype=np.int32), start=start):
                if row.tobytes() in rows:
                    numbers.setdefault(row.tobytes(), place)
        return sorted(numbers.values())
