"""The phases of a plan, carried out in training: parameters learn, and are in the optimizer, from their step on.

All that any phase trains requires gradients when the model is wrapped for several processes, since DDP never
synchronises what is thawed later, and the optimizer is made with all of it, so that its groups and the learning rate
scheduler are complete. Only then is what belongs to later phases taken out again, until its phase begins.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from partialtune.fast.fast_paths import FastPaths
from partialtune.freeze.apply import let_learn
from partialtune.freeze.plan import FreezePlan, Phase
from partialtune.model.parameters import named_weights
from partialtune.model.train_mode import keep_activations, recompute_from

logger = logging.getLogger(__name__)

BEGINS = "from_step"  # key in a group of the optimizer: the first step in which its parameters learn


def split_by_phase(optimizer: torch.optim.Optimizer, model: nn.Module, plan: FreezePlan) -> None:
    """Split the optimizer's groups, so that what begins at one step with one rate has groups of its own.

    Groups of earlier phases come first. Settings such as weight decay stay those of the group that was split.
    """
    names = {id(parameter): name for name, parameter in named_weights(model)}
    planned = {parameter.name: parameter for parameter in plan.parameters}
    members: dict[tuple, list[nn.Parameter]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            entry = planned[names[id(parameter)]]
            members.setdefault((entry.from_step, number, entry.learning_rate), []).append(parameter)
    whole = list(optimizer.param_groups)
    optimizer.param_groups[:] = [
        {**whole[number], "params": parameters, "lr": whole[number]["lr"] if rate is None else rate, BEGINS: step}
        for (step, number, rate), parameters in sorted(members.items(), key=lambda entry: entry[0][:2])
    ]


class Held(NamedTuple):
    """What is out of the optimizer until its phase begins."""

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    state: dict[nn.Parameter, Any]  # Adagrad has some from the start; older ones make none later


class PhaseCallback(TrainerCallback):
    """Lets each phase begin at its step: gradients, train mode, optimizer, and what is recomputed in backward.

    Args:
        plan: The plan that was applied to the model.
        fast: The run's fast paths, which are told of each phase.
    """

    def __init__(self, plan: FreezePlan, fast: FastPaths) -> None:
        self.plan = plan
        self.fast = fast
        self._held: list[Held] = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        later = [group for group in optimizer.param_groups if group.get(BEGINS, 0) > state.global_step]
        self._held = [_take_out(group, optimizer) for group in later]
        self._begin(self.plan.phase_at(state.global_step), args, model)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        due = [held for held in self._held if held.group[BEGINS] == state.global_step]
        if due:
            self._held = [held for held in self._held if held.group[BEGINS] > state.global_step]
            for held in due:
                held.group["params"].extend(held.parameters)
                optimizer.state.update(held.state)
            self._begin(self.plan.phase_at(state.global_step), args, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.fast.leave()
        keep_activations(model)

    def _begin(self, phase: Phase, args, model: nn.Module) -> None:
        self.fast.leave()
        let_learn(model, phase.trainable, also_in_eval=self.fast.before_blocks if phase.first_block else ())
        if args.activation_checkpointing:
            recompute_from(model, phase.first_block)
        self.fast.begin(phase.from_step)
        if len(self.plan.phases) > 1:
            logger.info("From step %d: %s", phase.from_step, phase_words(self.plan, phase))


def _take_out(group: dict[str, Any], optimizer: torch.optim.Optimizer) -> Held:
    parameters, group["params"] = group["params"], []
    return Held(group, parameters, {p: optimizer.state.pop(p) for p in parameters if p in optimizer.state})


def phase_words(plan: FreezePlan, phase: Phase) -> str:
    """`trainable 7,089,408 of 124,439,808 (5.7%), backward stops at transformer.h.11.ln_1.weight`."""
    names = set(phase.trainable)
    count = sum(parameter.numel for parameter in plan.parameters if parameter.name in names)
    share = count / plan.total_parameters
    return f"trainable {count:,} of {plan.total_parameters:,} ({share:.1%}), backward stops at {phase.backward_from}"
