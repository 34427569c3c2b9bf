"""The Trainer of a recipe, and what each phase of the run does with its frozen prefix."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from partialtune.data import RunData
from partialtune.fast.prefix_choice import PrefixPhase, Windows, choose_prefix, lengths_to_try, try_prefixes
from partialtune.freeze.plan import FreezePlan
from partialtune.machine import free_memory
from partialtune.recipe.reading import Recipe
from partialtune.training.batches import collate_windows
from partialtune.training.settings import evaluation_steps, run_length
from partialtune.training.trainer import PartialTrainer


def prefix_phases(
    recipe: Recipe,
    plan: FreezePlan,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: RunData,
    begun: Mapping[str, Any] | None,
) -> list[PrefixPhase]:
    """What each phase does with its frozen prefix: as the run that goes on here chose it, else chosen now."""
    if recipe.speed.prefix_cache == "auto" and begun is not None and "prefix_cache" in begun["choices"]:
        return [PrefixPhase(**phase) for phase in begun["choices"]["prefix_cache"]]
    held_out = len(data.held_out or [])
    windows = Windows(
        training=len(data.train),
        held_out=held_out,
        a_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        steps=run_length(args, len(data.train)),
        eval_steps=evaluation_steps(args, len(data.train)) if held_out else None,
    )
    wanted = recipe.speed.prefix_cache
    lengths = lengths_to_try(wanted, plan, windows)
    tried = try_prefixes(lengths, recipe.text.window_sampling, args, model, data.train)
    width = max((one.width for one in tried.values()), default=0)
    size = recipe.text.block_size * width * (2 if args.bf16 or args.fp16 else 4)
    return choose_prefix(wanted, plan, windows, size, free_memory(), tried)


def make_trainer(
    recipe: Recipe,
    plan: FreezePlan,
    model: PreTrainedModel,
    args: TrainingArguments,
    data: RunData,
    prefix: Sequence[PrefixPhase],
    origin: Mapping[str, Any],
) -> PartialTrainer:
    """The Trainer of the run. The plan is applied already: Trainer takes what trains at that moment."""
    scored = data.scored.get("validation")
    return PartialTrainer(
        plan=plan,
        delta_steps=recipe.freeze.delta_steps,
        stop_on_violation=not recipe.freeze.allow_failed_audit,
        decay_everything=recipe.freeze.weight_decay_on == "all",
        fast_paths=recipe.speed.fast_paths,
        prefix=prefix,
        origin=origin,
        tokens_per_byte=scored.text_tokens / scored.text_bytes if scored and scored.text_bytes else None,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_windows,
    )
