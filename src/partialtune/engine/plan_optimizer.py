"""An optimizer that suits a plan: frozen parameters are not in it, rates have groups, its state is kept by names.

    suit_optimizer(optimizer, model, plan)     # before a scheduler is made
    handles = key_by_name(optimizer, model)

PyTorch numbers parameters by their place in the optimizer. Then a checkpoint of other trainable layers of the same
shapes loads silently, and each layer goes on with the moments of another one. Under names it cannot.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from partialtune.engine.part_rates import MARK, OWN, Rate, rate_of, same_rates
from partialtune.errors import InputError, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import named_learners, named_weights, rows_by_name
from partialtune.model.row_parameters import rows_by_matrix
from partialtune.model.rows import name_with_rows

WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer"}  # by their names: neither library need be imported
# A key of `optimizer.state` beside those of parameters: name -> state of each parameter that rests and keeps its state.
# torch hands on what is under a key that is no parameter ("copied as is", in `Optimizer.load_state_dict`), so that it
# is saved and loaded with the optimizer, by whatever does it.
RESTING = "resting"
KEPT_BY_TORCH = ("param_groups", "state", "defaults")  # of each optimizer


# ---- the optimizer suits the plan -----------------------------------------------------------------------------------


def apply_beside_optimizer(model: nn.Module, plan: FreezePlan, optimizer: torch.optim.Optimizer) -> list[str]:
    """Apply the plan to a model whose optimizer exists already, and let the optimizer suit it. May be done again.

    Args:
        model: The model itself.
        plan: Made for it; applied to it already or not.
        optimizer: Made by somebody else; a wrapper of accelerate or Lightning is looked through.

    Returns:
        As `suit_optimizer`.

    Raises:
        RecipeError: If the plan adds parameters that no optimizer can hold that was made before; as `suit_optimizer`.
    """
    names = {id(parameter): name for name, parameter in named_learners(model)}
    added = [parameter.name for parameter in plan.parameters if parameter.name not in names.values()]
    if added and (plan.head == "untied" or plan.adapter is not None):
        what = "adapters" if plan.adapter is not None else "a matrix of its own for the head (head: untied)"
        raise RecipeError(
            f"The plan adds {what}, {added[0]}, and the optimizer was made before. Call apply_plan(model, plan) first, "
            f"and make the optimizer after it."
        )
    _refuse_old_rows(model, plan)
    _refuse_unsuitable(bare_optimizer(optimizer))  # before the model is touched
    _refuse_strangers(bare_optimizer(optimizer), names)
    apply_plan(model, plan)
    return suit_optimizer(optimizer, model, plan)


MAKE_IT_AFTER = "Call apply_plan(model, plan) first, and make the optimizer after it."


def suit_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, plan: FreezePlan) -> list[str]:
    """Take what the plan freezes out of the optimizer, and give what has a learning rate of its own a group of its own.

    All else stays in its group, with that group's settings, and no group is removed, though it be empty: a scheduler
    that exists keeps a rate for each. What no gradient is asked for and is not the model's leaves the optimizer too.
    Doing it again changes nothing.

    Args:
        optimizer: Of any class that keeps one state a parameter, or accelerate's or Lightning's wrapper of it.
        model: The model itself; the plan is applied to it.
        plan: Says what trains.

    Returns:
        Names of what trains in some phase and is not in the optimizer. It is not added: the audit calls it a violation.

    Raises:
        RecipeError: If the optimizer packs its state, holds parameters that are not the model's, was made before the
            head was untied, or has a scheduler already where the plan needs another group or rate. Nothing is changed.
    """
    optimizer = bare_optimizer(optimizer)
    _refuse_unsuitable(optimizer)
    names = {id(parameter): name for name, parameter in named_learners(model)}
    _refuse_strangers(optimizer, names)
    _refuse_whole_matrices(optimizer, model)
    planned = {parameter.name: parameter for parameter in plan.parameters if parameter.trainable}
    held = {names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name in planned if name not in held]
    _refuse_old_head(plan, missing, held)
    staying: list[ByRate] = []
    for group in optimizer.param_groups:
        by_rate: ByRate = {}
        for member in members_of(group):
            entry = planned.get(names.get(id(member.parameter), ""))
            if entry is not None:
                by_rate.setdefault(Rate.of(entry), []).append(member)
        staying.append(by_rate)
    _refuse_new_rates(optimizer, staying, plan)
    _regroup(optimizer, staying, plan.names_rates)
    learning = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in [parameter for parameter in optimizer.state if id(parameter) not in learning]:
        del optimizer.state[parameter]
    return missing


def bare_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside the wrapper of accelerate or Lightning, which call it at each real step."""
    wrapped = any(kind.__name__ in WRAPPERS for kind in type(optimizer).__mro__)
    return bare_optimizer(optimizer.optimizer) if wrapped else optimizer


