"""What a recipe trains: its freeze arguments -> a plan, by method."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import FreezePlan, plan_freeze
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
