"""The Hugging Face Trainer of this package: phases, whole checkpoints, a loss that must stay finite, the decay rule."""

import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import IntervalStrategy, PretrainedConfig, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.cost.flops import FORMULAS
from partialtune.distributed import decided_by_main, done_together, shards_parameters
from partialtune.errors import RecipeError, TrainingDiverged
from partialtune.fast.fast_paths import FastPaths
from partialtune.fast.prefix_choice import PrefixPhase
from partialtune.freeze.lora import load_adapters, save_adapters
from partialtune.freeze.plan import FreezePlan
from partialtune.metrics import best_model_metric, value_of_loss
from partialtune.model.conformance import Conformance, next_token_loss
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.audit_result import SavedDifference
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.proof.saved_files import saved_differences
from partialtune.proof.snapshot import Stopwatch
from partialtune.training.batches import numbered
from partialtune.training.checkpoints import (
    ASIDE,
    clear_aside,
    disk_errors,
    finish_checkpoint,
    read_with_care,
    rotate_checkpoints,
    with_ties,
)
from partialtune.training.divergence import BatchWatch
from partialtune.training.optimizer_state import key_by_name
from partialtune.training.origin import write_origin
from partialtune.training.performance import StepTimer
from partialtune.training.phases import PhaseCallback, split_by_phase
from partialtune.training.progress import FirstStepRecord, TrainingProgress
from partialtune.training.stopping import StopOnSignal

logger = logging.getLogger(__name__)


