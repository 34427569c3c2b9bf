"""The Hugging Face Trainer of this package: phases, whole checkpoints, a loss that must stay finite, the decay rule."""

import copy
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    IntervalStrategy,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.cost.flops import FORMULAS
from partialtune.distributed import decided_by_main, done_together, shards_parameters
from partialtune.engine.fast_paths import FastPaths
from partialtune.engine.phases import PhaseCallback
from partialtune.engine.plan_optimizer import key_by_name, suit_optimizer
from partialtune.engine.prefix_choice import PrefixPhase
from partialtune.errors import RecipeError, TrainingDiverged
from partialtune.freeze.lora import load_adapters, save_adapters
from partialtune.freeze.plan import FreezePlan
from partialtune.metrics import best_model_metric, value_of_loss
from partialtune.model.conformance import Conformance, next_token_loss
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.audit_result import SavedDifference
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.proof.saved_files import saved_differences
from partialtune.proof.snapshot import Stopwatch
from partialtune.training.checkpoint_files import (
    ASIDE,
    FirstStepRecord,
    clear_aside,
    disk_errors,
    finish_checkpoint,
    read_with_care,
    rotate_checkpoints,
    with_ties,
    write_state,
)
from partialtune.training.performance import StepTimer, TrainingProgress
from partialtune.training.resume_check import RunOrigin, write_origin
from partialtune.training.settings import compute_dtype
from partialtune.training.stopping import BatchWatch, StopOnSignal
from partialtune.training.training_data import numbered

logger = logging.getLogger(__name__)


