"""What a freeze plan is made of: a tensor and what happens to it; a part of the run in which the same tensors learn."""

import math
from dataclasses import dataclass

import torch

from partialtune.freeze.additions import start_words
from partialtune.model.rows import Rows, count_rows, take_rows


@dataclass(frozen=True)
class PlannedParameter:
    """One tensor of the model and what happens to it.

    Attributes:
        name: Full dotted name, as in `model.named_parameters()` once the plan is applied.
        shape: Its shape.
        numel: Number of values.
        block: Index of its decoder block, None outside the blocks.
        component: Its part of the model, see `layout.COMPONENTS`.
        selector: The selector that chose it, None where it is frozen.
        from_step: First step of the phase that adds it, or of the first draw of its block. None where it is frozen, and
            where that phase begins at an epoch in a plan made before the text is read.
        learning_rate: Of its own or of that phase, None where the recipe's holds.
        rate_factor: What the one that holds is multiplied with.
        rate_name: Of its rate in the log, where the plan has rates of parts; empty for the recipe's own.
        fixed: Whether the model's own code never trains it, so that no selector adds it.
        rows: Which of its rows train, None where all of it does.
        in_turn: Whether it learns only while its block is drawn.
        quantized: Whether it is held in the bits of the plan's `frozen_quantization`.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    block: int | None
    component: str
    selector: str | None = None
    from_step: int | None = None
    learning_rate: float | None = None
    fixed: bool = False
    rows: Rows | None = None
    in_turn: bool = False
    rate_factor: float = 1.0
    rate_name: str = ""
    quantized: bool = False

    @property
    def trainable(self) -> bool:
        """Whether any phase of the run trains it, or rows of it."""
        return self.selector is not None

    @property
    def learning_shape(self) -> tuple[int, ...]:
        """Shape of what an optimizer holds of it, where it trains: that of its rows, if only these train."""
        return self.shape if self.rows is None else (count_rows(self.rows), *self.shape[1:])

    @property
    def learning(self) -> int:
        """Number of its values that train, 0 where it is frozen."""
        return math.prod(self.learning_shape) if self.trainable else 0

    def learning_part(self, values: torch.Tensor) -> torch.Tensor:
        """Of its values those of `learning_shape`: its rows that train, in a new tensor, or all."""
        return values if self.rows is None else take_rows(values, self.rows)


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the same parameters learn.

    Attributes:
        from_step: Its first step; steps count from 0. None where `from_epoch` says it, before the text is read.
        trainable: Names of all that learns from then on, in the order of `named_parameters()`.
        backward_from: First of them in forward order: backward stops there.
        first_block: First block that backward passes, the number of blocks where it passes none.
        from_epoch: The epoch at which it begins, in a plan made before the text is read.
    """

    from_step: int | None
    trainable: tuple[str, ...]
    backward_from: str
    first_block: int
    from_epoch: float | None = None

    @property
    def first_step(self) -> int:
        """`from_step`, in a plan that is carried out.

        Raises:
            ValueError: In a plan made before the text is read, where the phase begins at an epoch.
        """
        if self.from_step is None:
            raise ValueError(f"The phase from {self.start} has no step yet: plan again once the text is read.")
        return self.from_step

    @property
    def start(self) -> str:
        """`step 40`, or `epoch 1.5`."""
        return start_words(self.from_step, self.from_epoch)
