"""A call over the network -> what it returns, tried again while that may help; downloads and the Hub's client wait so.

`urllib3.Retry` is not enough: it is done once the header of an answer is there, while a text that breaks off or stalls
in its body has to be fetched anew and counts as a try; it obeys a Retry-After of hours; and it logs the address of
every failed try with the secrets in it.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Tries:
    """How often a call is tried, and how long is waited between."""

    tries: int
    first_wait_seconds: float  # doubled after each try
    longest_wait_seconds: float  # the longest Retry-After that is obeyed


def with_retries(
    call: Callable[[], Answer],
    limits: Tries,
    errors: tuple[type[Exception], ...],
    seconds_asked: Callable[[Any], float | None],
    in_words: Callable[[Any], str] = str,
) -> Answer:
    """What `call` returns. The last failure is raised as it came.

    Args:
        call: Tried until it returns.
        limits: Tries, and the seconds between them.
        errors: What may be worth another try.
        seconds_asked: How long the server asks to wait, 0 where it says nothing, None where another try cannot help.
        in_words: The failure in one sentence, for the log.
    """
    attempt = 1
    while True:
        try:
            return call()
        except errors as error:
            asked = seconds_asked(error)
            if asked is None or attempt >= limits.tries or asked > limits.longest_wait_seconds:
                raise
            wait = max(asked, limits.first_wait_seconds * 2 ** (attempt - 1))
            attempt += 1
            logger.warning("%s Trying again in %.3g s (%d of %d).", in_words(error), wait, attempt, limits.tries)
        time.sleep(wait)  # outside of `except`: what the error holds on to, a connection or a body, is free by then


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks to wait, given as a number or a date; 0 if it does not say."""
    if (seconds := whole_number(value.strip())) is not None:
        return float(seconds)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, LookupError, OverflowError):  # no date, or one without a zone
        return 0.0


def whole_number(value: str) -> int | None:
    """A number in a header; None where there is none. `isdigit` alone takes \u00b2, and `int` no 5,000 digits."""
    return int(value[:18]) if value.isascii() and value.isdigit() else None  # 10^17 is beyond any limit, as more is
