"""The optimizer of a plan: parameters are in it from the step of their phase on, and its state is kept by their names.

All that any phase trains requires gradients when the model is wrapped for several processes, since DDP never
synchronises what is thawed later, and the optimizer is made with all of it, so that its groups and the learning rate
scheduler are complete. Only then is what belongs to later phases taken out again, until its phase begins.

PyTorch numbers parameters by their place in the optimizer. Then a checkpoint of other trainable layers of the same
shapes loads silently, and each layer goes on with the moments of another one. Under names it cannot.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from partialtune.engine.fast_paths import FastPaths
from partialtune.errors import InputError
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
        self.fast.begin(phase.first_step)
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


# ---- state by name -------------------------------------------------------------------------------------------------


def key_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let the optimizer's `state_dict` name parameters as the plan does, and `load_state_dict` take such a one.

    {"state": {name: {"exp_avg": ...}}, "param_groups": [{"lr": ..., "params": [name, ...]}]}
    """
    name_of = {id(parameter): name for name, parameter in named_weights(model)}
    optimizer.register_state_dict_post_hook(partial(_places_to_names, name_of))
    optimizer.register_load_state_dict_pre_hook(partial(_names_to_places, name_of))


def _places_to_names(
    name_of: Mapping[int, str], optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    names = [name for group in _names_by_group(name_of, optimizer) for name in group]
    groups = [{**group, "params": [names[place] for place in group["params"]]} for group in state_dict["param_groups"]]
    return {"state": {names[place]: state for place, state in state_dict["state"].items()}, "param_groups": groups}


def _names_to_places(
    name_of: Mapping[int, str], optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters that are not named, those of later phases, keep the state that the optimizer was made with."""
    names, saved = _names_by_group(name_of, optimizer), saved_groups(state_dict)
    if len(saved) != len(names) or any(set(old["params"]) - set(new) for old, new in zip(saved, names, strict=True)):
        raise InputError(
            "The checkpoint's optimizer has other groups of parameters than this run's: `weight_decay_on` or "
            "`schedule` differ. Go on with the recipe of that run, or start in a new output_dir."
        )
    kept = state_dict.get("state")
    if not (isinstance(kept, Mapping) and kept.keys() <= {name for group in saved for name in group["params"]}):
        raise ValueError("its optimizer holds the state of parameters that are in none of its groups")
    place_of = {name: place for place, name in enumerate(name for group in names for name in group)}
    states = {name_of[id(parameter)]: state for parameter, state in optimizer.state.items()} | dict(kept)
    groups = [{**old, "params": [place_of[name] for name in new]} for old, new in zip(saved, names, strict=True)]
    return {"state": {place_of[name]: state for name, state in states.items()}, "param_groups": groups}


def saved_groups(saved: Any) -> list[Mapping[str, Any]]:
    """The groups of parameters in an optimizer's saved state, each with its names under `params`.

    Raises:
        ValueError: If it is no such state.
    """
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not (isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups)):
        raise ValueError("its optimizer holds no groups of parameters")
    of_groups = [group.get("params") for group in groups]
    if not all(isinstance(names, list) and all(isinstance(name, str | int) for name in names) for names in of_groups):
        raise ValueError("its optimizer holds groups without names of parameters")
    return groups


def _names_by_group(name_of: Mapping[int, str], optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
