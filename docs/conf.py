"""Settings of Sphinx. Strictly, as CI does it: sphinx-build -W --keep-going -b html docs outputs/docs

A link to a page, a heading or a file that is not there fails, and so does a public name without a docstring.
"""

import partialtune

project = "partialtune"
author = "the authors of partialtune"
release = partialtune.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"partialtune {release}"
myst_heading_anchors = 3
nitpicky = False  # types of torch and transformers have no pages here
autodoc_typehints = "signature"
napoleon_use_ivar = True  # the attributes of a dataclass once
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def fail_without_docstring(app, what, name, obj, options, lines) -> None:
    """A public name without a docstring is a warning, which `-W` makes an error."""
    if what in ("class", "function", "method", "property", "exception") and not any(line.strip() for line in lines):
        from sphinx.util import logging

        logging.getLogger(__name__).warning("%s %s has no docstring", what, name)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", fail_without_docstring, priority=900)
