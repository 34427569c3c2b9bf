"""A selector's regular expression that gives up in time: `(\\w+)+x` on a long name would take longer than a life."""

import re
import signal
import threading
from collections.abc import Callable

from partialtune.errors import RecipeError

PATIENCE_SECONDS = 2.0  # for one name; an ordinary pattern takes microseconds


class Pattern:
    """A compiled regular expression of Python's re, whose matching is broken off after PATIENCE_SECONDS.

    Args:
        written: The selector as it was written, for messages.
        source: The expression between the slashes.

    Raises:
        RecipeError: If it is none.
    """

    def __init__(self, written: str, source: str) -> None:
        self.written, self.pattern = written, source
        try:
            self._compiled = re.compile(source)
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"{written} cannot be read as a regular expression of Python's re: {error}.") from error

    def fullmatch(self, name: str) -> re.Match | None:
        return self._in_time(self._compiled.fullmatch, name)

    def search(self, name: str) -> re.Match | None:
        return self._in_time(self._compiled.search, name)

    def _in_time(self, match: Callable[[str], re.Match | None], name: str) -> re.Match | None:
        if threading.current_thread() is not threading.main_thread():
            return match(name)  # only the main thread has signals, which re listens to while it matches

        def give_up(number, frame) -> None:
            raise RecipeError(
                f"{self.written} takes more than {PATIENCE_SECONDS:g} s on the name {name}: repetitions within "
                rf"repetitions, as in (\w+)+, can be matched in too many ways. Write one of them."
            )

        before = signal.signal(signal.SIGALRM, give_up)
        left, interval = signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
        try:
            return match(name)
        finally:
            signal.setitimer(signal.ITIMER_REAL, left, interval)
            signal.signal(signal.SIGALRM, before)
