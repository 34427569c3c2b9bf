"""An http(s) address -> a text file in the cache, with its sha256; fetched once, whole, or not at all.

Every way in which a transfer can fail has a message of its own. Beside each file a JSON record says where it came from;
`partialtune.cache` says how both get there.
"""

import hashlib
import logging
import os
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urldefrag, urlsplit

import requests
import urllib3
from tqdm import tqdm

from partialtune import __version__
from partialtune.cache import cache_root, cached_file, new_file
from partialtune.errors import TextError
from partialtune.net.addresses import without_secrets
from partialtune.net.retries import Tries, retry_after, whole_number, with_retries
from partialtune.net.sniffing import refuse_non_text
from partialtune.progress import progress_bar
from partialtune.words import megabytes

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
SNIFFED_BYTES = 1024  # enough to tell an HTML page or an archive from a text
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Download:
    """A text in the cache: `sha256` and `size` (bytes) of the file, `charset` if the HTTP header named one."""

    path: Path
    url: str
    sha256: str
    size: int
    charset: str | None


@dataclass(frozen=True)
class Limits(Tries):
    """How patient a download is. `max_bytes` None means PARTIALTUNE_MAX_DOWNLOAD_MB (of 2^20 bytes) or 4 GB."""

    connect_seconds: float = 10.0
    read_seconds: float = 20.0  # without a single byte
    slow_after_seconds: float = 60.0  # from then on the average must be at least
    slowest_bytes_per_second: float = 1024.0
    tries: int = 3
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0
    max_bytes: int | None = None


