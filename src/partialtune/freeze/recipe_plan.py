"""What a recipe trains: its freeze arguments and its schedule -> a plan, by method.

    trainable: [final_norm]
    schedule:
      - {from_step: 40, trainable: ['blocks[-1]'], learning_rate: 2.0e-5}
      - {from_epoch: 1.5, trainable: ['blocks[-2]']}

A phase may begin at an epoch, whose step is known once the text is read: before it, `plan_before_text` makes a plan
that is shown; after it, `in_steps` and `plan_of_recipe` make the one that is carried out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from partialtune.errors import RecipeError
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.grammar.schedule_syntax import STARTS
from partialtune.grammar.selector_syntax import parse_selector
from partialtune.model.loading import empty_model, load_config, load_tokenizer
from partialtune.model.new_tokens import NewTokens, extend_tokenizer, give_rows, new_tokens_of
from partialtune.model.structure import ModelStructure, read_structure
from partialtune.recipe.arguments import FreezeArguments, ModelArguments

ADAPTER = re.compile(r"\.lora_[AB](?=\.)")


def plan_of_recipe(
    model: nn.Module,
    freeze: FreezeArguments,
    schedule: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    before_text: bool = False,
    tokenizer_length: int | None = None,
) -> FreezePlan:
    """The plan of a recipe. The model is not touched and may lie on the meta device.

    Args:
        model: A causal language model, which has the recipe's new tokens by now.
        freeze: The recipe's arguments; `method: full` has `trainable: [all]` by now.
        schedule: The recipe's, in steps.
        seed: Of the start values of adapters, and of random draws of blocks.
        before_text: As in `plan_freeze`.
        tokenizer_length: Tokens of the model's tokenizer, which are said beside the rows of a padded matrix.

    Raises:
        RecipeError: As `plan_freeze` and `plan_lora`.
    """
    others: dict[str, Any] = {
        "part_learning_rates": freeze.part_learning_rates,
        "layer_decay": freeze.layer_decay,
        "frozen_quantization": freeze.frozen_quantization,
    }
    if freeze.method == "lora":
        plan = plan_lora(model, freeze.trainable, freeze.lora_rank, freeze.lora_alpha, seed, **others)
    else:
        plan = _plan_of_parts(model, freeze, schedule, seed, before_text, others)
    _refuse_unread(read_structure(model), plan)
    frozen_dtype = "bf16" if freeze.frozen_dtype == "bf16" else None  # what is held in 16 bits is loaded so
    return replace(plan, tokenizer_length=tokenizer_length or plan.tokenizer_length, frozen_dtype=frozen_dtype)


def _plan_of_parts(
    model: nn.Module,
    freeze: FreezeArguments,
    schedule: Sequence[Mapping[str, Any]],
    seed: int,
    before_text: bool,
    others: Mapping[str, Any],
) -> FreezePlan:
    new_tokens = new_tokens_of(model)
    return plan_freeze(
        model,
        [*freeze.trainable, *(new_tokens.selectors if new_tokens else [])],
        head=freeze.head,
        schedule=schedule,
        before_text=before_text,
        lora=freeze.lora or None,
        block_sampling=freeze.block_sampling,
        seed=seed,
        **others,
    )


def names_rows(freeze: FreezeArguments) -> bool:
    """Whether a selector names rows, so that a plan tells the tokenizer's length."""
    return any(
        parse_selector(text).rows is not None
        for text in [*freeze.trainable, *(text for entry in freeze.schedule for text in entry["trainable"])]
    )


def _refuse_unread(structure: ModelStructure, plan: FreezePlan) -> None:
    """Stop where a selector asks for what text does not reach. `all` may: there it is said by the audit, at the end.

    Raises:
        RecipeError: Names the selectors.
    """
    towers: dict[str, set[str]] = {}
    for parameter in plan.parameters:
        info = structure.by_name.get(ADAPTER.sub("", parameter.name))
        if parameter.selector is not None and info is not None:
            towers.setdefault(parameter.selector, set()).update(place.tower for place in info.places)
    unread = [selector for selector, found in towers.items() if found <= {"vision", "projector"}]
    if unread:
        raise RecipeError(
            f"{', '.join(unread)}: a recipe trains on text, in which no gradient reaches the vision tower and the "
            f"projector of {structure.model_name}. Choose parts of its language model (language.blocks[-1]); to train "
            f"with images, make a Trainer of your own and call attach(trainer, plan)."
        )


def plan_before_text(
    model: nn.Module, freeze: FreezeArguments, seed: int = 0, tokenizer_length: int | None = None
) -> FreezePlan:
    """The plan of a recipe whose text was not read: a phase that begins at an epoch has no step yet.

    Raises:
        RecipeError: As `plan_of_recipe`.
    """
    return plan_of_recipe(model, freeze, freeze.schedule, seed, before_text=True, tokenizer_length=tokenizer_length)


def empty_base(arguments: ModelArguments) -> PreTrainedModel:
    """A recipe's model without weights, with rows for its new tokens. The tokenizer is loaded only where it adds some.

    Raises:
        ModelError: If config or tokenizer cannot be loaded, or the model cannot be resized.
        RecipeError: As `extend_tokenizer`.
    """
    base = arguments
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    model = empty_model(config, base.trust_remote_code)
    if base.new_tokens:
        tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code)
        give_rows(model, extend_tokenizer(tokenizer, base.new_tokens, base.new_tokens_init))
    return model


def in_steps(schedule: Sequence[Mapping[str, Any]], epoch_steps: int, run_steps: int) -> list[dict[str, Any]]:
    """The same schedule with every `from_epoch` as the nearest `from_step`.

    in_steps([{"from_epoch": 1.5, "trainable": ["head"]}], epoch_steps=10, run_steps=30)
    -> [{"from_step": 15, "trainable": ["head"]}]

    Args:
        schedule: Entries as `read_schedule` returns them.
        epoch_steps: Optimizer steps of one epoch.
        run_steps: Optimizer steps of the whole run.

    Raises:
        RecipeError: If an entry begins when the run has ended.
    """
    resolved, late = [], []
    for number, entry in enumerate(schedule, start=1):
        step = entry["from_step"] if "from_step" in entry else round(entry["from_epoch"] * epoch_steps)
        resolved.append({"from_step": step, **{key: entry[key] for key in entry if key not in STARTS}})
        if step >= run_steps:
            epoch = f"from_epoch {entry['from_epoch']:g}, which is " if "from_epoch" in entry else ""
            late.append(f"schedule, entry {number}: {epoch}from_step {step}")
    if late:
        raise RecipeError(
            f"{'; '.join(late)}: the run has {run_steps} steps, 0 to {run_steps - 1}, {epoch_steps} an epoch. "
            f"Begin earlier, train longer (max_steps, num_train_epochs), or take it out."
        )
    return resolved


def tokens_of_recipe(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> NewTokens | None:
    """Add a recipe's new tokens to the tokenizer of its base; None where it names none.

    Raises:
        RecipeError: As `extend_tokenizer`.
    """
    return (
        extend_tokenizer(tokenizer, arguments.new_tokens, arguments.new_tokens_init) if arguments.new_tokens else None
    )
