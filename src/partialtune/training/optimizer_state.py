"""Optimizer state under parameter names: what a checkpoint keeps can never be loaded into another parameter.

PyTorch numbers parameters by their place in the optimizer. Then a checkpoint of other trainable layers of the same
shapes loads without a word, and each layer goes on with the moments of another one.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from partialtune.errors import InputError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import named_weights
from partialtune.training.checkpoints import damage_of, read_with_care


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
    names, saved = _names_by_group(name_of, optimizer), state_dict["param_groups"]
    if len(saved) != len(names) or any(set(old["params"]) - set(new) for old, new in zip(saved, names, strict=True)):
        raise InputError(
            "The checkpoint's optimizer has other groups of parameters than this run's: `weight_decay_on` or "
            "`schedule` differ. Go on with the recipe of that run, or start in a new output_dir."
        )
    place_of = {name: place for place, name in enumerate(name for group in names for name in group)}
    states = {name_of[id(parameter)]: state for parameter, state in optimizer.state.items()} | state_dict["state"]
    groups = [{**old, "params": [place_of[name] for name in new]} for old, new in zip(saved, names, strict=True)]
    return {"state": {place_of[name]: state for name, state in states.items()}, "param_groups": groups}


def _names_by_group(name_of: Mapping[int, str], optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _checked_state(state: TrainerState) -> TrainerState:
    """The state, if its fields that a resumed run builds on are of their types."""
    whole = [state.global_step, state.max_steps, state.num_train_epochs, state.save_steps, state.logging_steps]
    if not all(isinstance(number, int | float) and number >= 0 for number in whole):
        raise ValueError(f"{TRAINER_STATE_NAME} holds no numbers of steps")
    if not all(isinstance(entry, dict) for entry in state.log_history):
        raise ValueError(f"{TRAINER_STATE_NAME} holds no history")
    return state


def check_checkpoint(checkpoint: Path, plan: FreezePlan) -> None:
    """Stop where a run cannot go on from a checkpoint as if it had never stopped. Nothing is loaded.

    Raises:
        InputError: If it is not whole, or its optimizer held other parameters than the plan trains at its step.
    """
    damage = damage_of(checkpoint, read=False)  # whoever chose it has read it
    if damage:
        raise InputError(
            f"{checkpoint} is no whole checkpoint of partialtune: {'; '.join(damage[:3])}. "
            f"`--resume_from_checkpoint auto` takes the newest whole one of output_dir."
        )
    with read_with_care(checkpoint):
        step = _checked_state(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))).global_step
    file = checkpoint / OPTIMIZER_NAME
    if not any(checkpoint.glob("optimizer*")):
        raise InputError(f"{checkpoint} holds no optimizer: going on with a fresh one would be another run.")
    if not file.is_file():  # sharded: PyTorch keeps it in a folder of its own, by name
        return
    with read_with_care(checkpoint):
        groups = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        held = {str(name) for group in groups for name in group["params"]}
    trained = set(plan.phase_at(step - 1).trainable)
    if held != trained:
        both = {"not in the plan": sorted(held - trained), "not in the checkpoint": sorted(trained - held)}
        differences = "; ".join(f"{len(names)} {where}, as {names[0]}" for where, names in both.items() if names)
        raise InputError(
            f"{checkpoint} does not fit: its optimizer holds {len(held)} parameters, and up to step {step} this plan "
            f"trains {len(trained)} ({differences}). Go on with the recipe of that run, or start in a new output_dir."
        )
