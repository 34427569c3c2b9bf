"""What is to be measured: recipes -> variants, each a recipe for a few steps, with full fine-tuning beside each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from partialtune.errors import RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.recipe_mistakes import read_with_model
from partialtune.freeze.recipe_plan import empty_base, plan_before_text
from partialtune.model.model_checks import check_fit
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values

# The keys that decide what trains: full fine-tuning leaves them out.
POLICY_KEYS = (
    *("method", "trainable", "schedule", "block_sampling", "head", "lora", "lora_rank", "lora_alpha", "prefix_cache"),
    *("part_learning_rates", "layer_decay"),
)
# The keys of what a run writes, sends, evaluates, and of its length: a measurement sets these itself.
RUN_KEYS = (
    *("output_dir", "resume_from_checkpoint", "num_train_epochs", "max_steps", "warmup_steps", "logging_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "report_to", "prompts", "eval_texts"),
    *("push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo", "greater_is_better"),
    *("early_stopping_patience", "early_stopping_threshold", "sample_steps"),
)
# What changes neither the arithmetic nor the memory of a step on random windows.
WITHOUT_EFFECT = (
    *("text", "text_cleaning", "text_column", "validation_share", "window_stride", "window_sampling", "replay"),
    *("seed", "data_seed", "learning_rate", "weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs"),
)
FULL = "method: full"
KEPT = ", prefix kept"


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        label: In the table: the recipe's name, or `method: full`.
        full: Number of the variant that trains everything on the same batch; its own where it is that.
        values: The recipe to measure, without what writes, sends and evaluates.
    """

    label: str
    full: int
    values: dict[str, Any]


def read_variants(paths: Sequence[str], overrides: Sequence[str]) -> list[Variant]:
    """The recipes in their order, then full fine-tuning on each batch that they have, unless a recipe is just that.

    A recipe that leaves it to the run whether its frozen prefix is kept is measured both ways.

    Args:
        paths: Recipe files.
        overrides: `--key value` for all of them.

    Raises:
        InputError: If a recipe is wrong, or its model is; all are checked before the first is measured.
    """
    recipes = [read_with_model(partial(read_recipe, path, overrides), reads_text=False) for path in paths]
    own = [entry for path, recipe in zip(paths, recipes, strict=True) for entry in own_variants(path, recipe)]
    entries = [*own, *((FULL, full_values(values)) for _, values in own)]
    numbers: dict[str, int] = {}  # of the first entry that trains everything on a batch
    for number, (_, values) in enumerate(entries):
        if values.get("method") == "full":
            numbers.setdefault(_key(full_values(values)), number)
    kept = [number for number in range(len(entries)) if number < len(own) or number in numbers.values()]
    return [
        Variant(label, kept.index(numbers[_key(full_values(values))]), values)
        for label, values in (entries[number] for number in kept)
    ]


def own_variants(label: str, recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """(label, values) of a recipe: itself, and where its frozen prefix may be kept, itself with that.

    How long a run is, and so whether `prefix_cache: auto` keeps it, is known only with the text.
    """
    _, plan = plan_of(recipe)
    values = {key: value for key, value in recipe.values.items() if key not in RUN_KEYS}
    if recipe.speed.prefix_cache != "auto" or not plan.phases[0].first_block or plan.sampling is not None:
        return [(label, values)]
    kept = {**values, "prefix_cache": "memory"}
    try:
        runnable(kept, steps=2, folder=recipe.training["output_dir"])
    except RecipeError:  # it adds noise to the embeddings, for one
        return [(label, values)]
    return [(label, {**values, "prefix_cache": "off"}), (f"{label}{KEPT}", kept)]


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in values.items() if key not in WITHOUT_EFFECT}, sort_keys=True)


def full_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same recipe with everything training."""
    return {**{key: value for key, value in values.items() if key not in POLICY_KEYS}, "method": "full"}


def runnable(variant_values: Mapping[str, Any], steps: int, folder: str) -> Recipe:
    """A variant as a recipe of so many steps that writes to `folder` alone."""
    return recipe_from_values(
        {
            **variant_values,
            "output_dir": folder,
            "max_steps": steps,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
        }
    )


def plan_of(recipe: Recipe) -> tuple[PreTrainedModel, FreezePlan]:
    """The model without weights, and what trains in it. Of a schedule it is the last phase, from the first step on.

    Raises:
        InputError: If the model cannot be had, is too short for the windows, or a selector is wrong.
    """
    base = recipe.model
    model = empty_base(base)
    check_fit(base.model_name_or_path, model.config, recipe.text.block_size, vocabulary=0)
    return model, last_phase(plan_before_text(model, recipe.freeze, recipe.seed))


def last_phase(plan: FreezePlan) -> FreezePlan:
    """The plan in which all that any phase trains does so from the first step on; that of blocks in turn itself."""
    if plan.sampling is not None:
        return plan
    parameters = tuple(replace(p, from_step=0) if p.trainable else p for p in plan.parameters)
    return replace(plan, parameters=parameters, phases=(replace(plan.phases[-1], from_step=0, from_epoch=None),))
