"""Whether an optimizer's steps were large enough to move a parameter that kept every bit.

A parameter that trains and did not move is a fault only if an update was lost. A gradient alone does not tell: an
update below half the spacing of floating-point numbers near a value rounds away (near 1 half the spacing of fp32 is
6e-8 upwards, of bf16 4e-3). So before each step the values, gradients and optimizer state of what has not moved yet are
noted. Where it has not moved after the step either, the optimizer's own class takes that step again on a copy in fp64,
and the update is compared with the spacing. What has moved once is watched no more: after the first step of an ordinary
run nothing is left to note, and the proof costs nothing.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from partialtune.errors import InputError
from partialtune.model.digests import bit_sums, same_bits
from partialtune.model.parameters import is_sharded, numbers, piece_size
from partialtune.model.rows import Rows
from partialtune.proof.audit_result import CANNOT_BE_TOLD, NEVER_A_GRADIENT, ONLY_SKIPPED, TOO_SMALL
from partialtune.proof.row_gradients import RowGradients

logger = logging.getLogger(__name__)

SAMPLED = 4096  # values of a parameter that are noted, each with the largest gradient of its part of the tensor
# Each value's update depends on that value's gradient and state alone, so that a sample can be stepped by itself.
ELEMENTWISE = {
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.SGD, torch.optim.ASGD, torch.optim.RMSprop, torch.optim.Rprop),
    *(torch.optim.Adagrad, torch.optim.Adadelta),
}
# Others (Adafactor) need whole tensors, copied with their state before the step: of at most so many values in the first
# step, in which nearly all parameters move, and of at most so many once a parameter has kept every bit in a step.
WHOLE_AT_ONCE, WHOLE_UP_TO = 2**16, 2**22
SMALLEST = 5e-324  # the smallest fp64 above 0
ONE_BY_ONE = {"fused": None, "foreach": False, "capturable": False}  # fast kernels take no fp64 on a CPU


class Due(NamedTuple):
    """An update that a step was due to make, and half the spacing at its value: a larger update changes a bit."""

    update: float
    half_spacing: float

    @property
    def is_enough(self) -> bool:
        return self.update > self.half_spacing

    @property
    def share(self) -> float:
        return self.update / max(self.half_spacing, SMALLEST)


NONE = Due(0.0, 1.0)


class _Noted(NamedTuple):
    """What is known of a parameter right before a step; `places` None for all of its values."""

    places: torch.Tensor | None
    values: torch.Tensor
    gradient: torch.Tensor
    settings: Mapping[str, Any]  # of the optimizer's group: rate, betas, weight decay
    state: Mapping[str, Any] | None  # the optimizer's; None where the step cannot be taken again


class DueUpdates:
    """Watches parameters until they have moved, or an update was due that had to move them.

    Attributes:
        had_gradient: Names of those that had a gradient other than 0 in a step that was taken at a rate above 0.
        skipped: Names of those that had one in a step that the gradient scaler of fp16 skipped.
        due: Names of those that moved, or were due to move.
        largest: For the others, where it can be told, the update that came closest to moving them.
        optimizer_name: Class of the optimizer.
        rows: Which rows, of matrices of which some train, have had a gradient.
    """

    def __init__(self) -> None:
        self.rows = RowGradients()
        self.had_gradient: set[str] = set()
        self.skipped: set[str] = set()
        self.due: set[str] = set()
        self.largest: dict[str, Due] = {}
        self.optimizer_name = ""
        self._optimizer: torch.optim.Optimizer | None = None
        self._watched: dict[str, tuple[nn.Parameter, dict[str, Any]]] = {}
        self._start: Mapping[str, int] = {}
        self._noted: dict[str, _Noted] = {}
        self._kept_once: set[str] = set()

    def watch(
        self,
        learning: Mapping[str, tuple[nn.Parameter, dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        start: Mapping[str, int],
        rows: Mapping[str, Rows] | None = None,
    ) -> None:
        """Watch these from now on.

        Args:
            learning: By name: the parameter, and the optimizer's group that holds it.
            optimizer: May be accelerate's wrapper.
            start: `bit_sum` of each at the start of the run.
            rows: By name of a matrix of which some rows train, which ones: the parameter is these.
        """
        self.after_step()
        self.rows.watch(learning, rows or {})
        self._optimizer, self._start = optimizer, start
        self.optimizer_name = type(_plain(optimizer)).__name__
        self._watched = {name: pair for name, pair in learning.items() if name not in self.due}

    def before_step(self, scale: float = 1.0) -> None:
        """Note what the step needs. Its gradients are final: clipped, and of all processes.

        Args:
            scale: What the gradients are still multiplied with, as under fp16 without clipping.
        """
        self.after_step()
        self.rows.before_step()
        for name, (parameter, group) in self._watched.items():
            rate = group.get("lr")
            # At rate 0, as in the first step of a warm-up, nothing moves. A shard may be empty.
            if parameter.grad is not None and (rate is None or rate > 0) and _local(parameter).numel():
                self._noted[name] = self._note(name, parameter, group, scale)

    def after_step(self) -> None:
        """For all that was noted: did it move? Else, was it due to? Does nothing where nothing was noted.

        It is called again before the next step and at saves, since not every loop calls it after each step.
        """
        noted, self._noted = self._noted, {}
        skipped = getattr(self._optimizer, "step_was_skipped", False)
        self.rows.after_step(skipped)
        if not noted:
            return
        with_gradient = _names(noted, lambda name: noted[name].gradient.any())
        if skipped:
            self.skipped |= with_gradient
            return
        self.had_gradient |= with_gradient
        moved = _names(noted, lambda name: ~same_bits(self._present(name, noted[name]), noted[name].values).all())
        # Of some only a sample was noted: another value may have moved, now or in an earlier step.
        others = {n: self._watched[n][0] for n in noted if n not in moved and not is_sharded(self._watched[n][0])}
        moved |= {name for name, total in bit_sums(others.items()).items() if total != self._start.get(name, total)}
        for name in noted.keys() - moved:
            due = self._due(noted[name])
            if due is not None and (name not in self.largest or due.share > self.largest[name].share):
                self.largest[name] = due
        self._kept_once |= noted.keys() - moved
        self.due |= moved | {name for name, due in self.largest.items() if due.is_enough}
        for name in self.due:
            self._watched.pop(name, None)
            self.largest.pop(name, None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `go_back_to`."""
        self.after_step()
        return {
            "had_gradient": sorted(self.had_gradient),
            "skipped": sorted(self.skipped),
            "due": sorted(self.due),
            "largest": {name: list(due) for name, due in sorted(self.largest.items())},
            **self.rows.state(),
        }

    def go_back_to(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint keeps; one of an older version keeps less.

        Raises:
            InputError: If it is not what `state` gives.
        """
        self._noted = {}
        try:
            self.had_gradient, self.skipped, self.due = (
                set(state.get(key, ())) for key in ("had_gradient", "skipped", "due")
            )
            self.largest = {name: Due(*map(float, due)) for name, due in state.get("largest", {}).items()}
            self.rows.take_over([state], anew=True)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"The checkpoint's trainer_state.json is damaged: its freeze audit ({error}).") from error

    def why_not_due(self, name: str) -> str:
        """Why no update had to move a parameter, as far as that can be told."""
        if name not in self.had_gradient:
            return ONLY_SKIPPED if name in self.skipped else NEVER_A_GRADIENT
        if name in self.largest:
            return TOO_SMALL.format(**self.largest[name]._asdict())
        return CANNOT_BE_TOLD.format(optimizer=self.optimizer_name)

    def merge(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Take over what all processes found, each on its own shards."""
        states = list(states)
        self.rows.take_over(states)
        for state in states:
            for known, key in ((self.had_gradient, "had_gradient"), (self.skipped, "skipped"), (self.due, "due")):
                known.update(state[key])
            for name, due in state["largest"].items():
                self.largest[name] = max(Due(*due), self.largest.get(name, NONE), key=lambda one: one.share)

    def _note(self, name: str, parameter: nn.Parameter, group: Mapping[str, Any], scale: float) -> _Noted:
        gradient = _local(parameter.grad)
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()  # enough to tell whether one is not 0
            return _Noted(torch.zeros(0, dtype=torch.int64), gradient.new_zeros(0), gradient, {}, None)
        state = _plain(self._optimizer).state.get(parameter, {})
        by_element = type(_plain(self._optimizer)) in ELEMENTWISE and not parameter.is_complex()
        whole = not by_element and not is_sharded(parameter)
        whole = whole and parameter.numel() <= (WHOLE_UP_TO if name in self._kept_once else WHOLE_AT_ONCE)
        places = None if whole else places_of_largest(gradient)
        if whole:
            noted_state = {key: _copied(value) for key, value in state.items()}
        elif by_element:
            noted_state = {key: _taken(value, parameter, places) for key, value in state.items()}
        else:
            noted_state = None
        return _Noted(
            places=places,
            values=_at(parameter, places),
            gradient=_at(gradient, places) / scale,
            settings={
                key: _plain_number(value) for key, value in group.items() if key not in ("params", "param_names")
            },
            state=noted_state,
        )

    def _present(self, name: str, noted: _Noted) -> torch.Tensor:
        return _at(self._watched[name][0], noted.places)

    def _due(self, noted: _Noted) -> Due | None:
        """The update that the step was due to make at the value that it came closest to moving, None if unknown."""
        values = noted.values
        if noted.state is None or not values.is_floating_point():
            return None
        try:
            update = stepped_again(type(_plain(self._optimizer)), noted) - values.to("cpu", torch.float64)
        except Exception as error:  # noqa: BLE001  (anybody's optimizer may raise anything; training goes on)
            logger.debug("%s takes no step in fp64: %s", self.optimizer_name, error)
            return None
        half = half_spacing(values.cpu(), update)
        share = torch.where(update.isfinite(), update.abs() / half, 0.0).flatten()  # above 1: a bit had to change
        best = int(share.argmax())
        return Due(abs(float(update.flatten()[best])), float(half.flatten()[best])) if share[best] > 0 else NONE


def stepped_again(kind: type[torch.optim.Optimizer], noted: _Noted) -> torch.Tensor:
    """The values after one step of an optimizer of this class, fp64, on the CPU."""
    values = nn.Parameter(noted.values.to("cpu", torch.float64, copy=True))
    values.grad = noted.gradient.to("cpu", torch.float64)
    settings = {**noted.settings, **{key: value for key, value in ONE_BY_ONE.items() if key in noted.settings}}
    optimizer = kind([{**settings, "params": [values]}])
    optimizer.state[values].update(
        {  # moments in fp64; a step count, which has no dimensions, as it is
            key: value.to("cpu", torch.float64) if isinstance(value, torch.Tensor) and value.ndim else value
            for key, value in noted.state.items()
        }
    )
    optimizer.step()
    return values.detach()


def half_spacing(values: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Half the distance from each value to the next number of its dtype in a direction, fp64.

    half_spacing(tensor([1.0]), tensor([+1])) -> 2**-24, half_spacing(tensor([1.0]), tensor([-1])) -> 2**-25

    Args:
        values: Floating point.
        direction: Of the same shape; only its sign counts.
    """
    limits, wide = torch.finfo(values.dtype), values.double()
    mantissa, exponent = torch.frexp(wide)  # |value| = mantissa x 2^exponent, mantissa from 0.5 to below 1, 0 for 0
    towards_zero = (mantissa.abs() == 0.5) & (wide * direction < 0)  # below a power of two numbers lie twice as close
    spacing = limits.eps * torch.exp2((exponent - 1 - towards_zero.int()).double()) * (wide != 0)
    smallest = limits.smallest_normal * limits.eps  # near 0 the spacing no longer shrinks
    return (spacing.clamp_min(smallest) / 2).clamp_min(SMALLEST)


def places_of_largest(gradient: torch.Tensor) -> torch.Tensor:
    """Where the largest |gradient| is in each of at most `SAMPLED` equal parts of a tensor: flat places, (n,)."""
    flat = gradient.reshape(-1)
    width = -(-flat.numel() // SAMPLED)
    whole = flat[: flat.numel() // width * width].view(-1, width)
    rows_at_once = max(1, piece_size(flat.device) // width)
    best = torch.cat([rows.abs().argmax(1) for rows in whole.split(rows_at_once)])
    places = best + width * torch.arange(len(best), device=flat.device)
    rest = flat[whole.numel() :]
    return torch.cat([places, whole.numel() + rest.abs().argmax().view(1)]) if rest.numel() else places


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, which is known by `step_was_skipped`."""
    return optimizer.optimizer if hasattr(optimizer, "step_was_skipped") else optimizer


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The values that this process holds."""
    values = tensor.detach()
    return values.to_local() if is_sharded(values) else values


def _at(tensor: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """A copy of the values at flat places; of all of them for None."""
    values = _local(tensor)
    return values.clone() if places is None else values.reshape(-1)[places]


def _taken(value: Any, parameter: nn.Parameter, places: torch.Tensor) -> Any:
    """The part of an optimizer's state that belongs to the values at these places."""
    of_each = isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 0
    return _at(value, places) if of_each else _copied(value)


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _plain_number(value: Any) -> Any:
    """A learning rate may be a tensor, which changes in place."""
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _names(names: Iterable[str], question: Callable[[str], torch.Tensor]) -> set[str]:
    """Those names for which the answer, a tensor (), is true, waiting for each device once."""
    asked = list(names)
    return {name for name, answer in zip(asked, numbers([question(n) for n in asked]), strict=True) if answer}
