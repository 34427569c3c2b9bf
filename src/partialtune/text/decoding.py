"""Bytes of a text -> characters, and how they were read; what is no text (binary, HTML, empty) is refused in words."""

import codecs
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from partialtune.net.sniffing import BYTE_ORDER_MARKS, may_hold_nulls, refuse_non_text, refuse_nulls

logger = logging.getLogger(__name__)

_GUTENBERG_CHARSET = re.compile(rb"^character set encoding:[ \t]*([^\r\n]+)", re.I | re.M)
# Python calls these text encodings, and no file is written in them: some know no "replace", one no text at all.
# https://docs.python.org/3/library/codecs.html#text-encodings
_NO_CHARSETS = frozenset(
    {"idna", "mbcs", "oem", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "palmos"}
)
_HEADER_BYTES = 20_000  # a Gutenberg header's charset line lies within


Chunks = Callable[[], Iterator[bytes]]  # a file's bytes in order, from the beginning at every call


@dataclass(frozen=True)
class Encoding:
    """How bytes are read, and what that rests on: a byte order mark, a header, ..."""

    name: str
    origin: str


@dataclass
class Damage:
    """Counts the U+FFFD characters of a text while its pieces pass."""

    count: int = 0
    first: str = ""  # the first one with the characters around it

    def watched(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces, each counted before it is given out."""
        for piece in pieces:
            found = piece.count("\ufffd")
            if found and not self.count:
                place = piece.index("\ufffd")
                self.first = piece[max(0, place - 30) : place + 30]
            self.count += found
            yield piece

    def warn(self, name: str, encoding: Encoding) -> None:
        """Log a warning, if there was any damage."""
        if self.count:
            logger.warning(
                "%s: %d damaged characters, read as %s (%s), stand in the text as U+FFFD; the first one in %r.",
                *(name, self.count, encoding.name, encoding.origin, self.first),
            )


def choose_encoding(chunks: Chunks, name: str, http_charset: str | None = None) -> Encoding:
    """How to read a text: by its byte order mark, else its declared charset, else as UTF-8, else as cp1252.

    A declared charset that does not decode every byte is passed over with a warning. Where nothing decodes every byte,
    or UTF-8 would if it were not for some damage, the damaged places become U+FFFD.

    Args:
        chunks: The bytes; the first chunk is the whole text or at least SNIFFED_BYTES of it.
        name: How messages call the text.
        http_charset: The charset of the HTTP header it came with, if one was given there.

    Raises:
        TextError: If the bytes are empty, binary or an HTML page.
    """
    head = next(chunks(), b"")
    refuse_non_text(head, name, http_charset)
    if not may_hold_nulls(head, http_charset):
        refuse_nulls(chunks(), name)
    return _choose(chunks, head, name, http_charset)


def decoded_pieces(chunks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """The characters of a text, chunk by chunk as if decoded in one go; what is damaged becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    yield from filter(None, map(decoder.decode, chunks))
    if rest := decoder.decode(b"", final=True):
        yield rest


def _choose(chunks: Chunks, head: bytes, name: str, http_charset: str | None) -> Encoding:
    """`choose_encoding`, for bytes that are a text."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return Encoding(encoding, "byte order mark")
    declared = False
    for charset, origin in _declared_charsets(chunks, head, http_charset):
        declared = True
        if _decodes(chunks(), charset):
            _warn_if_also_utf8(chunks, name, charset, origin)
            return Encoding(charset, origin)
        logger.warning("%s: the %s says %s, but some bytes are not: another encoding is tried.", name, origin, charset)
    if _decodes(chunks(), "utf-8"):
        return Encoding("utf-8", "valid UTF-8" + (", against its declaration" if declared else ""))
    characters = others = damaged = 0
    for piece in decoded_pieces(chunks(), "utf-8"):
        characters += len(piece)
        others += len(piece) - len(piece.encode("ascii", errors="ignore"))
        damaged += piece.count("\ufffd")
    if others > 2 * damaged:  # most of what is no ASCII decodes: UTF-8 with some damage, since cp1252 rarely does
        return Encoding("utf-8", "mostly valid UTF-8")
    if others > characters / 4:
        logger.warning(
            "%s: no UTF-8, and no charset is declared: read as cp1252. If it looks wrong, save it as UTF-8.", name
        )
    return Encoding("cp1252", "fallback, because it is no valid UTF-8")


def _decodes(chunks: Iterable[bytes], encoding: str) -> bool:
    """Whether every byte can be read so."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks:
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeError:  # that of some codecs is no UnicodeDecodeError
        return False
    return True


def _declared_charsets(chunks: Chunks, head: bytes, http_charset: str | None) -> Iterator[tuple[str, str]]:
    """The charsets that are declared for a text, as Python's names, each with where it is declared."""
    head = head[:_HEADER_BYTES]
    line = _GUTENBERG_CHARSET.search(head) if b"gutenberg" in head.lower() else None
    declared = [(http_charset, "HTTP header"), (line and line[1].decode("ascii", "replace"), "Gutenberg header")]
    for charset, origin in declared:
        if charset and (encoding := python_encoding(charset)):
            # Windows programs say ISO-8859-1 and mean cp1252, whose quotes are control characters there.
            windows = encoding == "iso8859-1" and any(re.search(rb"[\x80-\x9f]", chunk) for chunk in chunks())
            yield ("cp1252" if windows else encoding), origin
        elif charset:
            logger.warning(
                "The %s names the charset %r, which Python does not know: it is passed over.", origin, charset
            )


def python_encoding(charset: str) -> str | None:
    """Python's name for a charset as people write it, such as 'ISO-646-US (US-ASCII)'; None if there is none."""
    charset = charset.strip().strip("\"'").lower()
    bracketed = re.search(r"\(([^)]+)\)", charset)
    spellings = [charset, re.sub(r"\s*\([^)]*\)", "", charset), bracketed[1] if bracketed else ""]
    for pattern, encoding in ((r"utf-?8", "utf-8"), (r"latin-?\s?1\b", "latin-1"), (r"\b(125\d)\b", r"cp\1")):
        if match := re.search(pattern, charset):
            spellings.append(match.expand(encoding))
    for spelling in filter(None, spellings):
        try:
            codec = codecs.lookup(spelling)
        except (LookupError, ValueError):
            continue
        if codec._is_text_encoding and codec.name not in _NO_CHARSETS:
            return codec.name
    return None


def _warn_if_also_utf8(chunks: Chunks, name: str, charset: str, origin: str) -> None:
    """A declared one-byte charset decodes anything, also UTF-8 that was declared wrongly, into nonsense."""
    if charset.startswith("utf") or all(chunk.isascii() for chunk in chunks()):
        return
    if _decodes(chunks(), "utf-8"):
        logger.warning(
            "%s: read as %s, as the %s says, but it is valid UTF-8 too. If letters look wrong, save it as UTF-8 "
            "with a byte order mark.",
            *(name, charset, origin),
        )
