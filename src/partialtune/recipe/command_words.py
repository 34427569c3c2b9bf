"""Command-line words -> recipe values: `--key value`, `--key=value`, `--key a b`, `--flag`.

In: the words after the recipe's path. Out: the words of each key, then, once a key's type is known, the value that a
YAML file would have held.
"""

import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_origin

from partialtune.grammar.values import describe_type, union_members
from partialtune.recipe.yaml_file import Problem, parse_yaml

COMMAND_LINE = "command line"
KEY = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


class Words(tuple[str, ...]):
    """The words that follow one key on the command line; `word_value` reads them once the key's type is known."""

    __slots__ = ()


def group_words(words: Sequence[str]) -> tuple[dict[str, Words], list[Problem]]:
    """Sort command-line words by their key; dashes within a key count as underscores.

    group_words(["--max-steps", "5", "--prompts", "a b", "c"]) -> ({"max_steps": ("5",), "prompts": ("a b", "c")}, [])
    """
    said: dict[str, Words] = {}
    problems, key = [], None
    for word in words:
        match = KEY.fullmatch(word)
        if match:
            key, value = match.group(1).replace("-", "_"), match.group(2)
            if key in said:
                problems.append(Problem(COMMAND_LINE, key, "said twice. Keep one; a list is --key a b."))
            said[key] = Words(() if value is None else (value,))
        elif key is None or word.startswith("--"):
            problems.append(_stray(word))
        else:
            said[key] = Words((*said[key], word))
    return said, problems


def _stray(word: str) -> Problem:
    message = "is no key and belongs to none. Write --key value; a value that begins with -- is --key='--value'."
    return Problem(COMMAND_LINE, f"`{word}`", message)


def word_value(words: Sequence[str], hint: Any) -> Any:
    """The value that the words of one key stand for, not yet converted to the key's type.

    Raises:
        ValueError: If there are too few or too many words, or a word is no YAML; says what to write.
    """
    kinds = [get_origin(member) or member for member in union_members(hint)]
    if not words:
        if bool in kinds:
            return True
        raise ValueError(f"got no value; allowed: {describe_type(hint)}. Write --key value.")
    if len(words) > 1:
        if list in kinds:
            return list(words)
        raise ValueError(_too_many(words, hint))
    word = words[0]
    if NoneType in kinds and word in ("null", "~"):
        return None
    is_list = list in kinds and word.startswith("[") and word.endswith("]")
    is_mapping = dict in kinds and (str not in kinds or word.startswith("{"))
    return _yaml_word(word) if is_list or is_mapping else word


def _too_many(words: Sequence[str], hint: Any) -> str:
    dashed = [word for word in words if re.match(r"-[A-Za-z]", word)]
    advice = f" Keys have two dashes: -{dashed[0]}." if dashed else " Put quotes around a value with blanks."
    return f"got {len(words)} words ({' '.join(words)}); allowed: {describe_type(hint)}, in one word.{advice}"


def _yaml_word(word: str) -> Any:
    try:
        value, _, problems = parse_yaml(word)
    except ValueError as error:
        raise ValueError(f"is no valid YAML. {error}") from error
    if problems:
        raise ValueError(f"{problems[0].key} is said twice. Keep one of them.")
    return value
