"""Memory of a training step: tensors as they come and go -> bytes by part, and the most that is held at one time.

Two things are counted: what tensors hold (`MemoryLedger`), and what the process holds for them on a CPU (`MallocHeap`).

Freed memory is not given back at once. Of glibc's malloc, which PyTorch uses on a CPU, the heap here replays what
matters: large pieces are mapped one by one and given back when freed, smaller ones share a heap whose holes stay
resident, and where the line runs moves up with what was freed ("dynamic mmap threshold", mallopt(3)). With
MALLOC_MMAP_THRESHOLD_=65536 in the environment nothing is kept back: a run then grows by its tensors alone, and takes a
quarter more time.
"""

import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

SMALLEST_LINE, LARGEST_LINE = 128 * 2**10, 32 * 2**20  # bytes: M_MMAP_THRESHOLD at first, and at most on 64 bits
EXTRA = 96  # bytes that a piece asks for beside its own: alignment to 64, and the header
SLIVERS = 64  # pieces whose slivers are lost at one time
SMALL = 64 * 2**10  # bytes: the slivers of smaller pieces do not count, since real steps have some fewer of these
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

    torch has no public name for a storage's address: `_cdata` is that of the C++ object, which all tensors over one
    storage share. `test_memory_by_part_is_plain_arithmetic_where_it_can_be` fails should it change.
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


class MallocHeap:
    """Best fit with merging of neighbours, as malloc does it.

    A hole of just the size is too small for a tensor that is to be aligned, unless the slivers beside it are still
    free; Python's small objects take some. So every other piece that comes into the heap leaves slivers that are lost,
    which keep its neighbours from merging, until malloc merges them after all: the oldest first, once there are
    `SLIVERS` of them. Both numbers are fitted to measurements (`tests/benchmarks/forecast.py`). With none lost, small
    models come out a third too small; were they lost for good, a model of 22 blocks would come out at twice its size.

    Attributes:
        peak: The most bytes that were resident at one time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._pieces = 0
        self._slivers: deque[int] = deque()  # where those that are lost begin, the oldest first
        self._line = SMALLEST_LINE
        self._mapped = 0
        self._top = 0  # end of what is in use; what was beyond it stays resident up to `_held`
        self._held = 0
        self._starts: dict[int, int] = {}  # free pieces: start -> size
        self._ends: dict[int, int] = {}  # end -> start
        self._sizes: list[tuple[int, int]] = []  # (size, start), ascending
        self._taken: dict[int, tuple[int | None, int]] = {}  # number -> (start, None where mapped; size)

    def take(self, number: int, size: int) -> None:
        """A piece of `size` bytes comes, known by `number`."""
        if size + EXTRA > self._line:
            self._mapped += size
            self._taken[number] = (None, size)
        else:
            start = self._place(size + EXTRA)
            self._pieces += size > SMALL
            loses = size > SMALL and self._pieces % 2 == 1
            self._taken[number] = (start, size if loses else size + EXTRA)
            if loses:
                self._slivers.append(start + size)
                if len(self._slivers) > SLIVERS:
                    self._free(self._slivers.popleft(), EXTRA)
        self.peak = max(self.peak, self._mapped + self._held)

    def give_back(self, number: int) -> None:
        """That piece goes."""
        start, size = self._taken.pop(number)
        if start is None:
            self._mapped -= size
            if size <= LARGEST_LINE:
                self._line = max(self._line, size)
        else:
            self._free(start, size)

    def _place(self, size: int) -> int:
        place = bisect_left(self._sizes, (size, 0))
        if place == len(self._sizes):
            start = self._top
            self._top += size
            self._held = max(self._held, self._top)
            return start
        room, start = self._sizes[place]
        self._forget(start, room)
        if room > size:
            self._note(start + size, room - size)
        return start

    def _free(self, start: int, size: int) -> None:
        if start + size in self._starts:
            following = self._starts[start + size]
            self._forget(start + size, following)
            size += following
        if start in self._ends:
            before = self._ends[start]
            size += start - before
            self._forget(before, start - before)
            start = before
        if start + size == self._top:
            self._top = start
            if self._held - self._top > 2 * self._line:  # M_TRIM_THRESHOLD follows the line
                self._held = self._top
        else:
            self._note(start, size)

    def _note(self, start: int, size: int) -> None:
        self._starts[start], self._ends[start + size] = size, start
        insort(self._sizes, (size, start))

    def _forget(self, start: int, size: int) -> None:
        del self._starts[start], self._ends[start + size]
        del self._sizes[bisect_left(self._sizes, (size, start))]


def resident_peak(events: Iterable[tuple[int, int]]) -> int:
    """The most bytes that are resident.

    Args:
        events: (number, bytes) as a piece comes, (number, -bytes) as it goes, in order.
    """
    heap = MallocHeap()
    for number, size in events:
        if size > 0:
            heap.take(number, size)
        elif size < 0:
            heap.give_back(number)
    return heap.peak
