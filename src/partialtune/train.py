"""The whole run, one stage a line: recipe -> data -> model and plan -> training -> evaluation -> pages."""

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from partialtune.data import RunData, prepare_data
from partialtune.errors import FreezeViolation, InputError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.freeze.schedules import in_steps
from partialtune.freeze.table import plan_table
from partialtune.hub.push import Target, check_access, push_after_training
from partialtune.launch import (
    check_precision,
    check_processes,
    decided_by_main,
    main_process_only,
    one_device_a_process,
)
from partialtune.model.loading import check_fit, load_config, load_model, load_tokenizer
from partialtune.model.statement import stated_by
from partialtune.output_dir import RECIPE_FILE, Standing, locked, standing_of, write_exit, write_json
from partialtune.pages.card import write_card
from partialtune.pages.figures import draw_figures
from partialtune.pages.report import write_report
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.recipe.reading import Recipe, write_recipe
from partialtune.scoring.evaluation import ScoredText, score_text
from partialtune.scoring.prompts import PromptProbe, check_prompts, compare_prompts, format_prompts, probe_prompts
from partialtune.summary import closing_words
from partialtune.training.activation_checkpointing import check_support
from partialtune.training.checkpoints import newest_complete_checkpoint
from partialtune.training.optimizer_state import check_checkpoint
from partialtune.training.performance import performance
from partialtune.training.trainer import (
    PartialTrainer,
    collate_windows,
    run_length,
    steps_an_epoch,
    suit_length,
    training_arguments,
)

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
        logger.info("%s holds this run, finished: nothing to do.", folder)
        return folder
    check_precision(recipe.training)
    args = training_arguments(recipe.training)
    check_processes(args)
    one_device_a_process(args)
    base = recipe.model
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code)
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    check_fit(base.model_name_or_path, config, recipe.text.block_size, vocabulary=len(tokenizer))
    check_prompts(recipe.evaluation.prompts, tokenizer, config)
    if recipe.training.get("push_to_hub"):
        check_hub(recipe.training)
    seed = args.seed if args.data_seed is None else args.data_seed
    data = prepare_data(recipe.text, recipe.evaluation.eval_texts, tokenizer, seed)
    windows = len(data.train)
    suit_length(args, recipe.training, windows, held_out=data.held_out is not None)
    model = load_model(base.model_name_or_path, config, base.model_revision, base.trust_remote_code)
    check_support(args, model)
    schedule = in_steps(recipe.freeze.schedule, steps_an_epoch(args, windows), run_length(args, windows))
    plan = plan_freeze(model, recipe.freeze.trainable, head=recipe.freeze.head, schedule=schedule)
    checkpoint = checkpoint_to_go_on_from(folder, recipe.resume, plan)
    look = Look(tokenizer, data.scored, recipe.evaluation.prompts, args.per_device_eval_batch_size)

    with ExitStack() as held, exit_recorded(folder):
        decided_by_main(lambda: held.enter_context(locked(folder)))
        begin_folder(folder, recipe, plan, run_record(args, model, data))
        apply_plan(model, plan)
        before = look.at(model.to(args.device), "before")

        set_seed(args.seed)
        trainer = make_trainer(recipe, plan, model, args, data)
        write_plan(folder, plan, trainer.audit)
        violation = train_to_the_end(trainer, checkpoint)
        save_model(folder, trainer, tokenizer)
        write_plan(folder, plan, trainer.audit)

        after = look.at(model, "after")
        write_results(folder, trainer, before, after, recipe.text.block_size)
        if violation is not None:
            raise violation
        if recipe.training.get("push_to_hub"):
            push(folder, recipe.training, recipe.freeze.allow_failed_audit)
    return folder


@dataclass(frozen=True)
class Sight:
    """What a model made of the texts and prompts at one moment."""

    scores: dict[str, dict[str, Any]]
    prompts: list[PromptProbe]


@dataclass(frozen=True)
class Look:
    """The same texts and prompts for every look at a model, before training and after."""

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, ScoredText]
    prompts: Sequence[str]
    batch_size: int

    def at(self, model: PreTrainedModel, moment: str) -> Sight:
        scores = {
            name: score_text(model, text, self.batch_size, f"{name}, {moment}") for name, text in self.texts.items()
        }
        return Sight(scores, probe_prompts(model, self.tokenizer, self.prompts))


