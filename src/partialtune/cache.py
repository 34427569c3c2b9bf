"""The cache on disk: what a file is made of -> the file, made once, in $PARTIALTUNE_CACHE or ~/.cache/partialtune.

    cached_file(folder / "a.txt", build, ...)        # build(path) writes the file and returns its record
    cached_by_content("tokens", ".bin", {"text": digest, "tokenizer": fingerprint}, build)    # named by what made it

A file appears by a rename after it was written and synced, its JSON record after it, so that a run that dies leaves
nothing that a later one would trust. A lock keeps two processes from making the same file at once. `datasets` caches
too (`Dataset.from_generator`), but returns a file in which a bit was flipped, stops at one that was cut short or
deleted, follows links, and writes a lock file even to read (tried with datasets 5.2).
"""

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from partialtune.errors import TextError
from partialtune.files import lock

logger = logging.getLogger(__name__)

LIFETIME_DAYS = 30  # of what `cached_by_content` made, after its last use
LAYOUT = 1  # of files cached by content; raised when it changes, so that no older file is taken for a newer one


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache: its sha256, its size in bytes, its record, and whether this call has just made it."""

    path: Path
    sha256: str
    size: int
    record: dict[str, Any]
    is_new: bool = field(default=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What `build` returned to `cached_by_content`."""
        return self.record["facts"]


def cache_root() -> Path:
    """The folder that holds all that is cached."""
    return Path(os.environ.get("PARTIALTUNE_CACHE") or "~/.cache/partialtune").expanduser()


def cached_by_content(
    kind: str, suffix: str, made_of: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]
) -> CachedFile:
    """The file that is made of `made_of`: taken from the cache if it is there and whole, else built.

    What no run has used for LIFETIME_DAYS is removed when something new is made; the folder may be deleted at any other
    time, too.

    Args:
        kind: Folder below the cache: `texts`, `tokens`, `windows`.
        suffix: How the file's name ends.
        made_of: Everything that its content depends on, as JSON.
        build: Writes the file at the path that it gets, and returns facts to keep, as JSON.

    Raises:
        TextError: If the cache cannot be written.
    """
    path = _path_of(kind, suffix, made_of)

    def build_with_time(part: Path) -> dict[str, Any]:
        _remove_unused(path.parents[1])
        facts = build(part)
        return {"mtime_ns": part.stat().st_mtime_ns, "facts": facts}  # a rename keeps the time

    return cached_file(
        path,
        build_with_time,
        waiting=f"Another process makes {path}: waiting for it.",
        again=f"{path} is damaged or was left unfinished: it is made again.",
        advice="a folder where you may write, on a disk with space for four times the size of the text",
    )


def find_cached(kind: str, suffix: str, made_of: Mapping[str, Any]) -> CachedFile | None:
    """The file that `cached_by_content` made of the same, None where there is none or it is damaged."""
    return _read(_path_of(kind, suffix, made_of))


def _path_of(kind: str, suffix: str, made_of: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps([LAYOUT, kind, made_of], sort_keys=True).encode()).hexdigest()
    return cache_root() / "prepared" / kind / f"{key}{suffix}"


def cached_file(
    path: Path, build: Callable[[Path], dict[str, Any]], *, waiting: str, again: str, advice: str
) -> CachedFile:
    """The file at `path`, built if it is not there or not what its record says.

    Args:
        path: Where it belongs; its record lies beside it and ends in `.json`.
        build: Writes the file at the path that it gets, and returns its record. To the record `sha256` and `bytes` are
            added. With `mtime_ns` in it a file of one's own is believed while its time stays the same; without it the
            whole content is read every time.
        waiting: Logged where another process is making the file.
        again: Logged where the file, or a part of it, is there and cannot be used.
        advice: What PARTIALTUNE_CACHE should be, in the error's words.

    Raises:
        TextError: If the cache cannot be written.
    """
    if entry := _read(path):  # without the lock: a shared cache may be read-only
        return entry
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT) as file:
            lock(file, lambda: logger.info("%s", waiting))
            return _read(path) or _build(path, build, again)
    except OSError as error:
        raise TextError(
            f"The cache folder {path.parent} cannot be used ({error.strerror or error}). "
            f"Set PARTIALTUNE_CACHE to {advice}."
        ) from error


def new_file(path: Path) -> BinaryIO:
    """A file of the cache to write, made anew: what lay in its place is removed, and written to by no means."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def _opened(path: Path, flags: int = os.O_RDONLY) -> io.BufferedReader | io.BufferedRandom:
    """A file of the cache, opened. Others may be able to write there: a link that they put there is an OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "rb") if flags == os.O_RDONLY else os.fdopen(descriptor, "r+b")


def _read(path: Path) -> CachedFile | None:
    """The file if it is what its record says. Its content is read if it was touched since, or may not be ours."""
    try:
        with _opened(path.with_suffix(".json")) as file:
            record, owners = json.loads(file.read()), {os.fstat(file.fileno()).st_uid}
        with _opened(path) as file:
            status = os.fstat(file.fileno())
            ours = owners | {status.st_uid} == {os.geteuid()}
            entry = CachedFile(path, record["sha256"], status.st_size, record)
            if status.st_size != record["bytes"]:
                return None
            believed = ours and record.get("mtime_ns") == status.st_mtime_ns
            if not believed and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # such a record vouches for nothing
        return None
    with suppress(OSError):  # a shared cache may be read-only
        os.utime(path.with_suffix(".json"))  # a record's time is that of its last use
    return entry


def _build(path: Path, build: Callable[[Path], dict[str, Any]], again: str) -> CachedFile:
    """Write the file aside, then put it and its record in place."""
    record_path, part = path.with_suffix(".json"), path.with_suffix(".part")
    if any(map(os.path.lexists, (path, record_path, part))):
        logger.warning("%s", again)
        record_path.unlink(missing_ok=True)
    try:
        new_file(part).close()
        record = build(part)
        with _opened(part, os.O_RDWR) as file:
            os.fsync(file.fileno())  # before the rename: after a crash of the machine the name would hold zeros
            sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    entry = CachedFile(path, sha256, size, {"sha256": sha256, "bytes": size, **record}, is_new=True)
    aside = path.with_suffix(".json.part")
    with new_file(aside) as file:
        file.write(json.dumps(entry.record, indent=2).encode())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(record_path)
    return entry


def _remove_unused(folder: Path) -> None:
    """Remove entries whose record is old, and what a run that died left behind."""
    oldest = time.time() - LIFETIME_DAYS * 24 * 3600
    for path in [*folder.glob("*/*.json"), *folder.glob("*/*.part")]:
        with suppress(FileNotFoundError):  # another process was here, too
            if path.stat().st_mtime < oldest:
                for file in path.parent.glob(f"{path.stem}.*"):
                    if file.suffix != ".lock":  # another process may hold it; without its name two would hold one each
                        file.unlink(missing_ok=True)
