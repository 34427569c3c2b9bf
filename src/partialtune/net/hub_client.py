"""A call of the Hugging Face Hub -> its answer, tried again where that helps, or its failure in a sentence.

The client of `huggingface_hub` retries neither whoami nor create_repo nor a commit, and waits for an answer without
end. Here every call has a time-out and a few tries. A token never gets into a message.
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    parse_ratelimit_headers,
)

from partialtune import __version__
from partialtune.errors import InputError
from partialtune.net.retries import Answer, Tries, retry_after, with_retries

LONGEST_QUOTE = 300  # characters of what a server said; some send a page
TEMPORARY_STATUSES = frozenset({408, 409, 412, 425, 429})  # and 500 and more; 409, 412: somebody else wrote meanwhile


class HubUnreachable(InputError):
    """The Hub did not answer, or with something unreadable: whether the call had an effect is not known."""


class NotThereYet(Exception):
    """What was sent does not show on the Hub, or not as it was sent."""


class PlainHttpNext(Exception):
    """Xet, the client's usual way to the Hub's storage, broke; the next try goes another way."""


# Everything that a call of the client may end with: an answer that says no, no connection, a file that cannot be read
# (all OSError or HTTPError), a failed transfer (RuntimeError), an answer that is no JSON or metadata that is not valid.
HUB_ERRORS = (httpx2.HTTPError, OSError, RuntimeError, ValueError, NotThereYet, PlainHttpNext)


@dataclass(frozen=True)
class Patience(Tries):
    """How long the Hub is waited for. Inside one try the client itself repeats a failed transfer up to five times."""

    tries: int = 5
    first_wait_seconds: float = 2.0
    longest_wait_seconds: float = 300.0
    answer_seconds: float = 60.0  # of silence, after which a request is given up


def hub_api() -> HfApi:
    """The client, with the token of `hf auth login` or HF_TOKEN."""
    return HfApi(token=True, library_name="partialtune", library_version=__version__)


def unreachable_hub() -> str | None:
    """The Hub's host where its name is not known, as without a network; None where it is, or a proxy would know.

    The client would ask for each file six times, half a minute in all.
    """
    proxied = any(os.environ.get(name) for key in ("https_proxy", "all_proxy") for name in (key, key.upper()))
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or proxied or not host:
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return host
    return None


def ask(call: Callable[[], Answer], patience: Patience) -> Answer:
    """What `call` returns, tried again while that may help. The last failure is raised as it came."""
    return with_retries(call, patience, HUB_ERRORS, _seconds_asked, in_words)


def is_temporary(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    error = _root(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TEMPORARY_STATUSES or error.response.status_code >= 500
    if isinstance(error, OfflineModeIsEnabled | httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return False
    temporary = (httpx2.TransportError, ConnectionError, json.JSONDecodeError, NotThereYet, PlainHttpNext)
    return isinstance(error, temporary)


def in_words(error: Exception) -> str:
    """A failure in one sentence, without tokens."""
    error = _root(error)
    host = constants.ENDPOINT
    if isinstance(error, HfHubHTTPError):
        quote = " ".join((error.server_message or "").split())[:LONGEST_QUOTE]
        words = f"{error.response.url.host} answered {error.response.status_code}" + (f": {quote}" if quote else "")
    elif isinstance(error, httpx2.TimeoutException):
        words = f"{host} did not answer in time"
    elif isinstance(error, httpx2.TransportError | ConnectionError):
        words = f"The connection to {host} failed: {error}"
    elif isinstance(error, json.JSONDecodeError):
        words = f"{host} answered with something that is no JSON (is a proxy or a login page in between?)"
    else:
        words = " ".join(str(error).split()) or type(error).__name__
    return _without_token(words).rstrip(".") + "."


@contextmanager
def time_limits(seconds: float) -> Iterator[None]:
    """Give up each request of the client after that many seconds of silence.

    Left to itself the client waits for ever: it has no time-out, and some of its calls ask for none on top of that. So
    the limit is put into each request as it is sent. A factory set with `set_client_factory` is replaced.
    """

    def limit(request: httpx2.Request) -> None:
        asked = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            part: asked.get(part) or seconds for part in ("connect", "read", "write", "pool")
        }

    hooks = get_session().event_hooks  # offline mode and request ids
    limited = {**hooks, "request": [*hooks["request"], limit]}
    set_client_factory(lambda: httpx2.Client(event_hooks=limited, follow_redirects=True, timeout=seconds))
    try:
        yield
    finally:
        set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None))


@contextmanager
def storage_protocol(seconds: float) -> Iterator[None]:
    """Inside it, Xet gives up after that many seconds of silence, and `without_xet` may switch it off.

    Xet is a library of its own, written in Rust: the `time_limits` of the client's requests do not reach it.
    """
    chosen = constants.HF_HUB_DISABLE_XET
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{seconds:.0f}s")
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = chosen


def without_xet(error: Exception) -> Exception:
    """What to raise for a failed transfer: PlainHttpNext, once Xet is switched off, if it was Xet that failed.

    The client asks no server whether it knows Xet, and no answer makes it fall back; `hf_xet` has tried several times
    by now. Its failures are Python's own errors, never those of HTTP.
    """
    if constants.HF_HUB_DISABLE_XET or isinstance(error, json.JSONDecodeError) or find_spec("hf_xet") is None:
        return error
    constants.HF_HUB_DISABLE_XET = True
    return PlainHttpNext(f"The transfer over Xet failed, the next one is plain HTTP: {in_words(error)}")


@contextmanager
def progress_bars() -> Iterator[None]:
    """Show the client's progress bars, though training switched them off; HF_HUB_DISABLE_PROGRESS_BARS wins."""
    switched_off = are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if switched_off:
        enable_progress_bars()
    try:
        yield
    finally:
        if switched_off:
            disable_progress_bars()


def _root(error: Exception) -> Exception:
    """The cause of a failed transfer: the client wraps it into a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, HUB_ERRORS) else error


def _seconds_asked(error: Exception) -> float | None:
    """Seconds that the server asks us to wait, 0 where it says nothing; None where another try cannot help."""
    if not is_temporary(error):
        return None
    error = _root(error)
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    limit = parse_ratelimit_headers(error.response.headers)  # the Hub's own headers, which say more than Retry-After
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return retry_after(error.response.headers.get("Retry-After", ""))


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "<token>") if token else text
