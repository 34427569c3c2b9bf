"""Values of a recipe's keys: what YAML or a command line gave -> the key's type and bounds, or what is wrong.

In: a value, and a type of a dataclass' hints. Out: the converted value. pydantic walks the types; the conversions of
single values are ours, because a recipe's mistakes hide in lax ones (`no` for False, 1 for true, `5e-5` for a text).
"""

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

BOOLEAN_WORDS = {"yes": True, "true": True, "no": False, "false": False}


@dataclass(frozen=True)
class Bound:
    """A condition on a value beyond its type, with the words that an error says it in."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    """`low` or more."""
    return Bound(f"{low} or more", lambda value: value >= low)


MORE_THAN_ZERO = Bound("more than 0", lambda value: value > 0)


def convert_value(value: Any, hint: Any) -> Any:
    """A value as YAML or a command line gives it -> the type `hint`.

    convert_value("5e-5", float) -> 5e-05; convert_value("head", list[str]) -> ["head"]

    Raises:
        ValueError: If it cannot be; the message is what was got, and where within a list or mapping.
    """
    from pydantic import TypeAdapter, ValidationError  # here: a help text need not wait for it

    try:
        return TypeAdapter(_lenient(hint)).validate_python(value)
    except ValidationError as error:
        paths = [(_path(value, found["loc"]), found["input"]) for found in error.errors()]
        path, got = max(paths, key=lambda found: len(found[0]))
        raise ValueError(show(got) + "".join(path)) from error


def show(value: Any) -> str:
    """A value as a recipe would have it, cut to a line."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is not finite"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: Any, choices: Iterable[str]) -> str | None:
    """The choice spelt most like `word`, or None if none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(choices), n=1, cutoff=0.6)
    return near[0] if near else None


def nearest_choice(value: Any, hint: Any) -> str:
    """Did you mean ...? for a value that is spelt almost like one of the type's choices, else nothing."""
    near = nearest(value, map(str, choices_of(hint)))
    return f" Did you mean {near}?" if near else ""


def quoting_advice(value: Any, hint: Any) -> str:
    """What to do where a text is wanted and YAML made a number or a boolean of it, else nothing."""
    entries = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    if "str" not in str(hint) or not any(isinstance(entry, bool | int | float) for entry in entries):
        return ""
    return " Put text like that in quotes: YAML reads yes, no, on, off as booleans and digits as numbers."


def _path(value: Any, location: tuple[Any, ...]) -> list[str]:
    """Where in `value` a pydantic location points, in words; its names for the members of a union are left out."""
    words: list[str] = []
    for part in location:
        if isinstance(value, list) and isinstance(part, int):
            words, value = [*words, f" as entry {part + 1}"], value[part]
        elif isinstance(value, Mapping) and part in value:
            words, value = [*words, f" under {part}"], value[part]
    return words


