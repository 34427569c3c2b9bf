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

Nodes that share no disk may hold other files, and start from something else:
    differences_from_main(own)          each process that differs from the main one, and in what
    end_where_nodes_differ(own, do)     ends all of them in words where one does
"""

import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
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
    InputError,
    PartialtuneError,
    code_of,
    disk_words,
    is_disk_fault,
)

Value = TypeVar("Value")
DDP_TIMEOUT = 1800  # seconds, Trainer's default
# Tried with DeepSpeed 0.19.8: Trainer trains under ZeRO-1 and -2, and ends where one process does; docs/clusters.md.
DEEPSPEED = (
    "DeepSpeed is not supported at any stage. ZeRO-3 partitions the parameters; ZeRO-1 and ZeRO-2 keep gradients and "
    "optimizer state in flat pieces without names, and take the optimizer's step within backward, where the audit "
    "does not see what learnt. Launch with recipes/launch/fsdp2.yaml, which divides all of these too, or, where the "
    "model fits on each GPU, with recipes/launch/ddp.yaml."
)


def rank_and_processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is the process that measures and writes: rank 0, or the only one."""
    return rank_and_processes()[0] == 0


def is_first_of_node() -> bool:
    """Whether this process is the one of its node that fetches, prepares and compares for the others there."""
    return PartialState().is_local_main_process


def several_nodes() -> bool:
    """Whether the processes of this run are on more than one node, which need not share a disk. All have to ask."""
    return sum(from_all(is_first_of_node())) > 1 if _several() else False


def node_name() -> str:
    """What messages call the node of this process: `torchrun` counts nodes, and several of them may have one name."""
    number = os.environ.get("GROUP_RANK")
    return socket.gethostname() + (f", node {number}" if number else "")


def _several() -> bool:
    return rank_and_processes()[1] > 1


def launcher_says(variable: str) -> bool:
    """Whether a variable by which `accelerate launch` passes a setting on says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def shards_parameters(args: TrainingArguments) -> bool:
    """Whether recipe or launcher ask for FSDP."""
    return bool(args.fsdp) or launcher_says("ACCELERATE_USE_FSDP")


def saves_sharded_checkpoints(args: TrainingArguments) -> bool:
    """Whether FSDP lets each process write its own part of a checkpoint, into one folder (SHARDED_STATE_DICT)."""
    if not shards_parameters(args):
        return False
    by_launcher = launcher_says("ACCELERATE_USE_FSDP")
    kind = os.environ.get("FSDP_STATE_DICT_TYPE") if by_launcher else args.fsdp_plugin_args.get("state_dict_type")
    return "FULL_STATE_DICT" not in str(kind)


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
    first = is_first_of_node()
    made: Any = done_together(lambda: make() if first else None)
    return done_together(lambda: made if first else make())


@dataclass(frozen=True)
class _Failure:
    """What other processes are told of an error: not the error itself, which need not survive pickling."""

    words: str
    code: int
    node: str

    def on_main(self) -> str:
        """The words as the main process prints them, with the node where it is another one."""
        return self.words if self.node == node_name() else f"{self.words} (On {self.node}.)"


def _attempt(make: Callable[[], Value]) -> tuple[Any, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # noqa: BLE001  (raised again, whatever it is, when the others know)
        return None, error


def _failure_of(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    if isinstance(error, PartialtuneError):
        return _Failure(str(error), error.exit_code, node_name())
    if is_disk_fault(error):
        return _Failure(disk_words(error), code_of(error), node_name())
    words = f"Another process of this run failed, and says more: {type(error).__name__}: {error}"
    return _Failure(words, code_of(error), node_name())


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
    raise EndedElsewhere(failure.on_main() if is_main() else "", failure.code) from error


# ---- nodes that start from something else ----------------------------------------------------------------------------

SHOWN = 60  # characters of a value


def differences_from_main(own: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Each process that differs from the main one, with its node, and in what; the same list on all processes.

    Args:
        own: Of this process, by what a message calls it: a value that a reader is shown, a sha256, or a mapping of
            either. Empty where this process has nothing to compare.
    """
    main = from_main(dict(own))
    found = [*_differences(main, own)] if own else []
    of_all = enumerate(from_all((node_name(), found)))
    return [(f"Process {rank} ({node})", differences) for rank, (node, differences) in of_all if differences]


def end_where_nodes_differ(own: Mapping[str, Any], what_to_do: str) -> None:
    """Stop where a process has something else than the main one. All have to call this.

    Args:
        own: As for `differences_from_main`.
        what_to_do: A sentence for the end of the message.

    Raises:
        InputError: On the main process; EndedElsewhere on the others.
    """
    found = differences_from_main(own)

    def end() -> None:
        if found:
            lines = [f"  {place}: {'; '.join(differences)}" for place, differences in found]
            raise InputError(
                f"The processes of this run do not start from the same. They differ from process 0 ({node_name()}):\n"
                + "\n".join(lines)
                + f"\n{what_to_do} Nothing was written."
            )

    decided_by_main(end)


def _differences(main: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    for key in {**main, **own}:
        there, here = main.get(key), own.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            yield f"{key}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        elif isinstance(here, str) and len(here) == 64:  # a sha256 says nothing to a reader
            yield key
        else:
            yield f"{key}: {_shown(here)} here, {_shown(there)} there"


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."


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
