"""Schedules: a recipe's `schedule` -> checked entries. Neither model nor text is needed."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from partialtune.grammar.selector_syntax import check_selector_syntax
from partialtune.grammar.values import MORE_THAN_ZERO, at_least, read_keys

STARTS = ("from_step", "from_epoch")
KEYS = {  # of an entry -> type and bound
    "from_step": (int, at_least(0)),
    "from_epoch": (float, at_least(0)),
    "trainable": (list[str], None),
    "learning_rate": (float, MORE_THAN_ZERO),
}


def read_schedule(
    schedule: Sequence[Mapping[str, Any]], trains_from_start: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Convert and check the entries of a schedule.

    read_schedule([{"from_step": "5", "trainable": "final_norm"}], True)
    -> ([{"from_step": 5, "trainable": ["final_norm"]}], [])

    Args:
        schedule: Mappings with `trainable`, either `from_step` or `from_epoch`, and perhaps `learning_rate`.
        trains_from_start: Whether something trains before any entry adds to it.

    Returns:
        The entries with converted values, and what is wrong, in words; the entries are of use only if nothing is.
    """
    entries, problems = [], []
    for number, given in enumerate(schedule, start=1):
        entry, wrong = _read_entry(given)
        entries.append(entry)
        problems += [f"entry {number}: {message}" for message in wrong]
    return entries, problems or list(_wrong_starts(entries, trains_from_start))


def _read_entry(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    entry, problems = read_keys(given, KEYS)
    starts = [key for key in STARTS if given.get(key) is not None]
    if len(starts) == 2:
        problems.append("both from_step and from_epoch say when it begins. Keep one of them.")
    if not starts:
        problems.append("neither from_step nor from_epoch says when it begins. Give one of them.")
    if not given.get("trainable"):
        problems.append("trainable is missing: it adds nothing. Give selectors, such as ['blocks[-2]'].")
    for selector in entry.get("trainable", []):
        problem = check_selector_syntax(selector)
        problems += [f"trainable, {selector!r}: {problem}"] if problem else []
    return entry, problems


def _wrong_starts(entries: Sequence[Mapping[str, Any]], trains_from_start: bool) -> Iterator[str]:
    for key in STARTS:  # the two compare only once the number of steps in an epoch is known
        starts = [(number, entry[key]) for number, entry in enumerate(entries, start=1) if key in entry]
        for (earlier, before), (later, start) in pairwise(starts):
            if start <= before:
                yield (
                    f"entry {later} begins at {key} {start}, not after entry {earlier} ({key} {before}). Put the "
                    f"entries in the order in which they begin; what begins at once belongs into one."
                )
    if entries and not trains_from_start:
        key = next(key for key in STARTS if key in entries[0])
        if entries[0][key] > 0:
            yield (
                f"entry 1 begins at {key} {entries[0][key]}, and `trainable` is empty: nothing would train before. "
                f"Begin it at from_step: 0, or say in `trainable` what learns from the start."
            )
