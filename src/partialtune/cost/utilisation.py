"""How much of what the machine can multiply a run makes use of: needed products / seconds / rate of a product."""

from torch import nn

from partialtune.cost.dry_step import dry_step
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import FreezePlan


def needed_products(
    model: nn.Module,
    plan: FreezePlan,
    batch_size: int,
    block_size: int,
    accumulation: int = 1,
    prefix_cached: bool = False,
) -> int | None:
    """Multiplications and additions that one optimizer step of `plan` cannot do without, on one process.

    Products with weights alone, forward and backward; what activation checkpointing computes twice counts once, and
    attention's own products, which no counter sees where they are fused, do not count.

    Args:
        model: Causal language model, best on the meta device. It is not touched.
        plan: What trains.
        batch_size: Windows of one forward pass.
        block_size: Tokens per window.
        accumulation: Forward passes of one step.
        prefix_cached: Whether the frozen blocks below all that trains are computed once and kept.

    Returns:
        None where it is unknown: it changes from phase to phase, or the model takes no step without its weights.
    """
    if len(plan.phases) > 1:
        return None
    try:
        products = dry_step(model, plan, batch_size, block_size, accumulation).products
    except (ModelError, RecipeError):  # it decides by values, or has other parameters than its config says
        return None
    return products.total - products.prefix * prefix_cached


def utilisation(needed: int | None, step_seconds: float | None, rate: float) -> float | None:
    """Share of the machine's rate of products that a run makes use of.

    utilisation(needed=2_000, step_seconds=4.0, rate=1_000.0) -> 0.5

    Args:
        needed: As `needed_products` finds it.
        step_seconds: Median seconds a step.
        rate: Multiplications and additions a second, as `precision.product_rate` measures it.
    """
    return needed / step_seconds / rate if needed and step_seconds else None
