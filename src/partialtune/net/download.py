"""An http(s) address -> a text file in the cache, with its sha256; fetched once, whole, or not at all.

Beside each file a JSON record says where it came from. See `partialtune.cache` for how it gets there.
"""

import hashlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from partialtune.cache import cache_root, cached, new_file
from partialtune.errors import TextError
from partialtune.net.addresses import without_secrets
from partialtune.net.retries import with_retries
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
        return {
            "url": shown,
            "content_type": received.content_type,
            "charset": received.charset,
            "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    entry = cached(
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


def _receive_with_retries(url: str, part: Path, limits: Limits) -> Received:
    """Try as often as allowed, waiting longer each time or as long as the server asks."""

    def attempt() -> Received:
        with new_file(part) as file:  # from the beginning: what a try before this one wrote is gone
            return receive(url, file, limits)

    try:
        return with_retries(attempt, limits, (TryAgainError,), lambda error: error.wait_seconds)
    except TryAgainError as error:
        if error.wait_seconds > limits.longest_wait_seconds:
            raise TextError(f"{error} It asks to wait {error.wait_seconds:,.0f} s: try again later.") from error
        raise TextError(f"{error} Tried {limits.tries} times: check the address and the network.") from error
