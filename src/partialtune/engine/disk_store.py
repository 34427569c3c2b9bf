"""Where the states of rows are kept on disk, by key: for later runs, and for more rows than memory holds.

    store = open_disk_store(prefix_facts(model, blocks, digest))    # `prefix_facts`: all that changes the states
    cache = PrefixCache(model, blocks, store, digest)               # or by hand: get, put; by the same keys
    store.close()

The interface is that of `state_store`. Any number of processes of any number of runs use a folder at once. Each writes
to two files of its own, as in `SharedStore`: one of states, and one of records that say which key lies where. A record
is appended when its states are written, and holds their checksum: nothing is ever locked, and a row that was written
by half, cut off or changed since is noticed when it is read, left out, and so computed and written again.

Files are read by `pread` and not through a mapping, which is the same for what memory is taken (the system's cache of
files in both cases, which it gives up when others need it), but what is read does not count as the process's own
memory, and a file that is cut short or a disk that fails is an error that can be answered: in a mapping it is SIGBUS.
"""

import logging
import os
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkstemp
from typing import Any, NamedTuple

import torch

from partialtune.engine.disk_folders import HeldFolder, hold_folder

logger = logging.getLogger(__name__)

# key, first byte, tokens of the row, bytes of a token, CRC-32 of the states; then that of the record itself
FIELDS = struct.Struct("<16sQIII")
RECORD_BYTES = FIELDS.size + 4
STEP = 64 * 2**20  # bytes after which it is looked again whether the limit and the disk have room


class _Place(NamedTuple):
    """Where the states of a row lie."""

    segment: "_Segment"
    start: int
    tokens: int
    width: int
    checksum: int


class DiskStore:
    """States of rows in a folder that outlives the run. Made by `open_disk_store`.

    Args:
        folder: Held; let go of when the store is closed.
        dtype: Of the states, as in a `MemoryStore`.

    Attributes:
        size: Bytes of states written by this process so far.
        outlives_run: That later runs will find what is kept.
    """

    outlives_run = True

    def __init__(self, folder: HeldFolder, dtype: torch.dtype) -> None:
        self._folder, self.dtype, self.size = folder, dtype, 0
        self._segments: dict[str, _Segment] = {}
        self._places: dict[bytes, list[_Place]] = {}  # the newest last
        self._own: _Writer | None = None
        self._room, self._is_full, self._damaged = 0, False, 0
        self._read_on()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    def __len__(self) -> int:
        """Rows that are known to lie here."""
        return len(self._places)

    def get(self, key: bytes) -> torch.Tensor | None:
        found = self._read(key)
        if found is None:  # what others have kept since
            self._read_on()
            found = self._read(key)
        return found

    def _read(self, key: bytes) -> torch.Tensor | None:
        places = self._places.get(key, [])
        while places:
            states = places[-1].segment.states(places[-1], self.dtype)
            if states is not None:
                return states
            self._warn_of_damage(places.pop().segment)
        self._places.pop(key, None)
        return None

    def _warn_of_damage(self, segment: "_Segment") -> None:
        self._damaged += 1
        if self._damaged == 1:
            logger.warning(
                "Kept states in %s.states are damaged or cut off: such rows are computed and kept again.", segment.stem
            )

    def put(self, key: bytes, states: torch.Tensor) -> bool:
        if key in self._places:
            return True
        size = states.numel() * self.dtype.itemsize
        if self._is_full or not self._has_room(size):
            return False
        try:
            if self._own is None:
                self._own = _Writer(self._folder.path)
            self._own.append(key, states.to(self.dtype).contiguous())
        except OSError as error:
            self._stop(f"{self._folder.path} cannot be written ({error.strerror or error})")
            return False
        self._room -= size
        self.size += size
        self._read_on()
        return True

    def _has_room(self, size: int) -> bool:
        if self._room < size:
            try:
                # not all that there is: other runs write, too
                self._room = min(self._folder.room_for(size), max(size, STEP))
            except OSError as error:
                self._stop(f"{self._folder.path} cannot be looked at ({error.strerror or error})")
                return False
            if not self._room:
                self._stop(
                    f"the limit of all kept states is reached (PARTIALTUNE_PREFIX_GB), or less than 1 GB would be left "
                    f"free on the disk of {self._folder.path}"
                )
                return False
        return True

    def _stop(self, why: str) -> None:
        self._is_full = True
        logger.warning("No more states of the frozen prefix are kept on disk: %s. The run goes on without.", why)

    def forget(self) -> None:
        """Nothing: states of other weights have other keys, and another process may be reading these."""

    def close(self) -> None:
        for segment in self._segments.values():
            segment.close()
        if self._own is not None:
            self._own.close()
        self._segments, self._places, self._own = {}, {}, None
        self._folder.let_go()

    def _read_on(self) -> None:
        """Take note of what this process and all others have kept since the last time."""
        try:
            names = sorted(os.listdir(self._folder.path))
        except OSError:  # somebody has deleted the cache: what is open can still be read
            names = []
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending == ".records" and stem not in self._segments:
                try:
                    self._segments[stem] = _Segment(self._folder.path / stem)
                except OSError:  # another user's, or too many files are open
                    continue
        for segment in self._segments.values():
            for key, place in segment.read_on():
                self._places.setdefault(key, []).append(place)


