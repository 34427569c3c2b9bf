"""Text sources as a recipe names them -> decoded, cleaned texts, each with where it came from and how it was read.

    text = load_text("https://www.gutenberg.org/cache/epub/829/pg829.txt")      # see `sources` for what can be named

A text is read piece by piece: small ones are put together in memory, what exceeds IN_MEMORY_BYTES goes to a file in the
cache.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialtune.cache import cached_by_content
from partialtune.errors import TextError
from partialtune.net import sniffing
from partialtune.net.addresses import without_secrets
from partialtune.text import cleaning as cleaning_code
from partialtune.text import decoding, gutenberg, stored_text, unwrapping
from partialtune.text.cleaning import CLEANINGS, cleaned_pieces
from partialtune.text.decoding import Damage, Encoding, choose_encoding, decoded_pieces
from partialtune.text.sources import RawText, expand_sources, raw_text, source_of
from partialtune.text.stored_text import StoredText, write_pieces

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 16 << 20  # of all texts that are read together; 64 MB in memory would take half a GB on the way
# A text in the cache is made of its bytes and of the code that reads them: where one of these changes, it is made anew.
CODE = (cleaning_code, decoding, gutenberg, sniffing, stored_text, unwrapping)


@dataclass(frozen=True)
class SourceText:
    """One text and its origin.

    Attributes:
        name: The source: an address without password, a path, `builtin:...` or `hf:...`.
        content: The text that is trained on: a str, or where it lies on disk.
        sha256: Of the raw bytes (of the text's UTF-8 where there is no file).
        raw_bytes: Size of the file before decoding.
        encoding: How the bytes were decoded, a Python encoding.
        encoding_from: What that rests on: byte order mark, HTTP header, Gutenberg header, ...
        cleaning: What was done: `gutenberg`, or `none`, which under `auto` is LF for line ends and no byte order mark.
        removed_head: Characters cut before the book.
        removed_foot: Characters cut after it.
        damaged: U+FFFD characters in the decoded text.
    """

    name: str
    content: str | StoredText
    sha256: str
    raw_bytes: int
    encoding: str
    encoding_from: str
    cleaning: str
    removed_head: int
    removed_foot: int
    damaged: int

    @property
    def text(self) -> str:
        """The whole text; one that lies on disk is read into memory."""
        return self.content if isinstance(self.content, str) else self.content.read()


def load_text(source: str | Path, cleaning: str = "auto") -> str:
    """The decoded and cleaned text of one source; the files of a glob are joined by a blank line.

    Args:
        source: An http(s) address, a path, a glob, or another of `sources.SOURCES`.
        cleaning: `auto` cleans what carries a header or footer of Project Gutenberg and leaves other texts as they
            are but for a byte order mark and line ends, which become LF; `gutenberg` also joins the hard-wrapped lines
            of other texts; `none` keeps every character, a byte order mark and CRLF too.

    Raises:
        TextError: If the text cannot be fetched, read or decoded, or nothing is left of it.
    """
    return "\n\n".join(text.text for text in read_texts([str(source)], cleaning))


def read_texts(
    sources: Sequence[str], cleaning: str = "auto", text_column: str = "text", in_memory_bytes: int = IN_MEMORY_BYTES
) -> list[SourceText]:
    """Read text sources, one SourceText a file, in the order of the sources; a glob's files are sorted.

    Args:
        sources: As in `load_text`.
        cleaning: As in `load_text`.
        text_column: The column of a dataset (`hf:...`) that holds the text.
        in_memory_bytes: Raw bytes of texts that are kept in memory, in the order of the sources; those that do not fit
            are stored on disk, in the cache.

    Raises:
        TextError: If a text cannot be fetched, read or decoded, or nothing is left of it. All missing files are named.
    """
    if cleaning not in CLEANINGS:
        raise TextError(f"text_cleaning is {cleaning!r}: choose one of {', '.join(CLEANINGS)}.")
    names = expand_sources(sources)
    texts: list[SourceText] = []
    for name in names:
        text = _read_source(raw_text(name, text_column), cleaning, in_memory_bytes)
        in_memory_bytes -= text.raw_bytes if isinstance(text.content, str) else 0
        texts.append(text)
    return texts


def check_texts_unchanged(
    recorded: Mapping[str, str], sources: Sequence[str], run: Path, text_column: str = "text"
) -> list[str]:
    """Raise where a text is not the one that a finished run was trained on.

    What lies on this machine is read, and of the network what an address without its secrets does not tell from others.

    Args:
        recorded: Name -> sha256 of each text, from the run's `recipe.yaml`. Where it is empty, nothing is compared.
        sources: What the recipe names now.
        run: The run's folder, for the message.
        text_column: Which column of files with columns is read.

    Returns:
        Names of texts that were not compared: on the network, or not there any more.

    Raises:
        TextError: Names the texts that differ.
    """
    if not recorded:
        return ["its texts"]
    present: set[str] = set()
    different = []
    for source in sources:
        if source_of(source).on_network and without_secrets(source) == source:
            continue
        with suppress(TextError):  # a text that is gone has not become another one
            for name in expand_sources([source]):
                found, _ = _digest(raw_text(name, text_column))
                written = without_secrets(name)
                present.add(written)
                if recorded.get(written) != found:
                    was = f"sha256 {recorded[written][:12]} then" if written in recorded else "not among its texts"
                    different.append(f"{written}: {was}, {found[:12]} now")
    if different:
        raise TextError(
            f"The run in {run} is finished, and its text is not what it was: {'; '.join(different)}. "
            f"For a run on the present text name another folder: --output_dir {run}-2. Nothing was touched."
        )
    return [name for name in recorded if name not in present]


def _digest(raw: RawText) -> tuple[str, int]:
    """The sha256 of a text's bytes, and their number."""
    digest, size = hashlib.sha256(), 0
    for chunk in raw.chunks():
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _read_source(raw: RawText, cleaning: str, in_memory_bytes: int) -> SourceText:
    """Decode and clean one text, into memory or into the cache, and log what was decided."""
    sha256, size = _digest(raw)
    content: str | StoredText
    if size <= in_memory_bytes:
        pieces, facts = _prepare(raw, cleaning)
        content = "".join(pieces)
    else:
        content, facts = _store_text(raw, cleaning, sha256)
    encoding = Encoding(facts["encoding"], facts["encoding_from"])
    Damage(facts["damaged"], facts.pop("first_damage")).warn(raw.name, encoding)
    source = SourceText(name=raw.name, content=content, sha256=sha256, raw_bytes=size, **facts)
    _log_decisions(source, cleaning)
    return source


def _store_text(raw: RawText, cleaning: str, sha256: str) -> tuple[StoredText, dict[str, Any]]:
    """The text in the cache: by its bytes, how they are read, and the code that does it."""

    def build(path: Path) -> dict[str, Any]:
        pieces, facts = _prepare(raw, cleaning)
        return {"marks": write_pieces(pieces, path), **facts}

    code = hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in CODE)).hexdigest()
    given = [raw.charset, raw.encoding and raw.encoding.origin]
    made_of = {"raw": sha256, "encoding": given, "cleaning": cleaning, "code": code}
    entry = cached_by_content("texts", ".txt", made_of, build)
    facts = dict(entry.facts)
    marks = tuple((characters, size) for characters, size in facts.pop("marks"))
    return StoredText(entry.path, entry.sha256, marks, start=0, end=marks[-1][0]), facts


