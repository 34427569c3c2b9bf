"""One tensor for all processes of a node: each writes its share, all read everything, memory holds it once."""

import math
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

IN_MEMORY = Path("/dev/shm")  # Linux; elsewhere, or where it is full, a file that the system keeps cached


def of_this_node() -> tuple[int, int]:
    """Number of this process among those of its node, and how many they are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # not every launcher says it: each is then by itself
    return (int(os.environ.get("LOCAL_RANK", "0")) if processes > 1 else 0), processes


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, its values unset. Every process of a run has to call this together.

    Several processes of a node get the same memory: a file that is unlinked as soon as all have it, so that nothing
    is left behind, however the run ends.
    """
    rank, processes = of_this_node()
    if processes == 1:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    path = _new_file(size * dtype.itemsize) if rank == 0 else None
    paths: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(paths, (socket.gethostname(), path))
    here = next(path for host, path in paths if host == socket.gethostname() and path)
    tensor = torch.from_file(here, shared=True, size=size, dtype=dtype).view(shape)
    dist.barrier()
    if rank == 0:
        os.unlink(here)
    return tensor


def _new_file(size: int) -> str:
    room = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > size
    descriptor, path = tempfile.mkstemp(prefix="partialtune-prefix-", dir=IN_MEMORY if room else None)
    os.truncate(descriptor, size)
    os.close(descriptor)
    return path
