"""The Trainer of a recipe, and what each phase of the run does with its frozen prefix."""

from collections.abc import Sequence

from transformers import PreTrainedModel, TrainingArguments

from partialtune.engine.prefix_choice import PrefixPhase, Windows, choose_prefix, lengths_to_try, try_prefixes
from partialtune.errors import RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.machine import free_memory
from partialtune.metrics import best_model_metric
from partialtune.model.conformance import Conformance
from partialtune.recipe.recipe import Recipe
from partialtune.training.resume_check import RunOrigin
from partialtune.training.settings import evaluation_steps, run_length
from partialtune.training.trainer import PartialTrainer
from partialtune.training.training_data import RunData, collate_windows


def prefix_phases(
    recipe: Recipe,
    plan: FreezePlan,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: RunData,
    saved: RunOrigin | None = None,
) -> list[PrefixPhase]:
    """What each phase does with its frozen prefix: as the run that goes on here chose it, else chosen now.

    Args:
        recipe: Its `prefix_cache` may be "auto".
        plan: Not applied yet.
        model: As it was loaded.
        args, data: Of the run.
        saved: What the run began with, where it goes on from a checkpoint.
    """
    wanted = recipe.speed.prefix_cache
    if wanted == "auto" and saved is not None and saved.choices.prefix_cache is not None:
        return saved.choices.prefix_cache
    held_out = len(data.held_out or [])
    windows = Windows(
        training=len(data.train),
        held_out=held_out,
        a_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        steps=run_length(args, len(data.train)),
        eval_steps=evaluation_steps(args, len(data.train)) if held_out else None,
    )
    lengths = lengths_to_try(wanted, plan, windows)
    tried = try_prefixes(lengths, recipe.text.window_sampling, args, model, data.train)
    width = max((one.width for one in tried.values()), default=0)
    size = recipe.text.block_size * width * (2 if args.bf16 or args.fp16 else 4)  # bytes a window, of states (T, width)
    return choose_prefix(wanted, plan, windows, size, free_memory(), tried)


def make_trainer(
    recipe: Recipe,
    *,
    plan: FreezePlan,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: RunData,
    prefix: Sequence[PrefixPhase],
    conformance: Conformance,
    origin: RunOrigin | None = None,
) -> PartialTrainer:
    """The Trainer of the run.

    Args:
        recipe: Of the run.
        plan: Applied to the model already: Trainer takes what trains at that moment.
        model, args, data: Of the run.
        prefix: Of `prefix_phases`.
        conformance: Of `check_conformance`.
        origin: What the run began with, for its checkpoints; None where nothing will go on from them.
    """
    return PartialTrainer(
        plan=plan,
        delta_steps=recipe.freeze.delta_steps,
        stop_on_violation=not recipe.freeze.allow_failed_audit,
        decay_everything=recipe.freeze.weight_decay_on == "all",
        fast_paths=recipe.speed.fast_paths,
        prefix=prefix,
        origin=origin,
        conformance=conformance,
        tokens_per_byte=tokens_per_byte(args, data),
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_windows,
    )


def tokens_per_byte(args: TrainingArguments, data: RunData) -> float | None:
    """Tokens per byte of the held-out text, None where nothing is held out or its tokens do not hold the text.

    Raises:
        RecipeError: If the best model is to be chosen by bits per byte and there are none.
    """
    scored = data.scored.get("validation")
    if scored is not None and scored.comes_back and scored.text_bytes:
        return scored.text_tokens / scored.text_bytes
    metric = best_model_metric(args.metric_for_best_model)
    if metric is not None and metric.per_byte:
        why = "nothing is held out" if scored is None else "the held-out text does not come back from its tokens"
        raise RecipeError(
            f"metric_for_best_model is {metric.key}, and there are none: {why}. Take loss, which is in nats a token, "
            f"and a validation_share above 0."
        )
    return None
