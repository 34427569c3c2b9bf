"""What the processes of a run do together: one of them decides, or fails, for all of them.

The only module that calls collective operations on Python objects. Every process has to call these functions at the
same place of the program: a process that takes another path leaves the rest waiting until `ddp_timeout`.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from partialtune.errors import (
    DiskError,
    EndedElsewhere,
    InputError,
    PartialtuneError,
    code_of,
    disk_words,
    is_disk_fault,
)

Value = TypeVar("Value")
Decision = TypeVar("Decision")
DDP_TIMEOUT = 1800  # seconds, Trainer's default


def is_main() -> bool:
    """Whether this is the process that measures and writes: rank 0, or the only one."""
    return not _several() or dist.get_rank() == 0


def from_main(value: Value) -> Value:
    """What the main process gave; every process has to call this together."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: Value) -> list[Value]:
    """What each process gave, by rank; every process has to call this together."""
    if not _several():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_disk_error(words: str | None) -> None:
    """End all processes where the main one could not write; every process has to call this together.

    Args:
        words: Of the main process: what could not be written, None where all was.

    Raises:
        DiskError: On the main process; EndedElsewhere on the others, with the same exit code.
    """
    said = from_main(words)
    if said is not None:
        raise DiskError(said) if is_main() else EndedElsewhere("", DiskError.exit_code)


def shards_parameters(args: TrainingArguments) -> bool:
    """Whether recipe or launcher ask for FSDP."""
    return bool(args.fsdp) or _said_by_launcher("ACCELERATE_USE_FSDP")


def _said_by_launcher(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def main_process_only(function: Callable[..., None]) -> Callable[..., None]:
    """Let one process of a run do what must be done once, while the others wait: where it fails, all end alike."""

    @functools.wraps(function)
    def on_main_process(*args, **kwargs) -> None:
        decided_by_main(lambda: function(*args, **kwargs))

    return on_main_process


def decided_by_main(decide: Callable[[], Decision]) -> Decision:
    """What `decide` gives on the main process, on every process.

    Several processes that look at one folder while one of them begins to write would not see the same.

    Raises:
        Exception: What `decide` raised, on the main process; whatever it is, the others do not wait for ever.
        EndedElsewhere: On the others, with the exit code that the main process ends with.
    """
    made = _or_error(decide) if PartialState().is_main_process else None
    if not _several():
        return _or_raise(made)
    outcome = [_failure_of(made), None if isinstance(made, _Failed) else made]
    dist.broadcast_object_list(outcome, src=0)
    _end_together(made, outcome[0])
    return outcome[1]


def check_shared(folder: Path, name: str, patience_seconds: float = 30) -> None:
    """Stop where this process does not see a file that the main process has written.

    Args:
        folder: The run's folder.
        name: The file's.
        patience_seconds: How long to wait for it.

    Raises:
        InputError: If it is not there after some time, which network file systems may take.
    """
    PartialState().wait_for_everyone()
    end = time.monotonic() + patience_seconds

    def wait() -> None:
        while not (folder / name).is_file():
            if time.monotonic() > end:
                raise InputError(
                    f"output_dir: {folder.absolute()} is not the same folder on every machine of this run. "
                    f"Name one on a file system that they share."
                )
            time.sleep(0.5)

    done_together(wait)


def first_on_each_node(make: Callable[[], Decision]) -> Decision:
    """What `make` gives, on every process; the first one of each machine goes first, so that others find its files.

    Raises:
        Exception: What any process raised, on all of them; the main process says it.
    """
    state = PartialState()
    if not _several():
        return make()
    made = _or_error(make) if state.is_local_main_process else None
    _end_together(made, _first_failure(made))
    if not state.is_local_main_process:
        made = _or_error(make)
    _end_together(made, _first_failure(made))
    return made


def done_together(make: Callable[[], Decision]) -> Decision:
    """What `make` gives on each process; an error on one of them, a full disk for example, ends all of them alike.

    Every process has to call this together, and `make` may hold no collective operation that a process which failed
    in it would miss.

    Raises:
        Exception: As `first_on_each_node`.
    """
    if not _several():
        return make()
    made = _or_error(make)
    _end_together(made, _first_failure(made))
    return made


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass(frozen=True)
class _Failure:
    """What other processes are told of an error: not the error, which need not survive pickling."""

    words: str
    code: int


def _or_error(make: Callable[[], Decision]) -> Decision | _Failed:
    try:
        return make()
    except Exception as error:  # noqa: BLE001  (raised again, whatever it is, when the others know)
        return _Failed(error)


def _or_raise(made: Any) -> Any:
    if isinstance(made, _Failed):
        raise made.error
    return made


def _failure_of(made: Any) -> _Failure | None:
    if not isinstance(made, _Failed):
        return None
    error = made.error
    if isinstance(error, PartialtuneError):
        return _Failure(str(error), error.exit_code)
    if is_disk_fault(error):
        return _Failure(disk_words(error), code_of(error))
    return _Failure(
        f"Another process of this run failed, and says more: {type(error).__name__}: {error}", code_of(error)
    )


def _first_failure(made: Any) -> _Failure | None:
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, _failure_of(made))
    return next((failure for failure in failures if failure is not None), None)


def _end_together(made: Any, failure: _Failure | None) -> None:
    """Raise on every process what one of them failed with: in words once, on the main process; a bug where it is."""
    if failure is None:
        return
    main_process = PartialState().is_main_process
    cause = made.error if isinstance(made, _Failed) else None
    if cause is not None and (main_process or not (isinstance(cause, PartialtuneError) or is_disk_fault(cause))):
        raise cause
    raise EndedElsewhere(failure.words if main_process else "", failure.code) from cause


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
GO_ON = "What was saved before is in the run's folder; go on with: --resume_from_checkpoint auto"


@contextmanager
def peers_watched(patience_seconds: float = DDP_TIMEOUT) -> Iterator[None]:
    """Say in words that another process of the run is gone, or does not answer any more.

    Args:
        patience_seconds: The recipe's `ddp_timeout`, which the message names.

    Raises:
        EndedElsewhere: In the place of what torch.distributed raises.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if _several() and any(words in said for words in LOST):
            words = f"Another process of this run ended: it was killed, or says why above. {GO_ON}"
        elif _several() and any(words in said for words in STALLED):
            words = (
                f"Another process of this run did not answer for {patience_seconds:g} seconds (ddp_timeout): it was "
                f"stopped, its machine is out of reach, or it is slower than that. {GO_ON}"
            )
        else:
            raise
        raise EndedElsewhere(words) from error
