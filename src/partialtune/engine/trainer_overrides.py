"""What an attached Trainer does otherwise than its own class: all overrides of transformers' methods, in one place.

`attach` makes `trainer.__class__` a subclass of what it was, with `TunedTrainer` before it, as torch's `fully_shard`
does with modules: methods of a Trainer that is made already can be overridden in no other way that keeps `super()`.
All that callbacks can do is done by callbacks. tests/test_trainer_overrides.py notices where transformers has changed
what is overridden here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from partialtune.delta_checkpoint import write_delta_of_state
from partialtune.distributed import decided_by_main, done_together, from_main, is_main, several_nodes
from partialtune.engine.checkpoint_files import (
    ASIDE,
    Entries,
    best_checkpoint,
    clear_aside,
    disk_errors,
    finish_checkpoint,
    load_weights,
    read_with_care,
    rotate_checkpoints,
    say_without_optimizer,
    with_ties,
    write_state,
)
from partialtune.engine.checkpoint_transfer import (
    gather_random_states,
    on_each_node,
    random_file,
    remove_if_empty,
    same_checkpoint,
)
from partialtune.engine.gradient_reduction import leave_out_resting
from partialtune.engine.other_engine import check_step_is_kept, load_gathered_optimizer, seed_missing_ranks
from partialtune.engine.phases import PhaseCallback
from partialtune.engine.plan_optimizer import key_by_name, suit_optimizer
from partialtune.engine.row_digests import digesting
from partialtune.engine.shard_model import put_back, shards_in
from partialtune.engine.sharded_saves import (
    as_it_was_saved,
    holds_fsdp_files,
    is_loaded_here,
    load_beside_base,
    put_optimizer_together,
    save_sharded_model,
    saves_shards,
    shards_by_process,
)
from partialtune.engine.sharding import load_states, write_states
from partialtune.engine.tuning import Tuning
from partialtune.freeze.lora import save_adapters
from partialtune.model.held_narrow import unrounded
from partialtune.model.parameters import uncompiled
from partialtune.model.saving import saved_in_pieces
from partialtune.model.sharded_files import failures_unwrapped

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
    `_save_checkpoint`, `_save_optimizer_and_scheduler`, `_save_rng_state`.

    Attributes:
        tuning: The plan that is carried out.
        changes: What was asked for beside it.
    """

    tuning: Tuning
    changes: TrainerChanges
    _saving_in: str | None = None
    _in_checkpoint: bool = False
    _state_by_name: Sequence[RemovableHandle] = ()
    _held_shards: Sequence[Sequence[nn.Parameter]] = ()
    _is_predicting: bool = False
    _logits_wanted: bool = False
    _sends_states: bool = False
    _random_state: bytes = b""
    _pass_has_begun: Callable[[], None] = staticmethod(lambda: None)

    # ---- training ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Every process goes on from the main process's checkpoint, which nodes that do not share its disk are sent."""
        # Without, a process that finds no checkpoint, or another one, would train from other weights, silently.
        self._sends_states = not self.args.save_on_each_node and several_nodes()
        own_files = self.args.save_on_each_node  # then each node goes on from files of its own, as it was asked to
        try:
            with self.tuning.fast, same_checkpoint(resume_from_checkpoint, self.args.output_dir, own_files) as folder:
                output = super().train(check_step_is_kept(self, folder), *args, **kwargs)
                self.tuning.audit_callback.check_again(self)
                return output
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, PhaseCallback):  # broken off, as by Ctrl-C, it was not told of the end
                    callback.end()
            for handle in self._state_by_name:  # the optimizer may be a user's own
                handle.remove()
            self._state_by_name = []
            self.tuning.end()

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        made = super().create_optimizer(*args, **kwargs)  # or a user's own, or that of a training before
        optimizer = self.optimizer if made is None else made
        suit_optimizer(optimizer, self.model, self.tuning.plan)
        self._held_shards = shards_in(optimizer)
        # Under FSDP accelerate is about to put shards in the place of the parameters, group by group. Their state has
        # names already, or gets them when it is saved.
        if not self.is_fsdp_enabled and not self._state_by_name:
            self._state_by_name = key_by_name(optimizer, self.model)
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        # Called when accelerate has prepared model and optimizer, before anything looks for the latter's parameters.
        put_back(self.optimizer, self._held_shards)
        return super().create_scheduler(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Beside `learning_rate`, which is that of the optimizer's first group, the rates of the plan's parts."""
        super().log({**logs, **self.tuning.rates} if "learning_rate" in logs else logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        if self.changes.decay_everything:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def _get_train_sampler(self, *args, **kwargs):
        # Without, windows come in Trainer's own order, and a step holds any number of replayed ones.
        if self.changes.train_order is not None:
            return self.changes.train_order
        return super()._get_train_sampler(*args, **kwargs)

    def num_examples(self, dataloader: Any) -> int:
        """Those of an epoch: an order may leave some of the data set out, and have others twice."""
        if self.changes.train_order is not None and getattr(dataloader, "dataset", None) is self.train_dataset:
            return len(self.changes.train_order)
        return super().num_examples(dataloader)

    @contextmanager
    def _rows_come_with(self, loader: Any) -> Iterator[None]:
        """Around a pass over a loader: its batches bring their rows, unless a user's method may change them."""
        seen = self._has_own("get_batch_samples", "evaluation_loop") or "training_step" in vars(self)
        with digesting(loader if self.tuning.fast.keeps_prefix and not seen else None) as self._pass_has_begun:
            yield

    def _has_own(self, *names: str) -> bool:
        kinds = [kind for kind in type(self).__mro__[2:] if not kind.__module__.startswith("transformers.")]
        return any(name in vars(kind) for kind in kinds for name in names)

    def get_batch_samples(self, *args, **kwargs):
        samples = super().get_batch_samples(*args, **kwargs)
        self._pass_has_begun()
        return samples

    def training_step(self, model, inputs, *args, **kwargs):
        leave_out_resting(model, self.tuning.plan)  # here the model comes as it was wrapped, before its first backward
        # Here, since a class of the user's may change the batch in it: what was digested is the batch as it came.
        with self.tuning.fast.rows_known(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # A prediction always asks for outputs, and one of the user's own may look at them. Others ask for them to look.
        outputs = kwargs.get("return_outputs", args[0] if args and isinstance(args[0], bool) else False)
        wanted = self._logits_wanted or self._has_own("prediction_step") if self._is_predicting else bool(outputs)
        own = self.compute_loss_func or self.label_smoother  # may be set since `attach`
        with self.tuning.fast.batch(inputs, wanted or own is not None, wanted):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, *args, **kwargs):
        self._pass_has_begun()
        self._is_predicting, self._logits_wanted = True, not prediction_loss_only  # by compute_metrics
        try:
            with self.tuning.fast.rows_known(inputs), unrounded():  # what is scored is what is saved
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
        with self._rows_come_with(kwargs["train_dataloader"]):
            super()._run_epoch(**kwargs)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        with self._rows_come_with(dataloader):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    # ---- what is saved ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Where one process cannot write, all end here: Trainer would let them wait for it at its next barrier."""
        what = f"checkpoint-{self.state.global_step}" if self._saving_in else "The model"

        def save() -> None:
            with disk_errors(what, Path(self.args.output_dir)):
                super(TunedTrainer, self).save_model(output_dir, _internal_call)

        if not self.is_fsdp_enabled:
            done_together(save)
            return
        # Trainer's own way gathers the whole model in one process (FULL_STATE_DICT), or saves nothing (SHARDED).
        save_sharded_model(self, self.tuning, Path(output_dir or self.args.output_dir), what, self._in_checkpoint)
        if self.args.push_to_hub and not _internal_call:  # as Trainer's own
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        """The log, as a whole or not at all."""
        if self.is_world_process_zero():
            write_state(Path(self.args.output_dir) / TRAINER_STATE_NAME, self.state)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as the model was loaded, each tied tensor once, and without the pickle; of LoRA the adapters alone.

        Adapters beside trained parts of the base are saved as a delta, and so is what trains beside quantised matrices:
        the base itself is in neither.
        """
        # All of Trainer's ways to save end here. Without, the saved config has `use_cache: false`, FSDP saves a tied
        # head twice, LoRA the whole model, and `training_args.bin` is a pickle that nobody should have to open.
        folder, plan = Path(output_dir or self.args.output_dir), self.tuning.plan
        if not plan.leaves_base_out:
            with self.tuning.as_loaded(), saved_in_pieces(uncompiled(self.model)):
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
        self.tuning.audit_callback.check_frozen(self.args, self.state, self.model)
        self._in_checkpoint = True
        try:
            if self.changes.whole_checkpoints:
                self._save_whole_checkpoint(model, trial)
                return
            with failures_unwrapped():
                super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False
        saved = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        self._gather_random_states(saved)
        if self._sends_states:  # else it is None where the best one is not on this node's disk
            self.state.best_model_checkpoint = from_main(self.state.best_model_checkpoint)
            remove_if_empty(saved, Path(self.args.output_dir))

    def _save_whole_checkpoint(self, model, trial) -> None:
        audit = self.tuning.audit_callback
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_aside(run)
        self.accelerator.wait_for_everyone()
        self._saving_in = str(run / ASIDE)
        try:
            done_together(lambda: self._write_checkpoint(name, model, trial))
            self._gather_random_states(run / ASIDE / name)
            self.accelerator.wait_for_everyone()
            shards = shards_by_process(run / ASIDE / name) if saves_shards(self) else {}
            found = self.tuning.read_back(run / ASIDE / name, *audit.known_digests(self.state))
            if found:
                audit.conclude_saved(self.args, self.state, found)
            self.state.best_model_checkpoint = decided_by_main(lambda: best_checkpoint(run, name, self.state))
            done_together(lambda: self._finish_checkpoint(name, shards))
        except Exception:
            if self.args.should_save:
                clear_aside(run)  # of which this process may have written a part while another one failed
            raise
        finally:
            self._saving_in = None
        if self.args.should_save:
            rotate_checkpoints(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self._sends_states:
            remove_if_empty(run / ASIDE / name, run)

    def _save_rng_state(self, output_dir: str) -> None:
        """The main process's as ever; on several nodes the others hand theirs to it, see `_gather_random_states`."""
        # Without, each lies on the disk of its own node, and the checkpoint is whole nowhere.
        if not self._sends_states or is_main():
            super()._save_rng_state(output_dir)
            return
        with TemporaryDirectory() as own:
            super()._save_rng_state(own)
            self._random_state = (Path(own) / random_file(self.args.process_index)).read_bytes()

    def _gather_random_states(self, checkpoint: Path) -> None:
        if self._sends_states:
            gather_random_states(self._random_state, checkpoint, Path(self.args.output_dir))

    def _write_checkpoint(self, name: str, model: nn.Module, trial) -> None:
        with disk_errors(name, Path(self.args.output_dir)), failures_unwrapped():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Under FSDP accelerate cannot load groups of the optimizer that are empty, nor state that is out of it.
        write_states(output_dir, self, self.tuning.plan, super()._save_optimizer_and_scheduler)

    def _finish_checkpoint(self, name: str, shards: Entries) -> None:
        if self.args.should_save:
            run = Path(self.args.output_dir)
            with disk_errors(name, run):
                write_state(run / ASIDE / name / TRAINER_STATE_NAME, self.state)
                self.changes.write_beside(run / ASIDE / name)
                finish_checkpoint(run / ASIDE / name, run / name, shards)

    # ---- what is loaded again ---------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A checkpoint of LoRA holds the adapters, and a delta of what trained beside them, and not the base.

        Trainer looks for adapters in its own wrapper only, and knows no deltas.
        """
        # Without, adapters are not loaded, nor weights under the names of their origin (experts, vision-language
        # models); a second model's memory is taken, and a damaged file ends in a traceback and exit code 1.
        with read_with_care(Path(resume_from_checkpoint)), as_it_was_saved(self, Path(resume_from_checkpoint)):
            if self.is_fsdp_enabled and holds_fsdp_files(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # base, adapters and all
                return
            if not self.tuning.plan.leaves_base_out and is_loaded_here(self, resume_from_checkpoint):
                load_weights(Path(resume_from_checkpoint), self.model)
                return
            if not self.tuning.plan.leaves_base_out:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            load_beside_base(self, self.tuning.plan, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Go back to the best checkpoint, audit and deltas too: they speak of the model that is saved."""
        # Called after the last step and before `on_train_end`, in which the audit concludes. Without, it would judge
        # the best model by what the last steps did, and find fault with parameters that went back to the base.
        chosen = self.state.best_model_checkpoint
        with on_each_node(Path(chosen), Path(self.args.output_dir), self.args.save_on_each_node) as folder:
            self.state.best_model_checkpoint = best = str(folder)  # by which Trainer's own way finds it
            if not (self.is_fsdp_enabled or self.tuning.plan.leaves_base_out or is_loaded_here(self, best)):
                super()._load_best_model()
            else:
                self._load_from_checkpoint(best)
            self.tuning.audit_callback.end_with(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
        self.state.best_model_checkpoint = chosen
        self.tuning.delta_callback.report_again(self.args, self.state)

    # Without these two, a damaged optimizer.pt, scheduler.pt or rng_state.pth ends in a traceback and exit code 1.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Trainer has forgotten the best checkpoint where it is not on this node's disk: some would load it at the end.
        self.state.best_model_checkpoint = from_main(self.state.best_model_checkpoint)
        folder = Path(checkpoint or ".")
        say_without_optimizer(checkpoint)
        with read_with_care(folder), as_it_was_saved(self, folder):
            if checkpoint is not None and (
                put_optimizer_together(self, folder) or load_gathered_optimizer(self, folder)
            ):
                return
            load_states(checkpoint, self, self.tuning.plan, super()._load_optimizer_and_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with read_with_care(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            seed_missing_ranks(self, Path(checkpoint))


def override(trainer: Trainer, tuning: Tuning, changes: TrainerChanges) -> None:
    """Let a Trainer carry a plan out: from now on it is a `TunedTrainer` of its own class."""
    own = type(trainer)
    # The name stays: trainers write theirs into model cards and run names.
    members: Mapping[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__}
    trainer.__class__ = type(own.__name__, (TunedTrainer, own), dict(members))
    trainer.tuning, trainer.changes = tuning, changes
