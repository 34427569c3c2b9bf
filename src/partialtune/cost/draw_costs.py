"""Where blocks learn in turn: what a step costs in the draw that costs most, and on average over the draws.

Backward passes the blocks from the lowest one that learns on. So the arithmetic of a draw is taken to lie between that
of the lowest and that of the highest draw, by the number of blocks passed; of blocks that are alike it does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

from partialtune.cost.dry_step import Cost
from partialtune.freeze.block_sampling import blocks_words
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import Phase

LOOKED_AT = 100  # draws over which the average is taken


@dataclass(frozen=True)
class CostOfDraws:
    """What a step of a plan costs whose blocks learn in turn.

    Attributes:
        largest: Cost of a step in the draw that costs most; with the state of blocks that rest, where it is kept.
        average: Products of a step, on average over the draws.
        blocks: Of the draw that costs most.
        first_step: Of that draw.
    """

    largest: Cost
    average: int
    blocks: tuple[int, ...]
    first_step: int

    def words(self) -> str:
        """A sentence for the advice."""
        share = self.average / self.largest.products.total
        return (
            f"The figures are those of the draw that costs most, of {blocks_words(self.blocks)}. Over the draws the "
            f"arithmetic is {share:.0%} of it on average."
        )


def cost_of_draws(plan: FreezePlan, costing: Callable[[FreezePlan], Cost]) -> CostOfDraws | None:
    """What a step costs, without a step for each draw.

    Args:
        plan: What trains.
        costing: Tells the cost of a plan in which the same learns in every step.

    Returns:
        None where no blocks learn in turn.
    """
    if plan.sampling is None:
        return None
    draws = [plan.phase_at(number * plan.sampling.every) for number in range(LOOKED_AT)]
    lowest = min(draws, key=lambda draw: draw.first_block)
    highest = max(draws, key=lambda draw: draw.first_block)
    largest = smallest = costing(in_draw(plan, lowest))
    passed = fmean(draw.first_block for draw in draws)
    share = 0.0
    if highest.first_block > lowest.first_block:
        smallest = costing(in_draw(plan, highest))
        share = (passed - lowest.first_block) / (highest.first_block - lowest.first_block)
    saved = largest.products.total - smallest.products.total
    if plan.sampling.keep_state:
        largest = _with_state_of(largest, costing(replace(plan, sampling=None)))
    blocks = plan.sampling.draw(plan.sampling.number_at(lowest.first_step))
    return CostOfDraws(largest, round(largest.products.total - share * saved), blocks, lowest.first_step)


def in_draw(plan: FreezePlan, draw: Phase) -> FreezePlan:
    """The plan of one draw by itself: what learns in it does so in every step, and all else is frozen."""
    learning = set(draw.trainable)
    parameters = tuple(
        replace(parameter, in_turn=False, from_step=0)
        if parameter.name in learning
        else replace(parameter, selector=None, from_step=None, in_turn=False)
        for parameter in plan.parameters
    )
    return replace(plan, parameters=parameters, phases=(replace(draw, from_step=0),), sampling=None)


def _with_state_of(cost: Cost, everything: Cost) -> Cost:
    """The cost where the optimizer keeps the state of all candidates, once each of them has been drawn."""
    memory = cost.memory
    more = everything.memory.optimizer - memory.optimizer
    kept = {"optimizer": everything.memory.optimizer, "peak": memory.peak + more, "resident": memory.resident + more}
    return replace(cost, memory=replace(memory, **kept))
