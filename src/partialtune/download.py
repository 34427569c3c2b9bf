"""An http(s) URL -> a text file in the cache, with its sha256; fetched once, whole, or not at all.

Beside each file a JSON record says where it came from. A file appears in the cache by a rename after it was written
and synced, and a lock keeps two processes from fetching the same address at once.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urldefrag, urlsplit, urlunsplit

import requests
import urllib3
from tqdm import tqdm

from partialtune import __version__
from partialtune.decoding import refuse_non_text
from partialtune.errors import TextError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
SNIFFED_BYTES = 1024  # enough to tell an HTML page or an archive from a text
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Limits:
    """How patient a download is. `max_bytes` None means PARTIALTUNE_MAX_DOWNLOAD_MB (2^20 bytes each) or 4 GiB."""

    connect_seconds: float = 10.0
    read_seconds: float = 20.0  # without a single byte
    slow_after_seconds: float = 60.0  # from then on the average must be at least
    slowest_bytes_per_second: float = 1024.0
    tries: int = 3
    first_wait_seconds: float = 1.0  # doubled after each try
    longest_wait_seconds: float = 60.0  # the longest Retry-After that is obeyed
    max_bytes: int | None = None


@dataclass(frozen=True)
class Download:
    """A text in the cache: `sha256` and `size` (bytes) are those of the file, `charset` is the HTTP header's."""

    path: Path
    url: str
    sha256: str
    size: int
    charset: str | None