class Member(NamedTuple):
    """A parameter in a group, with the name that the group may hold for it (an optimizer of `named_parameters()`)."""

    parameter: nn.Parameter
    name: str | None


ByRate = dict[Rate, list[Member]]  # of one group


def members_of(group: Mapping[str, Any]) -> list[Member]:
    """The parameters of a group, in its order."""
    names = group.get("param_names") or [None] * len(group["params"])
    return [Member(*pair) for pair in zip(group["params"], names, strict=True)]


def set_members(group: dict[str, Any], members: list[Member]) -> None:
    """In place: some optimizers and loops keep the list."""
    group["params"][:] = [member.parameter for member in members]
    if "param_names" in group:
        group["param_names"][:] = [member.name for member in members]


def first_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], member: Member) -> Any:
    """The state with which a parameter enters that has none: what the optimizer's constructor makes of it, or None.

    Of the optimizers that are known here Adagrad alone does not make it in the first step that it takes.
    """
    if not isinstance(optimizer, torch.optim.Adagrad):
        return None
    made = torch.optim.Adagrad([member.parameter], initial_accumulator_value=group["initial_accumulator_value"])
    return made.state[member.parameter]


def on_its_device(state: Mapping[str, Any], group: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """A state that may have been loaded on another device, where the optimizer's step looks for it."""
    # torch leaves the number of steps on the CPU, but for kernels that read it on the device
    all_there = group.get("fused") or group.get("capturable")
    return {
        key: value.to(member.parameter.device)
        if isinstance(value, torch.Tensor) and (value.ndim or all_there)
        else value
        for key, value in state.items()
    }


def _rate_that_stays(group: Mapping[str, Any], by_rate: ByRate, names_rates: bool) -> Rate:
    """Of the members of a group: the rate of those that stay in it, `OWN` where that is the group's own."""
    if names_rates:  # the group keeps its own, though it be empty: Trainer logs that of the first one for all
        return rate_of(group) or OWN
    return OWN if OWN in by_rate else next(iter(by_rate), OWN)


def _regroup(optimizer: torch.optim.Optimizer, staying: list[ByRate], names_rates: bool) -> None:
    # Two rates do not share a name, though the user's groups have rates of their own.
    several = names_rates and len({float(group["lr"]) for group in optimizer.param_groups if MARK not in group}) > 1
    for number, (group, by_rate) in enumerate(zip(list(optimizer.param_groups), staying, strict=True)):
        stays, own = _rate_that_stays(group, by_rate, names_rates), group["lr"]
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names", MARK)}
        set_members(group, by_rate.get(stays, []))
        if names_rates:
            group.setdefault(MARK, OWN.mark(own, ""))
        elif stays != OWN:
            group["lr"] = _like(own, stays.value(own))
        for rate, members in by_rate.items():
            if rate not in (OWN, stays):
                name = f"{rate.name}/group_{number}" if several and rate.learning_rate is None else rate.name
                mark = {MARK: rate.mark(own, name)} if names_rates else {}
                named = "param_names" in group
                members_or_pairs = [(name, p) if named else p for p, name in members]
                lr = _like(own, rate.value(own))
                optimizer.add_param_group({**settings, **mark, "lr": lr, "params": members_or_pairs})


def _like(present: Any, rate: float) -> Any:
    """A rate as the group holds its own: `capturable` optimizers want a tensor, and change it in place."""
    return torch.full_like(present, rate) if isinstance(present, torch.Tensor) else rate


# ---- what is refused ------------------------------------------------------------------------------------------------


def _refuse_unsuitable(optimizer: Any) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RecipeError(
            f"The optimizer is a {kind}, which is no torch.optim.Optimizer: what is frozen cannot be taken out of it. "
            f"Give the optimizer that it wraps, or one of torch.optim."
        )
    learning = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    others = [key for key in optimizer.state if id(key) not in learning]
    packed = [name for name, value in vars(optimizer).items() if name not in KEPT_BY_TORCH and _is_packed(value)]
    packed += [
        key for group in optimizer.param_groups for key, value in group.items() if key != "params" and _is_packed(value)
    ]
    if others or packed:
        where = f"in `{packed[0]}`" if packed else "under keys that are none of its parameters"
        raise RecipeError(
            f"{kind} keeps values of many parameters together ({where}): the frozen ones cannot be taken out of it. "
            f"Take an optimizer that keeps one state a parameter, such as torch.optim.AdamW."
        )


def _is_packed(value: Any) -> bool:
    """Whether it is no setting: a tensor of several values, such as a flat buffer, or a list of parameters."""
    several = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, torch.Tensor) and one.numel() > 1 for one in several)


