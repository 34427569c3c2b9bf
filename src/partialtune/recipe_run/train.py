"""The whole run, one stage a line: recipe -> data -> model and plan -> training -> evaluation -> pages."""

import logging
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from partialtune.delta_checkpoint import Base
from partialtune.distributed import (
    decided_by_main,
    done_together,
    from_main,
    is_first_of_node,
    is_main,
    main_process_only,
    node_name,
    peers_watched,
    saves_sharded_checkpoints,
    several_nodes,
    shards_parameters,
)
from partialtune.engine.prefix_choice import prefix_words
from partialtune.engine.shard_model import shard_model
from partialtune.errors import DiskError, FreezeViolation, InputError, RecipeError, code_of, disk_words, is_disk_fault
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan_table import plan_table
from partialtune.hub.push import push_after_training
from partialtune.insight.learning_curves import LearningCurves
from partialtune.model.base_card import stated_by
from partialtune.model.held_narrow import narrow_values
from partialtune.model.loading import auto_class
from partialtune.proof.deltas import DELTAS_FILE
from partialtune.recipe.recipe import Recipe, write_recipe
from partialtune.recipe_run.evaluate_before_after import Evaluation, Evaluator, read_base_values
from partialtune.recipe_run.prepare import RunStart, prepare, push_target
from partialtune.recipe_run.while_training import LivePage, Samples, WhileTraining, page_says_when_it_ends
from partialtune.recipe_run.write_results import (
    check_saved,
    save_model,
    write_insight,
    write_performance,
    write_plan,
    write_results,
)
from partialtune.run_folder import RECIPE_FILE, SAMPLES_FILE, begin_writing, locked, write_exit
from partialtune.scoring.fast_scoring import FastScoring
from partialtune.terminal import show
from partialtune.text.reading import SourceText
from partialtune.training.load_base import frozen_dtype_words
from partialtune.training.recipe_trainer import RecipeTrainer, evaluated_windows, make_trainer, windows_of_curves
from partialtune.training.replay import ReplayOrder
from partialtune.training.resume_check import standing_of
from partialtune.training.settings import compute_dtype
from partialtune.training.training_data import RunData

logger = logging.getLogger(__name__)

RECORDED_VERSIONS = ("partialtune", "torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors")


def train(recipe: Recipe) -> Path:
    """Run a recipe from its text to its report.

    Returns:
        The run's folder, finished.

    Raises:
        PartialtuneError: With the exit code of its kind; for all but bad input `exit.json` in the folder says it too.
    """
    start = prepare(recipe)
    if start is None:  # the folder holds this run, finished
        return Path(recipe.training["output_dir"])
    folder, model, plan = start.folder, start.model, start.plan
    with (
        ExitStack() as held,
        page_says_when_it_ends(folder),
        exit_recorded(folder),
        peers_watched(start.args.ddp_timeout),
    ):
        decided_by_main(lambda: take_folder(held, start))
        begin_folder(start)
        if saves_sharded_checkpoints(start.args):
            check_shared(folder, RECIPE_FILE)
        say_where_results_are(folder)

        apply_plan(model, plan)  # now already: the base is scored as it will train, with its head untied
        evaluator = evaluator_of(start)
        read_base_values(model, *base_of(start))
        if shards_parameters(start.args):
            # in shards, as it will train too: no device may hold it whole, and other processes may have no weights yet
            run = trainer_at_start(start)
            shard_model(run.trainer)
            before = evaluator.before(model, folder, start.origin.base.sha256)
            set_seed(start.args.seed)
        else:
            before = evaluator.before(model.to(start.args.device), folder, start.origin.base.sha256)
            run = trainer_at_start(start)
        quantized = evaluator.quantized(model)

        curves = curves_of(start, evaluator, before).attach(run.trainer)
        watching = watched(start, run, evaluator, before)
        # now already, so that a run that fails has its plan (`compare` reads it); below with the digests after training
        write_plan(folder, run.tuning)
        violation = train_to_the_end(run, start.checkpoint)
        save_model(folder, run, start)
        # in memory all may be well: only what is read back proves what others will load
        violation = check_saved(folder, run) or violation
        write_plan(folder, run.tuning)

        if run.early_stopping is not None and run.early_stopping.stopped and is_main():
            record_run(start, run.early_stopping.stopped)
        after = evaluator.after(model, curves.at_end)
        evaluator.fast.forget()
        write_insight(start, run, curves, evaluator, before, after)
        write_performance(start, run, watching)
        write_results(folder, run, before, after, quantized)
        # after the results: a failed audit is a finding, and the pages show it
        if violation is not None:
            raise violation
        # last: a lost connection then costs nothing that is not on disk
        if recipe.training.get("push_to_hub"):
            push(start)
    return folder


