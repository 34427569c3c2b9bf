"""Everything that is checked and decided before a run writes anything: recipe -> `RunStart`.

The cheap comes first: the output folder, then processes and precision, config and tokenizer, the texts, and only then
the weights. What `auto` means is decided here, once: `resume_from_checkpoint`, `bf16`, `prefix_cache`.
"""

import copy
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from partialtune.distributed import (
    decided_by_main,
    done_together,
    first_on_each_node,
    from_main,
    is_first_of_node,
    main_process_only,
    shards_parameters,
)
from partialtune.engine.prefix_choice import PrefixPhase
from partialtune.engine.shard_model import check_sharding, plugin_of
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.recipe_mistakes import check_with_model
from partialtune.freeze.recipe_plan import in_steps, plan_of_recipe, tokens_of_recipe
from partialtune.hub.push import Target, check_access
from partialtune.model.conformance import Conformance, check_conformance, conformance_of_main
from partialtune.model.loading import empty_model, load_config, load_tokenizer, model_location
from partialtune.model.model_checks import check_ids, check_weights
from partialtune.model.new_tokens import NewTokens, config_with, give_rows
from partialtune.model.train_mode import check_support
from partialtune.recipe.arguments import ModelArguments
from partialtune.recipe.early_stopping import implied_by_early_stopping
from partialtune.recipe.recipe import Recipe
from partialtune.recipe_run.same_start import check_run_is_here, check_same_recipe, check_same_start
from partialtune.scoring.prompts import check_prompts
from partialtune.training.launch import check_engine, check_precision, check_processes, one_device_a_process
from partialtune.training.load_base import load_base, main_sends_weights
from partialtune.training.other_processes import Dealing, epoch_order, suited_accumulation
from partialtune.training.recipe_trainer import prefix_phases, tokens_per_byte
from partialtune.training.resume_check import Standing, check_checkpoint, checkpoint_to_resume, standing_of
from partialtune.training.run_origin import (
    RunOrigin,
    at_saved_commit,
    check_origin,
    origin_of,
    read_origin,
    with_choices,
)
from partialtune.training.settings import (
    run_length,
    steps_an_epoch,
    suit_length,
    training_arguments,
    warn_of_patience,
)
from partialtune.training.training_data import RunData, check_run_texts_unchanged, data_of_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStart:
    """What a run starts with. All of it was checked, and nothing was written yet.

    Attributes:
        recipe: As it was read.
        folder: Its `output_dir`.
        standing: What the folder held before anything was written to it.
        checkpoint: Where training goes on from, None for a start from the base.
        args: Trainer's arguments, with what follows from the recipe, the checkpoint and the length of the run.
        config: Of the model: the base's, with rows for new tokens.
        tokenizer: Of the base, with the recipe's new tokens.
        data: Windows, and the texts that are scored.
        model: The base on the CPU, computing in fp32, in eval mode, with rows for new tokens. Without its plan yet.
        conformance: Whether the model's own loss is used, and what the saved config holds.
        plan: What trains in which phase.
        prefix: What each phase does with its frozen prefix.
        origin: Digests, settings and choices of the run's start, kept in each of its checkpoints.
    """

    recipe: Recipe
    folder: Path
    standing: Standing
    checkpoint: Path | None
    args: TrainingArguments
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    model: PreTrainedModel
    conformance: Conformance
    plan: FreezePlan
    prefix: list[PrefixPhase]
    origin: RunOrigin


def prepare(recipe: Recipe) -> RunStart | None:
    """Check everything that can be known before training, and decide what `auto` means. Every process calls this.

    Returns:
        None where the output folder holds this run, finished.

    Raises:
        InputError: If anything that was given cannot be used. Nothing was written.
    """
    folder = Path(recipe.training["output_dir"])
    check_same_recipe(recipe.values)  # first: a process of another recipe would not come to the same places below
    check_run_is_here(folder)
    standing = decided_by_main(lambda: standing_of(folder, recipe.values, recipe.resume))
    if standing is Standing.FINISHED:
        _say_finished(recipe, folder)
        return None
    if standing is Standing.UNSTARTED:
        logger.info("%s holds this run, ended before its first optimizer step: it starts again.", folder)
    check_precision(recipe.training)
    checkpoint, saved = decided_by_main(lambda: _resumed(recipe, folder))
    args = _checked_arguments(recipe, saved)
    dealt = None
    if checkpoint is not None and saved is not None:  # the main process's, where nodes share no disk
        step, before = saved.windows.get("windows a step"), saved.dealt
        dealt, accumulation = decided_by_main(lambda: suited_accumulation(args, checkpoint, step, before))
        args.gradient_accumulation_steps = accumulation
    base = at_saved_commit(recipe.model, saved)
    loaded, tokenizer, new_tokens = first_on_each_node(lambda: _load_before_texts(recipe, base))
    config = config_with(loaded, new_tokens)
    if recipe.training.get("push_to_hub"):
        check_hub(recipe)
    data = _checked_data(recipe, args, config, tokenizer, checkpoint, dealt)

    # the weights last: what is wrong with text or config is known without waiting for them
    # Not one after the other: the Hub's client locks what it fetches, and loading takes minutes.
    model = done_together(lambda: load_base(recipe, args, loaded, base.model_revision, new_tokens))
    if new_tokens is not None:
        _warn_of_unused(new_tokens, data)
    if main_sends_weights():
        conformance = conformance_of_main(model, recipe.text.block_size)
    else:
        conformance = done_together(lambda: check_conformance(model, recipe.text.block_size))
    check_support(args, model)
    if shards_parameters(args):
        check_sharding(model, plugin_of(args))
    plan = done_together(lambda: _plan_in_steps(recipe, args, model, data.epoch_windows, len(tokenizer)))
    prefix = decided_by_main(lambda: prefix_phases(recipe, plan, model, args, saved, data))
    make_origin = partial(origin_of, recipe, args=args, model=model, data=data, plan=plan, prefix=prefix, dealt=dealt)
    # of each node: with `cpu_ram_efficient_loading` its other processes have no weights yet
    own = done_together(lambda: make_origin() if is_first_of_node() else None)
    origin = from_main(own)
    check_same_start(own, data, tokenizer)
    if checkpoint is not None and saved is not None:
        decided_by_main(lambda: check_checkpoint(checkpoint, plan))
        decided_by_main(lambda: check_origin(checkpoint, saved, origin))
    return RunStart(
        recipe, folder, standing, checkpoint, args, config, tokenizer, data, model, conformance, plan, prefix, origin
    )


