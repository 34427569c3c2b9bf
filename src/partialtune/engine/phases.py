"""Phases of a plan: what learns, what is in the optimizer, and what is recomputed, changes at their steps.

    phases = Phases(plan, model, optimizer, fast)
    phases.start(0)                 # what belongs to later phases is held out of the optimizer
    phases.step_begins(step)        # before each step: is it the first of a phase?
    phases.end()

All that any phase trains requires gradients when the model is wrapped for several processes, since DDP never
synchronises what is thawed later, and the optimizer is made with all of it, so that its groups and the learning rate
scheduler are complete. Only then is what belongs to later phases taken out again, until its phase begins.

Where blocks learn in turn, each draw is a phase: blocks that come to rest leave the optimizer, and those that are drawn
enter it. Outside of it neither weight decay nor momentum moves them.

Under `fully_shard` it is the same, since the dtypes of its groups are fixed once too, before anything is held: see
`sharding`.
"""

import logging
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from partialtune.engine.fast_paths import FastPaths
from partialtune.engine.forward_stack import Worn
from partialtune.engine.plan_optimizer import (
    RESTING,
    Member,
    bare_optimizer,
    first_state,
    members_of,
    on_its_device,
    set_members,
)
from partialtune.engine.recomputation import recompute_from
from partialtune.engine.sharding import fix_dtypes
from partialtune.freeze.apply import let_learn
from partialtune.freeze.block_sampling import blocks_words
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import Phase
from partialtune.model.parameters import named_learners, reshard

logger = logging.getLogger(__name__)


class Held(NamedTuple):
    """What is out of the optimizer until its phase begins.

    Attributes:
        group: Place of its group in the optimizer: `load_state_dict` exchanges the groups themselves.
        member: The parameter.
        name: Its name in the plan.
        state: Of the parameter: Adagrad has some from the start. None where there is none, where a resting block has
            lost it, and where the optimizer keeps it under `RESTING`.
    """

    group: int
    member: Member
    name: str
    state: Any = None