def _refuse_strangers(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
    strangers = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and id(parameter) not in names
    ]
    if strangers:
        raise RecipeError(
            f"The optimizer holds {len(strangers)} parameters that are not the model's, the first of shape "
            f"{tuple(strangers[0].shape)}: the plan does not say whether they train. Make the optimizer of this "
            f"model's parameters alone, after all that changes them (get_peft_model, resize_token_embeddings)."
        )


def _refuse_old_head(plan: FreezePlan, missing: list[str], held: set[str | None]) -> None:
    """An optimizer that was made of a tied model holds the matrix as the embedding's, and not the head's copy of it."""
    if plan.head != "untied":
        return
    component = {parameter.name: parameter.component for parameter in plan.parameters}
    embedding = any(component.get(name or "") == "embeddings.tokens" for name in held)
    head = next((name for name in missing if component[name] == "head"), None)
    if embedding and head is not None:
        raise RecipeError(
            f"The plan gives the head a matrix of its own (head: untied), and the optimizer holds the embedding but "
            f"not {head}: it was made before. Make the optimizer after apply_plan(model, plan)."
        )


def _refuse_old_rows(model: nn.Module, plan: FreezePlan) -> None:
    """An optimizer that was made before these rows had a parameter of their own cannot hold it."""
    present = {name: trained.rows for name, trained in rows_by_name(model).items()}
    if others := [name for name in plan.rows.keys() | present.keys() if plan.rows.get(name) != present.get(name)]:
        name = min(others)
        what = name_with_rows(name, plan.rows[name]) if name in plan.rows else f"the whole of {name}"
        raise RecipeError(
            f"The plan says how {what} is to learn, and rows learn through a parameter of their own, which an "
            f"optimizer that was made before does not fit. {MAKE_IT_AFTER}"
        )


