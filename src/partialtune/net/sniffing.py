"""The first bytes of a download or a file -> nothing, or a TextError that says why it is no plain text."""

import codecs
import re
from collections.abc import Iterable

from partialtune.errors import TextError

BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16: its little-endian mark starts with the other's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FILE_KINDS = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive (perhaps an e-book or an office document)",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PAR1": "a Parquet file (give its dataset as hf:FOLDER)",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
    b"{\\rtf": "an RTF document",
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x08\x1a\x1b"))
_HTML_START = re.compile(rb"\s*(?:<!--.*?-->\s*)*(?:<\?xml[^>]*>\s*)?(?:<!doctype\s+html|<html[\s>])", re.I | re.S)
SNIFFED_BYTES = 1 << 20  # bytes at the start by which a text is told from something else


def refuse_non_text(data: bytes, name: str, http_charset: str | None = None) -> None:
    """Raise a TextError in words if data (a file or the first part of one) is empty, binary or an HTML page."""
    if not data.strip():
        raise TextError(f"{name} is empty: it holds {len(data)} bytes and no text.")
    for start, kind in _FILE_KINDS.items():
        if data.startswith(start):
            raise TextError(f"{name} is {kind}, not plain text. Unpack or convert it to a .txt file first.")
    if _HTML_START.match(data[:4096].removeprefix(codecs.BOM_UTF8)):
        raise TextError(
            f"{name} is an HTML page, not plain text. Give the address of the plain text itself "
            f"(Project Gutenberg calls it 'Plain Text UTF-8'), or save the page's text to a file."
        )
    if may_hold_nulls(data, http_charset):
        return
    refuse_nulls((data,), name)
    sample = data[:SNIFFED_BYTES]
    controls = len(sample) - len(sample.translate(None, _CONTROLS))
    if controls > len(sample) / 100:
        raise TextError(
            f"{name} is binary, not plain text: {controls:,} of its first {len(sample):,} bytes are controls."
        )


def may_hold_nulls(head: bytes, http_charset: str | None) -> bool:
    """Whether a text claims to be in two or four bytes a character, of which many are NUL."""
    wide = http_charset and re.match("(utf|ucs)[-_]?(16|32|2|4)", http_charset, re.I)
    return bool(wide) or head.startswith(tuple(mark for mark, _ in BYTE_ORDER_MARKS[1:]))


def refuse_nulls(chunks: Iterable[bytes], name: str) -> None:
    start = 0
    for chunk in chunks:
        if (null := chunk.find(b"\0")) >= 0:
            utf16 = " It may be UTF-16 without a byte order mark: save it as UTF-8." if _alternates_nulls(chunk) else ""
            raise TextError(f"{name} is binary, not plain text: byte {start + null:,} is NUL.{utf16}")
        start += len(chunk)


def _alternates_nulls(data: bytes) -> bool:
    return max(data[:1000:2].count(0), data[1:1000:2].count(0)) > len(data[:1000]) / 4
