"""What a run leaves in its folder: plan, model, insight, performance, scores and pages."""

import logging
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from partialtune.cost.forecast import needed_products, utilisation
from partialtune.delta_checkpoint import Base, write_delta
from partialtune.distributed import decided_by_main, done_together, is_main, main_process_only
from partialtune.engine.checkpoint_files import ASIDE, clear_aside, disk_errors
from partialtune.engine.tuning import Tuning
from partialtune.errors import FreezeViolation
from partialtune.files import move_all
from partialtune.hub.published_files import WEIGHTS
from partialtune.insight.effective_rank import effective_ranks
from partialtune.insight.learning_curves import LearningCurves
from partialtune.insight.moved_tokens import moved_tokens
from partialtune.model.loading import copy_processor_files, empty_model
from partialtune.model.packed_weights import packed_in
from partialtune.model.parameters import plain_name
from partialtune.net.addresses import without_secrets
from partialtune.pages.card import write_card
from partialtune.pages.figures import draw_figures
from partialtune.pages.findings import length_finding
from partialtune.pages.report import write_report
from partialtune.pages.run_files import read_run
from partialtune.proof.audit_result import Audit
from partialtune.recipe.arguments import ModelArguments
from partialtune.recipe_run.evaluate_before_after import Evaluation, Evaluator
from partialtune.recipe_run.finished_run import score_rows
from partialtune.recipe_run.prepare import RunStart
from partialtune.recipe_run.while_training import WhileTraining
from partialtune.run_folder import write_json
from partialtune.scoring.continuations import SAMPLING
from partialtune.scoring.prompts import compare_prompts, format_prompts
from partialtune.terminal import is_narrow, show
from partialtune.training.performance import performance
from partialtune.training.recipe_trainer import RecipeTrainer
from partialtune.training.settings import compute_dtype, product_rate

logger = logging.getLogger(__name__)


@main_process_only
def write_plan(folder: Path, tuning: Tuning) -> None:
    """`freeze_plan.json`, with the digests that are known."""
    audit = tuning.audit_callback
    packed = {plain_name(name): weight.sha256() for name, weight in packed_in(tuning.model).items()}
    write_json(folder / "freeze_plan.json", tuning.plan.to_json(audit.digests_before, audit.digests_after, packed))


def save_model(folder: Path, run: RecipeTrainer, start: RunStart) -> None:
    """The adapted model, its tokenizer and what it reads images with, for `from_pretrained(folder)`.

    As a delta it is for `partialtune.load(folder)`.

    All is written aside and then renamed, so that a run which ended before and goes on keeps a whole model till then.
    """
    aside, trainer, recipe = folder / ASIDE / "model", run.trainer, start.recipe

    def finish() -> None:
        if trainer.args.should_save:
            with disk_errors("The model", folder):
                start.tokenizer.save_pretrained(aside)
                copy_processor_files(start.config, aside)
                written = {path.name for path in aside.iterdir()}
                move_all(aside, folder)
                for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
                    if path.name not in written:
                        path.unlink()  # of an earlier end, saved in another way: it would be loaded in its place

    try:
        decided_by_main(lambda: clear_aside(folder))
        of_base = run.tuning.plan.frozen_quantization is not None and bool(run.tuning.plan.parts)
        if recipe.freeze.checkpoint_format == "full" and not of_base:
            trainer.save_model(str(aside))
        elif run.tuning.audit is not None and run.tuning.audit.changed_buffers and not of_base:
            logger.warning("Buffers changed, which a delta does not hold: the model is saved whole.")
            trainer.save_model(str(aside))
        else:
            save_delta(aside, run, recipe.model)
        done_together(finish)
    finally:
        if trainer.args.should_save:
            clear_aside(folder)


def save_delta(folder: Path, run: RecipeTrainer, base: ModelArguments) -> None:
    """Only what was trained, with the digests of base and result."""
    tuning, model, audit = run.tuning, run.trainer.model, run.tuning.audit_callback
    origin = Base(base.model_name_or_path, base.model_revision, getattr(model.config, "_commit_hash", None))

    def save() -> None:
        with tuning.as_loaded(), disk_errors("The model", Path(run.trainer.args.output_dir)):
            write_delta(folder, model, tuning.plan, audit.digests_before, audit.digests_after, origin)

    done_together(save)


def check_saved(folder: Path, run: RecipeTrainer) -> FreezeViolation | None:
    """Read the saved model back from disk and compare it with the digests of the audit, whose verdict it is a part of.

    Returns:
        The violation, if there is one: the run's files are still worth writing.
    """
    audit = run.tuning.audit_callback
    try:
        found = run.tuning.read_back(folder, audit.digests_after, audit.buffers_after)
        audit.conclude_saved(run.trainer.args, run.trainer.state, found)
    except FreezeViolation as violation:
        return violation
    return None


def write_insight(
    start: RunStart,
    run: RecipeTrainer,
    curves: LearningCurves,
    evaluator: Evaluator,
    before: Evaluation,
    after: Evaluation,
) -> None:
    """`insight.json`: what moved and what shifted, beyond the scores. Every process calls this to gather weights."""
    weights, counts = (start.model, start.plan, run.tuning.delta_callback.snapshot.copies), start.data.token_counts
    moved = {
        "effective_ranks": effective_ranks(*weights, is_main()),
        "moved_tokens": moved_tokens(*weights, counts, start.tokenizer, is_main()),
    }

    def write() -> None:
        shift = {"next_token_shift": evaluator.token_shift(before, after)}
        pairs = zip(before.prompts, after.prompts, strict=True)
        drawn = [{"prompt": a.prompt, "before": a.sample, "after": b.sample} for a, b in pairs]
        samples = {"sampled_continuations": {**SAMPLING, "prompts": drawn}}
        content = {**moved, "learning_curves": curves.to_json(), **shift, **samples}
        write_json(start.folder / "insight.json", content)

    decided_by_main(write)


