"""A callback that proves, by sha256, that frozen parameters kept every bit, and that trainable ones could learn."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from partialtune.distributed import from_all, from_main, is_main, raise_disk_error
from partialtune.errors import FreezeViolation
from partialtune.files import write_whole
from partialtune.freeze.plan import FreezePlan, Phase
from partialtune.model.digests import bit_sums, buffer_digests, digests_on_main, whole_on_main
from partialtune.model.parameters import Named, is_sharded, named_weights, persistent_buffers
from partialtune.proof.audit_result import (
    CANNOT_BE_TOLD,
    INTERRUPTED,
    NEVER_A_GRADIENT,
    NOT_REACHED,
    ONLY_SKIPPED,
    TOO_SMALL,
    Audit,
    SavedDifference,
)
from partialtune.proof.due_updates import DueUpdates
from partialtune.proof.snapshots import Snapshot, measure_deltas, take_snapshot
from partialtune.proof.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"


class FreezeAuditCallback(TrainerCallback, ExportableState):
    """Compares digests with those from before the first step, at every save and at the end, and writes `audit.json`.

    Frozen parameters and persistent buffers have to keep every bit, trainable parameters have to be able to learn.
    Of several processes the main one digests; the others compare checksums of what they hold a replica of.

    Works in any `transformers.Trainer`: `Trainer(..., callbacks=[FreezeAuditCallback(plan)])`.

    Args:
        plan: The plan that was applied to the model.
        output_dir: Folder of the file, `args.output_dir` where absent.
        stop_on_violation: Whether a violation raises FreezeViolation, or is only logged and written.

    Attributes:
        result: The newest `Audit`, None before the first.
        interrupted: Whether a signal ends the run, asked when training ends. An interrupted run gets no verdict on
            what has not moved.
        digests_before: sha256 of every parameter at the start.
        buffers_before, buffers_after: sha256 of every persistent buffer at the start, and at the end of training.
        digests_after: sha256 of every parameter at the end of training.
        seconds: Time spent in snapshot and checks so far.
    """

    def __init__(
        self, plan: FreezePlan, output_dir: str | os.PathLike | None = None, stop_on_violation: bool = True
    ) -> None:
        self.plan = plan
        self.output_dir = output_dir
        self.stop_on_violation = stop_on_violation
        self.result: Audit | None = None
        self.digests_after: dict[str, str] = {}
        self.buffers_after: dict[str, str] = {}
        self._snapshot: Snapshot | None = None
        self._not_in_optimizer: list[str] = []
        self.interrupted: Callable[[], bool] = lambda: False
        self._updates = DueUpdates()
        self._phase: Phase | None = None
        self._checked_at: int | None = None
        self._watch = Stopwatch()

    @property
    def digests_before(self) -> Mapping[str, str]:
        return self._snapshot.digests if self._snapshot else {}

    @property
    def buffers_before(self) -> Mapping[str, str]:
        return self._snapshot.buffers if self._snapshot else {}

    @property
    def seconds(self) -> float:
        return self._watch.seconds

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._take_snapshot(args, model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._snapshot is None:
            self._take_snapshot(args, model)
        if state.global_step:  # the run goes on from a checkpoint
            self.go_back_to(state)
        self._begin_phase(args, state, model, optimizer)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.plan.phase_at(state.global_step) is not self._phase:
            self.check_frozen(args, state, model)  # also what begins now, for the last time
            self._begin_phase(args, state, model, optimizer)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the audit: which parameters have had a gradient, and moved or were to move."""
        return {"args": {}, "attributes": self._updates.state()}

    def go_back_to(self, state) -> None:
        """Know of gradients and updates what a checkpoint knew: one to go on from, or the best one, loaded at the end.

        Args:
            state: The checkpoint's `TrainerState`; one of a Trainer without this callback changes nothing.

        Raises:
            InputError: If what it keeps of this callback is damaged.
        """
        saved = dict(state.stateful_callbacks or {}).get(type(self).__name__)
        if saved:
            self._updates.go_back_to(saved.get("attributes") if isinstance(saved, dict) else saved)

    def _folder(self, args) -> Path:
        return Path(self.output_dir or args.output_dir)

    def _take_snapshot(self, args, model: nn.Module) -> None:
        with self._watch:
            self._snapshot = take_snapshot(model, self.plan, self._folder(args))

    def _begin_phase(self, args, state, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Look up what the present phase trains in the optimizer, and watch it until it has moved."""
        self._phase = self.plan.phase_at(state.global_step)
        learning = self._learning(model, optimizer)
        found = {name: (parameter, group) for name, (parameter, group) in learning.items() if group is not None}
        mine = {name: pair for name, pair in found.items() if is_main() or is_sharded(pair[0])}
        self._updates.watch(mine, optimizer, self._snapshot.bit_sums)
        self._not_in_optimizer = [name for name, (_, group) in learning.items() if group is None]
        audit = self._audit(model)
        if audit.not_in_optimizer or audit.other_names:
            self._conclude(args, state, audit)

    def _learning(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, Any]]:
        """What the present phase trains by name: the parameter, and the optimizer's group or None."""
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        trainable = set(self._phase.trainable)
        return {name: (p, group_of.get(id(p))) for name, p in named_weights(model) if name in trainable}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        with self._watch:
            scaler = getattr(optimizer, "scaler", None)  # of fp16; clipping has divided the gradients by its scale
            unclipped = scaler is not None and not getattr(args, "max_grad_norm", 1.0)
            self._updates.before_step(scaler.get_scale() if unclipped else 1.0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        with self._watch:
            self._updates.after_step()

    def on_save(self, args, state, control, model=None, **kwargs):
        self.check_frozen(args, state, model)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if optimizer is not None:  # what has taken the place of a parameter since is not in it
            replaced = (n for n, (p, group) in self._learning(model, optimizer).items() if not (group or is_sharded(p)))
            self._not_in_optimizer = list(replaced)
        self._audit_everything(args, state, model)

    def check_frozen(self, args, state, model: nn.Module) -> None:
        """Compare what no step so far was to change with the start, and conclude the audit if a bit changed.

        Raises:
            FreezeViolation: If one changed and `stop_on_violation` is set; `audit.json` is written before.
        """
        if self._checked_at == state.global_step:
            return
        self._checked_at = state.global_step
        with self._watch:
            kept = self._kept(state)
            present = digests_on_main((name, parameter) for name, parameter in named_weights(model) if name in kept)
            found = self._changed(model, kept, present) + self._changed_buffers(model)
            found += self._audit(model).other_names
        if found:
            self._audit_everything(args, state, model)

    def conclude_saved(self, args, state, differences: list[SavedDifference]) -> None:
        """Take what the saved files hold otherwise than was audited into the verdict, and conclude anew.

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

    def known_digests(self, state) -> tuple[dict[str, str], dict[str, str]]:
        """sha256 by name of the parameters and buffers that have to be in a checkpoint as they were at the start.

        What is known to have changed, in a run that goes on all the same, is told already.
        """
        changed = {*self.result.changed, *self.result.changed_buffers} if self.result else set()
        parameters = {name: self.digests_before[name] for name in self._kept(state) if name not in changed}
        return parameters, {name: sha256 for name, sha256 in self.buffers_before.items() if name not in changed}

    def _audit_everything(self, args, state, model: nn.Module) -> None:
        with self._watch:
            self.digests_after = from_main(digests_on_main(named_weights(model)))
            audit = self._audit(model)
            audit.changed = self._changed(model, self._kept(state), self.digests_after)
            self.buffers_after = from_main(buffer_digests(model))
            audit.changed_buffers = self._changed_buffers(model)
            audit.trainable_l2_delta = self._trainable_distance(model)
            self._updates.merge(from_all(self._updates.state()))
            audit.stuck, audit.unmoved = self._unmoved(state)
            audit.below_precision = self._rounded_away(model)
            audit = from_main(audit)
        state.log_history.append({"audit/passed": float(audit.passed), "epoch": state.epoch, "step": state.global_step})
        self._conclude(args, state, audit)

    def _audit(self, model: nn.Module) -> Audit:
        parameters = _missing_and_new((p.name for p in self.plan.parameters), named_weights(model))
        buffers = _missing_and_new(self._snapshot.buffers, persistent_buffers(model))
        return Audit(
            frozen_parameters=len(self.plan.frozen),
            trainable_parameters=len(self.plan.trainable),
            buffers=len(self._snapshot.buffers),
            missing=parameters[0],
            new=parameters[1],
            missing_buffers=buffers[0],
            new_buffers=buffers[1],
            not_in_optimizer=self._not_in_optimizer,
        )

    def _unmoved(self, state) -> tuple[list[str], dict[str, str]]:
        """Trainable parameters that kept every bit: those that were to move, and the others with the reason."""
        updates, unreached, interrupted = self._updates, self._unreached(state), self.interrupted()
        before, after = self.digests_before, self.digests_after
        still = [name for name in self.plan.trainable if name in after and after[name] == before.get(name)]
        stuck, reasons = [], {}
        for name in still:
            if name in unreached:
                reasons[name] = NOT_REACHED.format(step=unreached[name])
            elif interrupted:
                reasons[name] = INTERRUPTED.format(step=state.global_step)
            elif name in updates.due:
                stuck.append(name)
            elif name not in updates.had_gradient:
                reasons[name] = ONLY_SKIPPED if name in updates.skipped else NEVER_A_GRADIENT
            elif name in updates.largest:
                reasons[name] = TOO_SMALL.format(**updates.largest[name]._asdict())
            else:
                reasons[name] = CANNOT_BE_TOLD.format(optimizer=updates.optimizer_name)
        return stuck, reasons

    def _kept(self, state) -> list[str]:
        """Names of the parameters that no step so far was to change."""
        return [*self.plan.frozen, *self._unreached(state)]

    def _changed(self, model: nn.Module, kept: Iterable[str], present: Mapping[str, str]) -> list[str]:
        """Those of `kept` that changed on some process, or are no longer there.

        Args:
            model: Of this process.
            kept: Names of parameters.
            present: Their digests now, on the main process.
        """
        if is_main():
            changed = {name for name in kept if present.get(name) != self.digests_before.get(name)}
        else:  # what is sharded is gathered and digested there
            names = set(kept)
            replicas = [(n, p) for n, p in named_weights(model) if n in names and not is_sharded(p)]
            start = self._snapshot.bit_sums
            changed = {name for name, total in bit_sums(replicas).items() if total != start.get(name)}
        anywhere = set().union(*from_all(changed))
        return [name for name in kept if name in anywhere]

    def _changed_buffers(self, model: nn.Module) -> list[str]:
        present = from_main(buffer_digests(model))
        return [name for name, sha256 in self._snapshot.buffers.items() if present.get(name) != sha256]

    def _unreached(self, state) -> dict[str, int]:
        """Parameters that learn in a later phase than the last step's, with the step at which they begin."""
        begun = self.plan.phase_at(state.global_step - 1).from_step
        return {p.name: p.from_step for p in self.plan.parameters if p.trainable and p.from_step > begun}

    def _trainable_distance(self, model: nn.Module) -> float | None:
        moves = {delta.name: delta.l2_delta for delta in measure_deltas(model, self._snapshot)}
        distances = [moves.get(name) for name in self.plan.trainable]
        return None if None in distances else sum(distance**2 for distance in distances) ** 0.5

    def _rounded_away(self, model: nn.Module) -> list[str]:
        """Trainable parameters held in 16 bits of which fewer than half of the values moved."""
        names = []
        for name, parameter in named_weights(model):
            if name in self._updates.had_gradient and parameter.element_size() == 2 and parameter.is_floating_point():
                values, start = whole_on_main(parameter), self._snapshot.copies.get(name)
                if values is not None and start is not None and values.shape == start.shape:
                    moved = int(torch.count_nonzero(values.cpu() != start))
                    names += [name] if moved < values.numel() / 2 else []
        return names

    def _keep(self, args, state, audit: Audit) -> str | None:
        """Keep and write the result. Returns why writing failed."""
        self.result = audit
        return self._write(args, audit) if state.is_world_process_zero else None

    def _conclude(self, args, state, audit: Audit) -> None:
        """Keep and write the result, say what is wrong, and stop the run if it must stop."""
        refused = self._keep(args, state, audit)
        for sentence in audit.warnings():
            logger.warning("%s", sentence)
        if not audit.passed:
            message = f"Freeze audit failed at step {state.global_step}: {audit.violations()}."
            if self.stop_on_violation:
                raise FreezeViolation(message)
            logger.error(message)
        if state.global_step >= state.max_steps:  # one of an earlier step is followed by another
            raise_disk_error(refused)

    def _write(self, args, audit: Audit) -> str | None:
        """Write the result. Returns why that failed, which a violation must not be hidden by."""
        file = self._folder(args) / AUDIT_FILE
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, (json.dumps(audit.to_json(), indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            refused = f"{file} could not be written: {error.strerror or error}. Make room on the disk."
            logger.warning("%s", refused)
            return refused
        return None


def _missing_and_new(known: Iterable[str], named: Named) -> tuple[list[str], list[str]]:
    """Names among `known` that some process does not have any more, and names that some process has beside them."""
    known = list(known)
    everywhere = [set(names) for names in from_all([name for name, _ in named])]
    missing = [name for name in known if not all(name in names for names in everywhere)]
    return missing, sorted(set().union(*everywhere).difference(known))
