"""A callback that proves, by sha256, that frozen parameters kept every bit, and that trainable ones could learn.

In the order of a run: a snapshot of the start; each phase's parameters looked up in the optimizer; each step watched
until what trains has moved; the frozen weights compared at every save, and everything at the end; then the verdict,
which is kept, written to `audit.json`, and raised where it is a violation. Where blocks learn in turn, those that rest
are compared too, at every draw, with what they came to rest with.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import ExportableState

from partialtune.distributed import from_all, from_main, is_main, raise_disk_error
from partialtune.errors import FreezeViolation
from partialtune.files import write_whole
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import Phase
from partialtune.model.digests import buffer_digests, digests_on_main
from partialtune.model.parameters import (
    Named,
    is_sharded,
    named_learners,
    named_weights,
    persistent_buffers,
    with_other_rows,
)
from partialtune.proof.audit_result import Audit, SavedDifference
from partialtune.proof.distances import together
from partialtune.proof.due_updates import DueUpdates
from partialtune.proof.resting import DrawsRecord, RestingParameters
from partialtune.proof.snapshot import SnapshotCallback, measure_deltas
from partialtune.proof.what_moved import rounded_away, unmoved

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"


class FreezeAuditCallback(SnapshotCallback, ExportableState):
    """Compares digests with those from before the first step, at every save and at the end, and writes `audit.json`.

    Frozen parameters, the frozen rows of a matrix of which others train, and persistent buffers have to keep every bit,
    trainable parameters have to be able to learn.
    Of several processes the main one digests; the others compare checksums of what they hold a replica of.

    Works in any `transformers.Trainer`: `Trainer(..., callbacks=[FreezeAuditCallback(plan)])`.

    Args:
        plan: The plan that was applied to the model.
        output_dir: Folder of the file, `args.output_dir` where absent; without both nothing is written.
        stop_on_violation: Whether a violation raises FreezeViolation, or is only logged and written.

    Attributes:
        result: The newest `Audit`, None before the first.
        missing_at_start: Names of what trains and is known to be missing from the optimizer: a violation from the
            start, though its phase begins later.
        interrupted: Whether a signal ends the run, asked when training ends. An interrupted run gets no verdict on
            what has not moved.
        ended: Whether training has come to its end: at its last step, or where a callback such as early stopping has
            ended it, and not a signal.
        digests_before: sha256 of every parameter at the start, and of frozen rows by their name in `plan.frozen_rows`.
        buffers_before, buffers_after: sha256 of every persistent buffer at the start, and at the end of training.
        digests_after: The same at the end of training.
        snapshot, seconds: As in `SnapshotCallback`.
    """

    def __init__(
        self, plan: FreezePlan, output_dir: str | os.PathLike | None = None, stop_on_violation: bool = True
    ) -> None:
        super().__init__(plan, output_dir)
        self.stop_on_violation = stop_on_violation
        self.interrupted: Callable[[], bool] = lambda: False
        self.ended = False
        self.missing_at_start: list[str] = []
        self.result: Audit | None = None
        self.digests_after: dict[str, str] = {}
        self.buffers_after: dict[str, str] = {}
        self._updates = DueUpdates()
        self._resting = RestingParameters(plan)
        self._draws = None if plan.sampling is None else DrawsRecord(plan.sampling)
        self._not_in_optimizer: list[str] = []
        self._phase: Phase | None = None
        self._checked_at: int | None = None
        self._weights_of: int | None = None  # the step of the checkpoint that was gone back to after the last step

    @property
    def digests_before(self) -> Mapping[str, str]:
        """sha256 of each parameter at the start, by its name; empty before training."""
        return self.snapshot.digests if self.snapshot else {}

    @property
    def buffers_before(self) -> Mapping[str, str]:
        """sha256 of each saved buffer at the start, by its name; empty before training."""
        return self.snapshot.buffers if self.snapshot else {}

    # ---- at the start, and where a phase begins ---------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.ended, self._weights_of = False, None
        if len(self.plan.phases) == 1:  # else a second training begins with what the first one's later phases trained
            self._checked_at = None
        if self.snapshot is None:  # added after the Trainer was made
            self.take_snapshot(args, state, model)
        if state.global_step:  # the run goes on from a checkpoint
            self.go_back_to(state)
        if self.plan.sampling is not None:
            with self._watch:
                self._resting.start(model, state.global_step, self.snapshot)
        self._record_draws(args, state, anew=True)
        self._begin_phase(args, state, model, optimizer)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.plan.phase_at(state.global_step) is not self._phase:
            if self.plan.sampling is None:
                self.check_frozen(args, state, model)  # a last time for what this phase begins to train
            else:
                self._check_draw(args, state, model)
            self._begin_phase(args, state, model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        self._record_draws(args, state)

    def _record_draws(self, args, state, anew: bool = False) -> str | None:
        folder = self.folder(args) if state.is_world_process_zero else None
        return None if self._draws is None else self._draws.reach(folder, state.global_step, anew)

    def _check_draw(self, args, state, model: nn.Module) -> None:
        """Compare what rested, and what is frozen, with what it came to rest with; then others come to rest.

        Raises:
            FreezeViolation: As `check_frozen`.
        """
        with self._watch:
            kept = set(self._kept(state))
            parts = [(name, part) for name, part in self._parts(model) if name in kept]
            changed = self._resting.changed(parts, kept, state.global_step, self.snapshot)
        if changed:
            self._audit_everything(args, state, model)
        with self._watch:
            self._resting.draw(model, state.global_step)

    def _begin_phase(self, args, state, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Look up what the present phase trains in the optimizer, and watch it until it has moved."""
        self._phase = self.plan.phase_at(state.global_step)
        trained = self._trained(model, optimizer)
        in_optimizer = {name: (parameter, group) for name, (parameter, group) in trained.items() if group is not None}
        # Replicas get the same updates on every process, so the main one watches for all; of shards each has its own.
        mine = {name: pair for name, pair in in_optimizer.items() if is_main() or is_sharded(pair[0])}
        self._updates.watch(mine, optimizer, self.snapshot.learner_sums(), self.plan.rows)
        self._not_in_optimizer = [name for name in trained if name not in in_optimizer]
        self._not_in_optimizer += [name for name in self.missing_at_start if name not in trained]
        audit = self._names_and_optimizer(model)
        if audit.not_in_optimizer or audit.other_names:
            self._conclude(args, state, audit)

    def _trained(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, Any]]:
        """What the present phase trains by name: the parameter, and the optimizer's group that holds it or None."""
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        trainable = set(self._phase.trainable)
        return {name: (p, group_of.get(id(p))) for name, p in named_learners(model) if name in trainable}

    # ---- what a checkpoint keeps of the audit -----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Which parameters have had a gradient, and have moved or were due to: Trainer saves it (`ExportableState`)."""
        resting = {} if self.plan.sampling is None else {"resting": self._resting.digests}
        return {"args": {}, "attributes": {**self._updates.state(), **resting}}

    def go_back_to(self, state) -> None:
        """Take over what a checkpoint keeps: one to go on from, or the best one, which is loaded at the end.

        Args:
            state: The checkpoint's `TrainerState`; one of a Trainer without this callback changes nothing.

        Raises:
            InputError: If what it keeps of this callback is damaged.
        """
        saved = dict(state.stateful_callbacks or {}).get(type(self).__name__)
        if saved:
            attributes = saved.get("attributes") if isinstance(saved, dict) else saved
            self._updates.go_back_to(attributes)
            if self.plan.sampling is not None:
                self._resting.go_back_to(attributes.get("resting", {}))

    def end_with(self, state) -> None:
        """Judge the weights of the best checkpoint, which was loaded after the last step.

        Args:
            state: Its `TrainerState`.
        """
        self.go_back_to(state)
        self._weights_of = state.global_step

    # ---- around each optimizer step ---------------------------------------------------------------------------------

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        scaler = getattr(optimizer, "scaler", None)  # of fp16; clipping has divided the gradients by its scale
        unclipped = scaler is not None and not getattr(args, "max_grad_norm", 1.0)
        self.before_step(scaler.get_scale() if unclipped else 1.0, model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after_step()

    def before_step(self, scale: float = 1.0, model: nn.Module | None = None) -> None:
        """Note what the optimizer's step needs; its gradients are final.

        Args:
            scale: What the gradients are still multiplied with, as under fp16 without clipping.
            model: Where blocks learn in turn: the model, whose weights are loaded by now.
        """
        with self._watch:
            self._resting.step_begins(model)
            self._updates.before_step(scale)

    def after_step(self) -> None:
        """Look at what has moved in the step."""
        with self._watch:
            self._updates.after_step()

    # ---- at every save ----------------------------------------------------------------------------------------------

    def on_save(self, args, state, control, model=None, **kwargs):
        self.check_frozen(args, state, model)

    def check_frozen(self, args, state, model: nn.Module) -> None:
        """Compare what no step so far was to change with the start, and conclude the audit if a bit changed.

        Raises:
            FreezeViolation: If one changed and `stop_on_violation` is set; `audit.json` is written before.
        """
        if self._checked_at == state.global_step:  # our Trainer checks before it saves, and `on_save` comes after
            return
        self._checked_at = state.global_step
        with self._watch:
            kept = self._kept(state)
            present = self._digests((name, parameter) for name, parameter in self._parts(model) if name in kept)
            faults = self._changed(model, kept, present) + self._changed_buffers(model)
            faults += self._names_and_optimizer(model).other_names
        if faults:
            self._audit_everything(args, state, model)

    def check_again(self, trainer: Any) -> None:
        """Compare once more after the verdict, where callbacks of others may have written weights since.

        Those that keep averages of the weights put them in when training ends, after the audit.

        Raises:
            FreezeViolation: As `check_frozen`.
        """
        ends = [getattr(one, "on_train_end", None) for one in trainer.callback_handler.callbacks]
        known = ("transformers.", "partialtune.")
        if any(not str(getattr(end, "__module__", "")).startswith(known) for end in ends):
            self._checked_at = None
            self.check_frozen(trainer.args, trainer.state, trainer.model)

    def known_digests(self, state) -> tuple[dict[str, str], dict[str, str]]:
        """sha256 by name of the parameters and buffers that have to be in a checkpoint as they were at the start.

        Those that have changed, in a run that a violation does not stop, are left out: the audit names them already.
        """
        result = self.result
        changed = {*result.changed, *(result.changed_at_rest or ()), *result.changed_buffers} if result else set()
        parameters = {
            name: self._resting.digest(name, self.digests_before) for name in self._kept(state) if name not in changed
        }
        return parameters, {name: sha256 for name, sha256 in self.buffers_before.items() if name not in changed}

    def conclude_saved(self, args, state, differences: list[SavedDifference]) -> None:
        """Add what the saved files hold otherwise than was audited to the verdict, and conclude it again.

        Args:
            differences: The same on every process, see `saved_files.saved_differences`.

        Raises:
            FreezeViolation: If there is a violation and `stop_on_violation` is set; `audit.json` is written before.
        """
        counts = len(self.plan.frozen), len(self.plan.trainable), len(self.buffers_before)
        audit = replace(self.result or Audit(*counts), saved=differences)  # no result yet: at a checkpoint
        if differences:
            self._conclude(args, state, audit)
        else:
            raise_disk_error(self._keep(args, state, audit))

    # ---- at the end -------------------------------------------------------------------------------------------------

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.ended = not self.interrupted()
        if optimizer is not None:  # a parameter that was put in another one's place during the run is not in it
            trained = self._trained(model, optimizer).items()
            self._not_in_optimizer = [name for name, (p, group) in trained if not (group or is_sharded(p))]
        self._audit_everything(args, state, model)

    def _audit_everything(self, args, state, model: nn.Module) -> None:
        with self._watch:
            self.digests_after = from_main(self._digests(self._parts(model)))
            audit = self._names_and_optimizer(model)
            changed = self._changed(model, self._kept(state), self.digests_after)
            frozen = {*self.plan.frozen, *self.plan.frozen_rows} | (set() if self.plan.sampling else set(changed))
            audit.changed = [name for name in changed if name in frozen]
            if self.plan.sampling is not None:
                audit.changed_at_rest = [name for name in changed if name not in frozen]
            self.buffers_after = from_main(buffer_digests(model))
            audit.changed_buffers = self._changed_buffers(model)
            audit.trainable_l2_delta = self._trainable_distance(model)
            self._updates.merge(from_all(self._updates.state()))
            unreached, interrupted = self._unreached(state), state.global_step if self.interrupted() else None
            digests, ends = (self.digests_before, self.digests_after), (state.global_step, self._weights_of)
            audit.stuck, audit.unmoved = unmoved(self.plan, *digests, self._updates, unreached, interrupted, *ends)
            if self.plan.rows:
                known = {*unreached, *audit.stuck, *audit.unmoved, *audit.not_in_optimizer}
                found = {} if interrupted is not None else self._updates.rows.without()
                audit.rows_without_gradient = {name: rows for name, rows in found.items() if name not in known}
            audit.below_precision = rounded_away(model, self.plan, self.snapshot, self._updates.had_gradient)
            audit = from_main(audit)  # copies and their distances are known there only
        self.log({"audit/passed": float(audit.passed)}, state)
        self._conclude(args, state, audit)

    # ---- what is compared -------------------------------------------------------------------------------------------

    def _names_and_optimizer(self, model: nn.Module) -> Audit:
        """An audit that holds the names that the model has lost or gained, and what the optimizer lacks; no digests."""
        missing, new = _missing_and_new((p.name for p in self.plan.parameters), named_weights(model))
        missing_buffers, new_buffers = _missing_and_new(self.snapshot.buffers, persistent_buffers(model))
        return Audit(
            frozen_parameters=len(self.plan.frozen),
            trainable_parameters=len(self.plan.trainable),
            buffers=len(self.snapshot.buffers),
            missing=missing,
            new=new,
            missing_buffers=missing_buffers,
            new_buffers=new_buffers,
            not_in_optimizer=self._not_in_optimizer,
        )

    def _kept(self, state) -> list[str]:
        """Names of the parameters, and of frozen rows, that no step was to change, or none since they came to rest."""
        stay = [*self.plan.frozen, *self.plan.frozen_rows, *self._resting.digests, *self._unreached(state)]
        return list(dict.fromkeys(stay))

    def _parts(self, model: nn.Module) -> Named:
        """Every parameter by name, and each matrix of which some rows train by the name of its frozen rows too."""
        return with_other_rows(named_weights(model), self.plan.rows)

    def _digests(self, parts: Named) -> dict[str, str]:
        return digests_on_main(parts, self.plan.frozen_rows)

    def _unreached(self, state) -> dict[str, int]:
        """Parameters of a later phase than that of the last step, with the step from which it trains them."""
        last = state.global_step if self._weights_of is None else self._weights_of
        reached = self.plan.phase_at(last - 1).from_step
        return {p.name: p.from_step for p in self.plan.parameters if p.trainable and p.from_step > reached}

    def _changed(self, model: nn.Module, kept: Iterable[str], present: Mapping[str, str]) -> list[str]:
        """Those of `kept` that changed on some process, or are no longer there.

        Args:
            model: Of this process.
            kept: Names of parameters and of frozen rows.
            present: Their digests now, on the main process.
        """
        if is_main():
            changed = {name for name in kept if present.get(name) != self._resting.digest(name, self.digests_before)}
        else:  # shards were gathered, and digested on the main process; a replica may differ here alone
            names = set(kept)
            replicas = [(n, p) for n, p in self._parts(model) if n in names and not is_sharded(p)]
            changed = self._resting.other_sums(replicas, self.snapshot)
        anywhere = set().union(*from_all(changed))
        return [name for name in kept if name in anywhere]

    def _changed_buffers(self, model: nn.Module) -> list[str]:
        present = from_main(buffer_digests(model))
        return [name for name, sha256 in self.snapshot.buffers.items() if present.get(name) != sha256]

    def _trainable_distance(self, model: nn.Module) -> float | None:
        """L2 distance of all that trains from the start; None where that of one parameter is unknown."""
        moves = {delta.name: delta.l2_delta for delta in measure_deltas(model, self.snapshot)}
        return together([moves.get(name) for name in self.plan.trainable])

    # ---- the verdict ------------------------------------------------------------------------------------------------

    def _conclude(self, args, state, audit: Audit) -> None:
        """Keep and write the result, log what is wrong, and stop the run if it must stop."""
        disk_error = self._keep(args, state, audit) or self._record_draws(args, state)
        for sentence in audit.warnings():
            logger.warning("%s", sentence)
        if not audit.passed:
            message = f"Freeze audit failed at step {state.global_step}: {audit.violations()}."
            if self.stop_on_violation:
                raise FreezeViolation(message)
            logger.error(message)
        if self.ended or state.global_step >= state.max_steps:  # an audit of an earlier step is followed by another
            raise_disk_error(disk_error)

    def _keep(self, args, state, audit: Audit) -> str | None:
        """Keep and write the result. Returns why it could not be written, None where it was.

        A full disk is not raised here: it would hide a violation.
        """
        self.result = audit
        folder = self.folder(args)
        if folder is None or not state.is_world_process_zero:
            return None
        file = folder / AUDIT_FILE
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, (json.dumps(audit.to_json(), indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            disk_error = f"{file} could not be written: {error.strerror or error}. Make room on the disk."
            logger.warning("%s", disk_error)
            return disk_error
        return None


def _missing_and_new(known: Iterable[str], named: Named) -> tuple[list[str], list[str]]:
    """Names among `known` that some process does not have any more, and names that some process has beside them."""
    known = list(known)
    everywhere = [set(names) for names in from_all([name for name, _ in named])]
    missing = [name for name in known if not all(name in names for names in everywhere)]
    return missing, sorted(set().union(*everywhere).difference(known))
