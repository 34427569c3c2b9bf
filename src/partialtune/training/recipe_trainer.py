"""The Trainer of a recipe: transformers' own, attached to the plan, with the callbacks of a whole run."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from partialtune.engine.attach import attach, put_in_front
from partialtune.engine.checkpoint_files import FirstStepRecord
from partialtune.engine.prefix_choice import PrefixPhase, choose_prefix
from partialtune.engine.prefix_place import rows_of_run
from partialtune.engine.tuning import Tuning
from partialtune.errors import RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.insight.learning_curves import HELD_OUT_TIMES, POINTS, windows_a_point
from partialtune.metrics import best_model_metric, value_of_loss
from partialtune.model.conformance import Conformance, next_token_loss
from partialtune.recipe.recipe import Recipe
from partialtune.scoring.evaluation import evenly_spaced
from partialtune.training.other_processes import EpochOrder
from partialtune.training.performance import EndOfCallbacks, ProductCount, StepTimer, TrainingProgress
from partialtune.training.replay import ReplayOrder
from partialtune.training.run_origin import RunOrigin, write_origin
from partialtune.training.settings import LED_BY_EVALUATIONS, evaluation_steps, run_length, windows_a_step
from partialtune.training.stopping import BatchWatch, EarlyStopping, StopOnSignal
from partialtune.training.training_data import RunData, collate_windows

# Up to here all held-out windows are evaluated each time: a minute or less on two cores.
FLOPS_OF_ALL = 10**13


def prefix_phases(
    recipe: Recipe,
    plan: FreezePlan,
    model: PreTrainedModel,
    args: TrainingArguments,
    saved: RunOrigin | None = None,
    data: RunData | None = None,
) -> list[PrefixPhase]:
    """What each phase does with its frozen prefix: as the run that goes on here chose it, else chosen now.

    Args:
        recipe: Its `prefix_cache` may be "auto".
        plan: Of the run.
        model: As it was loaded.
        args: Of the run.
        saved: What the run began with, where it goes on from a checkpoint.
        data: Of the run, by which `auto` chooses between memory and disk; without it, memory.
    """
    wanted = recipe.speed.prefix_cache
    if wanted == "auto" and saved is not None and saved.choices.prefix_cache is not None:
        return saved.choices.prefix_cache
    rows = None if data is None else rows_of_run(args, data.rows, data.held_out)
    return choose_prefix(wanted, plan, model, args, rows)


@dataclass(frozen=True)
class RecipeTrainer:
    """A run's Trainer, and what follows it.

    Attributes:
        trainer: transformers' own, attached to the plan.
        tuning: What `attach` gave.
        timer: Of its steps.
        products: Counts those of the first step.
        stop: Turns signals into a checkpoint and an end.
        early_stopping: Where the recipe asks for it.
    """

    trainer: Trainer
    tuning: Tuning
    timer: StepTimer
    products: ProductCount
    stop: StopOnSignal
    early_stopping: EarlyStopping | None = None

    def train(self, checkpoint: Path | None = None) -> None:
        """Train, from a checkpoint where there is one."""
        self.trainer.remove_callback(EndOfCallbacks)  # of an earlier call: others may have been added since
        self.trainer.add_callback(self.timer.last)
        with self.products:
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


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
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RecipeTrainer:
    """The Trainer of the run.

    Args:
        recipe: Of the run.
        plan: What trains.
        model, args, data: Of the run.
        prefix: Of `prefix_phases`.
        conformance: Of `check_conformance`.
        origin: What the run began with, for its checkpoints; None where nothing will go on from them.
        tokenizer: Is put into its checkpoints where the run has added tokens to it: the base's would not fit them.
    """
    return attached_trainer(
        plan=plan,
        delta_steps=recipe.freeze.delta_steps,
        stop_on_violation=not recipe.freeze.allow_failed_audit,
        weight_decay_on=recipe.freeze.weight_decay_on,
        fast_paths=recipe.speed.fast_paths,
        prefix=prefix,
        origin=origin,
        tokenizer=tokenizer if plan.new_tokens else None,
        conformance=conformance,
        tokens_per_byte=tokens_per_byte(args, data),
        model=model,
        args=args,
        train_dataset=data.rows,
        order=data.order,
        early_stopping=early_stopping_of(recipe, args),
        eval_dataset=evaluated_windows(args, data, plan.total_parameters),
        data_collator=collate_windows,
    )


def evaluated_windows(args: TrainingArguments, data: RunData, parameters: int) -> Dataset | None:
    """Held-out windows of the evaluations during training: all, or a sample where these do no more than to draw a curve
    and take long.

    Args:
        args, data: Of the run.
        parameters: Of the model.
    """
    if data.held_out is None or decides_by_held_out(args):
        return data.held_out
    points = run_length(args, data.epoch_windows) // (evaluation_steps(args, data.epoch_windows) or 1)
    tokens = points * sum(map(len, data.held_out["input_ids"]))
    if 2 * parameters * tokens <= FLOPS_OF_ALL:  # a product and a sum for each, forward
        return data.held_out
    return evenly_spaced(data.held_out, HELD_OUT_TIMES * windows_of_curves(args, data))


def decides_by_held_out(args: TrainingArguments) -> bool:
    """Whether anything depends on the held-out loss during training: the best model, an early end, the learning rate.

    `early_stopping_patience` names a metric, see `early_stopping.implied_by_early_stopping`.
    """
    chooses = args.load_best_model_at_end or args.metric_for_best_model is not None
    return chooses or args.lr_scheduler_type in LED_BY_EVALUATIONS or args.save_strategy == "best"


def windows_of_curves(args: TrainingArguments, data: RunData) -> int:
    """Windows of each text that are scored at each point of the learning curves; of the held-out one `HELD_OUT_TIMES`
    as many."""
    steps = run_length(args, data.epoch_windows)
    every = evaluation_steps(args, data.epoch_windows) or max(1, steps // POINTS)
    return windows_a_point(steps * windows_a_step(args), steps // every, len(data.scored))


def attached_trainer(
    *,
    plan: FreezePlan,
    model: PreTrainedModel,
    args: TrainingArguments,
    train_dataset: Dataset,
    order: ReplayOrder | EpochOrder | None = None,
    early_stopping: EarlyStopping | None = None,
    eval_dataset: Dataset | None = None,
    delta_steps: int = 10,
    stop_on_violation: bool = True,
    weight_decay_on: str = "matrices",
    fast_paths: Collection[str] = (),
    prefix: Sequence[PrefixPhase] = (),
    origin: RunOrigin | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    conformance: Conformance | None = None,
    tokens_per_byte: float | None = None,
    data_collator: Callable[..., Any] = collate_windows,
) -> RecipeTrainer:
    """transformers' Trainer, attached to a plan, with callbacks for signals, divergence, timing and the bar.

    Args:
        plan, delta_steps, stop_on_violation, weight_decay_on, fast_paths: As for `attach`.
        prefix: What each phase does with its frozen prefix; nothing is kept where it is absent.
        origin: What the run began with, kept in each checkpoint (see `run_origin.origin_of`).
        tokenizer: Is put into each checkpoint; None for none.
        conformance: Whether the model's own loss is used, and the values of its config that the run changed.
        tokens_per_byte: Of the held-out text, for `metric_for_best_model: bits_per_byte`.
        order: That of the windows, where it is not the Trainer's own.
        early_stopping: Ends the run where the held-out loss no longer improves.
        model, args, train_dataset, eval_dataset, data_collator: As for the Trainer.
    """
    conformance = conformance or Conformance()
    # Trainer's constructor switches it off; saved is what was loaded.
    config_as_loaded = {**conformance.config_as_loaded, "use_cache": getattr(model.config, "use_cache", None)}
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        compute_loss_func=next_token_loss if conformance.loss_fault else None,
    )
    if conformance.loss_fault:
        trainer.model_accepts_loss_kwargs = False  # its forward pass takes no loss: the number of targets is ours
    stop = StopOnSignal()

    def write_beside(folder: Path) -> None:
        write_origin(folder, origin)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    tuning = attach(
        trainer,
        plan,
        delta_steps=delta_steps,
        stop_on_violation=stop_on_violation,
        fast_paths=fast_paths,
        prefix_cache=prefix or "off",
        weight_decay_on=weight_decay_on,
        whole_checkpoints=True,
        write_beside=write_beside,
        save_now=lambda: stop.agreed,
    )
    trainer.changes.train_order = order
    tuning.config_as_loaded = config_as_loaded
    tuning.audit_callback.interrupted = lambda: stop.asked_to_stop(args)
    timer, products = StepTimer(), ProductCount(lambda: tuning.fast.hits)
    # The clock comes first, and `train` puts its end last. The count has to end before a step may be refused.
    best = BestMetric(args.metric_for_best_model, tokens_per_byte)
    put_in_front(trainer, [timer, products, BatchWatch(train_dataset, order.texts if order else None), best])
    for printer in (PrinterCallback, ProgressCallback):  # they print every log entry as a line
        trainer.remove_callback(printer)
    row = len(train_dataset[0]["input_ids"]) if isinstance(train_dataset, Dataset) else 0  # a stream has no first row
    step_tokens = windows_a_step(args) * row
    bar = [] if args.disable_tqdm else [TrainingProgress(step_tokens)]
    for callback in (stop, *([early_stopping] if early_stopping else []), FirstStepRecord(), *bar):
        trainer.add_callback(callback)
    return RecipeTrainer(trainer, tuning, timer, products, stop, early_stopping)


def early_stopping_of(recipe: Recipe, args: TrainingArguments) -> EarlyStopping | None:
    """The callback that a recipe's `early_stopping_patience` asks for; None for none, and where a trial of a learning
    rate evaluates nothing on the way."""
    asked = recipe.evaluation
    if asked.early_stopping_patience is None or args.eval_strategy == IntervalStrategy.NO:
        return None
    return EarlyStopping(asked.early_stopping_patience, asked.early_stopping_threshold)


class BestMetric(TrainerCallback):
    """Adds the metric that chooses the best model to what an evaluation logs, where it is made of the loss.

    It has to be called before the trackers, and finds both Trainer's own record and what it chooses by.

    Args:
        name: The recipe's `metric_for_best_model`.
        tokens_per_byte: Of the held-out text.
    """

    def __init__(self, name: str | None, tokens_per_byte: float | None) -> None:
        self._metric, self._tokens_per_byte = best_model_metric(name), tokens_per_byte

    def on_log(self, args, state, control, logs=None, **kwargs):
        metric, loss = self._metric, logs.get("eval_loss")
        if metric is None or metric.key == "loss" or loss is None:
            return
        value = value_of_loss(metric, loss, self._tokens_per_byte)
        if value is not None:
            logs[f"eval_{metric.key}"] = value  # the dictionary that Trainer chooses by
            state.log_history[-1][f"eval_{metric.key}"] = value


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
