"""Where the states of rows are kept, by key: in memory, which the processes of a node share.

A process writes to memory of its own and reads that of all. Of several processes each has two files that lie in memory:
one of states, and one of records that say which key lies where. A record is appended when its states are written, so
that nothing is ever locked and nobody reads half a row. The store on disk is in `disk_store`.
"""

import mmap
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

IN_MEMORY = Path("/dev/shm")  # Linux; elsewhere, or where it is full, a file that the system keeps cached
SLAB = 64 * 2**20  # bytes: rows of one process by itself lie in pieces of this size, since each mapping costs
RECORD = struct.Struct("<16sQQQ")  # key, first byte, tokens of the row, values of a token


class StateStore(Protocol):
    """States of rows, (tokens, width), by key.

    Attributes:
        size: Bytes that this process has kept so far.
        outlives_run: Whether later runs will find what is kept.
    """

    size: int
    outlives_run: bool

    def get(self, key: bytes) -> torch.Tensor | None:
        """The states of a row, None where they are not kept."""

    def put(self, key: bytes, states: torch.Tensor) -> bool:
        """Keep the states of a row, on the CPU and in the store's dtype. False where there is no room."""

    def forget(self) -> None:
        """Nothing that was kept will be asked for again."""

    def close(self) -> None:
        """Give the memory back."""


class MemoryStore:
    """States in the memory of this process.

    Args:
        limit: Bytes to keep at most. What comes when it is full is not kept: each epoch meets each row once, so that
            to drop an old one for it would lose as much as it gains.
        dtype: Of the states.

    Attributes:
        size: Bytes kept so far.
    """

    outlives_run = False

    def __init__(self, limit: int, dtype: torch.dtype) -> None:
        self.limit, self.dtype, self.size = limit, dtype, 0
        self._kept: dict[bytes, torch.Tensor] = {}
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def get(self, key: bytes) -> torch.Tensor | None:
        return self._kept.get(key)

    def put(self, key: bytes, states: torch.Tensor) -> bool:
        size = states.numel() * self.dtype.itemsize
        if key in self._kept or self.size + size > self.limit:
            return key in self._kept
        if self._used + size > self._slab.numel():
            self._slab, self._used = torch.empty(max(SLAB, size), dtype=torch.uint8), 0
        place = self._slab[self._used : self._used + size].view(self.dtype).view(states.shape)
        place.copy_(states)
        self._used += -(-size // 64) * 64  # each row begins where any dtype may
        self.size += size
        self._kept[key] = place
        return True

    def forget(self) -> None:
        self._kept.clear()
        self._slab, self._used, self.size = torch.empty(0, dtype=torch.uint8), 0, 0

    def close(self) -> None:
        self.forget()


class HandedOnStore(MemoryStore):
    """States in the memory of this process that its later trainings start from, too: it stays when one is over."""

    outlives_run = True

    def close(self) -> None:
        pass


class SharedStore:
    """States in memory that the processes of a node share. All of a run have to make it together.

    Args:
        limit: Bytes that this process keeps at most.
        dtype: Of the states.

    Attributes:
        size: Bytes kept by this process so far.
    """

    outlives_run = False

    def __init__(self, limit: int, dtype: torch.dtype) -> None:
        self.limit, self.dtype = max(1, limit // mmap.PAGESIZE) * mmap.PAGESIZE, dtype
        self.size = self._end = 0
        own = _Files(_new_file(self.limit), _new_file(0), self.limit)
        everybody: list[tuple[str, _Files] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (socket.gethostname(), own))
        here = [files for entry in everybody if entry and entry[0] == socket.gethostname() for files in entry[1:]]
        self._logs = [_Log(files, dtype) for files in here]
        self._own = self._logs[here.index(own)]
        dist.barrier()  # all have opened them: their names can go, the memory stays as long as one of them lives
        own.unlink()

    def get(self, key: bytes) -> torch.Tensor | None:
        found = self._find(key)
        if found is None:
            for log in self._logs:  # what the others have kept since
                log.read_on()
            found = self._find(key)
        return found

    def _find(self, key: bytes) -> torch.Tensor | None:
        return next((log.states(key) for log in self._logs if key in log.places), None)

    def put(self, key: bytes, states: torch.Tensor) -> bool:
        if self._find(key) is not None:
            return True
        size = states.numel() * self.dtype.itemsize
        if self._end + size > self.limit:
            return False
        self._own.append(key, states, self._end)
        self._end += -(-size // 64) * 64
        self.size += size
        return True

    def forget(self) -> None:
        """Nothing: another process may be in the midst of reading what is written over. The room stays taken."""

    def close(self) -> None:
        for log in self._logs:
            log.close()
        self._logs = []


class _Files(NamedTuple):
    """The two files of a process, and how large that of the states can become."""

    states: str
    records: str
    size: int

    def unlink(self) -> None:
        os.unlink(self.states)
        os.unlink(self.records)


class _Log:
    """What one process has kept, as another one, or itself, sees it."""

    def __init__(self, files: _Files, dtype: torch.dtype) -> None:
        self.places: dict[bytes, tuple[int, int, int]] = {}
        self._memory = torch.from_file(files.states, shared=True, size=files.size, dtype=torch.uint8)
        self._records, self._read, self._dtype = os.open(files.records, os.O_RDWR | os.O_APPEND), 0, dtype

    def read_on(self) -> None:
        """Take note of what has been kept since the last time."""
        new = os.pread(self._records, 2**20 * RECORD.size, self._read)
        whole = len(new) // RECORD.size * RECORD.size
        self._read += whole
        for key, start, tokens, width in RECORD.iter_unpack(new[:whole]):
            self.places[key] = (start, tokens, width)

    def states(self, key: bytes) -> torch.Tensor:
        start, tokens, width = self.places[key]
        size = tokens * width * self._dtype.itemsize
        return self._memory[start : start + size].view(self._dtype).view(tokens, width)

    def append(self, key: bytes, states: torch.Tensor, start: int) -> None:
        self.places[key] = (start, *states.shape)
        self.states(key).copy_(states)
        os.write(self._records, RECORD.pack(key, start, *states.shape))

    def close(self) -> None:
        os.close(self._records)
        self.places.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)


def make_store(limit: int, dtype: torch.dtype) -> StateStore:
    """A store of `limit` bytes for all processes of this node together. Every process of a run calls this together."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # not every launcher says it: each is then by itself
    if processes > 1 and dist.is_available() and dist.is_initialized():
        return SharedStore(limit // processes, dtype)
    return MemoryStore(limit, dtype)


def _new_file(size: int) -> str:
    """A file of `size` bytes that takes memory, or disk, only for what is written to it."""
    room = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > size
    descriptor, path = tempfile.mkstemp(prefix="partialtune-prefix-", dir=IN_MEMORY if room else None)
    os.truncate(descriptor, size)
    os.close(descriptor)
    return path
