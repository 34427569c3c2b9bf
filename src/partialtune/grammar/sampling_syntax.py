"""Blocks in turn: a recipe's `block_sampling` -> checked settings. Neither model nor text is needed.

block_sampling: {blocks: 2, every: 20, order: random, keep_state: false}
"""

from collections.abc import Mapping
from typing import Any, Literal

from partialtune.grammar.selector_syntax import check_selector_syntax
from partialtune.grammar.values import at_least, read_keys

KEYS = {  # type and bound
    "blocks": (int, at_least(1)),
    "every": (int, at_least(1)),
    "order": (Literal["random", "ascending", "descending"], None),
    "keep_state": (bool, None),
    "candidates": (list[str], None),
}
NOT_WITH_A_SCHEDULE = (
    "does not go with a schedule, whose phases add to what trains, while drawn blocks rest again. Keep one of them."
)
NOT_WITH_LORA = "does not go with lora, whose adapters learn in every step. Keep one of them."
REQUIRED = {"blocks": "how many blocks learn at one time", "every": "for how many steps"}


def read_block_sampling(given: Any) -> tuple[dict[str, Any], list[str]]:
    """Convert and check the settings of block sampling.

    read_block_sampling({"blocks": "2", "every": 20}) -> ({"blocks": 2, "every": 20}, [])

    Args:
        given: A mapping with `blocks` and `every`, and perhaps `order`, `keep_state`, `candidates` (selectors).

    Returns:
        The settings that were given, converted, and what is wrong, in words; the settings are of use only if nothing
        is.
    """
    if not isinstance(given, Mapping):
        return {}, [f"got {given!r}; allowed: a mapping such as {{blocks: 2, every: 20}}."]
    settings, problems = read_keys(given, KEYS)
    for key, meaning in REQUIRED.items():
        if given.get(key) is None:
            problems.append(f"{key} is missing: it says {meaning}. Give a whole number, 1 or more.")
    if settings.get("candidates") == []:
        problems.append("candidates is empty: no block could be drawn. Leave it out for all blocks.")
    for selector in settings.get("candidates", []):
        problem = check_selector_syntax(selector)
        problems += [f"candidates, {selector!r}: {problem}"] if problem else []
    return settings, problems
