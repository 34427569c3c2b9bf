"""What all pages share: the templates' environment, style and script, table cells, images as data, text to be seen."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from partialtune.words import count, percent, significant

WHITE_SPACE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}


def page_environment(autoescape: bool, **filters: Callable) -> Environment:
    """The templates in `templates/`, with lines of tags alone left out of what they render, and these filters."""
    environment = Environment(
        loader=PackageLoader("partialtune.pages"),
        autoescape=autoescape,
        undefined=StrictUndefined,  # a value that a template asks for and does not get is an error, not a gap
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "count": count, "significant": significant, **filters}
    return environment


@cache  # compiling the templates takes longer than filling them
def html_environment() -> Environment:
    """The environment of the HTML templates: every value is escaped."""
    return page_environment(autoescape=True, visible=visible, flowing=flowing)


def style_and_script(environment: Environment) -> dict[str, Any]:
    """The package's own style and script, and the script's digest for the page's content security policy."""
    # a browser runs the one script of this digest and none that a text or a token smuggled in
    script = environment.get_template("report.js").render()
    return {
        "style": Markup(environment.get_template("report.css").render()),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def data_uri(png: bytes) -> str:
    """A PNG as a data URI: the page holds the image and requests nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, what the column sorts by (None comes last), and a bar's length as a share."""

    text: str
    sort: float | str | None
    kind: str = ""
    bar: float | None = None


def cell(value: Any, write: Callable[[Any], str] | None = None, kind: str = "", bar: float | None = None) -> Cell:
    """The cell of a value, by which its column sorts; `write` says how it reads. Without it None is an empty cell."""
    text = write(value) if write is not None else "" if value is None else str(value)
    return Cell(text, value, kind, bar)


# --- text of tokens and recipes, shown as it is


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
