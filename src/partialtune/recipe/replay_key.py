"""The recipe's `replay`: a mapping as it was given -> its checked entries. Neither model nor text is needed."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from partialtune.grammar.values import Bound, read_keys
from partialtune.recipe.arguments import NOT_EMPTY, SOURCES

NAME = "replay"  # of the text in evaluation.json
KEYS: dict[str, tuple[Any, Bound | None]] = {  # of the mapping -> type and bound
    "text": (list[str], SOURCES),
    "share": (float, Bound("more than 0 and below 1", lambda value: 0 < value < 1)),
    "text_column": (str, NOT_EMPTY),
    "text_cleaning": (Literal["auto", "gutenberg", "none"], None),
}
REQUIRED = {"text": "give a text source, as for the recipe's text", "share": "give a number such as 0.2"}


def read_replay(given: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert and check the entries of `replay`.

    read_replay({"text": "old.txt", "share": "0.2"}) -> ({"text": ["old.txt"], "share": 0.2}, [])

    Args:
        given: `text` and `share`; perhaps `text_column` and `text_cleaning`, which are else those of the run's text.
            An empty mapping replays nothing.

    Returns:
        The entries with converted values, and what is wrong, in words; the entries are of use only if nothing is.
    """
    if not given:
        return {}, []
    replay, problems = read_keys(given, KEYS)
    missing = [key for key in REQUIRED if given.get(key) is None]
    return replay, [*problems, *(f"{key} is missing: {REQUIRED[key]}." for key in missing)]


def wrong_beside_replay(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for what cannot stand beside `replay`."""
    if not values.get("replay"):
        return
    if NAME in (values.get("eval_texts") or {}):
        yield "eval_texts", f"the name {NAME} is taken by the text that is replayed. Give this one another name."
    accelerator = values.get("accelerator_config")
    if isinstance(accelerator, Mapping) and accelerator.get("split_batches"):
        message = "split_batches does not go with replay, which counts the windows of a step on all processes together"
        yield "accelerator_config", f"{message}. Leave it out, and divide per_device_train_batch_size."