def _lenient(hint: Any) -> Any:
    """The type with our conversions put in, for pydantic."""
    from pydantic import BeforeValidator, Field, PlainValidator

    # Types made at run time, of which mypy knows nothing: hence its two exceptions below.
    members = [member for member in union_members(hint) if member is not NoneType]
    if len(members) < len(union_members(hint)):
        return _lenient(Union[tuple(members)]) | None  # noqa: UP007
    if len(members) > 1:
        ordered = sorted(members, key=lambda member: TRIED_IN_ORDER.index(get_origin(member) or member))
        return Annotated[Union[tuple(map(_lenient, ordered))], Field(union_mode="left_to_right")]  # noqa: UP007
    if hint in CONVERSIONS:
        return Annotated[hint, PlainValidator(CONVERSIONS[hint])]
    if get_origin(hint) is Literal:
        return Annotated[hint, BeforeValidator(lambda value: _no_as_word(value, get_args(hint)))]
    if get_origin(hint) is list:
        return Annotated[list[_lenient(get_args(hint)[0])], BeforeValidator(_as_list)]  # type: ignore[misc]
    if hint in (Any, dict):
        return Annotated[hint, BeforeValidator(_without_nul)]
    if get_origin(hint) is dict:
        return dict[tuple(map(_lenient, get_args(hint)))]  # type: ignore[misc]
    return hint


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in BOOLEAN_WORDS:
        return BOOLEAN_WORDS[value.strip().lower()]
    if not isinstance(value, bool):
        raise ValueError("no boolean")  # noqa: TRY004 - pydantic collects ValueErrors alone
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("no number")  # noqa: TRY004 - as above
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("too large") from error
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _whole_number(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError("not whole")
    return value if isinstance(value, int) else int(number)


def _text(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("no text")  # noqa: TRY004 - as above
    text = os.fspath(value)
    if "\0" in text:  # no file's name holds one, and no text needs one
        raise ValueError("a NUL character")
    text.encode("utf-8")  # a command line may hold bytes that are no UTF-8: UnicodeEncodeError, a ValueError
    return text


def _without_nul(value: Any) -> Any:
    """What may hold anything, but no NUL."""
    if isinstance(value, str):
        _text(value)
    elif isinstance(value, Mapping | list):
        for entry in [*value, *value.values()] if isinstance(value, Mapping) else value:
            _without_nul(entry)
    return value


def _no_as_word(value: Any, choices: tuple[Any, ...]) -> Any:
    """YAML reads `eval_strategy: no` and `prefix_cache: off` as False."""
    words = [word for word in ("no", "off") if word in choices]
    return words[0] if value is False and words else value


def _as_list(value: Any) -> Any:
    """A scalar counts as a list of one."""
    if isinstance(value, tuple):
        return list(value)
    return [value] if isinstance(value, str | os.PathLike | bool | int | float) else value


def union_members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself as the only one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def describe_type(hint: Any) -> str:
    """A type in words that a recipe's author knows: `int | None` -> "a whole number or null"."""
    words = [word for member in union_members(hint) for word in _type_words(member)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _type_words(member: Any) -> list[str]:
    kind = get_origin(member) or member
    if kind is Literal:
        return [str(choice) for choice in get_args(member)]
    if kind is list:
        return [f"a list, each entry {describe_type(get_args(member)[0])}"]
    plain = {bool: ["true", "false"], int: ["a whole number"], float: ["a number"], str: ["text"]}
    return plain.get(kind) or {NoneType: ["null"], dict: ["a mapping {name: value}"]}[kind]


def choices_of(hint: Any) -> list[Any]:
    """The values that the Literal members of a type list."""
    return [choice for member in union_members(hint) if get_origin(member) is Literal for choice in get_args(member)]


def allowed(hint: Any, bound: Bound | None) -> str:
    """What a key may hold, in words: its type, and its bound where it has one."""
    return describe_type(hint) + (f", {bound.words}" if bound else "")


CONVERSIONS = {bool: _boolean, int: _whole_number, float: _number, str: _text}
# The stricter before the laxer: "0.1" is a number before it is a text, "x" a text before it is a list of one.
TRIED_IN_ORDER = (bool, int, float, Literal, dict, str, list)


def wrong_new_tokens(tokens: Sequence[str], init: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(key, message) for what is wrong with `new_tokens` and `new_tokens_init` in themselves.

    Of the library's `add_tokens`, too: there any value may come.
    """
    if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) for token in tokens):
        yield "new_tokens", f"got {show(tokens)}; allowed: a list of one or more texts, such as ['<poem>', '<drama>']."
        return
    empty = [token for token in tokens if not token.strip()]
    if empty:
        yield "new_tokens", f"{show(empty[0])} is no token: white space alone has tokens already. Take it out."
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice:
        yield "new_tokens", f"{show(twice[0])} stands there twice. Name each token once."
    for token, words in init.items():
        if token not in tokens:
            yield "new_tokens_init", f"{show(token)} is none of new_tokens, {show(list(tokens))}. Take it out."
        if not isinstance(words, str) or not words.strip():
            yield "new_tokens_init", f"{show(token)} has {show(words)}; allowed: words whose rows are averaged."


def converted(value: Any, hint: Any, bound: Any) -> Any:
    """The value of an entry's key as its type.

    Raises:
        ValueError: If it cannot be, or is out of bounds: what was got, what is allowed.
    """
    try:
        found = convert_value(value, hint)
    except ValueError as error:
        advice = nearest_choice(value, hint) or quoting_advice(value, hint)
        raise ValueError(f"got {error}; allowed: {allowed(hint, bound)}.{advice}") from error
    if bound and not bound.holds(found):
        raise ValueError(f"got {show(value)}; allowed: {allowed(hint, bound)}.")
    return found


def read_keys(given: Mapping[Any, Any], keys: Mapping[str, tuple[Any, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Convert and check a mapping within a recipe, such as `lora` or an entry of `schedule`.

    read_keys({"rank": "4", "rnk": 1}, {"rank": (int, at_least(1))})
    -> ({"rank": 4}, ["unknown key rnk; allowed are rank. Did you mean rank?"])

    Args:
        given: What the recipe says.
        keys: Key -> its type and bound, as for `converted`.

    Returns:
        The values that could be converted, and what is wrong, in words. A key without a value is left out.
    """
    values: dict[str, Any] = {}
    problems = []
    for key, value in given.items():
        if key not in keys:
            near = nearest(key, keys)
            advice = f" Did you mean {near}?" if near else ""
            problems.append(f"unknown key {key}; allowed are {', '.join(keys)}.{advice}")
        elif value is not None:
            try:
                values[key] = converted(value, *keys[key])
            except ValueError as error:
                problems.append(f"{key}: {error}")
    return values, problems
