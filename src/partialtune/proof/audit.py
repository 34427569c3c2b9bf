"""A callback that proves, by sha256, that frozen parameters kept every bit, and that trainable ones could learn."""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from partialtune.errors import FreezeViolation
from partialtune.freeze.plan import FreezePlan, Phase
from partialtune.proof.snapshots import Snapshot, measure_deltas, take_snapshot
from partialtune.proof.weights import digest, digests, named_weights

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"
NEVER_A_GRADIENT = "never had a gradient other than 0 in a step whose learning rate was above 0"
NOT_REACHED = "the run ended before step {step}, from which its phase trains it"
KEPT_EVERY_BIT = "had a gradient, yet kept every bit"


@dataclass
class Audit:
    """What the audit found, as in `audit.json`.

    Attributes:
        frozen_parameters: Number of frozen tensors.
        changed: Names of frozen tensors whose digest changed: a violation.
        trainable_parameters: Number of trainable tensors.
        stuck: Trainable tensors that had a gradient and kept every bit: a violation.
        untouched: Trainable tensors that never had a gradient: a warning.
        unreached: Those of them whose phase had not begun when the run ended, with the step at which it begins.
        below_precision: Trainable tensors in 16 bits, most of whose values kept every bit: a warning.
        not_in_optimizer: Trainable tensors that the optimizer does not hold: a violation.
        trainable_l2_delta: Distance of all trainable tensors from the start.
    """

    frozen_parameters: int
    trainable_parameters: int
    changed: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    unreached: dict[str, int] = field(default_factory=dict)
    below_precision: list[str] = field(default_factory=list)
    not_in_optimizer: list[str] = field(default_factory=list)
    trainable_l2_delta: float | None = 0.0

    @property
    def passed(self) -> bool:
        return not (self.changed or self.stuck or self.not_in_optimizer)

    def to_json(self) -> dict[str, Any]:
        unmoved = [{"name": name, "reason": KEPT_EVERY_BIT} for name in self.stuck]
        unmoved += [{"name": name, "reason": self._why_untouched(name)} for name in self.untouched]
        return {
            "passed": self.passed,
            "frozen": {
                "parameters": self.frozen_parameters,
                "changed": self.changed,
                "l2_delta": None if self.changed else 0.0,  # equal digests: the distance is exactly 0
            },
            "trainable": {
                "parameters": self.trainable_parameters,
                "unmoved": unmoved,
                "below_precision": self.below_precision,
                "not_in_optimizer": self.not_in_optimizer,
                "l2_delta": self.trainable_l2_delta,
            },
        }

    def _why_untouched(self, name: str) -> str:
        return NOT_REACHED.format(step=self.unreached[name]) if name in self.unreached else NEVER_A_GRADIENT

    def violations(self) -> str:
        """The violations in words, empty if there are none."""
        parts = [
            ("frozen parameters changed", self.changed),
            ("trainable parameters had a gradient, yet kept every bit", self.stuck),
            ("trainable parameters are missing from the optimizer", self.not_in_optimizer),
        ]
        return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts if names)