class Phases:
    """Lets each phase begin at its step: gradients, train mode, optimizer, and what is recomputed in backward.

    Args:
        plan: The plan that was applied to the model.
        model: The model itself.
        optimizer: As `suit_optimizer` left it.
        fast: The run's fast paths, which are told of each phase.
        recompute: Whether activations are checkpointed: exactly the blocks that backward passes are, in each phase.
        given: What wraps the model, as torch.compile does; the model itself where absent.

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
        given: nn.Module | None = None,
    ) -> None:
        self.plan, self.model, self.fast, self.recompute = plan, model, fast, recompute
        self._outermost = model if given is None else given
        self.phase: Phase | None = None
        self._optimizer = bare_optimizer(optimizer)
        self._held: list[Held] = []
        self._recomputed: list[Worn] = []

    def start(self, step: int) -> None:
        """Begin with the phase of this step.

        Args:
            step: Number of steps that were taken already: 0, or those of a checkpoint, which is loaded by now.
        """
        self._held = []
        reshard(self._outermost)
        if self.plan.changes_on_the_way:
            fix_dtypes(self._outermost)
        phase = self.plan.phase_at(step)
        if self.plan.sampling is not None:
            # A checkpoint of the last step of a draw holds the optimizer of that draw: what is drawn now rested in it.
            self._take_out(step - 1)
        self._take_out(step)
        self._let_in(phase.trainable)
        self._begin(phase)

    def step_begins(self, step: int) -> None:
        """Begin the phase of this step, if another one than the present."""
        phase = self.plan.phase_at(step)
        if phase is not self.phase:
            reshard(self._outermost)
            self._take_out(step)  # first, so that both never have their state at one time
            self._let_in(phase.trainable)
            self._begin(phase)

    def forget_state_of_new(self, step: int) -> None:
        """Of what begins to learn in this step: the state that torch made to load a checkpoint into, which has none of
        it. Left as it is, it would count one step too many."""
        began = set(self.plan.phase_at(step).trainable) - set(self.plan.phase_at(step - 1).trainable)
        for name, parameter in named_learners(self.model):
            if name in began:
                self._optimizer.state.pop(parameter, None)

    def end(self) -> None:
        """Take off what depends on the phase. Model and optimizer are then as `apply_plan` and `suit_optimizer` left
        them, with all phases in them: another training may begin."""
        if self.phase is None:
            return
        reshard(self._outermost)
        self._let_in(self.plan.trainable)
        self.phase = None
        self._leave()

    def _leave(self) -> None:
        """Take off what the present phase has put on the model."""
        self.fast.leave()
        for worn in self._recomputed:
            worn.take_off()
        self._recomputed = []
        let_learn(self.model, self.plan.trainable)

    def _take_out(self, step: int) -> None:
        """Take out what does not learn in this step; of blocks that rest, state and gradient as well."""
        out = hold_back(self._optimizer, self.model, self.plan, step)
        if self.plan.sampling is not None:
            for held in out:
                # A loop's own `zero_grad` reaches no parameter that is out of the optimizer: its last gradient would
                # count when gradients are clipped, and be added to when the block is drawn again.
                held.member.parameter.grad = None
                if self.plan.sampling.keep_state and held.state is not None:
                    # a checkpoint that was loaded may have brought the state of this one already
                    self._optimizer.state.setdefault(RESTING, {}).setdefault(held.name, held.state)
            out = [held._replace(state=None) for held in out]
        self._held += out

    def _let_in(self, learning: Collection[str]) -> None:
        """Put back what learns from now on."""
        names = set(learning)
        due = [held for held in self._held if held.name in names]
        self._held = [held for held in self._held if held.name not in names]
        resting = self._optimizer.state.get(RESTING, {})
        for held in due:
            group = self._optimizer.param_groups[held.group]
            set_members(group, [*members_of(group), held.member])
            state = held.state
            if self.plan.sampling is not None:
                kept = resting.pop(held.name, None)
                of_member = (self._optimizer, group, held.member)
                state = first_state(*of_member) if kept is None else on_its_device(kept, group, held.member)
            if state is not None:
                self._optimizer.state[held.member.parameter] = state
        if not resting:
            self._optimizer.state.pop(RESTING, None)

    def _begin(self, phase: Phase) -> None:
        self.phase = phase
        self._leave()
        let_learn(self.model, phase.trainable, also_in_eval=self.fast.before_blocks if phase.first_block else ())
        if self.recompute:
            self._recomputed = recompute_from(self.model, phase.first_block)
        self.fast.begin(phase.first_step)
        if self.plan.changes_on_the_way:
            logger.info("From step %d: %s", phase.first_step, phase_words(self.plan, phase))


def hold_back(optimizer: torch.optim.Optimizer, model: nn.Module, plan: FreezePlan, step: int) -> list[Held]:
    """Take out of the optimizer what does not learn in this step, but in another one."""
    waiting = set(plan.trainable) - set(plan.phase_at(step).trainable)
    name_of = {id(parameter): name for name, parameter in named_learners(model) if name in waiting}
    out = []
    for number, group in enumerate(optimizer.param_groups):
        members = members_of(group)
        for member in members:
            name = name_of.get(id(member.parameter))
            if name is not None:
                out.append(Held(number, member, name, optimizer.state.pop(member.parameter, None)))
        set_members(group, [member for member in members if id(member.parameter) not in name_of])
    return out


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
        # Somebody may have switched it on at the model, and not by the arguments.
        recomputes = bool(args.activation_checkpointing or getattr(model, "is_activation_checkpointing", False))
        self.phases = Phases(self.plan, model, optimizer, self.fast, recomputes)
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
    drawn = ""
    if plan.sampling is not None:
        drawn = f"{blocks_words(plan.sampling.draw(plan.sampling.number_at(phase.first_step)))} drawn, "
    count = sum(parameter.learning for parameter in plan.parameters if parameter.name in names)
    share = count / plan.total_parameters
    learns = f"{drawn}trainable {count:,} of {plan.total_parameters:,} ({share:.1%})"
    return f"{learns}, backward stops at {phase.backward_from}"
