"""An http(s) address -> a text file in the cache, with its sha256; fetched once, whole, or not at all.

Beside each file a JSON record says where it came from. A file appears in the cache by a rename after it was written
and synced, and a lock keeps two processes from fetching the same address at once.
"""

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urldefrag, urlsplit

from partialtune.errors import TextError
from partialtune.files import lock
from partialtune.net.addresses import without_secrets
from partialtune.net.transfer import Limits, Received, TryAgainError, receive

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    """A text in the cache: `sha256` and `size` (bytes) of the file, `charset` if the HTTP header named one."""

    path: Path
    url: str
    sha256: str
    size: int
    charset: str | None


def cache_folder() -> Path:
    """Where texts are kept: $PARTIALTUNE_CACHE/texts or ~/.cache/partialtune/texts."""
    return Path(os.environ.get("PARTIALTUNE_CACHE") or "~/.cache/partialtune").expanduser() / "texts"


def opened_without_links(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """A file of the cache, opened. Others may be able to write there: a link that they put there is an OSError."""
    mode = "rb" if flags == os.O_RDONLY else "r+b"
    return os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), mode)


def new_file(path: Path) -> BinaryIO:
    """A file of the cache to write, made anew: what lay in its place is removed, and written to by no means."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def fetch(url: str, folder: Path | None = None, limits: Limits | None = None) -> Download:
    """Fetch a text once; later calls find it in the cache and need no network.

    Args:
        url: An http or https address of a plain text.
        folder: Cache folder, default `cache_folder()`.
        limits: Time-outs, tries and the largest size.

    Returns:
        The cached file. Its `url` carries no secret.

    Raises:
        TextError: If the address, the network, the server or what it sent is no good, or the cache cannot be written.
    """
    url = _checked_address(url)
    shown = without_secrets(url)
    folder = folder or cache_folder()
    body = folder / f"{hashlib.sha256(url.encode()).hexdigest()}.txt"
    try:
        if cached := _read_cache(body, shown):  # without the lock: a shared cache may be read-only
            return cached
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(body.with_suffix(".lock"), shown):
            if cached := _read_cache(body, shown):
                return cached
            if os.path.lexists(body.with_suffix(".json")):
                logger.warning("%s is no longer what was fetched from %s: fetching it again.", body, shown)
            return _fetch_into_cache(url, body, limits or Limits())
    except OSError as error:
        raise TextError(
            f"The cache folder {folder} cannot be used ({error.strerror or error}). "
            f"Set PARTIALTUNE_CACHE to a folder on a disk with space where you may write."
        ) from error


def _checked_address(url: str) -> str:
    """The address without its fragment, if it is http or https and names a host."""
    try:
        url = urldefrag(url.strip()).url
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return url
    except ValueError:
        pass  # urlsplit on something like http://[: said below
    raise TextError(
        f"{without_secrets(url)!r} is no address to fetch a text from: write http://HOST/... or https://HOST/..."
    )


@contextmanager
def _lock(path: Path, shown: str) -> Iterator[None]:
    """Hold a file's lock, which the system lets go of if the process dies."""
    with opened_without_links(path, os.O_RDWR | os.O_CREAT) as file:
        lock(file, lambda: logger.info("Another process fetches %s: waiting for it.", shown))
        yield


def _read_cache(body: Path, shown: str) -> Download | None:
    """The cached file if it is still what its record says, else None."""
    try:
        with opened_without_links(body.with_suffix(".json")) as file:
            record = json.loads(file.read())
        with opened_without_links(body) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != record["sha256"]:
            return None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return None
    except (ValueError, KeyError, TypeError, RecursionError):  # a record that cannot be read vouches for nothing
        return None
    logger.info("%s: taken from the cache, %s", shown, body)
    return Download(body, shown, sha256, body.stat().st_size, record.get("charset"))


def _fetch_into_cache(url: str, body: Path, limits: Limits) -> Download:
    """Write the text aside, then put it and its record in place. What a failed try wrote is removed."""
    part = body.with_suffix(".part")
    shown = without_secrets(url)
    try:
        received = _receive_with_retries(url, part, limits)
        part.replace(body)
    finally:
        part.unlink(missing_ok=True)
    record = {
        "url": shown,
        "sha256": received.sha256,
        "bytes": received.size,
        "content_type": received.content_type,
        "charset": received.charset,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _write_record(body.with_suffix(".json"), record)
    logger.info("%s: fetched %s bytes into %s", shown, f"{received.size:,}", body)
    return Download(body, shown, received.sha256, received.size, received.charset)


def _receive_with_retries(url: str, part: Path, limits: Limits) -> Received:
    """Try as often as allowed, waiting longer each time or as long as the server asks."""
    for attempt in range(1, limits.tries + 1):
        try:
            with new_file(part) as file:
                received = receive(url, file, limits)
                file.flush()
                os.fsync(file.fileno())
            return received
        except TryAgainError as error:
            asked = error.wait_seconds
            if asked is not None and asked > limits.longest_wait_seconds:
                raise TextError(f"{error} It asks to wait {asked:,.0f} s: try again later.") from error
            if attempt == limits.tries:
                raise TextError(f"{error} Tried {attempt} times: check the address and the network.") from error
            wait = limits.first_wait_seconds * 2 ** (attempt - 1) if asked is None else asked
            logger.warning("%s Trying again in %.1f s.", error, wait)
            time.sleep(wait)
    raise TextError(f"{without_secrets(url)} was not fetched: {limits.tries} tries are allowed, it takes at least 1.")


def _write_record(path: Path, record: dict[str, str | int | None]) -> None:
    aside = path.with_suffix(".json.part")
    with new_file(aside) as file:
        file.write(json.dumps(record, indent=2).encode())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