class PartialTrainer(Trainer):
    """Trainer that carries out a plan, phase by phase, measures one step's arithmetic, stops at a non-finite loss and
    never leaves half a checkpoint.

    Args:
        plan: The plan that was applied to the model.
        delta_steps: Steps between two reports of the weight deltas.
        stop_on_violation: Whether a violation of the freeze audit ends the run.
        decay_everything: Weight decay on norms and biases too, as plain `AdamW(model.parameters())` does.
        fast_paths: Of `loss`, `gelu`, `casts`.
        prefix: What each phase does with its frozen prefix.
        tokens_per_byte: Of the held-out text, for `metric_for_best_model: bits_per_byte`.
        origin: What the run began with, kept in each checkpoint (see `origin.origin_of`).
        conformance: Whether the model's own loss is used, and what its saved config says where the run changed it.
        Others: As for `transformers.Trainer`.

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
        origin: Mapping[str, Any] | None = None,
        conformance: Conformance | None = None,
        tokens_per_byte: float | None = None,
        **kwargs,
    ) -> None:
        self.audit = FreezeAuditCallback(plan, stop_on_violation=stop_on_violation)
        self.deltas = WeightDeltaCallback(plan, delta_steps=delta_steps)
        self.timer, self.stop = StepTimer(), StopOnSignal()
        self.audit.interrupted = lambda: self.stop.asked_to_stop(self.args)
        self.plan = plan
        self.decay_everything = decay_everything
        self.origin = origin or {}
        self.tokens_per_byte = tokens_per_byte
        self.batch = BatchWatch(kwargs.get("train_dataset"))
        self.flops_per_step: int | None = None
        self.reading_back = Stopwatch()
        self._saving_in: str | None = None
        if len(plan.phases) > 1:  # what later phases train has no gradient yet; Trainer says no under checkpointing
            kwargs["args"].ddp_find_unused_parameters = True
        conformance = conformance or Conformance()
        if conformance.loss_fault:
            kwargs["compute_loss_func"] = next_token_loss
            fast_paths = set(fast_paths) - {"loss"}  # which stands in for a loss that the model takes itself
        self.fast = self._fast_paths(fast_paths, prefix or [PrefixPhase(0, 0, 0, "off")], kwargs)
        callbacks = [PhaseCallback(plan, self.fast), self.timer, self.deltas, self.audit, self.stop, FirstStepRecord()]
        use_cache = getattr(kwargs["model"].config, "use_cache", None)
        self._config_as_loaded = {**conformance.config_as_loaded, "use_cache": use_cache}
        super().__init__(callbacks=callbacks, **kwargs)
        if conformance.loss_fault:
            self.model_accepts_loss_kwargs = False  # its forward pass takes no loss: the number of targets is ours
        if self.is_fsdp_enabled and len(plan.phases) > 1:
            raise RecipeError("schedule: FSDP shards what trains before the first step. Launch without it (DDP).")
        for printer in (PrinterCallback, ProgressCallback):  # they print every log entry as a line
            self.remove_callback(printer)
        if not self.args.disable_tqdm:
            self.add_callback(TrainingProgress())
        self.deltas.attach(self)

    @staticmethod
    def _fast_paths(enabled: Collection[str], prefix: Sequence[PrefixPhase], settings: dict[str, Any]) -> FastPaths:
        """The fast paths; where a prefix is kept, the data sets in `settings` get the numbers of their windows."""
        args, train, held_out = settings["args"], settings["train_dataset"], settings.get("eval_dataset")
        if shards_parameters(args):  # the other paths hold whole weights
            enabled = {"gelu"} & set(enabled)
        evaluates = held_out is not None and args.eval_strategy != IntervalStrategy.NO
        fast = FastPaths(
            settings["model"],
            enabled,
            prefix,
            [train, held_out] if evaluates else [train],
            args.per_device_eval_batch_size,
            torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )
        if fast.keeps_prefix:
            settings["train_dataset"] = numbered(train, 0)
            settings["eval_dataset"] = numbered(held_out, len(train)) if evaluates else held_out
        return fast

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
            split_by_phase(optimizer, self.model, self.plan)
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
        if self.state.global_step >= self.state.max_steps:  # Trainer would do one step more than asked for
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
            file = Path(self.args.output_dir) / TRAINER_STATE_NAME
            aside = file.with_name(f".{file.name}.part")
            try:
                self.state.save_to_json(str(aside))
                os.replace(aside, file)
            finally:
                aside.unlink(missing_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as the model was loaded, each tied tensor once, and without the pickle; of LoRA the adapters alone."""
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
        """Give the model's config what it said where a run changes it: Trainer switches off `use_cache`, for one."""
        config = self.model.config
        in_training = {key: getattr(config, key, None) for key in self._config_as_loaded}
        _set_all(config, self._config_as_loaded)
        try:
            yield
        finally:
            _set_all(config, in_training)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A checkpoint of LoRA holds the adapters alone, and Trainer looks for them in its own wrapper only."""
        with read_with_care(Path(resume_from_checkpoint)):
            if self.plan.adapter is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_adapters(self.model, load_file(Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME))

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint, audit and deltas too: they speak of the model that is saved."""
        best = self.state.best_model_checkpoint
        if self.plan.adapter is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        self.audit.go_back_to(TrainerState.load_from_json(str(Path(best) / TRAINER_STATE_NAME)))
        self.deltas.report_again(self.args, self.state)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """With `save_strategy: best` this decides what is saved; a signal wants a checkpoint in any case."""
        return super()._determine_best_metric(metrics, trial) or self.stop.agreed

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def read_back(self, folder: Path, digests: Mapping[str, str], buffers: Mapping[str, str]) -> list[SavedDifference]:
        """What a folder that was just saved holds otherwise than these digests say; the same on every process."""
        with self.reading_back, self.config_as_loaded():
            return decided_by_main(lambda: saved_differences(folder, self.model, digests, buffers, self.plan))

    def _save_checkpoint(self, model, trial) -> None:
        """Audit, write aside, rename: what stands under `checkpoint-N` is complete and frozen where it must be."""
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
                self.state.save_to_json(str(run / ASIDE / name / TRAINER_STATE_NAME))
                write_origin(run / ASIDE / name, self.origin)
                finish_checkpoint(run / ASIDE / name, run / name)


def _set_all(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, value)
