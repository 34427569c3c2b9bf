"""What a process holds of a CPU's memory: tensors as they come and go -> bytes that malloc takes from the system.

Freed memory is not given back at once. Of glibc's malloc, which PyTorch uses on a CPU, this replays what matters: large
pieces are mapped one by one and given back when freed, smaller ones share a heap whose holes stay resident, and where
the line runs moves up with what was freed ("dynamic mmap threshold", mallopt(3)). With MALLOC_MMAP_THRESHOLD_=65536 in
the environment nothing is kept back: a run then grows by its tensors alone, and takes a quarter more time.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

SMALLEST_LINE, LARGEST_LINE = 128 * 2**10, 32 * 2**20  # bytes: M_MMAP_THRESHOLD at first, and at most on 64 bits
EXTRA = 96  # bytes that a piece asks for beside its own: alignment to 64, and the header


class Heap:
    """Best fit with merging of neighbours, as malloc does it.

    A hole of just the size is too small for a tensor that is to be aligned, unless the slivers beside it are still
    free; Python's small objects take some. So every other piece that comes into the heap leaves slivers that are lost,
    which keep its neighbours from merging. That half is fitted to measurements (`tests/benchmarks/forecast.py`); with
    none lost the heap comes out a third too small, with all lost a third too large.

    Attributes:
        peak: The most bytes that were resident at one time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._pieces = 0
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
            self._pieces += 1
            start = self._place(size + EXTRA)
            self._taken[number] = (start, size if self._pieces % 2 else size + EXTRA)
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
    heap = Heap()
    for number, size in events:
        if size > 0:
            heap.take(number, size)
        elif size < 0:
            heap.give_back(number)
    return heap.peak
