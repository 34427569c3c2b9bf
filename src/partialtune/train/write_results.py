"""What a run leaves in its folder: plan, model, insight, performance, scores and pages."""

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from partialtune.cost.forecast import needed_products, utilisation
from partialtune.delta_checkpoint import Base, write_delta
from partialtune.distributed import decided_by_main, done_together, is_main, main_process_only
from partialtune.errors import FreezeViolation
from partialtune.files import move_all
from partialtune.freeze.plan import FreezePlan
from partialtune.hub.published_files import WEIGHTS
from partialtune.insight.learning_curves import LearningCurves
from partialtune.insight.run_insight import sampled_continuations, weight_insight
from partialtune.model.loading import empty_model
from partialtune.pages.card import write_card
from partialtune.pages.figures import draw_figures
from partialtune.pages.report import write_report
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.recipe.arguments import ModelArguments
from partialtune.recipe.reading import Recipe
from partialtune.run_folder import write_json
from partialtune.scoring.prompts import compare_prompts, format_prompts
from partialtune.train.evaluate_before_after import Evaluation, Evaluator
from partialtune.train.prepare import RunStart
from partialtune.train.summary import closing_words
from partialtune.training.checkpoint_files import ASIDE, clear_aside, disk_errors
from partialtune.training.performance import performance
from partialtune.training.settings import compute_dtype, product_rate
from partialtune.training.trainer import PartialTrainer

logger = logging.getLogger(__name__)


@main_process_only
def write_plan(folder: Path, plan: FreezePlan, audit: FreezeAuditCallback) -> None:
    """`freeze_plan.json`, with the digests that are known."""
    write_json(folder / "freeze_plan.json", plan.to_json(audit.digests_before, audit.digests_after))


def save_model(folder: Path, trainer: PartialTrainer, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """The adapted model and its tokenizer, for `from_pretrained(folder)`; as a delta for `partialtune.load(folder)`.

    All is written aside and then renamed, so that a run which ended before and goes on keeps a whole model till then.
    """
    aside = folder / ASIDE / "model"

    def finish() -> None:
        if trainer.args.should_save:
            with disk_errors("The model", folder):
                tokenizer.save_pretrained(aside)
                written = {path.name for path in aside.iterdir()}
                move_all(aside, folder)
                for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
                    if path.name not in written:
                        path.unlink()  # of an earlier end, saved in another way: it would be loaded in its place

    try:
        decided_by_main(lambda: clear_aside(folder))
        if recipe.freeze.checkpoint_format == "full":
            trainer.save_model(str(aside))
        elif trainer.audit.result.changed_buffers:
            logger.warning("Buffers changed, which a delta does not hold: the model is saved whole.")
            trainer.save_model(str(aside))
        else:
            save_delta(aside, trainer, recipe.model)
        done_together(finish)
    finally:
        if trainer.args.should_save:
            clear_aside(folder)


def save_delta(folder: Path, trainer: PartialTrainer, base: ModelArguments) -> None:
    """Only what was trained, with the digests of base and result."""
    model, audit = trainer.model, trainer.audit
    origin = Base(base.model_name_or_path, base.model_revision, getattr(model.config, "_commit_hash", None))

    def save() -> None:
        with trainer.config_as_loaded(), disk_errors("The model", Path(trainer.args.output_dir)):
            write_delta(folder, model, trainer.plan, audit.digests_before, audit.digests_after, origin)

    done_together(save)


def check_saved(folder: Path, trainer: PartialTrainer) -> FreezeViolation | None:
    """Read the saved model back from disk and compare it with the digests of the audit, whose verdict it is a part of.

    Returns:
        The violation, if there is one: the run's files are still worth writing.
    """
    try:
        found = trainer.read_back(folder, trainer.audit.digests_after, trainer.audit.buffers_after)
        trainer.audit.conclude_saved(trainer.args, trainer.state, found)
    except FreezeViolation as violation:
        return violation
    return None


def write_insight(
    start: RunStart,
    trainer: PartialTrainer,
    curves: LearningCurves,
    evaluator: Evaluator,
    before: Evaluation,
    after: Evaluation,
) -> None:
    """`insight.json`: what moved and what shifted, beyond the scores. Every process calls this to gather weights."""
    copies, counts = trainer.deltas.snapshot.copies, start.data.token_counts
    moved = weight_insight(start.model, start.plan, copies, counts, start.tokenizer, is_main())

    def write() -> None:
        shift = {"next_token_shift": evaluator.token_shift(before, after)}
        samples = {"sampled_continuations": sampled_continuations(before.prompts, after.prompts)}
        content = {**moved, "learning_curves": curves.to_json(), **shift, **samples}
        write_json(start.folder / "insight.json", content)

    decided_by_main(write)


@main_process_only
def write_performance(start: RunStart, trainer: PartialTrainer) -> None:
    """`performance.json`: what the steps cost, and how much of the machine's rate of products they made use of."""
    args, block_size = trainer.args, start.recipe.text.block_size
    empty = empty_model(start.config, start.recipe.model.trust_remote_code)
    batch = (args.per_device_train_batch_size, block_size, args.gradient_accumulation_steps)
    needed = needed_products(empty, trainer.plan, *batch, prefix_cached=trainer.fast.keeps_prefix)
    used = utilisation(needed, trainer.timer.median(), product_rate(args.device, compute_dtype(args)))
    watched = trainer.deltas.seconds + trainer.audit.seconds
    content = performance(args, trainer.timer, trainer.flops_per_step, used, block_size, trainer.fast, watched)
    write_json(
        start.folder / "performance.json", {**content, "saved_files_check_seconds": trainer.reading_back.seconds}
    )


@main_process_only
def write_results(folder: Path, trainer: PartialTrainer, before: Evaluation, after: Evaluation) -> None:
    """Everything that is known only after training, and the pages made of it."""
    logged = reversed(trainer.state.log_history)
    metrics = next((entry for entry in logged if "train_runtime" in entry), {})  # none if the last save found a fault
    write_json(folder / "train_results.json", metrics)
    comparison = compare_prompts(before.prompts, after.prompts)
    scores = {name: {"before": before.scores[name], "after": after.scores[name]} for name in before.scores}
    write_json(folder / "evaluation.json", {**scores, "prompts": comparison})
    draw_figures(folder)
    write_card(folder)
    write_report(folder)
    print(format_prompts(comparison), closing_words(folder, trainer.audit.result, scores), sep="\n\n", flush=True)
