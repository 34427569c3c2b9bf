"""The whole run, one stage a line: recipe -> data -> model and plan -> training -> evaluation -> pages."""

import logging
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from partialtune.distributed import check_shared, decided_by_main, first_on_each_node, main_process_only, peers_watched
from partialtune.errors import DiskError, FreezeViolation, InputError, RecipeError, code_of, disk_words, is_disk_fault
from partialtune.fast.prefix_choice import PrefixPhase, prefix_words
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.plan_table import plan_table
from partialtune.freeze.recipe_plan import in_steps, plan_of_recipe
from partialtune.hub.push import Target, check_access, push_after_training
from partialtune.insight.learning_curves import LearningCurves
from partialtune.insight.run_insight import weight_insight
from partialtune.model.base_card import stated_by
from partialtune.model.conformance import Conformance, check_conformance
from partialtune.model.loading import empty_model, load_config, load_model, load_tokenizer, model_location
from partialtune.model.model_checks import check_finite, check_fit, check_ids, check_weights
from partialtune.model.train_mode import check_support
from partialtune.proof.deltas import DELTAS_FILE
from partialtune.recipe.reading import Recipe, write_recipe
from partialtune.run_folder import (
    RECIPE_FILE,
    Standing,
    begin_writing,
    locked,
    recorded_sources,
    standing_of,
    write_exit,
)
from partialtune.scoring.prompts import check_prompts
from partialtune.text.reading import IN_MEMORY_BYTES, check_texts_unchanged
from partialtune.train.before_after import Look
from partialtune.train.results import (
    check_saved,
    save_model,
    write_insight,
    write_performance,
    write_plan,
    write_results,
)
from partialtune.training.checkpoints import damage_of, newest_whole_checkpoint
from partialtune.training.launch import check_engine, check_precision, check_processes, one_device_a_process
from partialtune.training.making import make_trainer, prefix_phases, tokens_per_byte
from partialtune.training.optimizer_state import check_checkpoint
from partialtune.training.origin import check_origin, check_start, origin_of, read_origin, same_base, with_choices
from partialtune.training.run_data import RunData, prepare_data
from partialtune.training.settings import run_length, steps_an_epoch, suit_length, training_arguments
from partialtune.training.trainer import PartialTrainer

logger = logging.getLogger(__name__)

RECORDED_VERSIONS = ("partialtune", "torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors")


