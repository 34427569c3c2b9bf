"""How the pages' templates are read: a value that a template asks for and does not get is an error."""

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment(autoescape: bool, **filters: Callable) -> Environment:
    """The templates in `templates/`, with lines of tags alone left out of what they render, and these filters."""
    environment = Environment(
        loader=PackageLoader("partialtune.pages"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment
