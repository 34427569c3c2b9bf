"""Content-addressed files: what a file is made of -> the file, made once, in $PARTIALTUNE_CACHE/prepared.

    entry = stored("tokens", ".bin", {"text": digest, "tokenizer": fingerprint}, build)     # build(path) -> facts

A file appears by a rename after it was written and synced, its JSON record after it, so that a run that dies leaves
nothing that a later one would trust. A lock keeps two processes from making the same file at once. What no run has
used for LIFETIME_DAYS is removed when something new is made; the folder may be deleted at any other time, too.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialtune.errors import TextError
from partialtune.files import lock
from partialtune.net.download import cache_folder, new_file, opened_without_links

logger = logging.getLogger(__name__)

LIFETIME_DAYS = 30  # after its last use
LAYOUT = 1  # of the stored files; raised when it changes, so that no older file is taken for a newer one


@dataclass(frozen=True)
class Stored:
    """A stored file: its sha256 and what `build` said about it."""

    path: Path
    sha256: str
    facts: dict[str, Any]


def stored(kind: str, suffix: str, made_of: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> Stored:
    """The file that is made of `made_of`: taken from the cache if it is there and whole, else built.

    Args:
        kind: Folder below the cache: `texts`, `tokens`, `windows`.
        suffix: How the file's name ends.
        made_of: Everything that its content depends on, as JSON.
        build: Writes the file at the path that it gets, and returns facts to keep, as JSON.

    Raises:
        TextError: If the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps([LAYOUT, kind, made_of], sort_keys=True).encode()).hexdigest()
    path = cache_folder().parent / "prepared" / kind / f"{key}{suffix}"
    if entry := _read(path):  # without the lock: a shared cache may be read-only
        return entry
    with _cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if entry := _read(path):
                return entry
            _remove_unused(path.parents[1])
            return _build(path, build)


def _read(path: Path) -> Stored | None:
    """The stored file if it is what its record says. Its content is read if it was touched since, or is not ours."""
    try:
        with opened_without_links(path.with_suffix(".json")) as file:
            record, owners = json.loads(file.read()), {os.fstat(file.fileno()).st_uid}
        with opened_without_links(path) as file:
            status = os.fstat(file.fileno())
        ours = owners | {status.st_uid} == {os.geteuid()}
        entry = Stored(path, record["sha256"], record["facts"])
        if status.st_size != record["bytes"]:
            return None
        if (not ours or status.st_mtime_ns != record["mtime_ns"]) and _sha256(path) != entry.sha256:
            return None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # such a record vouches for nothing
        return None
    with suppress(OSError):  # a shared cache may be read-only
        os.utime(path.with_suffix(".json"))  # a record's time is that of its last use
    return entry


def _remove_unused(folder: Path) -> None:
    """Remove entries whose record is old, and what a run that died left behind."""
    oldest = time.time() - LIFETIME_DAYS * 24 * 3600
    for path in [*folder.glob("*/*.json"), *folder.glob("*/*.part")]:
        with suppress(FileNotFoundError):  # another process was here, too
            if path.stat().st_mtime < oldest:
                for file in path.parent.glob(f"{path.stem}.*"):
                    if file.suffix != ".lock":
                        file.unlink(missing_ok=True)


def _build(path: Path, build: Callable[[Path], dict[str, Any]]) -> Stored:
    """Write the file aside, then put it and its record in place."""
    record_path, part = path.with_suffix(".json"), path.with_suffix(".part")
    if path.exists() or record_path.exists() or part.exists():
        logger.warning("%s is damaged or was left unfinished: it is made again.", path)
        record_path.unlink(missing_ok=True)
    try:
        new_file(part).close()
        facts = build(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    status = path.stat()
    entry = Stored(path, _sha256(path), facts)
    record = {"sha256": entry.sha256, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "facts": facts}
    aside = path.with_suffix(".json.part")
    with new_file(aside) as file:
        file.write(json.dumps(record).encode())
    aside.replace(record_path)
    return entry


def _sha256(path: Path) -> str:
    with opened_without_links(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system lets go of if the process dies."""
    with opened_without_links(path, os.O_RDWR | os.O_CREAT) as file:
        lock(file, lambda: logger.info("Another process makes %s: waiting for it.", path.with_suffix("")))
        yield


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TextError(
            f"The cache folder {path.parent} cannot be used ({error.strerror or error}). Set PARTIALTUNE_CACHE to a "
            f"folder where you may write, on a disk with space for four times the size of the text."
        ) from error
