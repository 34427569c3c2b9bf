"""What a recipe trains: its freeze arguments -> a plan, by method."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from partialtune.errors import RecipeError
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.freeze.schedules import in_places
from partialtune.recipe.arguments import FreezeArguments


def plan_of_recipe(
    model: nn.Module, freeze: FreezeArguments, schedule: Sequence[Mapping[str, Any]] = (), seed: int = 0
) -> FreezePlan:
    """The plan of a recipe. The model is not touched and may lie on the meta device.

    Args:
        model: A causal language model.
        freeze: The recipe's arguments; `method: full` has `trainable: [all]` by now.
        schedule: The recipe's, in steps.
        seed: Of the start values of adapters.

    Raises:
        RecipeError: As `plan_freeze` and `plan_lora`.
    """
    if freeze.method == "lora":
        return plan_lora(model, freeze.trainable, freeze.lora_rank, freeze.lora_alpha, seed)
    return plan_freeze(model, freeze.trainable, head=freeze.head, schedule=schedule)


def plan_before_text(model: nn.Module, freeze: FreezeArguments) -> FreezePlan:
    """The plan of a recipe whose text was not read: a phase that begins at an epoch has no step yet.

    Raises:
        RecipeError: As `plan_of_recipe`.
    """
    if not any("from_epoch" in entry for entry in freeze.schedule):
        return plan_of_recipe(model, freeze, freeze.schedule)
    places = in_places(freeze.schedule)
    starts = {0: {"from_step": 0}}  # where `trainable` learns from the start
    starts |= {place["from_step"]: entry for place, entry in zip(places, freeze.schedule, strict=True)}
    try:
        plan = plan_of_recipe(model, freeze, places)
    except RecipeError as error:
        raise RecipeError(re.sub(r"step (\d+)", lambda found: _start(starts[int(found[1])]), str(error))) from error
    phases = [
        replace(
            phase,
            from_step=starts[phase.from_step].get("from_step"),
            from_epoch=starts[phase.from_step].get("from_epoch"),
        )
        for phase in plan.phases
    ]
    return replace(plan, phases=tuple(phases))


def _start(entry: Mapping[str, Any]) -> str:
    return f"epoch {entry['from_epoch']:g}" if "from_epoch" in entry else f"step {entry['from_step']}"
