"""A model's weights before training: digests of every parameter, copies of those that train."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from partialtune.freeze.plan import FreezePlan
from partialtune.proof.weights import bit_sum, chunks_of, digest, named_weights, whole

_TAKEN: "WeakKeyDictionary[nn.Module, Snapshot]" = WeakKeyDictionary()


@dataclass(frozen=True)
class ParameterDelta:
    """How far one parameter moved since its snapshot.

    Attributes:
        l2_delta: ||after - before||, exactly 0.0 where every bit is the same. None where it is unknown: for a frozen
            parameter that changed (only its digest was kept) and where a value is not finite.
        relative_delta: ||after - before|| / ||before||, None where the norm before is 0 or l2_delta is None.
        max_abs_delta: Largest change of one value, None as l2_delta.
    """

    name: str
    l2_delta: float | None
    relative_delta: float | None
    max_abs_delta: float | None


@dataclass(frozen=True)
class Snapshot:
    """The start of a run: what every later state is compared with.

    Attributes:
        digests: sha256 by parameter name.
        bit_sums: Quick checksum of each frozen parameter, see `weights.bit_sum`.
        copies: A real copy of each trainable parameter, on the CPU in its own dtype. Never a view: on a CPU
            `parameter.data` is the live tensor, and a difference to itself is always 0.
        norms: L2 norm of each trainable parameter.
    """

    digests: dict[str, str]
    bit_sums: dict[str, int]
    copies: dict[str, torch.Tensor]
    norms: dict[str, float]

    def still_holds(self, model: nn.Module) -> bool:
        """Whether the trainable parameters of `model` are what they were."""
        present = dict(named_weights(model))
        return self.copies.keys() <= present.keys() and all(
            torch.equal(whole(present[name]).cpu(), copy) for name, copy in self.copies.items()
        )


def take_snapshot(model: nn.Module, plan: FreezePlan) -> Snapshot:
    """The snapshot of `model` as it is now. Callbacks of one run that ask at the same point share one."""
    known = _TAKEN.get(model)
    trainable = set(plan.trainable)
    if known is not None and known.copies.keys() == trainable and known.still_holds(model):
        return known
    digests, bit_sums, copies, norms = {}, {}, {}, {}
    for name, parameter in named_weights(model):
        digests[name] = digest(parameter)
        if name in trainable:
            copies[name] = whole(parameter).to("cpu", copy=True)
            norms[name] = l2_norm(copies[name])
        else:
            bit_sums[name] = bit_sum(parameter)
    _TAKEN[model] = Snapshot(digests, bit_sums, copies, norms)
    return _TAKEN[model]


def measure_deltas(model: nn.Module, snapshot: Snapshot) -> Iterator[ParameterDelta]:
    """How far each parameter of `model` is from the snapshot, in the order of `named_parameters()`.

    Sums run in fp64 over values that are exact in fp64, on the CPU (MPS has no float64).
    """
    for name, parameter in named_weights(model):
        if name in snapshot.copies:
            yield delta_between(name, whole(parameter), snapshot.copies[name], snapshot.norms[name])
        elif bit_sum(parameter) == snapshot.bit_sums[name]:
            yield ParameterDelta(name, 0.0, 0.0 if parameter.numel() else None, 0.0)
        else:
            yield ParameterDelta(name, None, None, None)


def l2_norm(values: torch.Tensor) -> float:
    """||values||, summed in fp64 on the CPU."""
    wide_pieces = (piece.cpu().double() for piece in chunks_of(values))
    return sum(float(torch.dot(piece, piece)) for piece in wide_pieces) ** 0.5


def delta_between(name: str, now: torch.Tensor, before: torch.Tensor, norm_before: float) -> ParameterDelta:
    """How far a parameter is from what it was.

    Args:
        name: For the result.
        now: Its values.
        before: Its values before, of the same shape; the dtypes may differ.
        norm_before: `l2_norm(before)`.
    """
    square_sum, largest = 0.0, 0.0
    for now_piece, before_piece in zip(chunks_of(now), chunks_of(before), strict=True):
        change = now_piece.cpu().double() - before_piece.double()
        square_sum += float(torch.dot(change, change))
        largest = max(largest, float(change.abs().max()))
    l2_delta = square_sum**0.5
    if not math.isfinite(l2_delta):
        return ParameterDelta(name, None, None, None)
    return ParameterDelta(name, l2_delta, l2_delta / norm_before if norm_before else None, largest)