def train(recipe: Recipe) -> Path:
    """Run a recipe from its text to its report.

    Returns:
        The run's folder, finished.

    Raises:
        PartialtuneError: With the exit code of its kind; for all but bad input `exit.json` in the folder says it too.
    """
    folder = Path(recipe.training["output_dir"])
    standing = decided_by_main(lambda: standing_of(folder, recipe.values, recipe.resume))
    if standing is Standing.FINISHED:
        unread = decided_by_main(
            lambda: check_texts_unchanged(recorded_sources(folder), recipe.text.text, folder, recipe.text.text_column)
        )
        logger.info("%s holds this run, finished: nothing to do.%s", folder, not_compared(unread))
        return folder
    if standing is Standing.UNSTARTED:
        logger.info("%s holds this run, ended before its first optimizer step: it starts again.", folder)
    check_precision(recipe.training)
    checkpoint, begun = decided_by_main(lambda: checkpoint_to_go_on_from(folder, recipe.resume))
    args = training_arguments(with_choices(recipe.training, begun))
    check_precision({"bf16": args.bf16, "fp16": args.fp16})  # `bf16: auto` is decided by now
    check_processes(args)
    one_device_a_process(args)
    check_engine(args)
    base = same_base(recipe.model, begun)
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    check_weights(base.model_name_or_path, model_location(base.model_name_or_path), config)
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code)
    check_fit(base.model_name_or_path, config, recipe.text.block_size, vocabulary=len(tokenizer))
    check_prompts(recipe.evaluation.prompts, tokenizer, config)
    if recipe.training.get("push_to_hub"):
        check_hub(recipe.training)
    data = first_on_each_node(lambda: run_data(recipe, args, tokenizer))
    decided_by_main(lambda: check_ids(base.model_name_or_path, config, data.largest_ids))
    windows = len(data.train)
    suit_length(args, recipe.training, windows, held_out=data.held_out is not None)
    decided_by_main(lambda: tokens_per_byte(args, data))  # before anything is written: a metric that this text has not
    model = load_model(base.model_name_or_path, config, base.model_revision, base.trust_remote_code)
    check_finite(base.model_name_or_path, model)
    conformance = check_conformance(model, recipe.text.block_size)
    check_support(args, model)
    schedule = in_steps(recipe.freeze.schedule, steps_an_epoch(args, windows), run_length(args, windows))
    plan = plan_of_recipe(model, recipe.freeze, schedule, args.seed)
    prefix = decided_by_main(lambda: prefix_phases(recipe, plan, model, args, data, begun))
    origin = decided_by_main(lambda: run_origin(recipe, args, model, data, plan, prefix))
    if checkpoint is not None:
        decided_by_main(lambda: check_same_run(checkpoint, plan, begun, origin))
    look = Look(tokenizer, data.scored, recipe.evaluation.prompts, args.per_device_eval_batch_size)

    with ExitStack() as held, exit_recorded(folder), peers_watched(args.ddp_timeout):
        decided_by_main(lambda: take_folder(held, folder, recipe, standing))
        begin_folder(folder, recipe, plan, run_record(args, model, data, prefix, conformance), checkpoint)
        check_shared(folder, RECIPE_FILE)
        apply_plan(model, plan)
        before = look.before(model.to(args.device), folder, origin["base"]["sha256"])

        set_seed(args.seed)
        trainer = make_trainer(recipe, plan, model, args, data, prefix, origin, conformance)
        check_start(origin, trainer.audit.digests_before)
        curves = LearningCurves(data.scored, args.per_device_eval_batch_size).attach(trainer)
        write_plan(folder, plan, trainer.audit)
        violation = train_to_the_end(trainer, checkpoint)
        save_model(folder, trainer, tokenizer, recipe)
        violation = check_saved(folder, trainer) or violation
        write_plan(folder, plan, trainer.audit)

        after = look.at(model, "after")
        moved = weight_insight(
            model, plan, trainer.deltas.snapshot.copies, data.token_counts, tokenizer, PartialState().is_main_process
        )
        write_insight(folder, look, before, after, {**moved, "learning_curves": curves.to_json()})
        write_performance(folder, trainer, empty_model(config, base.trust_remote_code), recipe.text.block_size)
        write_results(folder, trainer, before, after)
        if violation is not None:
            raise violation
        if recipe.training.get("push_to_hub"):
            push(folder, recipe.training, recipe.freeze.allow_failed_audit)
    return folder


def not_compared(unread: Sequence[str]) -> str:
    """What was not looked at again before a run was said to be finished."""
    return f" Not looked at again: {', '.join(unread)}." if unread else ""


def checkpoint_to_go_on_from(folder: Path, resume: str | None) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that the recipe asks for and what its run began with; None for a start from the base.

    Raises:
        InputError: If the one that it names is not whole.
    """
    checkpoint = newest_whole_checkpoint(folder) if resume == "auto" else Path(resume) if resume else None
    if checkpoint is None:
        return None, None
    damage = damage_of(checkpoint) if resume != "auto" else []
    if damage:
        raise InputError(
            f"{checkpoint} is no whole checkpoint of partialtune: {'; '.join(damage[:3])}. "
            f"`--resume_from_checkpoint auto` takes the newest whole one of output_dir."
        )
    return checkpoint, read_origin(checkpoint)


def run_data(recipe: Recipe, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """The windows and scored texts of the run; in files that several processes share, so that they are made once."""
    in_memory = IN_MEMORY_BYTES if args.world_size == 1 else 0
    return prepare_data(recipe.text, recipe.evaluation.eval_texts, tokenizer, data_seed(args), in_memory)


def data_seed(args: TrainingArguments) -> int:
    """What decides the windows that are drawn, and their order."""
    return args.seed if args.data_seed is None else args.data_seed


def run_origin(
    recipe: Recipe,
    args: TrainingArguments,
    model: PreTrainedModel,
    data: RunData,
    plan: FreezePlan,
    prefix: Sequence[PrefixPhase],
) -> dict[str, Any]:
    """What the run begins with; each checkpoint keeps it."""
    windows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    choices = {"bf16": args.bf16, "prefix_cache": [phase.to_json() for phase in prefix]}
    return origin_of(
        recipe.model, model, recipe.text, data.sources, data.train, plan, data_seed(args), windows_a_step, choices
    )


def check_same_run(checkpoint: Path, plan: FreezePlan, begun: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Stop where the checkpoint is one of another run."""
    check_checkpoint(checkpoint, plan)
    check_origin(checkpoint, begun, origin)


