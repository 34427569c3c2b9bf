"""How many directions the change of a matrix has: weights before and after -> effective and stable rank of each.

A change of rank 1 moves every row along one direction; one of full rank moves all directions alike. Two measures, both
from the singular values s_1 >= s_2 >= ... of the change, neither of which needs a threshold:

    effective rank  exp(-sum p_i ln p_i) with p_i = s_i / sum s    Roy and Vetterli, "The effective rank: a measure of
                                                                   effective dimensionality", EUSIPCO 2007
    stable rank     sum s_i^2 / s_1^2                              Rudelson and Vershynin, "Sampling from large
                                                                   matrices", Journal of the ACM 54(4), 2007

Both lie between 1 and the shorter side. The stable rank is the smaller: it sees the strongest directions alone.
"""

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import PlannedParameter
from partialtune.model.parameters import CHUNK, named_weights, whole
from partialtune.progress import progress_bar

logger = logging.getLogger(__name__)

MOST_ARITHMETIC = 2e12  # multiplications and additions in fp64 over all matrices: about 40 s on two CPU cores
CUDA_FACTOR = 50  # a data centre's GPU does so many times as much in that time
LORA_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.(?:[^.]+\.)?weight")


def effective_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 where all are 0.

    effective_rank(torch.tensor([3.0, 3.0, 0.0])) -> 2.0
    """
    total = float(singular_values.sum())
    if total == 0:
        return 0.0
    shares = singular_values[singular_values > 0].double() / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(singular_values: torch.Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm (Rudelson and Vershynin 2007); 0 where all are 0.

    stable_rank(torch.tensor([2.0, 1.0])) -> 1.25
    """
    largest = float(singular_values.max())
    return float((singular_values.double() / largest).square().sum()) if largest > 0 else 0.0


def singular_values_of_change(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Singular values of now - before, fp64, shape (shorter side,), in no order.

    They are the roots of the eigenvalues of the change's Gram matrix over its shorter side, summed in fp64 piece by
    piece: for GPT-2's token embedding (50257 x 768) a matrix of 768 x 768 instead of a decomposition of the whole.
    What is smaller than 1e-8 of the largest is rounding, too little to be seen in either rank.

    Args:
        before, now: A matrix, shape (m, n), any dtype; on the CPU or on CUDA (MPS has no fp64).
    """
    if before.shape[0] < before.shape[1]:
        before, now = before.T, now.T
    short = before.shape[1]
    rows = max(1, CHUNK // short)
    gram = torch.zeros(short, short, dtype=torch.float64, device=now.device)
    for old, new in zip(before.split(rows), now.split(rows), strict=True):
        change = new.double() - old.to(now.device).double()  # (rows, short)
        gram.addmm_(change.T, change)
    if not gram.isfinite().all():  # eigvalsh raises on them, and the run's end is to be written all the same
        return torch.full((short,), math.nan, dtype=torch.float64)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().cpu()


def singular_values_of_adapter(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Singular values of the change B A - B0 A0 that a LoRA adapter makes, but for its constant scale.

    The product (out, in) is never made: with [B, -B0] = Q R and [A; A0]^T = P S its singular values are those of R S^T.

    Args:
        before, now: The adapter's factors `A` (rank, in) and `B` (out, rank).
    """
    left = torch.cat([now["B"].cpu(), -before["B"]], dim=1).double()  # (out, 2 rank)
    right = torch.cat([now["A"].cpu(), before["A"]], dim=0).double()  # (2 rank, in)
    if not (left.isfinite().all() and right.isfinite().all()):
        return torch.full((left.shape[1],), math.nan, dtype=torch.float64)
    return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T)


@dataclass(frozen=True)
class Change:
    """A trained matrix or its rows that train, a stack of them (fused experts), or the two factors of an adapter.

    Attributes:
        name: Of the parameter; of the adapted module where it is an adapter.
        planned: The plan's entries: one, or those of the factors.
        shape: Of the matrix.
        stacked: How many matrices there are, 1 but for fused experts.
    """

    name: str
    planned: tuple[PlannedParameter, ...]
    shape: tuple[int, int]
    stacked: int

    @property
    def largest_possible(self) -> int:
        """The rank that the change cannot exceed."""
        inner = [min(entry.learning_shape) for entry in self.planned] if len(self.planned) > 1 else []
        return min(*self.shape, *inner)

    @property
    def arithmetic(self) -> float:
        """Multiplications and additions of its singular values, roughly."""
        long, short = max(self.shape), min(self.shape)
        if len(self.planned) > 1:
            return 8.0 * long * self.largest_possible**2
        # the Gram matrix (short, short) over `long` rows, then its eigenvalues
        return self.stacked * (2.0 * long * short**2 + 10.0 * short**3)