def evaluator_of(start: RunStart) -> Evaluator:
    """Scores the run's texts and prompts, before and after."""
    prompts, batch_size = start.recipe.evaluation.prompts, start.args.per_device_eval_batch_size
    # what is frozen in every phase is the same before training and after it
    fast = FastScoring(start.model, start.recipe.speed.fast_paths, min(phase.blocks for phase in start.prefix))
    return Evaluator(start.tokenizer, start.data.scored, prompts, batch_size, fast, compute_dtype(start.args))


def curves_of(start: RunStart, evaluator: Evaluator, before: Evaluation) -> LearningCurves:
    """The learning curves, which begin with the scores before training and end with those after it."""
    evaluated = evaluated_windows(start.args, start.data, start.plan.total_parameters)
    # The best model is loaded after the last evaluation: its scores are other ones.
    ends_with = None if start.args.load_best_model_at_end else lambda name: evaluator.score(name, start.model, "after")
    return LearningCurves(
        start.data.scored,
        start.args.per_device_eval_batch_size,
        windows_of_curves(start.args, start.data),
        held_out=None if evaluated is None else len(evaluated),
        fast=evaluator.fast,
        before=before.texts,
        score_whole=ends_with,
    )


def watched(
    start: RunStart, run: RecipeTrainer, evaluator: Evaluator, before: Evaluation
) -> Mapping[str, WhileTraining]:
    """What the run shows while it trains: `page`, and `samples` unless the recipe wants none."""
    asked, trainer, found = start.recipe.evaluation, run.trainer, {}
    if asked.sample_steps != 0 and asked.prompts:
        base = [probe.continuation for probe in before.prompts]
        samples = Samples(evaluator.continuations, asked.prompts, base, start.folder, asked.sample_steps)
        found["samples"] = samples.attach(trainer)
    return {**found, "page": LivePage(start.folder).attach(trainer)}  # last: it shows what the others wrote


def base_of(start: RunStart) -> tuple[Base, bool]:
    """Where the base's files are, and whether code beside them may run."""
    asked = start.recipe.model
    return Base(asked.model_name_or_path, asked.model_revision, start.origin.base.commit), asked.trust_remote_code


def take_folder(held: ExitStack, start: RunStart) -> None:
    """Lock the folder for as long as `held` lasts, and make sure that it is still what it was.

    Raises:
        RecipeError: If another process is writing to it, or has written while this one loaded.
    """
    folder, recipe = start.folder, start.recipe
    held.enter_context(locked(folder))
    if standing_of(folder, recipe.values, recipe.resume) is not start.standing:
        raise RecipeError(f"output_dir: another process has written to {folder} meanwhile. Start again to go on there.")


