"""What an attached Trainer does otherwise than its own class: all overrides of transformers' methods, in one place.

`attach` makes `trainer.__class__` a subclass of what it was, with `TunedTrainer` before it, as torch's `fully_shard`
does with modules: methods of a Trainer that is made already can be overridden in no other way that keeps `super()`.
All that callbacks can do is done by callbacks. tests/test_trainer_overrides.py notices where transformers has changed
what is overridden here.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.delta_checkpoint import put_stored, read_delta, write_delta_of_state
from partialtune.distributed import done_together
from partialtune.engine.checkpoint_files import (
    ASIDE,
    clear_aside,
    disk_errors,
    finish_checkpoint,
    has_other_names,
    load_by_files_names,
    read_with_care,
    rotate_checkpoints,
    with_ties,
    write_state,
)
from partialtune.engine.phases import PhaseCallback
from partialtune.engine.plan_optimizer import key_by_name, suit_optimizer
from partialtune.engine.row_digests import DigestingCollator
from partialtune.engine.tuning import Tuning
from partialtune.freeze.lora import load_adapters, save_adapters

logger = logging.getLogger(__name__)

# The mixin's bases are known only once there is a Trainer; type checkers see the one that they all have.
Base: Any = Trainer if TYPE_CHECKING else object


@dataclass
class TrainerChanges:
    """What `attach` was asked for beside the plan.

    Attributes:
        decay_everything: Weight decay on norms and biases too, as plain `AdamW(model.parameters())` does.
        whole_checkpoints: Whether checkpoints are written aside, read back, and renamed when they are complete.
        write_beside: Writes further files into a checkpoint, before it counts as complete.
        save_now: Whether a checkpoint is wanted at this step, whatever the best metric says.
        train_order: A sampler of the training set with `set_epoch`, None for the Trainer's own.
    """

    decay_everything: bool = False
    whole_checkpoints: bool = False
    write_beside: Callable[[Path], None] = lambda folder: None
    save_now: Callable[[], bool] = lambda: False
    train_order: Any = None


class TunedTrainer(Base):
    """Carries a plan out in a Trainer of any class.

    These private methods of transformers' Trainer are overridden, here and nowhere else; each gives the reason, and
    what breaks without: `_determine_best_metric`, `_get_output_dir`, `_get_train_sampler`, `_load_best_model`,
    `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_rng_state`, `_run_epoch`, `_save`,
    `_save_checkpoint`.

    Attributes:
        tuning: The plan that is carried out.
        changes: What was asked for beside it.
    """

    tuning: Tuning
    changes: TrainerChanges
    _saving_in: str | None = None
    _state_by_name: Sequence[RemovableHandle] = ()
    _is_predicting: bool = False
    _logits_wanted: bool = False

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        try:
            with self.tuning.fast:
                return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, PhaseCallback):  # broken off, as by Ctrl-C, it was not told of the end
                    callback.end()
            for handle in self._state_by_name:  # the optimizer may be a user's own
                handle.remove()
            self._state_by_name = []
            self.tuning.end()

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)  # or a user's own, or that of a training before
        if not self.is_fsdp_enabled:  # sharded state is keyed by name already
            suit_optimizer(optimizer, self.model, self.tuning.plan)
            if not self._state_by_name:
                self._state_by_name = key_by_name(optimizer, self.model)
        return optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Beside `learning_rate`, which is that of the optimizer's first group, the rates of the plan's parts."""
        super().log({**logs, **self.tuning.rates} if "learning_rate" in logs else logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        if self.changes.decay_everything:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def get_train_dataloader(self) -> DataLoader:
        return self._digesting(super().get_train_dataloader())

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        return self._digesting(super().get_eval_dataloader(*args, **kwargs))

    def _get_train_sampler(self, *args, **kwargs):
        # Without, windows come in Trainer's own order, and a step holds any number of replayed ones.
        if self.changes.train_order is not None:
            return self.changes.train_order
        return super()._get_train_sampler(*args, **kwargs)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Those of an epoch: an order may leave some of the data set out, and have others twice."""
        if self.changes.train_order is not None and getattr(dataloader, "dataset", None) is self.train_dataset:
            return len(self.changes.train_order)
        return super().num_examples(dataloader)

    def _digesting(self, loader: Any) -> Any:
        """Let a loader digest its rows, where states of them are kept. The Trainer's own collator stays as it is."""
        # Where one process reads for all, accelerate cuts batches up, and knows no way to cut anything but tensors.
        known = isinstance(loader, DataLoader) and not isinstance(loader, DataLoaderDispatcher)
        if self.tuning.fast.keeps_prefix and known:
            # accelerate's loader reads from one that it holds, whose collator it is that counts
            inner = getattr(loader, "base_dataloader", loader)
            if not isinstance(inner.collate_fn, DigestingCollator):
                inner.collate_fn = DigestingCollator(inner.collate_fn)
        return loader

    def training_step(self, model, inputs, *args, **kwargs):
        # Here, since a class of the user's may change the batch in it: what was digested is the batch as it came.
        with self.tuning.fast.rows_known(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # A prediction always asks for outputs, and looks at logits or not. Others ask for them to look.
        outputs = kwargs.get("return_outputs", args[0] if args and isinstance(args[0], bool) else False)
        wanted = self._logits_wanted if self._is_predicting else bool(outputs)
        with self.tuning.fast.batch(inputs, wanted, wanted):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        self._is_predicting, self._logits_wanted = True, not prediction_loss_only  # by compute_metrics
        try:
            with self.tuning.fast.rows_known(inputs):
                return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._is_predicting = self._logits_wanted = False

    def _run_epoch(self, **kwargs) -> None:
        # Trainer asks only after a step whether it was the last: without, a run that goes on from a checkpoint of its
        # last step would take one step more than asked for. So does one that early stopping has ended there.
        stopped = self.state.global_step > 0 and self.control.should_training_stop
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.changes.train_order is not None:
            # Here, since accelerate does not reach the sampler of a resumed epoch on several processes: without, its
            # order would be that of the first epoch.
            self.changes.train_order.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    # ---- what is saved ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Where one process cannot write, all end here: Trainer would let them wait for it at its next barrier."""
        what = f"checkpoint-{self.state.global_step}" if self._saving_in else "The model"

        def save() -> None:
            with disk_errors(what, Path(self.args.output_dir)):
                super(TunedTrainer, self).save_model(output_dir, _internal_call)

        done_together(save)

    def save_state(self) -> None:
        """The log, as a whole or not at all."""
        if self.is_world_process_zero():
            write_state(Path(self.args.output_dir) / TRAINER_STATE_NAME, self.state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as the model was loaded, each tied tensor once, and without the pickle; of LoRA the adapters alone.

        Adapters beside trained parts of the base are saved as a delta: the base itself is in neither.
        """
        # All of Trainer's ways to save end here. Without, the saved config has `use_cache: false`, FSDP saves a tied
        # head twice, LoRA the whole model, and `training_args.bin` is a pickle that nobody should have to open.
        folder, plan = Path(output_dir or self.args.output_dir), self.tuning.plan
        if plan.adapter is None:
            with self.tuning.as_loaded():
                super()._save(output_dir, state_dict and with_ties(state_dict, self.model))
        elif self.args.should_save and plan.parts:
            with self.tuning.as_loaded():
                write_delta_of_state(folder, self.model, plan, self.tuning.audit_callback.digests_before, state_dict)
        elif self.args.should_save:
            save_adapters(self.model, folder, state_dict)
        if self.args.should_save and self.changes.whole_checkpoints:
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """With `save_strategy: best` this decides what is saved; a signal wants a checkpoint in any case."""
        # Without, Trainer takes back the `should_save` that the signal has set, and the run ends unsaved.
        return super()._determine_best_metric(metrics, trial) or self.changes.save_now()

    def _get_output_dir(self, trial) -> str:
        # While a checkpoint is saved, everything goes aside. Without, Trainer writes in place, and a kill leaves a
        # half checkpoint of the highest number.
        return self._saving_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Audit, write aside, rename: what stands under `checkpoint-N` is complete and frozen where it must be."""
        # Without, a checkpoint may hold a frozen parameter that changed, may be half written, and Trainer's rotation
        # may delete the last whole one.
        audit = self.tuning.audit_callback
        audit.check_frozen(self.args, self.state, self.model)
        if not self.changes.whole_checkpoints:
            super()._save_checkpoint(model, trial)
            return
        run = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_aside(run)
        self.accelerator.wait_for_everyone()
        self._saving_in = str(run / ASIDE)
        try:
            done_together(lambda: self._write_checkpoint(name, model, trial))
            self.accelerator.wait_for_everyone()
            found = self.tuning.read_back(run / ASIDE / name, *audit.known_digests(self.state))
            if found:
                audit.conclude_saved(self.args, self.state, found)
            self.state.best_model_checkpoint = self._best_checkpoint(run, name)
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

    def _best_checkpoint(self, run: Path, present: str) -> str | None:
        """That of the best evaluation, if it is there or `present`, which is being written; it may lie in the folder
        of a run that this one goes on from."""
        if not self.state.best_global_step:
            return None
        best = run / f"checkpoint-{self.state.best_global_step}"
        earlier = Path(self.state.best_model_checkpoint or best)
        if best.is_dir() or best.name == present:
            return str(best)
        return str(earlier) if earlier.name == best.name and earlier.is_dir() else None

    def _write_checkpoint(self, name: str, model: nn.Module, trial) -> None:
        with disk_errors(name, Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _finish_checkpoint(self, name: str) -> None:
        if self.args.should_save:
            run = Path(self.args.output_dir)
            with disk_errors(name, run):
                write_state(run / ASIDE / name / TRAINER_STATE_NAME, self.state)
                self.changes.write_beside(run / ASIDE / name)
                finish_checkpoint(run / ASIDE / name, run / name)

    # ---- what is loaded again ---------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A checkpoint of LoRA holds the adapters, and a delta of what trained beside them, and not the base.

        Trainer looks for adapters in its own wrapper only, and knows no deltas.
        """
        # Without, adapters are not loaded, nor weights under the names of their origin (experts, vision-language
        # models), and a damaged file ends in a traceback and exit code 1.
        with read_with_care(Path(resume_from_checkpoint)):
            if self.tuning.plan.adapter is None and _is_by_other_names(self, resume_from_checkpoint):
                load_by_files_names(Path(resume_from_checkpoint), self.model)
                return
            if self.tuning.plan.adapter is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            folder = Path(resume_from_checkpoint)
            if self.tuning.plan.parts:
                put_stored(read_delta(folder, folder.name), self.model)
            load_adapters(self.model, load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME))

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint, audit and deltas too: they speak of the model that is saved."""
        # Called after the last step and before `on_train_end`, in which the audit concludes. Without, it would judge
        # the best model by what the last steps did, and find fault with parameters that went back to the base.
        best = self.state.best_model_checkpoint
        if self.tuning.plan.adapter is None and not _is_by_other_names(self, best):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        self.tuning.audit_callback.end_with(TrainerState.load_from_json(str(Path(best) / TRAINER_STATE_NAME)))
        self.tuning.delta_callback.report_again(self.args, self.state)

    # Without these two, a damaged optimizer.pt, scheduler.pt or rng_state.pth ends in a traceback and exit code 1.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)


def _is_by_other_names(trainer: Trainer, checkpoint: str | None) -> bool:
    """Whether Trainer would not find a checkpoint's weights by the model's names."""
    is_whole = isinstance(trainer.model, PreTrainedModel) and not trainer.is_fsdp_enabled
    return is_whole and checkpoint is not None and has_other_names(Path(checkpoint), trainer.model)


def override(trainer: Trainer, tuning: Tuning, changes: TrainerChanges) -> None:
    """Let a Trainer carry a plan out: from now on it is a `TunedTrainer` of its own class."""
    own = type(trainer)
    # The name stays: trainers write theirs into model cards and run names.
    members: Mapping[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__}
    trainer.__class__ = type(own.__name__, (TunedTrainer, own), dict(members))
    trainer.tuning, trainer.changes = tuning, changes