def _some(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class FreezeAuditCallback(TrainerCallback):
    """Compares digests with those from before the first step, at every save and at the end, and writes `audit.json`.

    Works in any `transformers.Trainer`: `Trainer(..., callbacks=[FreezeAuditCallback(plan)])`.

    Args:
        plan: The plan that was applied to the model.
        output_dir: Folder of the file, `args.output_dir` where absent.
        stop_on_violation: Whether a violation raises FreezeViolation, or is only logged and written.

    Attributes:
        result: The newest `Audit`, None before the first.
        digests_before: sha256 of every parameter at the start.
        digests_after: sha256 of every parameter at the end of training.
    """

    def __init__(
        self, plan: FreezePlan, output_dir: str | os.PathLike | None = None, stop_on_violation: bool = True
    ) -> None:
        self.plan = plan
        self.output_dir = output_dir
        self.stop_on_violation = stop_on_violation
        self.result: Audit | None = None
        self.digests_after: dict[str, str] = {}
        self._snapshot: Snapshot | None = None
        self._not_in_optimizer: list[str] = []
        self._waiting: dict[str, tuple[nn.Parameter, dict]] = {}  # no gradient seen yet: parameter, optimizer group
        self._had_gradient: set[str] = set()
        self._phase: Phase | None = None
        self._checked_at: int | None = None

    @property
    def digests_before(self) -> dict[str, str]:
        return self._snapshot.digests if self._snapshot else {}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._snapshot = take_snapshot(model, self.plan)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self._snapshot is None:
            self._snapshot = take_snapshot(model, self.plan)
        self._begin_phase(args, state, model, optimizer)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.plan.phase_at(state.global_step) is not self._phase:
            self.check_frozen(args, state, model)  # also what begins now, for the last time
            self._begin_phase(args, state, model, optimizer)

    def _begin_phase(self, args, state, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Look up what the present phase trains in the optimizer, and watch it until it has had a gradient."""
        self._phase = self.plan.phase_at(state.global_step)
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        trainable = set(self._phase.trainable)
        learning = [(name, parameter) for name, parameter in named_weights(model) if name in trainable]
        self._not_in_optimizer = [name for name, parameter in learning if id(parameter) not in group_of]
        self._waiting = {
            name: (parameter, group_of[id(parameter)])
            for name, parameter in learning
            if name not in self._had_gradient and id(parameter) in group_of
        }
        if self._not_in_optimizer:
            self._conclude(args, state, self._audit(state, {}))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        seen = [
            name
            for name, (parameter, group) in self._waiting.items()
            if group["lr"] > 0 and parameter.grad is not None and bool(parameter.grad.any())
        ]
        self._had_gradient.update(seen)
        for name in seen:
            del self._waiting[name]

    def on_save(self, args, state, control, model=None, **kwargs):
        self.check_frozen(args, state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._audit_everything(args, state, model)

    def check_frozen(self, args, state, model: nn.Module) -> None:
        """Compare the digests of parameters that no step so far trained, and conclude the audit if one changed.

        Raises:
            FreezeViolation: If one changed and `stop_on_violation` is set; `audit.json` is written before.
        """
        if self._checked_at == state.global_step:
            return
        self._checked_at = state.global_step
        frozen = {*self.plan.frozen, *self._unreached(state)}
        present = {name: digest(parameter) for name, parameter in named_weights(model) if name in frozen}
        if any(present[name] != self._snapshot.digests[name] for name in present):
            self._audit_everything(args, state, model)

    def _audit_everything(self, args, state, model: nn.Module) -> None:
        self.digests_after = digests(model)
        audit = self._audit(state, self.digests_after)
        moves = {delta.name: delta.l2_delta for delta in measure_deltas(model, self._snapshot)}
        distances = [moves[name] for name in self.plan.trainable]
        audit.trainable_l2_delta = None if None in distances else sum(d**2 for d in distances) ** 0.5
        still = [n for n in self.plan.trainable if self.digests_after[n] == self._snapshot.digests[n]]
        audit.stuck = [name for name in still if name in self._had_gradient]
        audit.untouched = [name for name in still if name not in self._had_gradient]
        audit.below_precision = self._rounded_away(model)
        state.log_history.append({"audit/passed": float(audit.passed), "epoch": state.epoch, "step": state.global_step})
        self._conclude(args, state, audit)

    def _audit(self, state, present: dict[str, str]) -> Audit:
        before = self._snapshot.digests
        unreached = self._unreached(state)
        kept = [*self.plan.frozen, *unreached]
        return Audit(
            frozen_parameters=len(self.plan.frozen),
            trainable_parameters=len(self.plan.trainable),
            changed=[name for name in kept if name in present and present[name] != before[name]],
            unreached=unreached,
            not_in_optimizer=self._not_in_optimizer,
        )

    def _unreached(self, state) -> dict[str, int]:
        """Parameters that learn in a later phase than the last step's, with the step at which they begin."""
        begun = self.plan.phase_at(state.global_step - 1).from_step
        return {p.name: p.from_step for p in self.plan.parameters if p.trainable and p.from_step > begun}

    def _rounded_away(self, model: nn.Module) -> list[str]:
        """Trainable parameters held in 16 bits of which fewer than half of the values moved."""
        names = []
        for name, parameter in named_weights(model):
            if name in self._had_gradient and parameter.element_size() == 2 and parameter.is_floating_point():
                before = self._snapshot.copies[name]
                moved = int(torch.count_nonzero(parameter.detach().cpu() != before))
                if moved < before.numel() / 2:
                    names.append(name)
        return names

    def _conclude(self, args, state, audit: Audit) -> None:
        """Keep and write the result, say what is wrong, and stop the run if it must stop."""
        self.result = audit
        if state.is_world_process_zero:
            file = Path(self.output_dir or args.output_dir) / AUDIT_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(audit.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if audit.untouched:
            logger.warning(
                "%d trainable parameters never had a gradient: %s", len(audit.untouched), _some(audit.untouched)
            )
        if audit.below_precision:
            logger.warning(
                "%d trainable parameters are held in 16 bits and most of their updates round away: %s. "
                "Load the model in fp32.",
                len(audit.below_precision),
                _some(audit.below_precision),
            )
        if not audit.passed:
            message = f"Freeze audit failed at step {state.global_step}: {audit.violations()}."
            if self.stop_on_violation:
                raise FreezeViolation(message)
            logger.error(message)
