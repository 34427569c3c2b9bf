"""What the processes of a run do together: one of them decides, or fails, for all of them.

The only module that calls collective operations on Python objects. Every process has to call these functions at the
same place of the program: a process that takes another path leaves the rest waiting until `ddp_timeout`.

Every process has a value already:
    from_main(value)           all go on with the one of the main process
    from_all(value)            all get the list of them, by rank
    largest_of_all(number)     all get the largest; cheap enough for every step

Something is still to be done, which may fail; a failure of one process then ends all of them with its exit code:
    decided_by_main(decide)    by the main process alone, such as a look at a folder that it is about to write to
    main_process_only          the same as a decorator, for what gives nothing back, such as writing a file
    done_together(make)        by every process, such as saving, where one may find its disk full
    first_on_each_node(make)   by every process, but on each machine by one before the others, which find its files

On one process each of them is the plain value or the plain call.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from partialtune.errors import (
    DiskError,
    EndedElsewhere,
    PartialtuneError,
    code_of,
    disk_words,
    is_disk_fault,
)

Value = TypeVar("Value")
DDP_TIMEOUT = 1800  # seconds, Trainer's default


def rank_and_processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that measures and writes: rank 0, or the only one."""
    return rank_and_processes()[0] == 0


def _several() -> bool:
    return rank_and_processes()[1] > 1


def launcher_says(variable: str) -> bool:
    """Whether a variable by which `accelerate launch` passes a setting on says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def shards_parameters(args: TrainingArguments) -> bool:
    """Whether recipe or launcher ask for FSDP."""
    return bool(args.fsdp) or launcher_says("ACCELERATE_USE_FSDP")


# ---- every process has a value ---------------------------------------------------------------------------------------


def from_main(value: Value) -> Value:
    """The main process's value, on every process."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Value) -> list[Value]:
    """The value of each process, by rank."""
    if not _several():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest_of_all(number: int, device: torch.device) -> int:
    """The largest number that any process gives.

    Args:
        number: Of this process.
        device: Where the processes communicate: NCCL knows GPUs alone.
    """
    if not _several():
        return number
    largest = torch.tensor([number], device=device)  # a tensor: objects would be pickled after every step
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


# ---- something is to be done, and may fail ---------------------------------------------------------------------------


def decided_by_main(decide: Callable[[], Value]) -> Value:
    """What `decide` gives on the main process, on every process.

    Several processes that look at one folder while one of them begins to write would not see the same.

    Raises:
        Exception: What `decide` raised, on the main process; whatever it is, the others do not wait for ever.
        EndedElsewhere: On the others, with the exit code that the main process ends with.
    """
    value: Any = None
    error: Exception | None = None
    if is_main():
        value, error = _attempt(decide)
    failure, value = from_main((_failure_of(error), value))
    _end_together(error, failure)
    return value


def main_process_only(function: Callable[..., None]) -> Callable[..., None]:
    """Let one process of a run do what must be done once, while the others wait: where it fails, all end alike."""

    @functools.wraps(function)
    def on_main_process(*args, **kwargs) -> None:
        decided_by_main(lambda: function(*args, **kwargs))

    return on_main_process


def raise_disk_error(words: str | None) -> None:
    """End all processes where the main one could not write.

    Args:
        words: Of the main process: what could not be written, None where all was.

    Raises:
        DiskError: On the main process; EndedElsewhere on the others, with the same exit code.
    """

    def fail() -> None:
        if words is not None:
            raise DiskError(words)

    decided_by_main(fail)


def done_together(make: Callable[[], Value]) -> Value:
    """What `make` gives on each process; an error on one of them, a full disk for example, ends all of them alike.

    `make` may hold no collective operation that a process which failed in it would miss.

    Raises:
        Exception: What any process raised, on that process if it is a bug, and its words on the main process.
        EndedElsewhere: On the others.
    """
    value, error = _attempt(make)
    _end_together(error, next((failure for failure in from_all(_failure_of(error)) if failure is not None), None))
    return value


def first_on_each_node(make: Callable[[], Value]) -> Value:
    """What `make` gives, on every process; the first one of each machine goes first, so that others find its files.

    Raises:
        Exception: As `done_together`.
    """
    first = PartialState().is_local_main_process
    made: Any = done_together(lambda: make() if first else None)
    return done_together(lambda: made if first else make())


@dataclass(frozen=True)
class _Failure:
    """What other processes are told of an error: not the error itself, which need not survive pickling."""

    words: str
    code: int


def _attempt(make: Callable[[], Value]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # noqa: BLE001  (raised again, whatever it is, when the others know)
        return None, error


def _failure_of(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, PartialtuneError):
        return _Failure(str(error), error.exit_code)
    if is_disk_fault(error):
        return _Failure(disk_words(error), code_of(error))
    return _Failure(
        f"Another process of this run failed, and says more: {type(error).__name__}: {error}", code_of(error)
    )


def _end_together(error: Exception | None, failure: _Failure | None) -> None:
    """Raise on every process what one of them failed with.

    The main process alone prints its message. A bug is raised where it happened, for its traceback.

    Args:
        error: Of this process.
        failure: Of the first process that failed, None where none did.
    """
    if failure is None:
        return
    if error is not None:
        is_bug = not isinstance(error, PartialtuneError) and not is_disk_fault(error)
        if is_bug or is_main():
            raise error
    raise EndedElsewhere(failure.words if is_main() else "", failure.code) from error


# ---- processes that are lost -----------------------------------------------------------------------------------------

# torch raises plain RuntimeErrors when the connection to another process breaks: their texts are all there is.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")
# gloo's own waits, the pair that it closes after one of them, those for its store, and NCCL's
STALLED = (
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Timed out after",
    "Socket Timeout",
    "wait timeout after",
    "timed out after",
    "timeout of",
)
WHAT_IS_SAVED = "What was saved before is in the run's folder; go on with: --resume_from_checkpoint auto"


@contextmanager
def peers_watched(patience_seconds: float = DDP_TIMEOUT) -> Iterator[None]:
    """Turn what torch raises when another process is gone, or does not answer any more, into an explanation.

    Args:
        patience_seconds: The recipe's `ddp_timeout`, which the message names.

    Raises:
        EndedElsewhere: In the place of what torch.distributed raises.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        if _several() and any(words in reason for words in LOST):
            words = "Another process of this run ended: it was killed, or says why above."
        elif _several() and any(words in reason for words in STALLED):
            words = (
                f"Another process of this run did not answer for {patience_seconds:g} seconds (ddp_timeout): it was "
                f"stopped, its machine is out of reach, or it is slower than that."
            )
        else:
            raise
        raise EndedElsewhere(f"{words} {WHAT_IS_SAVED}") from error
