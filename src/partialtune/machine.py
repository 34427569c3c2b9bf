"""Memory of this machine as this process may use it: a container's limit counts where there is one."""

import resource
import sys
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # version 2, as a process in a container sees its own


def total_memory() -> int:
    """Bytes that this process could have at most."""
    limit = _cgroup_bytes("memory.max")
    return psutil.virtual_memory().total if limit is None else min(limit, psutil.virtual_memory().total)


def free_memory() -> int:
    """Bytes that this process can still have."""
    free, limit, used = psutil.virtual_memory().available, _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _cgroup_bytes(name: str) -> int | None:
    """The number in a file of the control group; None where there is no such file, or no limit."""
    try:
        return int((CGROUP / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # `max`
        return None


def peak_memory_mb() -> float:
    """Largest memory of this process so far, in units of 2^20 bytes: of the GPU where CUDA is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
