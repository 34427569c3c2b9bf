"""Learning rates of parts: a recipe's `part_learning_rates` and `layer_decay` -> checked values. No model is needed."""

from collections.abc import Mapping
from typing import Any

from partialtune.grammar.selector_syntax import check_selector_syntax
from partialtune.grammar.values import MORE_THAN_ZERO, Bound, converted, show

DECAY = Bound("more than 0 and at most 1", lambda value: 0 < value <= 1)
EXAMPLE = "{embeddings: 1.0e-5, 'blocks[-1]': 1.0e-4}"


def read_part_rates(given: Any) -> tuple[dict[str, float], list[str]]:
    """Convert and check the learning rates of parts.

    read_part_rates({"blocks[-1]": "1e-4"}) -> ({"blocks[-1]": 0.0001}, [])

    Args:
        given: Selector -> learning rate; None for none.

    Returns:
        The rates in their order, and what is wrong, in words; the rates are of use only if nothing is.
    """
    if given is None:
        return {}, []
    if not isinstance(given, Mapping):
        return {}, [f"got {show(given)}; allowed: a mapping {{selector: learning rate}}, such as {EXAMPLE}."]
    rates: dict[str, float] = {}
    problems: list[str] = []
    for selector, rate in given.items():
        problem = check_selector_syntax(selector)
        if problem is None and selector.strip().startswith("!"):
            problem = "takes away, and what has a rate is named: write the selector without its exclamation mark."
        if problem is not None:
            problems.append(f"{selector!r}: {problem}")
            continue
        try:
            rates[selector.strip()] = converted(rate, float, MORE_THAN_ZERO)
        except ValueError as error:
            problems.append(f"{selector}: {error}")
    return rates, problems


def read_layer_decay(given: Any) -> tuple[float | None, list[str]]:
    """The factor from one layer to the one below it, None for none, and what is wrong, in words."""
    try:
        return None if given is None else converted(given, float, DECAY), []
    except ValueError as error:
        return None, [str(error)]
