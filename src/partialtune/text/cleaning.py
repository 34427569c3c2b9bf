"""A decoded text in pieces -> the text that is trained on, in pieces: the book alone, each paragraph on one line.

The pieces of a text, joined, are the text; where it is cut into pieces means nothing. A text of any size is cleaned
with a piece and a paragraph in memory at a time.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from partialtune.text.gutenberg import ENDS, ZONE, book_limits, is_gutenberg, unify_lines
from partialtune.text.unwrapping import unwrapped_lines

CLEANINGS = ("auto", "gutenberg", "none")
PIECE_CHARACTERS = 1 << 20  # of cleaned text, given out at once

_LINE_END = re.compile(r"\r{0,2}\n|\r")

Pieces = Callable[[], Iterator[str]]  # the pieces of a text from its beginning, at every call


@dataclass(frozen=True)
class Cleaned:
    """A cleaned text, and how many characters were cut before and after it, counted with LF line ends.

    Attributes:
        pieces: The text; an iterator unless it came from `clean_gutenberg`, which keeps it in memory.
        cleaning: What was done: `gutenberg`, or `none`, which under `auto` is LF for line ends and no byte order mark.
    """

    pieces: Iterable[str]
    cleaning: str
    removed_head: int
    removed_foot: int

    @property
    def text(self) -> str:
        """All pieces in one."""
        return "".join(self.pieces)


def cleaned_pieces(pieces: Pieces, cleaning: str) -> Cleaned:
    """A text cleaned as a recipe's `text_cleaning` says.

    Args:
        pieces: The decoded text.
        cleaning: `auto` (as `gutenberg` where Project Gutenberg's header or footer is found), `gutenberg` or `none`.
    """
    if cleaning == "gutenberg" or (cleaning == "auto" and looks_like_gutenberg(pieces)):
        return clean_gutenberg_pieces(pieces)
    kept = pieces() if cleaning == "none" else with_line_feeds(_without_byte_order_mark(pieces()))
    return Cleaned(kept, "none", removed_head=0, removed_foot=0)


def clean_gutenberg(text: str) -> Cleaned:
    """Cut what Project Gutenberg put around a book, and join its hard-wrapped lines.

    Args:
        text: The decoded file with any line ends; a byte order mark may be left on it.

    Returns:
        The book with LF line ends, without blank lines at its ends, and the characters removed at head and foot.
        A text without header and footer loses nothing, but its lines are joined all the same.
    """
    cleaned = clean_gutenberg_pieces(lambda: iter((text,)))
    return replace(cleaned, pieces=(cleaned.text,))


def clean_gutenberg_pieces(pieces: Pieces) -> Cleaned:
    """What `clean_gutenberg` returns, piece by piece.

    The text passes three times: for its ends, to learn how its lines were wrapped, and to join them.
    """
    ends = Ends.of(unified_pieces(pieces()), ENDS)
    start, end = book_limits(ends.text)
    removed_foot = len(ends.text) - end

    def lines() -> Iterator[str]:
        return _book_lines(unified_pieces(pieces()), start, ends.length - removed_foot)

    return Cleaned(_with_line_ends(unwrapped_lines(lines)), "gutenberg", start, removed_foot)


def looks_like_gutenberg(pieces: Pieces) -> bool:
    """Whether a text carries a header or a footer of Project Gutenberg; see `gutenberg.is_gutenberg`."""
    return is_gutenberg(Ends.of(pieces(), ZONE).text)


@dataclass
class Ends:
    """The first and the last `width` characters of a text, and its length; gathered while its pieces pass."""

    width: int
    head: str = ""
    tail: str = ""
    length: int = 0

    @classmethod
    def of(cls, pieces: Iterable[str], width: int) -> "Ends":
        ends = cls(width)
        for piece in pieces:
            ends.length += len(piece)
            room = width - len(ends.head)
            ends.head, rest = ends.head + piece[:room], piece[room:] if room > 0 else piece
            ends.tail = (ends.tail + rest[-width:])[-width:]
        return ends

    @property
    def text(self) -> str:
        """Head and tail in one; the whole text if it is no longer."""
        return self.head + self.tail


def unified_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """The text with unified lines (`gutenberg.unify_lines`); each piece but the last one ends with a line end."""
    first, rest = True, []
    for piece in pieces:
        cut = _after_last_line(piece)
        if cut == 0:
            rest.append(piece)
            continue
        done = "".join([*rest, piece[:cut]])
        # A byte order mark is taken off the first piece alone: elsewhere it is a character of the text. unify_lines
        # takes one off any start, so later pieces get a line feed in front, which is cut off again.
        yield unify_lines(done if first else "\n" + done)[0 if first else 1 :]
        first, rest = False, [piece[cut:]]
    last = "".join(rest)
    if last or first:
        yield unify_lines(last if first else "\n" + last)[0 if first else 1 :]


def with_line_feeds(pieces: Iterable[str]) -> Iterator[str]:
    """The text with LF for its line ends CR LF, CR and CR CR LF (a CR LF that was converted once more)."""
    held = ""  # CRs at the end of a piece, whose line end may go on in the next one
    for piece in pieces:
        whole = held + piece
        text = whole.rstrip("\r")
        held = whole[len(text) :]
        if text:
            yield _LINE_END.sub("\n", text) if "\r" in text else text
    if held:
        yield held.replace("\r", "\n")


def _without_byte_order_mark(pieces: Iterable[str]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        yield piece.removeprefix("\ufeff") if number == 0 else piece


def _after_last_line(piece: str) -> int:
    """The place after the last line end that is certainly whole; 0 if there is none.

    A \\r at the end of a piece may be the beginning of \\r\\n or \\r\\r\\n, also with a \\f or \\x1a between, which
    `unify_lines` takes out before it looks for line ends.
    """
    newline = piece.rfind("\n")
    if newline >= 0:
        return newline + 1
    at = piece.rfind("\r")
    while at >= 0 and not piece[at + 1 :].lstrip("\r\f\x1a"):
        at = piece.rfind("\r", 0, at)
    return at + 1


def _book_lines(pieces: Iterable[str], start: int, end: int) -> Iterator[str]:
    """The lines from character `start` to `end`, without the blank ones at both ends."""
    at, unfinished, blank, started = 0, "", 0, False  # blank lines are held back until a line follows them
    for piece in pieces:
        part = piece[max(0, start - at) : max(0, end - at)]
        at += len(piece)
        if not part:
            continue
        *whole, unfinished = (unfinished + part).split("\n")
        for line in whole:
            if not line:
                blank += 1
                continue
            yield from [""] * (blank if started else 0)
            blank, started = 0, True
            yield line
    if unfinished:
        yield from [""] * (blank if started else 0)
        yield unfinished


def _with_line_ends(lines: Iterable[str]) -> Iterator[str]:
    """The lines with their ends, about a piece at a time."""
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line) + 1
        if size >= PIECE_CHARACTERS:
            yield "\n".join(piece) + "\n"
            piece, size = [], 0
    if piece:
        yield "\n".join(piece) + "\n"