def take_folder(held: ExitStack, folder: Path, recipe: Recipe, standing: Standing) -> None:
    """Lock the folder for as long as `held` lasts, and make sure that it is still what it was.

    Raises:
        RecipeError: If another process is writing to it, or has written while this one loaded.
    """
    held.enter_context(locked(folder))
    if standing_of(folder, recipe.values, recipe.resume) is not standing:
        raise RecipeError(f"output_dir: another process has written to {folder} meanwhile. Start again to go on there.")


def train_to_the_end(trainer: PartialTrainer, checkpoint: Path | None) -> FreezeViolation | None:
    """Train, from `checkpoint` where there is one.

    Returns:
        A violation that the audit found after the last step: the run's files are still worth writing. One found
        earlier is raised, at the last step's checkpoint too; and one about names: such a model is not the one that was
        planned.

    Raises:
        Interrupted: If a signal stopped it after a checkpoint.
    """
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    try:
        with trainer.stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except FreezeViolation as violation:
        ended = trainer.state.global_step >= trainer.state.max_steps and trainer.audit.digests_after
        if not ended or trainer.audit.result.other_names:
            raise
        return violation
    finally:
        with suppress(OSError):  # what ends the run has the word
            trainer.save_state()
    decided_by_main(trainer.save_state)
    trainer.stop.raise_if_stopped(trainer.args)
    return None


def run_record(
    args: TrainingArguments,
    model: PreTrainedModel,
    data: RunData,
    prefix: Sequence[PrefixPhase],
    conformance: Conformance,
) -> dict[str, Any]:
    """What `recipe.yaml` keeps under `run`: how to make the run again, and from exactly what."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_VERSIONS}},
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "processes": args.world_size,
        "distributed": PartialState().distributed_type.value,
        "device": str(args.device),
        "base_commit": getattr(model.config, "_commit_hash", None),
        "sources": [
            {
                "name": source.name,
                "sha256": source.sha256,
                "bytes": source.raw_bytes,
                "encoding": source.encoding,
                "cleaning": source.cleaning,
            }
            for source in data.sources
        ],
        "windows": {"training": len(data.train), "held_out": len(data.held_out or [])},
        "prefix_cache": [phase.to_json() for phase in prefix],
        "loss": conformance.loss_words(),
    }


@main_process_only
def begin_folder(
    folder: Path, recipe: Recipe, plan: FreezePlan, record: Mapping[str, Any], checkpoint: Path | None
) -> None:
    """Write the recipe, take over what another folder's run has reported so far, and say what will train."""
    begin_writing(folder)
    if checkpoint is not None and checkpoint.resolve().parent != folder.resolve():
        history = checkpoint.parent / DELTAS_FILE
        if history.is_file():
            shutil.copyfile(history, folder / DELTAS_FILE)
    values = {key: value for key, value in recipe.values.items() if key != "resume_from_checkpoint"}
    stated = stated_by(recipe.model.model_name_or_path, record["base_commit"])
    write_recipe(folder / RECIPE_FILE, values, {**record, **stated})
    print(plan_table(plan), flush=True)
    logger.info(prefix_words([PrefixPhase(**phase) for phase in record["prefix_cache"]]))
    logger.info("Loss: %s.", record["loss"])


@main_process_only
def check_hub(said: Mapping[str, Any]) -> None:
    """Make sure of the access to the Hub before hours of training."""
    check_access(push_target(said))


def push(folder: Path, said: Mapping[str, Any], allow_failed_audit: bool) -> None:
    """Upload the finished run and verify what arrived; everything is on disk by now, so that no process waits."""
    if PartialState().is_main_process:
        print(push_after_training(folder, push_target(said), allow_failed_audit), flush=True)


def push_target(said: Mapping[str, Any]) -> Target:
    """Where the recipe wants the run to be pushed to."""
    return Target(said.get("hub_model_id") or "", said.get("hub_revision"), said.get("hub_private_repo"))


@contextmanager
def exit_recorded(folder: Path) -> Iterator[None]:
    """Leave `exit.json`: 0 at the end, else the code and reason. Not for bad input, which writes nothing."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, InputError) or isinstance(error, DiskError):
            reason = disk_words(error) if is_disk_fault(error) else str(error) or type(error).__name__
            if PartialState().is_main_process:
                with suppress(OSError):  # there may be no room for it either
                    write_exit(folder, code_of(error), reason)
        raise
    if PartialState().is_main_process:
        write_exit(folder, 0, "done")
