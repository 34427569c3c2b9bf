"""LoRA: a recipe's `lora` -> which matrices get adapters, and how large these are. No model is needed.

lora: {target: [attention], rank: 8, alpha: 16}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partialtune.grammar.selector_syntax import check_selector_syntax
from partialtune.grammar.values import at_least, read_keys

RANK, ALPHA = 8, 16  # where nothing is said
NOT_WITH_NEW_TOKENS = (
    "does not go with new tokens: a delta of adapters has no place for rows that the base lacks. Train the rows first, "
    "and the adapters on what that run saves."
)
KEYS = {  # type and bound
    "target": (list[str], None),
    "rank": (int, at_least(1)),
    "alpha": (int, at_least(1)),
}


@dataclass(frozen=True)
class Lora:
    """Adapters as they are asked for.

    Attributes:
        target: Selectors: every matrix in a block that they choose gets an adapter.
        rank: Rows of A, columns of B.
        alpha: What B A is multiplied with, times the rank.
        said_as: The key that holds `target`, for messages.
        method: What messages call the adapters.
    """

    target: tuple[str, ...]
    rank: int = RANK
    alpha: int = ALPHA
    said_as: str = "lora, target"
    method: str = "lora"


def lora_of_method(target: list[str], rank: int = RANK, alpha: int = ALPHA) -> Lora:
    """What `method: lora` is short for: its `trainable` is the target, and nothing else trains."""
    return Lora(tuple(target), rank, alpha, said_as="trainable", method="method lora")


def read_lora(given: Mapping[str, Any]) -> tuple[Lora, list[str]]:
    """Convert and check a recipe's `lora`.

    read_lora({"target": "attention", "rank": "4"}) -> (Lora(("attention",), 4, 16), [])

    Args:
        given: Mapping with `target` and perhaps `rank` and `alpha`.

    Returns:
        The adapters, and what is wrong, in words; they are of use only if nothing is.
    """
    values, problems = read_keys(given, KEYS)
    if not given.get("target"):
        problems.append("target is missing: nothing would get an adapter. Give selectors, such as [attention].")
    for selector in values.get("target", []):
        problem = check_selector_syntax(selector)
        problems += [f"target, {selector!r}: {problem}"] if problem else []
    target = tuple(values.get("target", []))
    return Lora(target, values.get("rank", RANK), values.get("alpha", ALPHA)), problems
