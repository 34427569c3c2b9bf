"""Memory of a training step: tensors as they come and go -> bytes by part, and the most that is held at one time."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from partialtune.cost.heap import resident_peak

PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by part, each at its own largest moment, and of all together.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of the parameters that train.
        optimizer: What the optimizer keeps from step to step.
        activations: What forward keeps for backward, and what comes and goes in between.
        logits: Scores over the vocabulary, their logarithms and gradients: of all tokens that are predicted at one
            time, which are those of one chunk where the loss is taken without holding all logits.
        peak: The most that is held at one time, from the second step on. At most the sum of the parts.
        resident: The most that a process holds for it on a CPU in two steps, with what malloc keeps back.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int
    resident: int


class MemoryLedger:
    """Writes down when each storage comes and goes; to which part it belonged may be said later.

    A storage is known by a number of its own: its address is given to another one once it is gone.
    """

    def __init__(self) -> None:
        self._living: dict[int, tuple[int, weakref.ref]] = {}  # by address
        self._events: list[tuple[int, int]] = []  # (number, bytes) as it comes, (number, -bytes) as it goes
        self._part_of: dict[int, str] = {}
        self._optimizer_starts = 0

    def number(self, tensor: torch.Tensor, part: str = "activations") -> int:
        """The number of the tensor's storage. A new one is written down and counts to `part`."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._living:
            return self._living[address][0]
        number, size = len(self._events), storage.nbytes()
        self._part_of[number] = part
        self._events.append((number, size))
        self._living[address] = (number, weakref.ref(storage, partial(self._gone, address, number, size)))
        return number

    def _gone(self, address: int, number: int, size: int, _: weakref.ref) -> None:
        self._events.append((number, -size))
        del self._living[address]

    def assign(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Count these tensors to `part`, from their beginning on."""
        for tensor in tensors:
            self._part_of[self.number(tensor)] = part

    def optimizer_starts(self) -> None:
        """From here on comes what the optimizer makes: what it keeps is its state."""
        self._optimizer_starts = len(self._events)

    def close(self) -> Memory:
        """Bytes by part of the step so far. Call it while all that lasts is there: what the optimizer keeps.

        That state counts from the step's beginning, as it does from the second step on.
        """
        for number, _ in self._living.values():
            if number >= self._optimizer_starts:
                self._part_of[number] = "optimizer"
        largest, now = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
        peak_before, peak_after = 0, 0
        for index, (number, size) in enumerate(self._events):
            part = self._part_of[number]
            now[part] += size
            largest[part] = max(largest[part], now[part])
            if index < self._optimizer_starts:
                peak_before = max(peak_before, sum(now.values()))
            else:
                peak_after = max(peak_after, sum(now.values()))
        peak = max(peak_before + now["optimizer"], peak_after)
        return Memory(**largest, peak=peak, resident=resident_peak(self._two_steps()))

    def _two_steps(self) -> Iterator[tuple[int, int]]:
        """What comes and goes in this step and the next one, where weights and the optimizer's state are there."""
        yield from self._events
        living = {number for number, _ in self._living.values()}
        left = {number: size for number, size in self._events if number in living}
        lasting = {number for number in left if self._part_of[number] in ("weights", "optimizer")}
        yield from ((number, -size) for number, size in left.items() if number not in lasting)
        again = len(self._events)
        yield from ((again + number, size) for number, size in self._events if number not in lasting)