def _refuse_whole_matrices(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """An optimizer that was made before apply_plan holds a matrix whole of which rows train."""
    rows, held = rows_by_matrix(model), {id(p) for group in optimizer.param_groups for p in group["params"]}
    # One that was made of all parameters after it holds both, and the matrix leaves it as what is frozen does.
    alone = [
        name
        for name, matrix in named_weights(model)
        if id(matrix) in rows and id(matrix) in held and id(rows[id(matrix)].parameter) not in held
    ]
    if alone:
        found = alone[0]
        raise RecipeError(
            f"The optimizer holds the whole of {found}, of which only rows train: it was made before, and would learn "
            f"nothing of it. {MAKE_IT_AFTER}"
        )


def _refuse_new_rates(optimizer: torch.optim.Optimizer, staying: list[ByRate], plan: FreezePlan) -> None:
    scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")  # torch's schedulers mark it so
    for group, by_rate in zip(optimizer.param_groups, staying, strict=True):
        if rate_of(group) is not None and set(by_rate) - {rate_of(group)}:
            raise RecipeError(
                "The optimizer has the learning rates of another plan, whose part_learning_rates or layer_decay "
                "differ. Make a new optimizer."
            )
        rates = [rate for rate in by_rate if rate != OWN]
        if not rates or rate_of(group) is not None:
            continue
        gives, words = "The schedule gives parameters a learning_rate", "take learning_rate out of the schedule"
        if plan.names_rates:
            gives = f"{'part_learning_rates' if plan.part_learning_rates else 'layer_decay'} gives parameters a rate"
            words = "take part_learning_rates and layer_decay out of the plan"
        gives = f"{gives} of their own ({rates[0].words()}), and "
        if group.get("relative_step"):
            raise RecipeError(
                f"{gives}{type(optimizer).__name__} with relative_step chooses its rates itself. Say "
                f"relative_step=False, or {words}."
            )
        is_so = len(by_rate) == 1 and float(group.get("initial_lr", group["lr"])) == rates[0].learning_rate
        if (plan.names_rates or not is_so) and (scheduled or "initial_lr" in group):
            raise RecipeError(
                f"{gives}the optimizer has a learning rate scheduler already, which keeps a rate for each of its "
                f"groups. Make the scheduler after attach or audited, or {words}."
            )


# ---- state by name -------------------------------------------------------------------------------------------------


def key_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[RemovableHandle]:
    """Let the optimizer's `state_dict` name parameters as the plan does, and `load_state_dict` take such a one.

    {"state": {name: {"exp_avg": ...}}, "param_groups": [{"lr": ..., "params": [name, ...]}]}

    Returns:
        What takes it back: `handle.remove()` of each.
    """
    name_of = {id(parameter): name for name, parameter in learners_by_name(model).items()}
    optimizer = bare_optimizer(optimizer)
    return [
        optimizer.register_state_dict_post_hook(partial(_places_to_names, name_of)),
        optimizer.register_load_state_dict_pre_hook(partial(_names_to_places, name_of)),
    ]


def learners_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer may hold, by the name that its saved state has for it."""
    rows = {name: trained.rows for name, trained in rows_by_name(model).items()}
    # With the rows in the name: the moments of other rows, though as many, do not load.
    return {name_with_rows(name, rows.get(name)): parameter for name, parameter in named_learners(model)}


def _places_to_names(
    name_of: Mapping[int, str], optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    names = [name for group in _names_by_group(name_of, optimizer) for name in group]
    groups = [{**group, "params": [names[place] for place in group["params"]]} for group in state_dict["param_groups"]]
    states = dict(state_dict["state"])
    resting = {RESTING: dict(states.pop(RESTING))} if RESTING in states else {}
    return {"state": {**{names[place]: states[place] for place in states}, **resting}, "param_groups": groups}


def _names_to_places(
    name_of: Mapping[int, str], optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters that are not named, those of later phases, keep the state that the optimizer was made with."""
    names, saved = _names_by_group(name_of, optimizer), saved_groups(state_dict)
    if any(isinstance(name, int) for group in saved for name in group["params"]):
        raise InputError(
            "The checkpoint was saved without attach: its optimizer numbers its parameters and names none. Load "
            "its weights (from_pretrained), and begin a new training from them, without resume_from_checkpoint."
        )
    if len(saved) != len(names) or any(set(old["params"]) - set(new) for old, new in zip(saved, names, strict=True)):
        raise InputError(
            "The checkpoint's optimizer has other groups of parameters than this run's: `weight_decay_on`, `schedule`, "
            "`part_learning_rates`, `layer_decay` or the rows that train differ. Go on with the recipe of that run, or "
            "start in a new output_dir."
        )
    if not all(same_rates(old, new) for old, new in zip(saved, optimizer.param_groups, strict=True)):
        raise InputError(
            "The checkpoint's optimizer has other learning rates of parts than this run's: `part_learning_rates` or "
            "`layer_decay` differ. Go on with the recipe of that run, or start in a new output_dir."
        )
    kept = state_dict.get("state")
    resting = {}
    if isinstance(kept, Mapping) and RESTING in kept:
        resting = {RESTING: dict(_checked_resting(kept[RESTING], name_of))}
        kept = {name: state for name, state in kept.items() if name != RESTING}
    if not (isinstance(kept, Mapping) and kept.keys() <= {name for group in saved for name in group["params"]}):
        raise ValueError("its optimizer holds the state of parameters that are in none of its groups")
    place_of = {name: place for place, name in enumerate(name for group in names for name in group)}
    present = {name_of[id(one)]: state for one, state in optimizer.state.items() if isinstance(one, torch.Tensor)}
    states = present | dict(kept)
    groups = [{**old, "params": [place_of[name] for name in new]} for old, new in zip(saved, names, strict=True)]
    return {"state": {**{place_of[name]: state for name, state in states.items()}, **resting}, "param_groups": groups}


def _checked_resting(resting: Any, name_of: Mapping[int, str]) -> Mapping[str, Any]:
    if not (isinstance(resting, Mapping) and resting.keys() <= set(name_of.values())):
        raise ValueError("its optimizer holds the state of resting parameters that are not the model's")
    return resting


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
