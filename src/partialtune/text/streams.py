"""Texts that are too large for memory: pieces of characters -> a UTF-8 file in the cache, read again piece by piece.

The pieces of a text, joined, are the text; where it is cut into pieces means nothing.
"""

import bisect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from partialtune.text.cleaning import ENDS, ZONE, book_limits, is_gutenberg, unify_lines
from partialtune.text.unwrapping import indent_of, joined_lines, learn_wrap_width, left_margin

PIECE_CHARACTERS = 1 << 20

_LINE_END = re.compile(r"\r{0,2}\n|\r")

Pieces = Callable[[], Iterator[str]]  # the pieces of a text from its beginning, at every call


@dataclass(frozen=True)
class StoredText:
    """A text, or a part of one, in a UTF-8 file.

    Attributes:
        path: The file.
        sha256: Of the whole file.
        marks: Places in the file, (characters, bytes) from its beginning, in order; the first is (0, 0), the last its
            end.
        start: First character of the part.
        end: Character after its last one.
    """

    path: Path
    sha256: str
    marks: tuple[tuple[int, int], ...]
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def part(self, start: int, end: int) -> "StoredText":
        """Characters `start` to `end` of this text."""
        return replace(self, start=self.start + start, end=self.start + end)

    def pieces(self) -> Iterator[str]:
        """The characters, at most about a million at a time."""
        first = bisect.bisect_right(self.marks, self.start, key=lambda mark: mark[0]) - 1
        with self.path.open("rb") as file:
            file.seek(self.marks[first][1])
            for (at, at_byte), (following, next_byte) in pairwise(self.marks[first:]):
                if at >= self.end:
                    return
                piece = file.read(next_byte - at_byte).decode("utf-8", errors="surrogatepass")
                piece = piece[max(0, self.start - at) : min(following, self.end) - at]
                if piece:
                    yield piece

    def read(self) -> str:
        """The whole text, in memory."""
        return "".join(self.pieces())

    def utf8_bytes(self) -> int:
        """Its size in UTF-8."""
        return self._byte_of(self.end) - self._byte_of(self.start)

    def _byte_of(self, character: int) -> int:
        """The place in the file where a character begins."""
        at, at_byte = self.marks[bisect.bisect_right(self.marks, character, key=lambda mark: mark[0]) - 1]
        before = "".join(replace(self, start=at, end=character).pieces())
        return at_byte + len(before.encode("utf-8", errors="surrogatepass"))


def write_pieces(pieces: Iterable[str], path: Path) -> list[tuple[int, int]]:
    """Write a text to a file in UTF-8.

    Returns:
        The `marks` of a `StoredText`.
    """
    marks = [(0, 0)]
    with path.open("wb") as file:
        for piece in pieces:
            for at in range(0, len(piece), PIECE_CHARACTERS):
                part = piece[at : at + PIECE_CHARACTERS]
                size = file.write(part.encode("utf-8", errors="surrogatepass"))
                marks.append((marks[-1][0] + len(part), marks[-1][1] + size))
    return marks


@dataclass
class Ends:
    """The first and the last `width` characters of a text that passes by, and its length."""

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


@dataclass(frozen=True)
class CleanedPieces:
    """What `cleaning.Cleaned` says, for pieces."""

    pieces: Iterator[str]
    removed_head: int
    removed_foot: int


def looks_like_gutenberg(pieces: Pieces) -> bool:
    """Whether a text carries a header or a footer of Project Gutenberg; see `cleaning.is_gutenberg`."""
    return is_gutenberg(Ends.of(pieces(), ZONE).text)


def clean_gutenberg_pieces(pieces: Pieces) -> CleanedPieces:
    """What `cleaning.clean_gutenberg` makes of the whole text, with a piece and a paragraph in memory at a time.

    The text passes three times: for its ends, to learn how its lines were wrapped, and to join them.
    """
    ends = Ends.of(unified_pieces(pieces()), ENDS)
    start, end = book_limits(ends.text)
    removed_foot = len(ends.text) - end

    def lines() -> Iterator[str]:
        return _book_lines(unified_pieces(pieces()), start, ends.length - removed_foot)

    indents: Counter[int] = Counter()
    width = learn_wrap_width(_counted(lines(), indents))
    indent = " " * left_margin(indents)
    if indent:
        width = learn_wrap_width(line.removeprefix(indent) for line in lines())
    joined = joined_lines((line.removeprefix(indent) for line in lines()), width)
    return CleanedPieces(_with_line_ends(joined), start, removed_foot)


def unified_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """The text with unified lines (`cleaning.unify_lines`); each piece but the last one ends with a line."""
    first, rest = True, []
    for piece in pieces:
        cut = _after_last_line(piece)
        if cut == 0:
            rest.append(piece)
            continue
        # only a text's first character is a byte order mark, later ones are text
        done = "".join([*rest, piece[:cut]])
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


def _after_last_line(piece: str) -> int:
    """The place after the last line end that is certainly whole; 0 if there is none. \\r may begin \\r\\r\\n."""
    newline = piece.rfind("\n")
    if newline >= 0:
        return newline + 1
    at = piece.rfind("\r")
    while at >= 0 and not piece[at + 1 :].lstrip("\r\f\x1a"):
        at = piece.rfind("\r", 0, at)
    return at + 1


def _book_lines(pieces: Iterable[str], start: int, end: int) -> Iterator[str]:
    """The lines from character `start` to `end`, without the blank ones at both ends."""
    at, unfinished, blank, begun = 0, "", 0, False
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
            yield from [""] * (blank if begun else 0)
            blank, begun = 0, True
            yield line
    if unfinished:
        yield from [""] * (blank if begun else 0)
        yield unfinished


def _counted(lines: Iterable[str], indents: Counter[int]) -> Iterator[str]:
    """The lines, once their indents were counted."""
    for line in lines:
        if line:
            indents[indent_of(line)] += 1
        yield line


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