class _TryAgain(Exception):
    """A failure that another try may mend."""

    def __init__(self, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


def cache_folder() -> Path:
    """Where texts are kept: $PARTIALTUNE_CACHE/texts or ~/.cache/partialtune/texts."""
    return Path(os.environ.get("PARTIALTUNE_CACHE") or "~/.cache/partialtune").expanduser() / "texts"


def fetch(url: str, folder: Path | None = None, limits: Limits | None = None) -> Download:
    """Fetch a text once; later calls find it in the cache and need no network.

    Args:
        url: An http or https address of a plain text.
        folder: Cache folder, default `cache_folder()`.
        limits: Time-outs, tries and the largest size.

    Raises:
        TextError: If the address, the network, the server or what it sent is no good, or the cache cannot be written.
    """
    url = urldefrag(url.strip()).url
    _check_address(url)
    folder = folder or cache_folder()
    body = folder / f"{hashlib.sha256(url.encode()).hexdigest()}.txt"
    try:
        if cached := _read_cache(body, url):  # without the lock: a shared cache may be read-only
            return cached
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(body.with_suffix(".lock"), url):
            if cached := _read_cache(body, url):
                return cached
            if body.with_suffix(".json").exists():
                logger.warning(
                    "%s is no longer what was fetched from %s: fetching it again.", body, without_password(url)
                )
            return _fetch_with_retries(url, body, limits or Limits())
    except OSError as error:
        raise TextError(
            f"The cache folder {folder} cannot be used ({error.strerror or error}). "
            f"Set PARTIALTUNE_CACHE to a folder on a disk with space where you may write."
        ) from error


def without_password(url: str) -> str:
    """The address without a user name and password, for messages and records."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname
    except ValueError:
        usable = False
    if not usable:
        raise TextError(f"{without_password(url)!r} is no address to fetch a text from: give http://... or https://...")


@contextmanager
def _lock(path: Path, url: str) -> Iterator[None]:
    """Hold a file's lock, which the system lets go of if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process fetches %s: waiting for it.", without_password(url))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_cache(body: Path, url: str) -> Download | None:
    """The cached file if it is still what its record says, else None."""
    try:
        record = json.loads(body.with_suffix(".json").read_text(encoding="utf-8"))
        if _sha256(body) != record["sha256"]:
            return None
    except (
        FileNotFoundError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
    ):  # a record that says nothing vouches for nothing
        return None
    logger.info("%s: taken from the cache, %s", without_password(url), body)
    return Download(body, url, record["sha256"], body.stat().st_size, record.get("charset"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_with_retries(url: str, body: Path, limits: Limits) -> Download:
    part = body.with_suffix(".part")
    shown = without_password(url)
    try:
        for attempt in range(1, limits.tries + 1):
            try:
                return _fetch_once(url, body, part, limits)
            except _TryAgain as error:
                if attempt == limits.tries:
                    raise TextError(f"{error} Tried {attempt} times. Is the address right, the server up?") from error
                wait = error.wait_seconds
                wait = limits.first_wait_seconds * 2 ** (attempt - 1) if wait is None else wait
                if wait > limits.longest_wait_seconds:
                    raise TextError(f"{error} It asks to wait {wait:,.0f} s: try again later.") from error
                logger.warning("%s Trying again in %.1f s.", error, wait)
                time.sleep(wait)
        raise TextError(f"{shown} was not fetched: {limits.tries} tries are allowed, give at least 1.")
    finally:
        part.unlink(missing_ok=True)


def _fetch_once(url: str, body: Path, part: Path, limits: Limits) -> Download:
    """One try: request, check, stream into `part`, then put body and record in place."""
    shown = without_password(url)
    with _request(url, limits) as response:
        _check_answer(response, shown)
        content_type = response.headers.get("Content-Type", "")
        charset = _charset(content_type)
        with part.open("wb") as file:
            sha256, size = _stream(response, file, shown, charset, limits)
            file.flush()
            os.fsync(file.fileno())
    record = {
        "url": shown,
        "sha256": sha256,
        "bytes": size,
        "content_type": content_type,
        "charset": charset,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    part.replace(body)
    _write_record(body.with_suffix(".json"), record)
    logger.info("%s: fetched %d bytes into %s", shown, size, body)
    return Download(body, url, sha256, size, charset)


def _request(url: str, limits: Limits) -> requests.Response:
    """Send the request; what goes wrong before an answer becomes a message."""
    shown = without_password(url)
    headers = {"User-Agent": f"partialtune/{__version__}", "Accept": "text/plain, */*;q=0.1", "Accept-Encoding": "gzip"}
    try:
        timeout = (limits.connect_seconds, limits.read_seconds)
        return requests.get(url, stream=True, timeout=timeout, headers=headers)
    except requests.ConnectTimeout as error:
        raise _TryAgain(f"No connection to {shown} within {limits.connect_seconds:g} s.") from error
    except requests.ReadTimeout as error:
        raise _TryAgain(f"{shown} stalled: no answer within {limits.read_seconds:g} s.") from error
    except requests.exceptions.SSLError as error:
        raise TextError(f"{shown}: the secure connection failed ({error}). Is the machine's clock right?") from error
    except requests.exceptions.ProxyError as error:
        raise TextError(f"{shown}: the proxy cannot be used ({error}). Check HTTP_PROXY and HTTPS_PROXY.") from error
    except requests.TooManyRedirects as error:
        raise TextError(f"{shown} redirects in a circle. Give the address that a browser ends up at.") from error
    except requests.ConnectionError as error:
        raise _TryAgain(_explain_no_connection(shown, error)) from error
    except requests.RequestException as error:  # e.g. a redirect to an address that is none
        raise TextError(f"{shown} cannot be fetched: {error}") from error


def _explain_no_connection(shown: str, error: requests.ConnectionError) -> str:
    host = urlsplit(shown).hostname
    if "NameResolutionError" in repr(error):
        return f"{shown}: no network, or there is no host called {host}. A downloaded file can be given by its path."
    if "refused" in str(error):
        return f"{shown}: {host} refuses the connection."
    return f"{shown}: the connection failed ({error})."


def _check_answer(response: requests.Response, shown: str) -> None:
    """Raise for a status that brings no text, and for a page that says it is HTML."""
    status = response.status_code
    if status in RETRIED_STATUSES:
        busy = "too many requests" if status == 429 else response.reason
        raise _TryAgain(f"{shown}: the server answers {status} ({busy}).", _retry_after(response))
    if status in (404, 410):
        raise TextError(f"{shown}: there is no such text on the server ({status}). Check the address.")
    if status in (401, 403):
        raise TextError(f"{shown}: the server denies access ({status}). Download it in a browser and give its path.")
    if status != 200:
        raise TextError(f"{shown}: the server answers {status} ({response.reason}) instead of a text.")
    if re.match(r"\s*(?:text/html|application/xhtml)", response.headers.get("Content-Type", ""), re.I):
        raise TextError(
            f"{shown} is an HTML page, not plain text. Give the address of the plain text itself "
            f"(Project Gutenberg calls it 'Plain Text UTF-8')."
        )


def _retry_after(response: requests.Response) -> float | None:
    """Seconds that the server asks to wait, given as a number or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _stream(
    response: requests.Response, file: BinaryIO, shown: str, charset: str | None, limits: Limits
) -> tuple[str, int]:
    """Write the body to a file; returns its sha256 and size after unpacking."""
    max_bytes = limits.max_bytes or _largest_download()
    expected = int(response.headers.get("Content-Length") or 0)
    if expected > max_bytes:
        raise _too_large(shown, expected, max_bytes)
    digest, size, head = hashlib.sha256(), 0, b""
    with tqdm(total=expected or None, unit="B", unit_scale=True, desc=Path(urlsplit(shown).path).name) as bar:
        for data in _unpacked(response, _on_the_wire(response, expected, shown, limits, bar), shown):
            if size < SNIFFED_BYTES <= size + len(data):
                refuse_non_text(head + data, shown, charset)
            head = (head + data)[:SNIFFED_BYTES]
            size += len(data)
            if size > max_bytes:
                raise _too_large(shown, size, max_bytes)
            digest.update(data)
            file.write(data)
    refuse_non_text(head, shown, charset)
    return digest.hexdigest(), size


def _largest_download() -> int:
    """Bytes that a download may have."""
    megabytes = os.environ.get("PARTIALTUNE_MAX_DOWNLOAD_MB", "4096")
    if not megabytes.isdigit():
        raise TextError(f"PARTIALTUNE_MAX_DOWNLOAD_MB is {megabytes!r}: give a whole number of MiB, such as 4096.")
    return int(megabytes) * 2**20


def _too_large(shown: str, size: int, max_bytes: int) -> TextError:
    return TextError(
        f"{shown} is too large: at least {size / 2**20:,.1f} MiB, allowed are {max_bytes / 2**20:,.1f} MiB. "
        f"Set PARTIALTUNE_MAX_DOWNLOAD_MB if you want it all the same."
    )


def _on_the_wire(response: requests.Response, expected: int, shown: str, limits: Limits, bar: tqdm) -> Iterator[bytes]:
    """The body's bytes as they arrive; raises if they stop, trickle, or end before the length that was announced."""
    received, start = 0, time.monotonic()
    try:
        # read1 gives what has arrived: read would wait for a full chunk, and a trickle would never be noticed
        while data := response.raw.read1(CHUNK_BYTES, decode_content=False):
            received += len(data)
            bar.update(len(data))
            yield data
            seconds = time.monotonic() - start
            if seconds > limits.slow_after_seconds and received < seconds * limits.slowest_bytes_per_second:
                raise TextError(
                    f"{shown} trickles: {received:,} bytes in {seconds:,.1f} s. Try again later, or another mirror."
                )
    except urllib3.exceptions.ReadTimeoutError as error:
        raise _TryAgain(f"{shown} stalled after {received:,} bytes for {limits.read_seconds:g} s.") from error
    except urllib3.exceptions.HTTPError as error:
        raise _TryAgain(f"{shown} broke off after {received:,} bytes ({error}).") from error
    if received < expected:
        raise _TryAgain(f"{shown} broke off: {received:,} of {expected:,} bytes came.")


def _unpacked(response: requests.Response, wire: Iterator[bytes], shown: str) -> Iterator[bytes]:
    """The body without its transfer's compression. Done here because a cut-off gzip must not pass for the whole."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        yield from wire
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise TextError(f"{shown} comes packed as {encoding!r}, which was not asked for and cannot be unpacked.")
    unpacker = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, whichever it is
    try:
        for data in wire:
            while data:
                yield unpacker.decompress(data, 1 << 20)  # at most so many bytes at a time: a bomb meets the size limit
                data = unpacker.unconsumed_tail
    except zlib.error as error:
        raise _TryAgain(f"{shown}: its {encoding} data is damaged ({error}).") from error
    if not unpacker.eof:
        raise _TryAgain(f"{shown} broke off: its {encoding} data has no end.")


def _charset(content_type: str) -> str | None:
    """The charset that a Content-Type names; None where it names none (HTTP's old default means nothing today)."""
    match = re.search(r"charset\s*=\s*[\"']?([^\s;\"']+)", content_type, re.I)
    return match[1] if match else None


def _write_record(path: Path, record: dict) -> None:
    aside = path.with_suffix(".json.part")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
