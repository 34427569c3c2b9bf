"""One answer for all processes of a run: what the main one found, or what all of them found together."""

from typing import TypeVar

import torch.distributed as dist

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


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
