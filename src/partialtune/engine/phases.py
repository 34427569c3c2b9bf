"""Phases of a plan: what learns, what is in the optimizer, and what is recomputed, changes at their steps.

    phases = Phases(plan, model, optimizer, fast)
    phases.start(0)                 # what belongs to later phases is held out of the optimizer
    phases.step_begins(step)        # before each step: is it the first of a phase?
    phases.end()

All that any phase trains requires gradients when the model is wrapped for several processes, since DDP never
synchronises what is thawed later, and the optimizer is made with all of it, so that its groups and the learning rate
scheduler are complete. Only then is what belongs to later phases taken out again, until its phase begins.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from partialtune.engine.fast_paths import FastPaths
from partialtune.engine.forward_stack import Worn
from partialtune.engine.plan_optimizer import Member, bare_optimizer, members_of, set_members
from partialtune.engine.recomputation import recompute_from
from partialtune.freeze.apply import let_learn
from partialtune.freeze.plan import FreezePlan, Phase
from partialtune.model.parameters import named_learners

logger = logging.getLogger(__name__)


class Held(NamedTuple):
    """What is out of the optimizer until its phase begins.

    Attributes:
        group: Place of its group in the optimizer: `load_state_dict` exchanges the groups themselves.
        member: The parameter.
        from_step: First step in which it learns.
        state: Of the parameter: Adagrad has some from the start. None where there is none.
    """

    group: int
    member: Member
    from_step: int
    state: Any


class Phases:
    """Lets each phase begin at its step: gradients, train mode, optimizer, and what is recomputed in backward.

    Args:
        plan: The plan that was applied to the model.
        model: The model itself.
        optimizer: As `suit_optimizer` left it.
        fast: The run's fast paths, which are told of each phase.
        recompute: Whether activations are checkpointed: exactly the blocks that backward passes are, in each phase.

    Attributes:
        phase: The present one, None before `start`.
    """

    def __init__(
        self,
        plan: FreezePlan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fast: FastPaths,
        recompute: bool = False,
    ) -> None:
        self.plan, self.model, self.fast, self.recompute = plan, model, fast, recompute
        self.phase: Phase | None = None
        self._optimizer = bare_optimizer(optimizer)
        self._held: list[Held] = []
        self._recomputed: list[Worn] = []

    def start(self, step: int) -> None:
        """Begin with the phase of this step.

        Args:
            step: Number of steps that were taken already: 0, or those of a checkpoint, which is loaded by now.
        """
        self._held = hold_back(self._optimizer, self.model, self.plan, step)
        self._begin(self.plan.phase_at(step))

    def step_begins(self, step: int) -> None:
        """Begin the phase of this step, if another one than the present."""
        phase = self.plan.phase_at(step)
        if phase is not self.phase:
            self._let_in(phase.first_step)
            self._begin(phase)

    def end(self) -> None:
        """Take off what depends on the phase. Model and optimizer are then as `apply_plan` and `suit_optimizer` left
        them, with all phases in them: another training may begin."""
        if self.phase is None:
            return
        self._let_in(self.plan.phases[-1].first_step)
        self.phase = None
        self._leave()

    def _leave(self) -> None:
        """Take off what the present phase has put on the model."""
        self.fast.leave()
        for worn in self._recomputed:
            worn.take_off()
        self._recomputed = []
        let_learn(self.model, self.plan.trainable)

    def _let_in(self, step: int) -> None:
        """Put back what learns in this step."""
        due = [held for held in self._held if held.from_step <= step]
        self._held = [held for held in self._held if held.from_step > step]
        for held in due:
            group = self._optimizer.param_groups[held.group]
            set_members(group, [*members_of(group), held.member])
            if held.state is not None:
                self._optimizer.state[held.member.parameter] = held.state

    def _begin(self, phase: Phase) -> None:
        self.phase = phase
        self._leave()
        let_learn(self.model, phase.trainable, also_in_eval=self.fast.before_blocks if phase.first_block else ())
        if self.recompute:
            self._recomputed = recompute_from(self.model, phase.first_block)
        self.fast.begin(phase.first_step)
        if len(self.plan.phases) > 1:
            logger.info("From step %d: %s", phase.first_step, phase_words(self.plan, phase))


def hold_back(optimizer: torch.optim.Optimizer, model: nn.Module, plan: FreezePlan, step: int) -> list[Held]:
    """Take out of the optimizer what learns only after this step."""
    begins = {parameter.name: parameter.from_step for parameter in plan.parameters if parameter.from_step is not None}
    from_step = {id(parameter): begins.get(name, 0) for name, parameter in named_learners(model)}
    held = []
    for number, group in enumerate(optimizer.param_groups):
        members = members_of(group)
        for member in members:
            begin = from_step.get(id(member.parameter), 0)
            if begin > step:
                held.append(Held(number, member, begin, optimizer.state.pop(member.parameter, None)))
        set_members(group, [m for m in members if from_step.get(id(m.parameter), 0) <= step])
    return held


class PhaseCallback(TrainerCallback):
    """`Phases` in a Trainer.

    Args:
        plan: The plan that was applied to the model.
        fast: The run's fast paths, which are told of each phase.

    Attributes:
        phases: None before training begins.
    """

    def __init__(self, plan: FreezePlan, fast: FastPaths) -> None:
        self.plan, self.fast = plan, fast
        self.phases: Phases | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.fast.keeps_training_rows = state.num_train_epochs > 1
        self.phases = Phases(self.plan, model, optimizer, self.fast, bool(args.activation_checkpointing))
        self.phases.start(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.phases.step_begins(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def end(self) -> None:
        """Training is over, or was broken off. Doing it again changes nothing."""
        if self.phases is not None:
            self.phases.end()


def phase_words(plan: FreezePlan, phase: Phase) -> str:
    """`trainable 7,089,408 of 124,439,808 (5.7%), backward stops at transformer.h.11.ln_1.weight`."""
    names = set(phase.trainable)
    count = sum(parameter.learning for parameter in plan.parameters if parameter.name in names)
    share = count / plan.total_parameters
    return f"trainable {count:,} of {plan.total_parameters:,} ({share:.1%}), backward stops at {phase.backward_from}"