class _Segment:
    """The two files of one process, as all read them."""

    def __init__(self, stem: Path) -> None:
        self.stem, self._read = stem, 0
        self._records = _open_to_read(stem.with_suffix(".records"))
        try:
            self._states = _open_to_read(stem.with_suffix(".states"))
        except OSError:
            os.close(self._records)
            raise

    def read_on(self) -> list[tuple[bytes, _Place]]:
        """What has been kept since the last time."""
        found = []
        try:
            new = os.pread(self._records, 2**16 * RECORD_BYTES, self._read)
        except OSError:  # a disk that fails: these rows are computed again
            return []
        while len(new) >= RECORD_BYTES:
            for start in range(0, len(new) // RECORD_BYTES * RECORD_BYTES, RECORD_BYTES):
                record = new[start : start + RECORD_BYTES]
                if zlib.crc32(record[: FIELDS.size]).to_bytes(4, "little") == record[FIELDS.size :]:
                    key, *place = FIELDS.unpack_from(record)
                    found.append((key, _Place(self, *place)))
                self._read += RECORD_BYTES
            try:
                new = os.pread(self._records, 2**16 * RECORD_BYTES, self._read)
            except OSError:
                return found
        return found

    def states(self, place: _Place, dtype: torch.dtype) -> torch.Tensor | None:
        """The states at a place, None where they are not those that were written."""
        states = torch.empty((place.tokens, place.width // dtype.itemsize), dtype=dtype)
        wanted = _bytes_of(states)
        done = 0
        try:
            while done < len(wanted) and (more := os.preadv(self._states, [wanted[done:]], place.start + done)):
                done += more
        except OSError:  # a disk that fails
            return None
        return states if done == len(wanted) and zlib.crc32(wanted) == place.checksum else None

    def close(self) -> None:
        os.close(self._records)
        os.close(self._states)


class _Writer:
    """The two files of this process, to which it appends."""

    def __init__(self, folder: Path) -> None:
        # The names are in the order of time: of a row that was damaged and kept again the newer states are read.
        self._states, path = mkstemp(suffix=".states", prefix=f"{time.time_ns():020}-", dir=folder)
        self._end = 0
        records = Path(path).with_suffix(".records")
        try:
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(self._states, 0o666 & ~mask)  # as other files of the cache, which people may share
            self._records = os.open(records, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError:
            os.close(self._states)
            raise

    def append(self, key: bytes, states: torch.Tensor) -> None:
        """Write states (tokens, width), then their record.

        Raises:
            OSError: If the disk is full, or fails. There is no record then.
        """
        content = _bytes_of(states)
        done = 0
        while done < len(content):
            done += os.pwrite(self._states, content[done:], self._end + done)
        tokens, width = states.shape[0], states.shape[1] * states.element_size()
        record = FIELDS.pack(key, self._end, tokens, width, zlib.crc32(content))
        record += zlib.crc32(record).to_bytes(4, "little")
        if os.write(self._records, record) != len(record):
            raise OSError("half a record was written")
        self._end += len(content)

    def close(self) -> None:
        os.close(self._states)
        os.close(self._records)


def _bytes_of(states: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = states.view(torch.uint8).reshape(-1)
    return memoryview(flat.numpy()) if flat.numel() else memoryview(b"")


def _open_to_read(path: Path) -> int:
    # others may be able to write to the folder: a link that they put there is not followed
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def open_disk_store(made_of: Mapping[str, Any], dtype: torch.dtype = torch.uint8) -> DiskStore:
    """The store on disk of the states that depend on `made_of`, shared by all that open it.

    Args:
        made_of: Everything that the states depend on beside their keys, as JSON: `prefix_facts(...)`. Two stores
            with other facts share nothing.
        dtype: Of the states; a `PrefixCache` keeps bytes.

    Raises:
        OSError: If the folder can neither be made nor read.
        RecipeError: If $PARTIALTUNE_PREFIX_GB is no number.
    """
    return DiskStore(hold_folder(made_of), dtype)
