"""How far a tensor is from what it was: L2 norm, relative and largest change, summed in fp64.

In fp32 the sum over the 38.6 million values of GPT-2's embeddings would lose what single small changes add to it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from partialtune.model.parameters import chunks_of, piece_size

HAVE_FP64 = ("cpu", "cuda")  # devices; MPS has none, and its values are moved to the CPU


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


def unknown(name: str) -> ParameterDelta:
    """The delta of a parameter that cannot be measured."""
    return ParameterDelta(name, None, None, None)


def l2_norm(values: torch.Tensor) -> float:
    """||values||, summed in fp64."""
    return float(change_sums(values, None)[0]) ** 0.5


def change_sums(now: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Sum of the squares and largest magnitude of `now - before`, shape (2,), fp64, on the device that summed.

    Args:
        now: Any shape. Floating-point values are exact in fp64; integers are subtracted as such, and the real and
            imaginary parts of complex ones count as two.
        before: The same shape, on any device; None for 0.
    """
    now, before = as_real(now), None if before is None else as_real(before)
    device = now.device if now.device.type in HAVE_FP64 else torch.device("cpu")
    square_sum, largest = torch.zeros(2, dtype=torch.float64, device=device)
    size = piece_size(device)  # widened piece by piece: temporaries stay small beside any tensor
    earlier = [None] * -(-now.numel() // size) if before is None else chunks_of(before, size)
    for piece, piece_before in zip(chunks_of(now, size), earlier, strict=True):
        exact = torch.float64 if piece.is_floating_point() else torch.int64  # fp64 holds whole numbers up to 2^53 only
        change = piece.to(device, exact)
        if piece_before is not None:
            change = change - piece_before.to(device)
        change = change.to(torch.float64)
        square_sum = square_sum + torch.dot(change, change)
        low, high = torch.aminmax(change)  # both in one pass, where abs() would write a copy
        largest = torch.maximum(largest, torch.maximum(high, -low))
    return torch.stack([square_sum, largest])


def as_real(values: torch.Tensor) -> torch.Tensor:
    """Complex values as pairs of real ones, in a last dimension of 2; others as they are."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def delta_from_sums(name: str, square_sum: float, largest: float, norm_before: float) -> ParameterDelta:
    """The delta of a parameter from its `change_sums` and its norm before."""
    l2_delta = square_sum**0.5
    if not math.isfinite(l2_delta):
        return unknown(name)
    return ParameterDelta(name, l2_delta, l2_delta / norm_before if norm_before else None, largest)


def delta_between(name: str, now: torch.Tensor, before: torch.Tensor, norm_before: float) -> ParameterDelta:
    """How far a parameter is from what it was.

    Args:
        name: For the result.
        now: Its values.
        before: Its values before, of the same shape; the floating-point dtypes may differ.
        norm_before: `l2_norm(before)`.
    """
    square_sum, largest = change_sums(now, before).tolist()
    return delta_from_sums(name, square_sum, largest, norm_before)


def together(distances: Sequence[float | None]) -> float | None:
    """L2 distance of several parameters taken as one: the root of the summed squares; None where one is unknown."""
    known = [distance for distance in distances if distance is not None]
    return sum(distance**2 for distance in known) ** 0.5 if len(known) == len(distances) else None
