"""A text that is too large for memory, or a part of it: a UTF-8 file in the cache, read piece by piece."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

PIECE_CHARACTERS = 1 << 20  # of the file, read at once


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


def utf8_bytes(texts: Sequence[str | StoredText]) -> int:
    """The size of texts in UTF-8."""
    return sum(
        len(text.encode("utf-8", errors="surrogatepass")) if isinstance(text, str) else text.utf8_bytes()
        for text in texts
    )
