"""What a run fits in: cost of a step -> largest memory of its process on a CPU, largest batch on a GPU.

A process on a CPU holds the libraries, the tensors of a step with what malloc keeps back, the start values of what
trains, and pages of the base's files. What it reads and writes (a base, a checkpoint) goes through memory a piece at a
time. The states of a kept prefix come beside it, by the window: their number is not known before the text.

Of a GPU the forecast is the tensors of a step and a reserve, which is an assumption: nothing here was run on one.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from partialtune.cost.dry_step import Cost
from partialtune.engine.head_loss import rows_at_once
from partialtune.tables import draw_table
from partialtune.terminal import WIDTH
from partialtune.words import gigabytes, megabytes

GB = 2**30
# A process that has imported what a run imports and has prepared text and tokenizer: resident, its code included.
# Measured by `tests/benchmarks/forecast.py --whole llama-1.1b` with torch 2.13 for CPUs and transformers 5.24.
LIBRARIES_BYTES = 600 * 2**20
GPUS = (8, 16, 24, 80)  # GB
GPU_RESERVE = GB  # what CUDA itself and its libraries take
GPU_SHARE_LOST = 0.05  # of a GPU: what lies between tensors
STEADY_TOKENS = 2048  # of a batch from which on memory is taken to grow evenly with it
LARGEST_BATCH = 100_000
PLACES = {"memory": "in memory", "disk": "on disk", "auto": "in memory or on disk, where it pays"}


@dataclass(frozen=True)
class Fits:
    """Memory of a whole run on one process.

    Attributes:
        process: Bytes by part, of a process on a CPU.
        gpu: Bytes of tensors on a GPU.
        largest_batch: GB of a GPU -> windows of one forward pass that fit there, 0 where not even one does.
        block_size: Tokens of a window.
        prefix_cache: Of the recipe; `off` where nothing is kept.
        prefix_window: Bytes of the states that it keeps of a window.
    """

    process: Mapping[str, int]
    gpu: int
    largest_batch: Mapping[int, int]
    block_size: int
    prefix_cache: str = "off"
    prefix_window: int = 0

    @property
    def process_peak(self) -> int:
        return sum(self.process.values())

    @property
    def gpu_needed(self) -> int:
        return self.gpu + GPU_RESERVE

    def to_json(self) -> dict[str, Any]:
        """Bytes, but for `largest_batch`, which is by GB of a GPU, and `prefix_cache`."""
        return {
            "process_peak": self.process_peak,
            "process": dict(self.process),
            "gpu": self.gpu,
            "gpu_reserve": GPU_RESERVE,
            "gpu_share_lost": GPU_SHARE_LOST,
            "largest_batch": {str(size): batch for size, batch in self.largest_batch.items()},
            "prefix_cache": self.prefix_cache,
            "prefix_window": self.prefix_window,
        }

    def words(self, width: int = WIDTH) -> str:
        """What is which number, in lines of `width` columns, and the table of GPUs."""
        named = {"tensors of a step": "tensors of a step with what malloc keeps back"}
        parts = ", ".join(f"{named.get(name, name)} {_gb(size)}" for name, size in self.process.items() if size)
        lines = [
            f"On a CPU it fits in {_gb(self.process_peak)}, the process's largest resident memory (VmHWM): {parts}.",
            f"On a GPU it fits in {_gb(self.gpu_needed)}: tensors {_gb(self.gpu)}, and a reserve of "
            f"{_gb(GPU_RESERVE)} for CUDA. In the table {GPU_SHARE_LOST:.0%} of a GPU are left free besides.",
        ]
        if self.prefix_window:
            lines.append(
                f"Beside it lie the kept states of the frozen prefix (prefix_cache: {self.prefix_cache}), "
                f"{PLACES[self.prefix_cache]}: {megabytes(self.prefix_window, 2)} a window."
            )
        lines.append("GB are 2^30 bytes. All of it is forecast, and on a GPU nothing of it has been measured.")
        batches = [f"{batch:,}" if batch else "does not fit" for batch in self.largest_batch.values()]
        table = draw_table(
            [
                ("a GPU of so many GB", *(str(size) for size in self.largest_batch)),
                (f"largest batch, in windows of {self.block_size:,} tokens", *batches),
            ]
        )
        return "\n".join([*(textwrap.fill(line, width) for line in lines), "", table])


def fits(
    cost: Cost,
    costing: Callable[[int], Cost],
    batch_size: int,
    block_size: int,
    vocabulary: int,
    process: Mapping[str, int],
    bf16: bool,
) -> Fits:
    """What a run fits in.

    Args:
        cost: Of a step with `batch_size` windows a pass.
        costing: Cost of a step with another number of windows.
        batch_size: Windows of a pass.
        block_size: Tokens of a window.
        vocabulary: Width of the scores.
        process: Bytes of a process on a CPU, by part.
        bf16: Whether products run in bf16.
    """

    def on_gpu(cost: Cost, batch: int) -> int:
        return cost.memory.peak + more_on_gpu(cost.memory.logits, batch, block_size, vocabulary, bf16)

    steady = max(2 * batch_size, -(-STEADY_TOKENS // block_size))
    points = {batch: on_gpu(costing(batch), batch) for batch in (steady, 2 * steady)}
    points[batch_size] = on_gpu(cost, batch_size)
    room = {size: size * GB * (1 - GPU_SHARE_LOST) - GPU_RESERVE for size in GPUS}
    if batch_size > 1 and points[batch_size] > min(room.values()):
        points[1] = on_gpu(costing(1), 1)
    largest = {size: largest_batch(points, left) for size, left in room.items()}
    return Fits(process, points[batch_size], largest, block_size)


def largest_batch(points: Mapping[int, int], room: float) -> int:
    """The most windows whose memory fits in `room`, 0 where none do.

    Memory is the most of several moments, each of which grows evenly with the batch: between two points it is at most
    what lies on the line between them, and beyond the last two it goes on along their line.

    largest_batch({1: 10, 4: 16, 8: 28}, 22) -> 6

    Args:
        points: Windows -> bytes, at least two, of one window among them where others may not fit.
        room: Bytes.
    """
    known = sorted(points.items())
    if known[0][1] > room:
        return 0
    for (batch, size), (next_batch, next_size) in pairwise(known):
        is_last = next_batch == known[-1][0]
        if next_size > room or is_last:
            slope = (next_size - size) / (next_batch - batch)
            found = batch + int((room - size) / slope) if slope > 0 else LARGEST_BATCH
            return min(found, LARGEST_BATCH)
    return known[-1][0]


def more_on_gpu(logits: int, batch: int, block_size: int, vocabulary: int, bf16: bool) -> int:
    """Bytes of logits that a GPU holds at one time more than a CPU: the loss without logits takes more rows there.

    Args:
        logits: Bytes of logits on a CPU, with what comes of them.
        batch, block_size, vocabulary: Of a pass.
        bf16: Whether products run in bf16.
    """
    rows = batch * (block_size - 1)
    if logits >= 2 * 4 * rows * vocabulary:  # all of them are held, whatever the device
        return 0
    chunk = rows_at_once(rows, vocabulary, "cuda")
    return max(0, chunk * vocabulary * (6 if bf16 else 4) - logits)


def _gb(size: int) -> str:
    return gigabytes(size, 1 if size >= 0.05 * GB else 2)
