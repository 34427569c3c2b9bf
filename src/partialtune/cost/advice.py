"""What people get wrong about the cost of a plan: plan + its cost -> sentences with numbers and what to change.

Every number is computed for the plan at hand. A plan that is offered in its place was planned and costed as well.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import yaml
from torch import nn

from partialtune.cost.dry_step import Cost
from partialtune.errors import RecipeError
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.grammar.named_selectors import BLOCK_PARTS
from partialtune.machine import peak_memory_mb, total_memory
from partialtune.words import megabytes

WORTH_SAYING = 0.05  # saving of arithmetic, as a share, from which on an alternative is named


def advise(
    model: nn.Module,
    plan: FreezePlan,
    cost: Cost,
    full: Cost,
    batch_size: int,
    accumulation: int,
    costing: Callable[[FreezePlan], Cost],
) -> list[str]:
    """Sentences that apply to this plan.

    Args:
        model: The plan's model, on the meta device.
        plan: What trains.
        cost: What a step of the plan costs.
        full: What it costs where everything trains.
        batch_size: Windows of one forward pass.
        accumulation: Forward passes of one step.
        costing: Tells the cost of another plan on the same batch.
    """
    sentences = [
        _schedule(plan),
        _small_share(plan, cost, full),
        _where_backward_stops(model, plan, cost, costing),
        _untied(plan),
        _logits(cost, batch_size, accumulation),
        _too_large(plan, cost),
    ]
    return [sentence for sentence in sentences if sentence]


def _schedule(plan: FreezePlan) -> str | None:
    if len(plan.phases) == 1:
        return None
    last = plan.phases[-1].start
    return f"The figures are those of the last of {len(plan.phases)} phases, from {last} on: it costs most."


def _small_share(plan: FreezePlan, cost: Cost, full: Cost) -> str | None:
    """Few parameters are not little arithmetic."""
    if plan.sampling is not None:  # many may learn, and few do at one time: of that the draws' own sentence speaks
        return None
    parameters = plan.trainable_parameters / plan.total_parameters
    arithmetic = cost.products.total / full.products.total  # at least about a third: forward is one of three products
    if arithmetic < parameters + 0.25:
        return None
    return (
        f"{_percent(parameters)} of the parameters train, but a step takes {_percent(arithmetic)} of full "
        f"fine-tuning's arithmetic and {_percent(cost.memory.peak / full.memory.peak)} of its memory: forward alone is "
        f"{_percent(cost.products.forward / full.products.total)} of the arithmetic, whatever is frozen."
    )


def _where_backward_stops(
    model: nn.Module, plan: FreezePlan, cost: Cost, costing: Callable[[FreezePlan], Cost]
) -> str | None:
    """What trains first decides how far backward runs; something near to it may stop it much earlier."""
    passed, frozen = len(plan.blocks_passed), len(plan.frozen_blocks_passed)
    if not passed or plan.changes_on_the_way or (plan.adapter is not None and plan.parts):
        return None
    for cause, selectors, head in _alternatives(plan):
        try:
            other = _planned(model, plan, selectors, head)
        except RecipeError:  # what is left selects nothing, or contradicts itself
            continue
        then = costing(other)
        saved = 1 - then.products.total / cost.products.total
        if saved >= WORTH_SAYING:
            held = f" ({frozen} of them frozen)" if frozen else ""
            return (
                f"{cause}, so backward runs through {_of_all(passed, plan.block_count)}{held}. "
                f"{_in_a_recipe(plan, other)} would stop it at {_place(other)}, save {_percent(saved)} of the "
                f"arithmetic and need {megabytes(then.memory.peak)} instead of {megabytes(cost.memory.peak)} of memory."
            )
    return None


def _planned(model: nn.Module, plan: FreezePlan, selectors: Sequence[str], head: str) -> FreezePlan:
    """Another plan by the method of this one."""
    if plan.adapter is not None:
        return plan_lora(model, selectors, plan.adapter.rank, plan.adapter.alpha)
    return plan_freeze(model, selectors, head=head)


def _in_a_recipe(plan: FreezePlan, other: FreezePlan) -> str:
    """How the recipe of `plan` says `other`."""
    trainable = f"`trainable: {as_yaml(other.selectors)}`"
    unties = other.head == "untied" and plan.head == "tied"
    return f"`head: untied` with {trainable}, where the token embedding stays frozen," if unties else trainable


def _alternatives(plan: FreezePlan) -> Iterator[tuple[str, list[str], str]]:
    """(why backward runs far, selectors that may stop it earlier, head), the nearest to the plan first."""
    without_embeddings = [selector for selector in plan.selectors if not selector.startswith("embeddings")]
    tied = {name for pair in plan.ties for name in pair}
    if plan.backward_from in tied and "head" in plan.selectors:
        yield "The token embedding trains, because the head is the same tensor", without_embeddings, "untied"
    if len(without_embeddings) < len(plan.selectors):
        yield "The embeddings train", without_embeddings, plan.head
    upper = f"blocks[{plan.block_count // 2}:]"
    if set(plan.selectors) & set(BLOCK_PARTS):
        narrowed = [f"{upper}.{word}" if word in BLOCK_PARTS else word for word in plan.selectors]
        narrowed += ["final_norm"] if "norms" in plan.selectors else []
        yield "What trains begins in block 0", narrowed, plan.head


def _untied(plan: FreezePlan) -> str | None:
    if plan.head != "untied":
        return None
    head = sum(parameter.numel for parameter in plan.parameters if parameter.component == "head")
    return (
        f"`head: untied` gives the head {head:,} values of its own: the saved model is larger by "
        f"{_percent(head / (plan.total_parameters - head))}, and its config says that nothing is tied."
    )


def _logits(cost: Cost, batch_size: int, accumulation: int) -> str | None:
    """The scores over the vocabulary are as large whatever is frozen; a smaller batch shrinks them."""
    memory = cost.memory
    if memory.logits < memory.peak / 3:  # (B, T, V) x 4 bytes x 3: of GPT-2 and 16 x 256 tokens 2.5 GB
        return None
    share = f"{megabytes(memory.logits)} of {megabytes(memory.peak)}"
    text = f"The scores over the vocabulary take up to {share}, whatever is frozen"
    if batch_size % 2:
        return f"{text}."
    # What goes with the batch is halved; weights, gradients and the optimizer's state are as large for any batch.
    halved = memory.weights + memory.gradients + memory.optimizer + (memory.activations + memory.logits) // 2
    return (
        f"{text}. `per_device_train_batch_size: {batch_size // 2}` with `gradient_accumulation_steps: "
        f"{2 * accumulation}` is the same step with about {megabytes(halved)}."
    )


def _too_large(plan: FreezePlan, cost: Cost) -> str | None:
    place, held = memory_here()
    needed = cost.memory.peak
    if place == "this machine":  # which holds libraries, start values and what malloc keeps back, too
        needed = cost.memory.resident + int(peak_memory_mb() * 2**20) + 4 * plan.trainable_parameters
    return (
        f"It does not fit: the run needs about {megabytes(needed)}, {place} has {megabytes(held)}."
        if needed > held
        else None
    )


def memory_here() -> tuple[str, int]:
    """Where a run would have its tensors, and how many bytes there are."""
    if torch.cuda.is_available():
        return "this GPU", torch.cuda.mem_get_info()[1]
    return "this machine", total_memory()


def _place(plan: FreezePlan) -> str:
    first = next(parameter for parameter in plan.parameters if parameter.name == plan.backward_from)
    return f"block {first.block}" if first.block is not None else f"the {first.component.replace('_', ' ')}"


def _of_all(passed: int, blocks: int) -> str:
    return f"all {blocks} blocks" if passed == blocks else f"{passed} of {blocks} blocks"


def as_yaml(selectors: Sequence[str]) -> str:
    """Selectors as a recipe has them, in one line: [final_norm, 'blocks[-2:]']."""
    return yaml.safe_dump(list(selectors), default_flow_style=True, width=10_000).strip()


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"
