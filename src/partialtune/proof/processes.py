"""One answer for all processes of a run: what the main one found, or what all of them found together."""

from typing import TypeVar

import torch.distributed as dist

from partialtune.errors import DiskError, EndedElsewhere

Value = TypeVar("Value")


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


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