def trained_matrices(plan: FreezePlan) -> list[Change]:
    """What of the plan's trainable parameters has a rank, in the plan's order. Vectors have none."""
    adapters: dict[str, dict[str, PlannedParameter]] = {}
    changes = []
    for entry in plan.parameters:
        factor = LORA_FACTOR.fullmatch(entry.name)
        shape = entry.learning_shape  # where only some rows train, the change is 0 in all others
        if not entry.trainable or (factor is None and (len(shape) < 2 or min(shape[-2:]) < 2)):
            continue
        if factor is None:
            changes.append(Change(entry.name, (entry,), (shape[-2], shape[-1]), math.prod(shape[:-2])))
            continue
        pair = adapters.setdefault(factor["module"], {})
        pair[factor["factor"]] = entry
        if len(pair) == 2:
            product = (pair["B"].shape[0], pair["A"].shape[1])
            changes.append(Change(factor["module"], (pair["A"], pair["B"]), product, 1))
    return changes


def effective_ranks(
    model: nn.Module,
    plan: FreezePlan,
    before: Mapping[str, torch.Tensor],
    computes: bool = True,
    most_arithmetic: float = MOST_ARITHMETIC,
) -> dict[str, Any]:
    """Ranks of the changes of all trained matrices.

    Args:
        model: After training.
        plan: The plan that was applied to it.
        before: A copy of what trains of each parameter from before training, by name: `Snapshot.copies`.
        computes: Whether this process does the arithmetic. The others must call this too, since gathering a sharded
            parameter takes them all, and get an empty answer.
        most_arithmetic: Leave matrices out from where they would take more; a GPU is allowed more.

    Returns:
        `matrices`: `{name, block, component, shape, matrices, largest_possible, effective_rank, stable_rank}` each, the
        ranks being means where `matrices` are stacked, None where a value is not finite; `left_out`: names for which
        there was no time; `seconds`.
    """
    started = time.perf_counter()
    parameters = dict(named_weights(model))
    budget = most_arithmetic * (CUDA_FACTOR if next(model.parameters()).is_cuda else 1)
    found, left_out = [], []
    changes = trained_matrices(plan)
    with progress_bar(len(changes), "effective ranks", "matrices", delay=2) as bar:
        for change in changes:
            # Plan and kind of device decide, never the clock: all processes have to gather the same parameters, and one
            # that skipped a gathering would leave the others waiting.
            budget -= change.arithmetic
            if budget < 0:
                left_out.append(change.name)
                continue
            gathered = {entry: whole(parameters[entry.name]) for entry in change.planned}
            now = {entry.name: _on_an_fp64_device(entry.learning_part(v)) for entry, v in gathered.items()}
            if computes:
                found.append(_described(change, list(_singular_values(change, before, now))))
            bar.update()
    if left_out and computes:
        logger.info("Effective ranks: no time for %d of %d matrices.", len(left_out), len(changes))
    return {"matrices": found, "left_out": left_out, "seconds": round(time.perf_counter() - started, 3)}


def _on_an_fp64_device(values: torch.Tensor) -> torch.Tensor:
    return values if values.is_cuda else values.cpu()


def _singular_values(
    change: Change, before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Of each matrix of a stack, or of the one."""
    names = [entry.name for entry in change.planned]
    if len(names) == 2:
        a, b = names
        yield singular_values_of_adapter({"A": before[a], "B": before[b]}, {"A": now[a], "B": now[b]})
        return
    stacks = (values[names[0]].reshape(-1, *change.shape) for values in (before, now))
    for old, new in zip(*stacks, strict=True):
        yield singular_values_of_change(old, new)


def _described(change: Change, spectra: list[torch.Tensor]) -> dict[str, Any]:
    first = change.planned[0]
    finite = all(bool(spectrum.isfinite().all()) for spectrum in spectra)
    return {
        "name": change.name,
        "block": first.block,
        "component": first.component,
        "shape": list(change.shape),
        "matrices": len(spectra),
        "largest_possible": change.largest_possible,
        "effective_rank": sum(map(effective_rank, spectra)) / len(spectra) if finite else None,
        "stable_rank": sum(map(stable_rank, spectra)) / len(spectra) if finite else None,
    }