@main_process_only
def begin_folder(start: RunStart) -> None:
    """Write the recipe, copy the deltas and samples that another folder's run has so far, and print what will train."""
    folder, checkpoint = start.folder, start.checkpoint
    begin_writing(folder)
    if checkpoint is not None and checkpoint.resolve().parent != folder.resolve():
        for name in (DELTAS_FILE, SAMPLES_FILE):
            if (checkpoint.parent / name).is_file():
                shutil.copyfile(checkpoint.parent / name, folder / name)
    record_run(start)
    show(plan_table(start.plan, start.args.learning_rate))
    if words := frozen_dtype_words(start.model, start.plan):
        logger.info(words)
    logger.info(prefix_words(start.prefix))
    logger.info("Loss: %s.", start.conformance.loss_words())


def record_run(start: RunStart, stopped_early: Mapping[str, int] | None = None) -> None:
    """Write `recipe.yaml`; a second time where early stopping has ended the run, which it then says.

    Args:
        start: Of the run.
        stopped_early: As in `EarlyStopping.stopped`.
    """
    recipe = start.recipe
    values = {key: value for key, value in recipe.values.items() if key != "resume_from_checkpoint"}
    stated = stated_by(recipe.model.model_name_or_path, start.origin.base.commit)
    record = {**run_record(start), **stated, **({"stopped_early": dict(stopped_early)} if stopped_early else {})}
    write_recipe(start.folder / RECIPE_FILE, values, record)


def run_record(start: RunStart) -> dict[str, Any]:
    """What `recipe.yaml` keeps under `run`: how to make the run again, and from exactly what."""
    args, data, loads_with = start.args, start.data, auto_class(start.config).__name__
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_VERSIONS}},
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "processes": args.world_size,
        **({} if start.origin.dealt is None else {"accumulation": args.gradient_accumulation_steps}),
        # under FSDP accelerate says what it has found, MULTI_GPU, until a Trainer is made
        "distributed": "FSDP" if shards_parameters(args) else PartialState().distributed_type.value,
        "device": str(args.device),
        "base_commit": start.origin.base.commit,
        **({} if loads_with == "AutoModelForCausalLM" else {"auto_class": loads_with}),
        "sources": [source_record(source) for source in data.sources],
        "windows": {"training": len(data.train), "held_out": len(data.held_out or [])},
        **replay_record(data),
        **({"frozen_dtype": held} if (held := narrow_values(start.model, start.plan.trainable)) else {}),
        "prefix_cache": [phase.to_json() for phase in start.prefix],
        "loss": start.conformance.loss_words(),
    }


def source_record(source: SourceText) -> dict[str, Any]:
    """What is kept of a text: its name without secrets, its digest, how it was read."""
    return {
        "name": source.name,
        "sha256": source.sha256,
        "bytes": source.raw_bytes,
        "encoding": source.encoding,
        "cleaning": source.cleaning,
    }


def replay_record(data: RunData) -> dict[str, Any]:
    """What is kept of the text that is replayed, nothing where none is."""
    if data.replay is None or not isinstance(data.order, ReplayOrder):
        return {}
    return {
        "replay": {
            "sources": [source_record(source) for source in data.replay.sources],
            "windows": len(data.replay.windows),
            "windows_a_step": data.order.drawn,
            "of_a_step": data.order.batch,
            "steps_an_epoch": data.order.steps,
        }
    }


def check_shared(folder: Path, name: str, patience_seconds: float = 30) -> None:
    """Stop where this process does not see a file that the main process has written: a sharded checkpoint is written
    by all of them into one folder. What else a run saves is written by the main process alone.

    Args:
        folder: The run's folder.
        name: The file's.
        patience_seconds: How long to wait for it.

    Raises:
        InputError: If it is not there after some time, which network file systems may take.
    """
    PartialState().wait_for_everyone()
    end = time.monotonic() + patience_seconds

    def wait() -> None:
        while not (folder / name).is_file():
            if time.monotonic() > end:
                raise InputError(
                    f"output_dir: {folder.absolute()} is not the same folder on every machine of this run, "
                    f"and with SHARDED_STATE_DICT each writes a part of every checkpoint. Name one on a file system "
                    f"that they share, or set fsdp_state_dict_type: FULL_STATE_DICT."
                )
            time.sleep(0.5)

    done_together(wait)


