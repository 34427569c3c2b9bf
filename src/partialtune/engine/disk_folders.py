"""Folders of kept states on disk: one for each prefix that they were computed with, within a limit of size and age.

    folder = hold_folder(made_of)      # in $PARTIALTUNE_CACHE/prefix, made if it is not there; nobody removes it
    folder.room_for(2**20)             # bytes that fit in, 0 where these do not
    folder.let_go()

Whoever uses a folder holds a shared lock on a file in it, which dies with the process. What nobody holds is removed:
30 days after its last use, as prepared texts are, and before that, the least recently used first, where the limit is
reached. That is $PARTIALTUNE_PREFIX_GB (20 where it is not set; units of 2^30 bytes) for all folders together.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from partialtune.cache import LIFETIME_DAYS, cache_root, new_file
from partialtune.errors import RecipeError

logger = logging.getLogger(__name__)

LAYOUT = 1  # of the files; raised when it changes, so that no older folder is taken for a newer one
LIMIT_GB = 20.0  # of all folders together, where the environment does not say
ROOM_ON_DISK = 2**30  # bytes that are left free: a run that keeps states must not lose its checkpoint to them
LOCK_FILE, RECORD_FILE = "lock", "made_of.json"
REMOVED = ".removed-"  # how the name of a folder begins that is on its way out


def prefix_root() -> Path:
    """The folder in which the folders of kept states lie."""
    return cache_root() / "prefix"


def limit_bytes() -> int:
    """How much all kept states together may take on disk.

    Raises:
        RecipeError: If $PARTIALTUNE_PREFIX_GB is no number of 0 or more.
    """
    given = os.environ.get("PARTIALTUNE_PREFIX_GB", "").strip()
    try:
        limit = float(given) if given else LIMIT_GB
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise RecipeError(
            f"PARTIALTUNE_PREFIX_GB is {given!r}; allowed is a number of gigabytes, at least 0. So much do "
            f"the kept states of frozen prefixes take on disk at most; {LIMIT_GB:g} where it is not set."
        )
    return int(limit * 2**30)


def free_on_disk() -> int:
    """Bytes that kept states could still take on the disk of the cache, whatever the limit says."""
    place = prefix_root()
    while not place.exists():
        place = place.parent
    return max(0, shutil.disk_usage(place).free - ROOM_ON_DISK)


class HeldFolder:
    """A folder of kept states that this process uses.

    Args:
        path: The folder.
        descriptor: Of its lock file, with a shared lock on it; None where there can be none, as in a cache that may
            only be read.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self._descriptor = path, descriptor
        self._mark_used()

    def _mark_used(self) -> None:
        with suppress(OSError):  # a shared cache may be read-only
            os.utime(self.path / LOCK_FILE)

    def room_for(self, size: int) -> int:
        """How many bytes fit in, after others were removed where `size` did not; 0 where it still does not.

        Raises:
            OSError: If the disk cannot be looked at.
        """
        _remove_unused(self.path, size)
        taken = sum(folder.size for folder in _folders())
        room = min(limit_bytes() - taken, free_on_disk())
        return room if room >= size else 0

    def let_go(self) -> None:
        """Others may remove it from now on."""
        if self._descriptor is not None:
            self._mark_used()
            os.close(self._descriptor)
            self._descriptor = None


def name_of(made_of: Mapping[str, Any]) -> str:
    """The name of a folder."""
    return hashlib.sha256(json.dumps([LAYOUT, made_of], sort_keys=True).encode()).hexdigest()[:32]


def hold_folder(made_of: Mapping[str, Any]) -> HeldFolder:
    """The folder of the states that depend on `made_of`, made if it is not there.

    Args:
        made_of: Everything that they depend on beside their rows, as JSON. It is written into the folder for people.

    Raises:
        OSError: If the folder can neither be made nor read.
        RecipeError: If the limit is no number.
    """
    limit_bytes()
    path = prefix_root() / name_of(made_of)
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _shared_lock(path / LOCK_FILE)
        except FileNotFoundError:  # removed by another process since
            continue
        break
    if not (path / RECORD_FILE).exists():
        with suppress(OSError), new_file(path / RECORD_FILE) as file:
            file.write((json.dumps(made_of, indent=2, sort_keys=True) + "\n").encode())
    return HeldFolder(path, descriptor)


def _shared_lock(path: Path) -> int | None:
    """A descriptor of a lock file with a shared lock on it. None where the file system has no locks.

    Raises:
        FileNotFoundError: If the file has lost its name, now or while this waited: another process removes the folder.
        OSError: If the file can neither be made nor read.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not path.exists():
            raise
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # a cache that may only be read
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        # NFS without its lock service, and the like. What is open stays readable after its name is gone, so that a
        # process which removes this folder costs states that are computed once more, and no more than that.
        os.close(descriptor)
        return None
    if not _still_named(path, descriptor):
        os.close(descriptor)
        raise FileNotFoundError(path)
    return descriptor


def _still_named(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that lies at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


class _Folder(NamedTuple):
    path: Path
    last_use: float
    size: int


def _folders() -> list[_Folder]:
    """All folders of kept states, the least recently used first."""
    found = []
    for path in prefix_root().glob("[0-9a-f]*"):
        with suppress(OSError):  # another process was here, too
            lock = path / LOCK_FILE
            last_use = (lock if lock.exists() else path).stat().st_mtime
            found.append(_Folder(path, last_use, sum(file.stat().st_size for file in path.iterdir())))
    return sorted(found, key=lambda folder: folder.last_use)


def _remove_unused(kept: Path, wanted: int) -> None:
    """Remove what is old, and what was used least recently until `wanted` bytes fit in; never `kept`."""
    for rest in prefix_root().glob(f"{REMOVED}*"):  # of a process that was killed here
        shutil.rmtree(rest, ignore_errors=True)
    folders, oldest, limit = _folders(), time.time() - LIFETIME_DAYS * 24 * 3600, limit_bytes()
    taken = sum(folder.size for folder in folders)
    for folder in folders:
        full = taken + wanted > limit or free_on_disk() < wanted
        if folder.path != kept and (full or folder.last_use < oldest) and _remove(folder.path):
            taken -= folder.size
            logger.info("Kept states of another frozen prefix removed: %s, last used %s.", folder.path, _day(folder))


def _day(folder: _Folder) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(folder.last_use))


def _remove(path: Path) -> bool:
    """Remove a folder that nobody holds. False where somebody does, or it cannot be removed."""
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = path.with_name(f"{REMOVED}{path.name}-{os.getpid()}")
        path.rename(aside)  # at once: nobody finds half of it
        shutil.rmtree(aside, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
