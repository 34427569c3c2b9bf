"""What each choice of a ranking would cost: selector -> where backward stops, and a step beside a full one.

A good score is half of an answer. What lies low in the model costs a backward pass through all blocks above it, and no
state behind frozen blocks can be kept; what lies high costs little.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from partialtune.cost.dry_step import dry_step
from partialtune.cost.flops import Products
from partialtune.errors import ModelError
from partialtune.freeze.plan import plan_freeze
from partialtune.progress import progress_bar


@dataclass(frozen=True)
class ChoiceCost:
    """What training one choice alone costs.

    Attributes:
        backward_blocks: Blocks that backward runs through: all above the first trainable parameter, with its own.
        of_full: Arithmetic of a step / that of a step of full fine-tuning on the same batch.
        of_full_kept: The same where the states behind the frozen blocks below are kept and not computed again.
    """

    backward_blocks: int
    of_full: float
    of_full_kept: float


def costs_of(
    model: nn.Module, selectors: Iterable[str], block_size: int, head: str = "tied"
) -> dict[str, ChoiceCost | None]:
    """The cost of each of these choices by selector, without weights.

    Args:
        model: On the meta device.
        selectors: Each is a choice of its own.
        block_size: Tokens of a window; how many windows a step has does not matter for the ratios.
        head: As in a recipe.

    Returns:
        None for all of them where a dry step of this architecture fails on the meta device.
    """
    selectors = list(selectors)
    try:
        full = _arithmetic(dry_step(model, plan_freeze(model, ["all"], head=head), 1, block_size).products)
        found: dict[str, ChoiceCost | None] = {}
        with progress_bar(len(selectors), "cost", "choices") as bar:
            for selector in selectors:
                plan = plan_freeze(model, [selector], head=head)
                products = dry_step(model, plan, 1, block_size).products
                step = _arithmetic(products)
                found[selector] = ChoiceCost(len(plan.blocks_passed), step / full, (step - products.prefix) / full)
                bar.update(1)
    except ModelError:  # an operation that has no form without values
        return dict.fromkeys(selectors)
    return found


def _arithmetic(products: Products) -> int:
    return products.total + products.attention
