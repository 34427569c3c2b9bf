"""What is printed for people: no line longer than their terminal; in a pipe or a file lines stay as they are."""

import os
import sys
import textwrap
from typing import TextIO

WIDTH = 120  # columns of prose where nobody knows better
NARROW = 100  # columns below which things stand below each other that else stand side by side


def columns_of(stream: TextIO) -> int | None:
    """The columns of the terminal behind a stream; None where it is none."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or None) if stream.isatty() else None
    except (OSError, ValueError, AttributeError):  # closed, or in a notebook
        return None


def prose_width() -> int:
    """In how many columns prose for stdout is to be written."""
    return min(columns_of(sys.stdout) or WIDTH, WIDTH)


def is_narrow() -> bool:
    """Whether stdout is a terminal with no room for two things side by side."""
    return (columns_of(sys.stdout) or NARROW) < NARROW


def show(*texts: object) -> None:
    """Print texts with an empty line between them."""
    print("\n\n".join(fitted(str(text), columns_of(sys.stdout)) for text in texts), flush=True)


def fitted(text: str, columns: int | None) -> str:
    """Lines that are too long, folded between words and set in below their own start.

    Args:
        text: Lines.
        columns: Of the terminal; None, and the text stays as it is.
    """
    return text if columns is None else "\n".join(_folded(line, columns) for line in text.split("\n"))


def _folded(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    inset = len(line) - len(line.lstrip(" ")) + 2
    inset = inset if inset < columns // 2 else 0
    return "\n".join(textwrap.wrap(line, columns, subsequent_indent=" " * inset, break_on_hyphens=False)) or line
