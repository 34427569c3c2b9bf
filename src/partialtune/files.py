"""Files and folders that are there as a whole or not at all, and the locks that keep two processes apart."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

logger = logging.getLogger(__name__)

_without_locks: set[int] = set()  # device numbers of file systems that were warned about; one warning for each


def lock(file: IO, busy: Callable[[], None]) -> None:
    """Lock an open file until it is closed; the system releases the lock if the process dies.

    Some network file systems have no locks (NFS without its lock service, Lustre without `flock`, mounted cloud
    storage): there one warning is logged, and nothing keeps a second process away.

    Args:
        file: Open for writing, which NFS asks for.
        busy: Called where another process holds the lock: raises, or returns to wait for that process.
    """
    # Of filelock the function for a descriptor of our own, not its class FileLock: that one turns to a lock file that
    # outlives a killed process where a file system answers ENOSYS, and it hides the descriptor, which a child process
    # has to inherit so that the lock lasts until the child's end, too.
    try:
        if not lock_descriptor(file.fileno(), blocking=False):
            busy()
            lock_descriptor(file.fileno())
    except OSError as error:
        _warn_once(file, error)


def _warn_once(file: IO, error: OSError) -> None:
    device = os.fstat(file.fileno()).st_dev
    if device not in _without_locks:
        _without_locks.add(device)
        logger.warning(
            "The file system of %s has no locks (%s), so nothing stops a second process from writing to the same "
            "folder. Start one at a time.",
            Path(file.name).absolute().parent,
            error.strerror or error,
        )


def write_whole(file: Path, content: bytes) -> None:
    """Write a file aside and rename it: a reader, or a process that is killed, never leaves or meets half of it.

    Raises:
        OSError: If it cannot be written. What was there stays as it was, and nothing is left beside it.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def append_lines(file: Path, lines: Sequence[str]) -> None:
    """Append whole lines, all of them or none.

    Raises:
        OSError: If they cannot be written. The file is as long as it was.
    """
    size = None
    try:
        with file.open("ab") as out:
            size = out.tell()
            out.write("".join(lines).encode())
    except OSError:
        with suppress(OSError):
            if size is not None:
                os.truncate(file, size)  # there may have been room for some of the lines
        raise


def keep_lines_up_to(step: int, file: Path) -> None:
    """Take the lines of later steps out of a file of JSON lines with a `step`: a run that goes on writes them again.

    Raises:
        OSError: If the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    # A process that was killed may have left half a line, at the end.
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(file, "".join(kept).encode())


def move_all(source: Path, folder: Path, last: str = "config.json") -> None:
    """Move the files of a folder, and of those in it, into another one; every file is synced before the first moves.

    Args:
        source: Where they were written.
        folder: Where they belong, on the same file system. Files of the same names are replaced.
        last: Name of the file that moves last: without it nothing in the folder can be loaded.
    """
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == last)
    for file in files:
        with file.open("rb") as content:
            os.fsync(content.fileno())
    for file in files:
        place = folder / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