class TryAgainError(Exception):
    """A failure that another try may mend; `wait_seconds` is how long the server asks to wait, 0 if it does not say."""

    def __init__(self, message: str, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


def cache_folder() -> Path:
    """Where texts are kept: $PARTIALTUNE_CACHE/texts or ~/.cache/partialtune/texts."""
    return cache_root() / "texts"


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
    path = (folder or cache_folder()) / f"{hashlib.sha256(url.encode()).hexdigest()}.txt"

    def build(part: Path) -> dict[str, Any]:
        received = _receive_with_retries(url, part, limits or Limits())
        return {"url": shown, **received, "fetched": datetime.now(UTC).isoformat(timespec="seconds")}

    entry = cached_file(
        path,
        build,
        waiting=f"Another process fetches {shown}: waiting for it.",
        again=f"{path} is not whole, or no longer what was fetched from {shown}: fetching it again.",
        advice="a folder on a disk with space where you may write",
    )
    if entry.is_new:
        logger.info("%s: fetched %s bytes into %s", shown, f"{entry.size:,}", path)
    else:
        logger.info("%s: taken from the cache, %s", shown, path)
    return Download(path, shown, entry.sha256, entry.size, entry.record.get("charset"))


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


def _receive_with_retries(url: str, part: Path, limits: Limits) -> dict[str, str | None]:
    """Try as often as allowed, waiting longer each time or as long as the server asks."""

    def attempt() -> dict[str, str | None]:
        with new_file(part) as file:  # from the beginning: what a try before this one wrote is gone
            return _receive(url, file, limits)

    try:
        return with_retries(attempt, limits, (TryAgainError,), lambda error: error.wait_seconds)
    except TryAgainError as error:
        if error.wait_seconds > limits.longest_wait_seconds:
            raise TextError(f"{error} It asks to wait {error.wait_seconds:,.0f} s: try again later.") from error
        raise TextError(f"{error} Tried {limits.tries} times: check the address and the network.") from error


def _receive(url: str, file: BinaryIO, limits: Limits) -> dict[str, str | None]:
    """Fetch a text once, streamed into `file`, which is open for writing and empty.

    Returns:
        For the record: `content_type`, and `charset` where the header names one.

    Raises:
        TextError: If the address does not bring a text, and would not another time.
        TryAgainError: If it may another time.
    """
    shown = without_secrets(url)
    with _request(url, shown, limits) as response:
        _check_answer(response, shown)
        content_type = response.headers.get("Content-Type", "")
        # only where it is named: HTTP's old default, ISO-8859-1, is the truth about few texts
        named = re.search(r"charset\s*=\s*[\"']?([^\s;\"']+)", content_type, re.I)
        charset = named[1] if named else None
        _stream(response, file, shown, charset, limits)
    return {"content_type": content_type, "charset": charset}


def _request(url: str, shown: str, limits: Limits) -> requests.Response:
    """Send the request; what goes wrong before an answer becomes a message."""
    headers = {"User-Agent": f"partialtune/{__version__}", "Accept": "text/plain, */*;q=0.1", "Accept-Encoding": "gzip"}
    try:
        timeout = (limits.connect_seconds, limits.read_seconds)
        return requests.get(url, stream=True, timeout=timeout, headers=headers)
    except requests.ConnectTimeout as error:
        raise TryAgainError(f"{shown}: no connection within {limits.connect_seconds:g} s.") from error
    except requests.ReadTimeout as error:
        raise TryAgainError(f"{shown} stalled: no answer within {limits.read_seconds:g} s.") from error
    except requests.exceptions.SSLError as error:
        raise TextError(
            f"{shown}: the secure connection failed ({_reason(error)}). Is the machine's clock right?"
        ) from error
    except requests.exceptions.ProxyError as error:
        raise TextError(
            f"{shown}: the proxy cannot be used ({_reason(error)}). Check HTTP_PROXY and HTTPS_PROXY."
        ) from error
    except requests.TooManyRedirects as error:
        raise TextError(f"{shown} redirects in a circle. Give the address that a browser ends up at.") from error
    except requests.ConnectionError as error:
        raise TryAgainError(_explain_no_connection(shown, error)) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        # e.g. a redirect to an address that is none, which some layers refuse with a plain ValueError
        raise TextError(f"{shown} cannot be fetched: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What a library says, without the address around it: that may be one that a redirect led to, with its token."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    return without_secrets(str(inner or error))


def _explain_no_connection(shown: str, error: requests.ConnectionError) -> str:
    host = urlsplit(shown).hostname
    if "NameResolutionError" in repr(error):
        return f"{shown}: no network, or there is no host called {host}. A text on this machine is given by its path."
    if "refused" in str(error):
        return f"{shown}: {host} refuses the connection."
    return f"{shown}: the connection failed ({_reason(error)})."


def _check_answer(response: requests.Response, shown: str) -> None:
    """Raise for a status that brings no text, and for a page that says it is HTML."""
    status = response.status_code
    if status in RETRIED_STATUSES:
        reason = "too many requests" if status == 429 else response.reason
        raise TryAgainError(
            f"{shown}: the server answers {status} ({reason}).", retry_after(response.headers.get("Retry-After", ""))
        )
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


def _stream(response: requests.Response, file: BinaryIO, shown: str, charset: str | None, limits: Limits) -> None:
    """Write the body to a file while checking what it is and how much."""
    max_bytes = limits.max_bytes or _largest_download()
    expected = whole_number(response.headers.get("Content-Length", "")) or 0
    if expected > max_bytes:
        raise _too_large(shown, expected, max_bytes)
    size, head = 0, b""
    with progress_bar(expected or None, Path(urlsplit(shown).path).name, "B", unit_scale=True) as bar:
        for data in _unpacked(response, _on_the_wire(response, expected, max_bytes, shown, limits, bar), shown):
            if size < SNIFFED_BYTES <= size + len(data):
                refuse_non_text(head + data, shown, charset)
            head = (head + data)[:SNIFFED_BYTES]
            size += len(data)
            if size > max_bytes:
                raise _too_large(shown, size, max_bytes)
            file.write(data)
    refuse_non_text(head, shown, charset)


def _largest_download() -> int:
    """Bytes that a download may have where no limit is given."""
    limit = os.environ.get("PARTIALTUNE_MAX_DOWNLOAD_MB", "4096")
    if whole_number(limit) is None:
        raise TextError(f"PARTIALTUNE_MAX_DOWNLOAD_MB is {limit!r}: give a whole number of MB, such as 4096.")
    return int(limit) * 2**20


def _too_large(shown: str, size: int, max_bytes: int) -> TextError:
    return TextError(
        f"{shown} is too large: at least {megabytes(size, 1)}, allowed are {megabytes(max_bytes, 1)}. "
        f"Set PARTIALTUNE_MAX_DOWNLOAD_MB if you want it all the same."
    )


def _on_the_wire(
    response: requests.Response, expected: int, max_bytes: int, shown: str, limits: Limits, bar: tqdm
) -> Iterator[bytes]:
    """The body's bytes as they arrive.

    Raises if they stop, trickle, end before the length that was announced, or are more than `max_bytes`: packed data
    may go on for ever and unpack to nothing.
    """
    received, start = 0, time.monotonic()
    try:
        # read1 gives what has arrived; read would wait for a full chunk, and a trickle would never be noticed
        while data := response.raw.read1(CHUNK_BYTES, decode_content=False):
            received += len(data)
            if received > max_bytes:
                raise _too_large(shown, received, max_bytes)
            bar.update(len(data))
            yield data
            seconds = time.monotonic() - start
            if seconds > limits.slow_after_seconds and received < seconds * limits.slowest_bytes_per_second:
                raise TextError(
                    f"{shown} trickles: {received:,} bytes in {seconds:,.1f} s. Try again later, or another mirror."
                )
    except urllib3.exceptions.ReadTimeoutError as error:
        raise TryAgainError(f"{shown} stalled after {received:,} bytes for {limits.read_seconds:g} s.") from error
    except urllib3.exceptions.HTTPError as error:
        raise TryAgainError(f"{shown} broke off after {received:,} bytes ({_reason(error)}).") from error
    if received < expected:
        raise TryAgainError(f"{shown} broke off: {received:,} of {expected:,} bytes came.")


def _unpacked(response: requests.Response, wire: Iterator[bytes], shown: str) -> Iterator[bytes]:
    """The body without its transfer's compression. Done here, because a gzip cut short must not pass for whole."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        yield from wire
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise TextError(f"{shown} comes packed as {encoding!r}, which was not asked for and cannot be unpacked.")
    unpacker, members = zlib.decompressobj(wbits=47), 0  # 32 + 15: gzip or zlib, whichever it is
    try:
        for data in wire:
            while data:
                if unpacker.eof:  # gzip files may be joined, and zlib stops at the end of the first
                    data = data.lstrip(b"\0")  # what tapes and blocks are filled up with
                    if not data:
                        break
                    unpacker, members = zlib.decompressobj(wbits=31), members + 1  # 16 + 15: gzip alone
                yield unpacker.decompress(data, 1 << 20)  # at most so many bytes at a time: a bomb meets the size limit
                data = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
    except zlib.error as error:
        where = f" behind the end of its part {members}" if members else ""
        raise TryAgainError(f"{shown}: its {encoding} data is damaged{where} ({error}).") from error
    if not unpacker.eof:
        raise TryAgainError(f"{shown} broke off: its {encoding} data has no end.")