def _prepare(raw: RawText, cleaning: str) -> tuple[Iterator[str], dict[str, Any]]:
    """The pieces of a decoded and cleaned text, and what was decided: fields of SourceText, and the first damage."""
    encoding = raw.encoding or choose_encoding(raw.chunks, raw.name, raw.charset)
    damage = Damage()
    for _ in damage.watched(decoded_pieces(raw.chunks(), encoding.name)):
        pass  # a pass of its own: damage in a part that cleaning cuts away counts too
    cleaned = cleaned_pieces(lambda: decoded_pieces(raw.chunks(), encoding.name), cleaning)
    return _not_blank(cleaned.pieces, raw.name), {
        "encoding": encoding.name,
        "encoding_from": encoding.origin,
        "damaged": damage.count,
        "first_damage": damage.first,
        "cleaning": cleaned.cleaning,
        "removed_head": cleaned.removed_head,
        "removed_foot": cleaned.removed_foot,
    }


def _not_blank(pieces: Iterable[str], name: str) -> Iterator[str]:
    """The pieces; an error at their end if they were all white space."""
    blank = True
    for piece in pieces:
        blank = blank and not piece.strip()
        yield piece
    if blank:
        raise TextError(f"{name}: nothing is left after cleaning. Use text_cleaning: none, or check the file.")


def _log_decisions(source: SourceText, cleaning: str) -> None:
    if source.cleaning == "gutenberg":
        done = (
            f"cut {source.removed_head:,} characters at the head and {source.removed_foot:,} at the foot, lines joined"
        )
    elif cleaning == "auto":
        done = "left as it is but for line ends (LF)"
    else:
        done = "left as it is"
    logger.info(
        "%s: %s bytes, %s (%s), %s, %s characters.",
        source.name,
        f"{source.raw_bytes:,}",
        source.encoding,
        source.encoding_from,
        done,
        f"{len(source.content):,}",
    )