def _say_finished(recipe: Recipe, folder: Path) -> None:
    """Say that there is nothing to do, once the texts are known to be those of the run."""
    unread = decided_by_main(lambda: check_run_texts_unchanged(folder, recipe.values))
    not_compared = f" Not looked at again: {', '.join(unread)}." if unread else ""
    logger.info("%s holds this run, finished: nothing to do.%s", folder, not_compared)


def _resumed(recipe: Recipe, folder: Path) -> tuple[Path | None, RunOrigin | None]:
    """The checkpoint that training goes on from and the origin saved in it; None for a start from the base."""
    checkpoint = checkpoint_to_resume(folder, recipe.resume)
    return checkpoint, None if checkpoint is None else read_origin(checkpoint)


def _checked_arguments(recipe: Recipe, saved: RunOrigin | None) -> TrainingArguments:
    """Trainer's arguments, once launcher, processes and engine are known to fit them."""
    given = implied_by_early_stopping(recipe.values) | recipe.training
    args = training_arguments(with_choices(given, saved))
    check_precision({"bf16": args.bf16, "fp16": args.fp16})  # again: `bf16: auto` is decided by now
    check_processes(args)
    one_device_a_process(args)
    check_engine(args)
    return args


def _load_before_texts(
    recipe: Recipe, base: ModelArguments
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, NewTokens | None]:
    """Config of the base, its tokenizer with new tokens, once all is well that can be known without texts and weights.

    The tokens are added here, before any text is tokenised, so that each of them is one token there.
    """
    name = base.model_name_or_path
    config = load_config(name, base.model_revision, base.dropout, base.trust_remote_code)
    check_weights(name, model_location(name), config)  # `load_model` asks again, but after the texts: minutes later
    tokenizer = load_tokenizer(name, base.model_revision, base.trust_remote_code)
    new_tokens = tokens_of_recipe(base, tokenizer)
    grown = config_with(config, new_tokens)
    check_with_model(recipe, _without_weights(base, config, new_tokens), grown, len(tokenizer), reads_text=True)
    check_prompts(recipe.evaluation.prompts, tokenizer, grown)
    return config, tokenizer, new_tokens


def _without_weights(
    base: ModelArguments, config: PretrainedConfig, new_tokens: NewTokens | None
) -> PreTrainedModel | None:
    """The model on the meta device; None where its own code, which may do anything, would have to make it."""
    if base.trust_remote_code:
        return None
    model = empty_model(copy.deepcopy(config))  # a copy: models write into their config
    if new_tokens is not None:
        give_rows(model, new_tokens)
    return model


def _warn_of_unused(new_tokens: NewTokens, data: RunData) -> None:
    counts = data.token_counts
    unused = [token.token for token in new_tokens.tokens if token.row >= len(counts) or not counts[token.row]]
    if unused:
        logger.warning(
            "The training text does not hold %s: nothing is learnt from it but when it does not follow.",
            ", ".join(unused),
        )


def _checked_data(
    recipe: Recipe,
    args: TrainingArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
    dealt: Dealing | None,
) -> RunData:
    """The run's windows and texts; `args` get what follows from how many windows there are."""
    data = first_on_each_node(lambda: data_of_recipe(recipe, args, tokenizer))
    if checkpoint is not None and dealt is not None and data.order is None:  # replay's own order knows no processes
        order = decided_by_main(lambda: epoch_order(args, len(data.train), dealt, checkpoint))
        data = replace(data, order=order)
    decided_by_main(lambda: check_ids(recipe.model.model_name_or_path, config, data.largest_ids))
    early = recipe.evaluation.early_stopping_patience
    suit_length(args, recipe.training, data.epoch_windows, data.held_out is not None, stops_early=early is not None)
    warn_of_patience(args, early, data.epoch_windows)
    decided_by_main(lambda: tokens_per_byte(args, data))  # the best model may be chosen by what this text has not
    return data


def _plan_in_steps(
    recipe: Recipe, args: TrainingArguments, model: PreTrainedModel, windows: int, tokenizer_length: int
) -> FreezePlan:
    """The plan of the recipe, in which each phase begins at a step also where the recipe counts epochs."""
    schedule = in_steps(recipe.freeze.schedule, steps_an_epoch(args, windows), run_length(args, windows))
    return plan_of_recipe(model, recipe.freeze, schedule, args.seed, tokenizer_length=tokenizer_length)


@main_process_only
def check_hub(recipe: Recipe) -> None:
    """Make sure of the access to the Hub before hours of training."""
    check_access(push_target(recipe))


def push_target(recipe: Recipe) -> Target:
    """Where the recipe wants the run to be pushed to."""
    given = recipe.training
    return Target(given.get("hub_model_id") or "", given.get("hub_revision"), given.get("hub_private_repo"))
