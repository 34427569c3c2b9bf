"""Text of tokens and recipes -> HTML that shows it as it is: escaped, white space and control characters visible."""

from typing import Any

import yaml
from markupsafe import Markup, escape

WHITE_SPACE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}


def visible(text: str) -> Markup:
    """Text of a token with its white space and control characters to be seen, for HTML.

    visible(" the") -> <span class="space">␣</span>the
    """
    return Markup("").join(map(_seen, text)) or Markup('<span class="space">(empty)</span>')


def flowing(text: str) -> Markup:
    """Text that goes on from line to line: spaces are spaces, line ends and control characters are to be seen.

    flowing("a\\nb c") -> a<span class="space">↵</span> b c
    """
    return Markup("").join(
        " " if character == " " else _seen(character) + " " if character in "\n\r" else _seen(character)
        for character in text
    )


def _seen(character: str) -> Markup:
    if character.isprintable() and character != " ":
        return escape(character)
    return Markup('<span class="space">{}</span>').format(
        WHITE_SPACE.get(character) or character.encode("unicode_escape").decode()
    )


def yaml_words(value: Any) -> str:
    """A recipe's value on one line: a list as its entries with commas, anything else as it could stand in a recipe."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(yaml_words, value))
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