def checkpoint_to_go_on_from(folder: Path, resume: str | None, plan: FreezePlan) -> Path | None:
    """The checkpoint that the recipe asks for, None for a start from the base.

    Raises:
        InputError: If it does not fit the plan.
    """
    checkpoint = newest_complete_checkpoint(folder) if resume == "auto" else Path(resume) if resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint, plan)
    return checkpoint


def make_trainer(
    recipe: Recipe, plan: FreezePlan, model: PreTrainedModel, args: TrainingArguments, data: RunData
) -> PartialTrainer:
    """The Trainer of the run. The plan is applied already: Trainer takes what trains at that moment."""
    return PartialTrainer(
        plan=plan,
        delta_steps=recipe.freeze.delta_steps,
        stop_on_violation=not recipe.freeze.allow_failed_audit,
        decay_everything=recipe.freeze.weight_decay_on == "all",
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_windows,
    )


def train_to_the_end(trainer: PartialTrainer, checkpoint: Path | None) -> FreezeViolation | None:
    """Train, from `checkpoint` where there is one.

    Returns:
        A violation that the audit found after the last step: the run's files are still worth writing. One found
        earlier is raised.

    Raises:
        Interrupted: If a signal stopped it after a checkpoint.
    """
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    try:
        with trainer.stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except FreezeViolation as violation:
        if trainer.state.global_step < trainer.state.max_steps:
            raise
        return violation
    finally:
        trainer.save_state()
    trainer.stop.raise_if_stopped(trainer.args.output_dir)
    return None


def run_record(args: TrainingArguments, model: PreTrainedModel, data: RunData) -> dict[str, Any]:
    """What `recipe.yaml` keeps under `run`: how to make the run again, and from exactly what."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_VERSIONS}},
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "processes": args.world_size,
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
    }


@main_process_only
def begin_folder(folder: Path, recipe: Recipe, plan: FreezePlan, record: Mapping[str, Any]) -> None:
    """Write the recipe and say what will train."""
    values = {key: value for key, value in recipe.values.items() if key != "resume_from_checkpoint"}
    stated = stated_by(recipe.model.model_name_or_path, record["base_commit"])
    write_recipe(folder / RECIPE_FILE, values, {**record, **stated})
    print(plan_table(plan), flush=True)


@main_process_only
def write_plan(folder: Path, plan: FreezePlan, audit: FreezeAuditCallback) -> None:
    """`freeze_plan.json`, with the digests that are known."""
    write_json(folder / "freeze_plan.json", plan.to_json(audit.digests_before, audit.digests_after))


def save_model(folder: Path, trainer: PartialTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """The adapted model and its tokenizer, loadable with `from_pretrained(folder)`."""
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        tokenizer.save_pretrained(folder)


@main_process_only
def write_results(folder: Path, trainer: PartialTrainer, before: Sight, after: Sight, block_size: int) -> None:
    """Everything that is known only after training, and the pages made of it."""
    metrics = next(entry for entry in reversed(trainer.state.log_history) if "train_runtime" in entry)
    write_json(folder / "train_results.json", metrics)
    comparison = compare_prompts(before.prompts, after.prompts)
    scores = {name: {"before": before.scores[name], "after": after.scores[name]} for name in before.scores}
    write_json(folder / "evaluation.json", {**scores, "prompts": comparison})
    write_json(
        folder / "performance.json", performance(trainer.args, trainer.timer, trainer.flops_per_step, block_size)
    )
    draw_figures(folder)
    write_card(folder)
    write_report(folder)
    print(format_prompts(comparison), closing_words(folder, trainer.audit.result, scores), sep="\n\n", flush=True)


@main_process_only
def check_hub(said: Mapping[str, Any]) -> None:
    """Make sure of the access to the Hub before hours of training."""
    check_access(push_target(said))


@main_process_only
def push(folder: Path, said: Mapping[str, Any], allow_failed_audit: bool) -> None:
    """Upload the finished run and verify what arrived; everything is on disk by now."""
    print(push_after_training(folder, push_target(said), allow_failed_audit), flush=True)


def push_target(said: Mapping[str, Any]) -> Target:
    """Where the recipe wants the run to be pushed to."""
    return Target(said.get("hub_model_id") or "", said.get("hub_revision"), said.get("hub_private_repo"))


@contextmanager
def exit_recorded(folder: Path) -> Iterator[None]:
    """Leave `exit.json`: 0 at the end, else the code and reason. Not for bad input, which writes nothing."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        if PartialState().is_main_process:
            write_exit(folder, code, str(error) or type(error).__name__)
        raise
    if PartialState().is_main_process:
        write_exit(folder, 0, "done")