def say_where_results_are(folder: Path) -> None:
    """On the nodes that get no results of their own: whose disk they are on."""
    place = from_main(f"{folder.absolute()} on {node_name()}")
    if several_nodes() and is_first_of_node() and not is_main():
        print(f"This node, {node_name()}, trains. The run's results are in {place}.", flush=True)


def trainer_at_start(start: RunStart) -> RecipeTrainer:
    """The Trainer, which has taken its snapshot of the base.

    Raises:
        FreezeViolation: If the snapshot is not of the base as it was loaded.
    """
    # from here the random numbers are the same whether the base was scored now or its kept scores were used
    set_seed(start.args.seed)
    # The snapshot is taken as the Trainer is attached: at on_train_begin a checkpoint would be loaded already,
    # and the distances would be those from the checkpoint.
    run = make_trainer(
        start.recipe,
        plan=start.plan,
        model=start.model,
        args=start.args,
        data=start.data,
        prefix=start.prefix,
        conformance=start.conformance,
        origin=start.origin,
        tokenizer=start.tokenizer,
    )
    check_start(start.origin.base.sha256, run.tuning.audit_callback.digests_before)
    return run


def check_start(loaded: Mapping[str, str], digests_before: Mapping[str, str]) -> None:
    """Make sure that what the audit takes for the start is the base as it was loaded: the "before" scores lie between.

    Some models rescale their weights in place when they are evaluated (RWKV). The audit would then compare with the
    rescaled ones, and a reload of what is saved would rescale them again.

    Args:
        loaded: sha256 by name of every parameter as it was loaded.
        digests_before: sha256 by name of every parameter in the audit's snapshot, an untied head's too.

    Raises:
        FreezeViolation: If a parameter differs, whatever the recipe allows: no later verdict would mean anything.
    """
    changed = [name for name, sha256 in loaded.items() if digests_before.get(name) != sha256]
    if changed:
        raise FreezeViolation(
            f"{len(changed)} of {len(loaded)} parameters changed between loading and the first step, {changed[0]} "
            f"first: this model changes its own weights when it is evaluated, so that what would be saved is not what "
            f"is scored. It cannot be trained here. Take a setting of its config that switches this off."
        )


def train_to_the_end(run: RecipeTrainer, checkpoint: Path | None) -> FreezeViolation | None:
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
    trainer, audit = run.trainer, run.tuning.audit_callback
    try:
        with run.stop:
            run.train(checkpoint)
    except FreezeViolation as violation:
        ended = audit.ended or trainer.state.global_step >= trainer.state.max_steps
        if not (ended and audit.digests_after) or audit.result is None or audit.result.other_names:
            raise
        return violation
    finally:
        with suppress(OSError):  # the error that ends the run is the one to report
            trainer.save_state()
    decided_by_main(trainer.save_state)
    run.stop.raise_if_stopped(trainer.args)
    return None


def push(start: RunStart) -> None:
    """Upload the finished run and verify what arrived; everything is on disk by now, so that no process waits."""
    if is_main():
        allowed = start.recipe.freeze.allow_failed_audit
        show(push_after_training(start.folder, push_target(start.recipe), allowed))


@contextmanager
def recorded_end(folder: Path) -> Iterator[None]:
    """Leave `exit.json` at the end, and then no page that says the run goes on."""
    with page_says_when_it_ends(folder), exit_recorded(folder):
        yield


@contextmanager
def exit_recorded(folder: Path) -> Iterator[None]:
    """Leave `exit.json`: 0 at the end, else the code and reason. Not for bad input, which writes nothing."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, InputError) or isinstance(error, DiskError):
            reason = disk_words(error) if is_disk_fault(error) else str(error) or type(error).__name__
            if is_main():
                with suppress(OSError):  # there may be no room for it either
                    write_exit(folder, code_of(error), reason)
        raise
    if is_main():
        write_exit(folder, 0, "done")