class PartialTrainer(Trainer):
    """Trainer that carries out a plan, phase by phase, measures one step's arithmetic, stops at a non-finite loss and
    never leaves half a checkpoint.

    These private methods of transformers' Trainer are overridden, here and nowhere else; each gives the reason, and
    what breaks without: `_determine_best_metric`, `_get_grad_norm`, `_get_output_dir`, `_load_best_model`,
    `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_rng_state`, `_maybe_log_save_evaluate`,
    `_run_epoch`, `_save`, `_save_checkpoint`.

    Args:
        plan: The plan that was applied to the model.
        delta_steps: Steps between two reports of the weight deltas.
        stop_on_violation: Whether a violation of the freeze audit ends the run.
        decay_everything: Weight decay on norms and biases too, as plain `AdamW(model.parameters())` does.
        fast_paths: Of `loss`, `gelu`, `casts`.
        prefix: What each phase does with its frozen prefix.
        tokens_per_byte: Of the held-out text, for `metric_for_best_model: bits_per_byte`.
        origin: What the run began with, kept in each checkpoint (see `resume_check.origin_of`).
        conformance: Whether the model's own loss is used, and the values of its config that the run changed.
        Others: As for `transformers.Trainer`; none of them is changed.

    Attributes:
        audit, deltas, timer, stop: Its callbacks.
        fast: Its fast paths.
        reading_back: Time in which saved files were read back and compared with the audit's digests.
        flops_per_step: Multiplications and additions of the matrix products of one optimizer step on one process,
            attention's own included, counted in the first; None before it and under torch.compile.
    """

    def __init__(
        self,
        *,
        plan: FreezePlan,
        delta_steps: int,
        stop_on_violation: bool = True,
        decay_everything: bool = False,
        fast_paths: Collection[str] = (),
        prefix: Sequence[PrefixPhase] = (),
        origin: RunOrigin | None = None,
        conformance: Conformance | None = None,
        tokens_per_byte: float | None = None,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ) -> None:
        self.plan, self.origin = plan, origin
        self.decay_everything, self.tokens_per_byte = decay_everything, tokens_per_byte
        self.batch, self.reading_back = BatchWatch(train_dataset), Stopwatch()
        self.flops_per_step: int | None = None
        self._saving_in: str | None = None
        conformance = conformance or Conformance()
        use_cache = getattr(model.config, "use_cache", None)
        self._config_as_loaded = {**conformance.config_as_loaded, "use_cache": use_cache}
        if conformance.loss_fault:
            kwargs["compute_loss_func"] = next_token_loss
            fast_paths = set(fast_paths) - {"loss"}  # which stands in for a loss that the model takes itself
        evaluated = eval_dataset if args.eval_strategy != IntervalStrategy.NO else None
        self.fast = _fast_paths(model, args, fast_paths, prefix, train_dataset, evaluated)
        if self.fast.keeps_prefix:
            train_dataset, first = numbered(train_dataset, 0), len(train_dataset)
            eval_dataset = eval_dataset if evaluated is None else numbered(evaluated, first)
        super().__init__(
            model=model,
            args=_for_phases(args, plan),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=self._make_callbacks(delta_steps, stop_on_violation),
            **kwargs,
        )
        if conformance.loss_fault:
            self.model_accepts_loss_kwargs = False  # its forward pass takes no loss: the number of targets is ours
        if self.is_fsdp_enabled and len(plan.phases) > 1:
            raise RecipeError("schedule: FSDP shards what trains before the first step. Launch without it (DDP).")
        self._replace_printers()
        self.deltas.attach(self)

    def _make_callbacks(self, delta_steps: int, stop_on_violation: bool) -> list[TrainerCallback]:
        self.audit = FreezeAuditCallback(self.plan, stop_on_violation=stop_on_violation)
        self.audit.interrupted = lambda: self.stop.asked_to_stop(self.args)
        self.deltas = WeightDeltaCallback(self.plan, delta_steps=delta_steps)
        self.timer, self.stop = StepTimer(), StopOnSignal()
        # a phase begins first: the others measure what learns in the step
        return [PhaseCallback(self.plan, self.fast), self.timer, self.deltas, self.audit, self.stop, FirstStepRecord()]

    def _replace_printers(self) -> None:
        for printer in (PrinterCallback, ProgressCallback):  # they print every log entry as a line
            self.remove_callback(printer)
        if not self.args.disable_tqdm:
            self.add_callback(TrainingProgress())

    def train(self, *args, **kwargs):
        with self.fast:
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        with self.fast.step(inputs.pop("window", None)):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.timer.mark("forward")
        return loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        if self.decay_everything:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and not self.is_fsdp_enabled:  # sharded state is keyed by name already
            suit_optimizer(optimizer, self.model, self.plan)
            key_by_name(optimizer, self.model)
        return optimizer

    def get_batch_samples(self, *args, **kwargs) -> Any:
        self.timer.begin()
        batches = super().get_batch_samples(*args, **kwargs)
        self.timer.mark("data")
        return batches

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.timer.mark("callbacks")
        with self._products_counted():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.batch.add(inputs["input_ids"], loss)
        self.timer.mark("backward")
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # Called when the callbacks of a step are over and before anything is logged, evaluated or saved. Without, the
        # seconds of evaluation and saves would be counted to the step.
        self.timer.end()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextmanager
    def _products_counted(self) -> Iterator[None]:
        """Matrix products of the first batch, counted once."""
        if self.flops_per_step is not None or self.args.torch_compile:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            yield
        self.flops_per_step = counter.get_total_flops() * self.args.gradient_accumulation_steps

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of the gradients, all processes' by now; one that is not finite ends the run before it does harm."""
        # The one place between backward and the optimizer's step that knows the norm. Without, the step is taken, and
        # the weights are spoilt before `log` sees that the loss is not finite.
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16: the scaler skips such a step, and goes on
        self.batch.end_step(self.state.global_step, norm, self._get_learning_rate(), stop=not scaled)
        return norm

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """With the metric that chooses the best model, where it is one of ours, which are made of the loss."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metric = best_model_metric(self.args.metric_for_best_model)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if metric is not None and metric.key != "loss" and loss is not None:
            value = value_of_loss(metric, loss, self.tokens_per_byte)
            if value is not None:
                output.metrics[f"{metric_key_prefix}_{metric.key}"] = value
        return output

    def _run_epoch(self, **kwargs) -> None:
        # Trainer asks only after a step whether it was the last: without, a run that goes on from a checkpoint of its
        # last step would take one step more than asked for.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingDiverged(
                    f"Training diverged: {name} is {logs[name]} at step {self.state.global_step} "
                    f"(learning rate {self._get_learning_rate():.3g}). Lower learning_rate, or add warmup_steps. "
                    f"Checkpoints from before are kept."
                )
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Where one process cannot write, all end here: Trainer would let them wait for it at its next barrier."""
        what = f"checkpoint-{self.state.global_step}" if self._saving_in else "The model"

        def save() -> None:
            with disk_errors(what, Path(self.args.output_dir)):
                super(PartialTrainer, self).save_model(output_dir, _internal_call)

        done_together(save)

    def save_state(self) -> None:
        """The log, as a whole or not at all."""
        if self.is_world_process_zero():
            write_state(Path(self.args.output_dir) / TRAINER_STATE_NAME, self.state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as the model was loaded, each tied tensor once, and without the pickle; of LoRA the adapters alone."""
        # All of Trainer's ways to save end here. Without, the saved config has `use_cache: false`, FSDP saves a tied
        # head twice, LoRA the whole model, and `training_args.bin` is a pickle that nobody should have to open.
        folder = Path(output_dir or self.args.output_dir)
        if self.plan.adapter is None:
            with self.config_as_loaded():
                super()._save(output_dir, state_dict and with_ties(state_dict, self.model))
        elif self.args.should_save:
            save_adapters(self.model, folder, state_dict)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)

    @contextmanager
    def config_as_loaded(self) -> Iterator[None]:
        """Give the model's config the values that it was loaded with: Trainer switches off `use_cache`, for one."""
        config = self.model.config
        in_training = {key: getattr(config, key, None) for key in self._config_as_loaded}
        _set_all(config, self._config_as_loaded)
        try:
            yield
        finally:
            _set_all(config, in_training)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A checkpoint of LoRA holds the adapters alone, and Trainer looks for them in its own wrapper only."""
        # Without, adapters are not loaded, and a damaged file ends in a traceback and exit code 1.
        with read_with_care(Path(resume_from_checkpoint)):
            if self.plan.adapter is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_adapters(self.model, load_file(Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME))

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint, audit and deltas too: they speak of the model that is saved."""
        # Called after the last step and before `on_train_end`, in which the audit concludes. Without, it would judge
        # the best model by what the last steps did, and find fault with parameters that went back to the base.
        best = self.state.best_model_checkpoint
        if self.plan.adapter is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        self.audit.go_back_to(TrainerState.load_from_json(str(Path(best) / TRAINER_STATE_NAME)))
        self.deltas.report_again(self.args, self.state)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """With `save_strategy: best` this decides what is saved; a signal wants a checkpoint in any case."""
        # Without, Trainer takes back the `should_save` that the signal has set, and the run ends unsaved.
        return super()._determine_best_metric(metrics, trial) or self.stop.agreed

    # Without these two, a damaged optimizer.pt, scheduler.pt or rng_state.pth ends in a traceback and exit code 1.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is saved, everything goes aside. Without, Trainer writes in place, and a kill leaves a
        # half checkpoint of the highest number.
        return self._saving_in or super()._get_output_dir(trial)

    def read_back(self, folder: Path, digests: Mapping[str, str], buffers: Mapping[str, str]) -> list[SavedDifference]:
        """The tensors of a folder that was just saved which have other digests; the same on every process."""
        with self.reading_back, self.config_as_loaded():
            return decided_by_main(lambda: saved_differences(folder, self.model, digests, buffers, self.plan))

    def _save_checkpoint(self, model, trial) -> None:
        """Audit, write aside, rename: what stands under `checkpoint-N` is complete and frozen where it must be."""
        # Without, a checkpoint may be half written, may hold a frozen parameter that changed, and Trainer's rotation
        # may delete the last whole one.
        self.audit.check_frozen(self.args, self.state, self.model)
        run = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_aside(run)
        self.accelerator.wait_for_everyone()
        self._saving_in = str(run / ASIDE)
        try:
            done_together(lambda: self._write_checkpoint(name, model, trial))
            self.accelerator.wait_for_everyone()
            found = self.read_back(run / ASIDE / name, *self.audit.known_digests(self.state))
            if found:
                self.audit.conclude_saved(self.args, self.state, found)
            best = run / f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
            self.state.best_model_checkpoint = str(best) if best and (best.is_dir() or best.name == name) else None
            done_together(lambda: self._finish_checkpoint(name))
        except Exception:
            if self.args.should_save:
                clear_aside(run)  # of which this process may have written a part while another one failed
            raise
        finally:
            self._saving_in = None
        if self.args.should_save:
            rotate_checkpoints(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, name: str, model: nn.Module, trial) -> None:
        with disk_errors(name, Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _finish_checkpoint(self, name: str) -> None:
        if self.args.should_save:
            run = Path(self.args.output_dir)
            with disk_errors(name, run):
                write_state(run / ASIDE / name / TRAINER_STATE_NAME, self.state)
                write_origin(run / ASIDE / name, self.origin)
                finish_checkpoint(run / ASIDE / name, run / name)


def _set_all(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, value)


def _for_phases(args: TrainingArguments, plan: FreezePlan) -> TrainingArguments:
    """Trainer's arguments, for a plan of several phases a copy that lets DDP find parameters without a gradient.

    What later phases train has none yet, and DDP would wait for it. Trainer's own choice is not to look for them where
    activations are recomputed.
    """
    if len(plan.phases) > 1:
        args = copy.copy(args)
        args.ddp_find_unused_parameters = True
    return args


def _fast_paths(
    model: PreTrainedModel,
    args: TrainingArguments,
    enabled: Collection[str],
    prefix: Sequence[PrefixPhase],
    train: Dataset,
    evaluated: Dataset | None,
) -> FastPaths:
    """The fast paths of a run; `evaluated` are the windows that it evaluates on, None where it does not."""
    if shards_parameters(args):  # the other paths hold whole weights
        enabled = {"gelu"} & set(enabled)
    dtype = compute_dtype(args)
    return FastPaths(
        model,
        enabled,
        prefix or [PrefixPhase(0, 0, 0, "off")],
        [train] if evaluated is None else [train, evaluated],
        args.per_device_eval_batch_size,
        None if dtype == torch.float32 else dtype,
    )