@main_process_only
def write_performance(start: RunStart, run: RecipeTrainer, watching: Mapping[str, WhileTraining]) -> None:
    """`performance.json`: what the steps cost, and how much of the machine's rate of products they made use of.

    Args:
        start, run: Of the run.
        watching: What it showed while it trained, whose seconds are written too.
    """
    args, tuning, block_size = run.trainer.args, run.tuning, start.recipe.text.block_size
    empty = empty_model(start.config, start.recipe.model.trust_remote_code)
    batch = (args.per_device_train_batch_size, block_size, args.gradient_accumulation_steps)
    needed = needed_products(empty, tuning.plan, *batch, prefix_cached=tuning.fast.starts_from_states)
    rate = product_rate(args.device, compute_dtype(args)) if needed else 0.0  # nothing is measured for no answer
    used = utilisation(needed, run.timer.median(), rate)
    content = performance(args, run.timer, run.products.flops_per_step, used, block_size, tuning.fast, tuning.seconds)
    checked = {"saved_files_check_seconds": tuning.reading_back.seconds}
    checked |= {f"{name}_seconds": shown.seconds for name, shown in watching.items() if shown.seconds}
    write_json(start.folder / "performance.json", {**content, **checked, **this_process()})


def this_process() -> dict[str, Any]:
    """When this process began, how long it has run, and by which command, without the secrets of addresses in it."""
    began = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
    known = {"began": began.isoformat(timespec="seconds"), "run_seconds": (datetime.now(UTC) - began).total_seconds()}
    program = Path(sys.argv[0])
    if "partialtune" in (program.name, program.parent.name):  # else a program of the user's, or a notebook
        known["command"] = without_secrets(shlex.join(["partialtune", *sys.argv[1:]]))
    return known


@main_process_only
def write_results(
    folder: Path,
    run: RecipeTrainer,
    before: Evaluation,
    after: Evaluation,
    quantized: Mapping[str, Mapping[str, Any]],
) -> None:
    """Everything that is known only after training, and the pages made of it.

    Args:
        folder, run: Of the run.
        before, after: Scores of the base, and of what is saved over it.
        quantized: Scores of the base as it was held in few bits, by text; empty where it was held whole.
    """
    logged = reversed(run.trainer.state.log_history)
    metrics = next((entry for entry in logged if "train_runtime" in entry), None)  # if the last save found no fault
    write_json(folder / "train_results.json", metrics or {})
    comparison = compare_prompts(before.prompts, after.prompts)
    of_base = {name: {"quantized_base": scores} for name, scores in quantized.items()}
    scores: dict[str, Mapping[str, Mapping[str, Any]]] = {
        name: {"before": before.scores[name], "after": after.scores[name], **of_base.get(name, {})}
        for name in before.scores
    }
    write_json(folder / "evaluation.json", {**scores, "prompts": comparison})
    # the pages come last and read the files above, so that `partialtune report` makes the same ones again
    draw_figures(folder)
    write_card(folder)
    write_report(folder)
    prompt = comparison[0]["prompt"] if comparison else "..."
    show(format_prompts(comparison, stacked=is_narrow()), _closing_words(folder, run.tuning.audit, scores, prompt))


# ---- what the terminal shows last: how far the weights moved, the verdict, the scores, the folder --------------------


def _closing_words(
    folder: Path, audit: Audit, scores: Mapping[str, Mapping[str, Mapping[str, Any]]], prompt: str
) -> str:
    """What the terminal shows last.

    Args:
        folder: The run's folder.
        audit: The final audit.
        scores: TEXT -> `before` and `after`, as in `evaluation.json`.
        prompt: For the command that generates.
    """
    stopped = [f"Early stopping: {found.value}. {found.detail}" for found in length_finding(read_run(folder))]
    return "\n".join(
        [
            *_weight_lines(audit),
            *stopped,
            "",
            *_score_lines(scores),
            "",
            f"Everything is in {folder}; the page to look at is {folder / 'report.html'}",
            "Next:",
            f"  partialtune generate {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)} --beside-base",
            f"  partialtune push {shlex.quote(str(folder))} --repo_id NAMESPACE/NAME",
        ]
    )


def _weight_lines(audit: Audit) -> list[str]:
    changed = [*dict.fromkeys([*audit.changed, *audit.changed_buffers, *audit.other_names])]
    frozen = "changed: " + ", ".join(changed) if changed else "0.0, every bit kept"
    moved = "unknown" if audit.trainable_l2_delta is None else f"{audit.trainable_l2_delta:.6g}"
    return [
        "Change of the weights, L2 norm",
        f"  frozen     {audit.frozen_parameters:>5} tensors  {frozen}",
        f"  trainable  {audit.trainable_parameters:>5} tensors  {moved}",
        f"Verdict: {audit.verdict()}.",
    ]


def _score_lines(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return [
        "".join([f"{name:<14}", f"{first:>26}", *(f"{cell:>24}" for cell in others)])
        for name, first, *others in score_rows(scores)
    ]
