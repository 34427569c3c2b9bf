"""What all pages share: the templates' environment, style and script, table cells, images as data."""

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from partialtune.pages.html_text import flowing, visible
from partialtune.pages.templating import page_environment
from partialtune.words import count, percent, significant


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, what the column sorts by (None comes last), and a bar's length as a share."""

    text: str
    sort: float | str | None
    kind: str = ""
    bar: float | None = None


def html_environment() -> Environment:
    """The environment of the HTML templates: every value is escaped."""
    return page_environment(
        autoescape=True, visible=visible, flowing=flowing, percent=percent, count=count, significant=significant
    )


def style_and_script(environment: Environment) -> dict[str, Any]:
    """The package's own style and script, and the script's digest for the page's content security policy."""
    script = environment.get_template("report.js").render()
    return {
        "style": Markup(environment.get_template("report.css").render()),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def data_uri(png: bytes) -> str:
    """A PNG as an address that asks for nothing."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
