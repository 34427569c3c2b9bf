"""Learning rates of parts, in an optimizer: what marks a group, what the log says, what a scheduler has to keep.

Where a plan has `part_learning_rates` or a `layer_decay`, `plan_optimizer.suit_optimizer` gives each rate groups of its
own and marks every group of the optimizer. The mark goes into the optimizer's `state_dict` with the group, and so into
checkpoints: one of other rates is known by it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from partialtune.errors import RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import PlannedParameter

MARK = "rate_of_plan"  # key in a group
OTHER_RATIOS = 1e-3  # relative difference: more is no rounding


class Rate(NamedTuple):
    """What a plan says of the rate of a group.

    Attributes:
        learning_rate: None where the group's own holds.
        factor: What the one that holds is multiplied with.
        name: In the log; empty for the optimizer's own rate, and in plans without rates of parts.
    """

    learning_rate: float | None = None
    factor: float = 1.0
    name: str = ""

    @classmethod
    def of(cls, parameter: PlannedParameter) -> "Rate":
        return cls(parameter.learning_rate, parameter.rate_factor, parameter.rate_name)

    def value(self, own: Any) -> float:
        """The rate where the group's own is `own`, a number or a tensor."""
        rate = own if self.learning_rate is None else self.learning_rate
        return 0.0 if rate is None else float(rate) * self.factor  # Adafactor's group may have none: refused elsewhere

    def words(self) -> str:
        """`0.001`, `0.81 times learning_rate`."""
        if self.learning_rate is None:
            return f"{self.factor:g} times learning_rate"
        return f"{self.value(None):g}"

    def mark(self, own: Any, name: str) -> dict[str, Any]:
        """What a group keeps: the plan's words, the rate that it starts from, and its name in the log."""
        return {**self._asdict(), "start": self.value(own), "logged_as": name}


OWN = Rate()


def rate_of(group: Mapping[str, Any]) -> Rate | None:
    """What the plan says of a group's rate; None where it is not marked."""
    mark = group.get(MARK)
    return None if mark is None else Rate(*(mark[field] for field in Rate._fields))


def rates_by_name(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The present rate of each part: {"learning_rate/embeddings": 1e-05}; empty where the plan has none.

    Several groups of one rate, of which one has weight decay and one has not, have one name.
    """
    named = {group[MARK]["logged_as"]: float(group["lr"]) for group in optimizer.param_groups if MARK in group}
    return {f"learning_rate/{name}": rate for name, rate in named.items() if name}


def same_rates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the plan of both groups says the same of their rates."""
    return rate_of(one) == rate_of(other)


def check_ratios(optimizer: torch.optim.Optimizer) -> None:
    """Stop where a scheduler does not begin with the rates of the parts: OneCycleLR gives all groups its own.

    Raises:
        RecipeError: Names a group.
    """
    started = [
        (group[MARK], float(group["initial_lr"]) / group[MARK]["start"])
        for group in optimizer.param_groups
        if MARK in group and "initial_lr" in group and group[MARK]["start"]
    ]
    for mark, times in started:
        if abs(times - started[0][1]) > OTHER_RATIOS * abs(started[0][1]):
            name = mark["logged_as"] or "what has no rate of its own"
            raise RecipeError(
                f"The learning rate scheduler begins {name} at {times * mark['start']:g}, and the plan at "
                f"{mark['start']:g}: it has one rate for all groups of the optimizer. Take one that multiplies each "
                f"group's own (LambdaLR, get_scheduler), or give it a list: "
                f"max_lr=[group['lr'] for group in optimizer.param_groups]."
            )


class PartRates:
    """The rates of the parts in the newest step.

    Args:
        plan: Where it has no rates of parts, nothing is noted.

    Attributes:
        newest: By name in the log; empty before the first step.
        own: The rate of the optimizer's first group, which Trainer logs as `learning_rate`.
    """

    def __init__(self, plan: FreezePlan) -> None:
        self._is_on, self._is_checked = plan.names_rates, False
        self.newest: dict[str, float] = {}
        self.own = 0.0

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        """Right before a step of the optimizer.

        Raises:
            RecipeError: In the first step, as `check_ratios`.
        """
        if self._is_on:
            if not self._is_checked:
                check_ratios(optimizer)
                self._is_checked = True
            self.newest, self.own = rates_by_name(optimizer), float(optimizer.param_groups[0]["lr"])


class RateCallback(TrainerCallback):
    """`PartRates` in a Trainer."""

    def __init__(self, rates: PartRates) -> None:
        self.rates = rates

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.note(optimizer)
