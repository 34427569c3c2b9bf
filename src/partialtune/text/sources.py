"""Text sources as a recipe names them -> decoded, cleaned texts, each with where it came from and how it was read.

A source is an http(s) address, a path, a glob, `builtin:python-docs` or `hf:DATASET[:CONFIG[:SPLIT]]`. It is read piece
by piece: small texts are put together in memory, what exceeds IN_MEMORY_BYTES goes to a file in the cache.
"""

import difflib
import glob
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialtune.errors import TextError
from partialtune.text import cleaning as cleaning_code
from partialtune.text import decoding, streams, unwrapping
from partialtune.text.decoding import Chunks, Damage, Encoding, choose_encoding, decoded_pieces
from partialtune.text.store import stored
from partialtune.text.streams import Pieces, StoredText, clean_gutenberg_pieces, looks_like_gutenberg, write_pieces

logger = logging.getLogger(__name__)

CLEANINGS = ("auto", "gutenberg", "none")
IN_MEMORY_BYTES = 16 << 20  # of all texts that are read together; 64 MiB in memory would take half a GB on the way
CHUNK_BYTES = 4 << 20  # read at once
ROWS_AT_ONCE = 1000  # of a dataset
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


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
        cleaning: What was done: `gutenberg` or `none`.
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
        source: See the module's description.
        cleaning: `auto` cleans what carries a header or footer of Project Gutenberg and leaves other texts as they
            are, `gutenberg` also joins the hard-wrapped lines of other texts, `none` keeps every character, a byte
            order mark and CRLF too.

    Raises:
        TextError: If the text cannot be fetched, read or decoded, or nothing is left of it.
    """
    return "\n\n".join(text.text for text in read_texts([str(source)], cleaning))


def read_texts(
    sources: Sequence[str], cleaning: str = "auto", text_column: str = "text", in_memory_bytes: int = IN_MEMORY_BYTES
) -> list[SourceText]:
    """Read text sources, one SourceText a file, in the order of the sources; a glob's files are sorted.

    Args:
        sources: See the module's description.
        cleaning: As in `load_text`.
        text_column: The column of a dataset (`hf:...`) that holds the text.
        in_memory_bytes: Raw bytes of texts that are kept in memory, in the order of the sources; those that do not fit
            are stored on disk, in the cache.

    Raises:
        TextError: If a text cannot be fetched, read or decoded, or nothing is left of it. All missing files are named.
    """
    if cleaning not in CLEANINGS:
        raise TextError(f"text_cleaning is {cleaning!r}: choose one of {', '.join(CLEANINGS)}.")
    names = _expand_all(sources)
    texts: list[SourceText] = []
    for name in names:
        text = _read_source(_raw_text(name, text_column), cleaning, in_memory_bytes)
        in_memory_bytes -= text.raw_bytes if isinstance(text.content, str) else 0
        texts.append(text)
    return texts


def _expand_all(sources: Sequence[str]) -> list[str]:
    """The sources with globs expanded; every problem in one error. A file that comes up twice is read once."""
    names: list[str] = []
    problems: list[str] = []
    for source in sources:
        try:
            expanded = _expand(source)
        except TextError as error:
            problems.append(str(error))
            continue
        repeated = [name for name in expanded if name in names]
        if repeated:
            logger.warning("Named more than once, read once: %s", ", ".join(repeated))
        names += [name for name in dict.fromkeys(expanded) if name not in names]
    if problems:
        raise TextError("\n".join(problems))
    if not names:
        raise TextError("No text is named: give at least one address, path, glob, builtin:python-docs or hf:DATASET.")
    return names


def _expand(source: str) -> list[str]:
    """The files that a source stands for, or the source itself where it is no path."""
    if source.startswith(("builtin:", "hf:")):
        return [source]
    if address := _ADDRESS.match(source):
        if address[0].lower() in ("http://", "https://"):
            return [source]
        raise TextError(f"{source}: texts are fetched over http and https only. Download it and give the file's path.")
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        count = sum(1 for _ in path.glob("*.txt"))
        raise TextError(f"{source} is a folder. Name its files with a glob, such as {path}/*.txt ({count} files).")
    if path.exists():
        raise TextError(f"{source} is no regular file (a device or a pipe): save the text to a file and give its path.")
    if glob.has_magic(source):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if files:
            return files
        raise TextError(
            f"{source} matches no file in {Path.cwd()}." if not path.is_absolute() else f"{source} matches no file."
        )
    raise TextError(_explain_missing(source, path))


def _explain_missing(source: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no file {source}: the folder {path.parent.absolute()} does not exist."
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
    return f"There is no file {source} in {path.parent.absolute()}.{hint}"


@dataclass(frozen=True)
class _RawText:
    """The bytes of a source, the charset of its HTTP header, or its encoding where that is known."""

    name: str
    chunks: Chunks
    charset: str | None = None
    encoding: Encoding | None = None


def _raw_text(name: str, text_column: str) -> _RawText:
    """Fetch or find a source; nothing of a file is read yet."""
    if name.startswith("builtin:"):
        data = _builtin_text(name).encode()
        return _RawText(name, lambda: iter((data,)), encoding=Encoding("utf-8", "built in"))
    if name.startswith("hf:"):
        return _RawText(name, _dataset_chunks(name, text_column), encoding=Encoding("utf-8", "dataset"))
    charset = None
    path = Path(name)
    if _ADDRESS.match(name):
        from partialtune.text.download import fetch  # requests is not needed for files

        download = fetch(name)
        name, path, charset = download.url, download.path, download.charset
    return _RawText(name, _file_chunks(path, name), charset)


def _file_chunks(path: Path, name: str) -> Chunks:
    """A small file is read once, a large one chunk by chunk whenever its bytes are asked for."""
    try:
        if path.stat().st_size <= CHUNK_BYTES:
            data = path.read_bytes()
            return lambda: iter((data,))
        with path.open("rb"):
            pass  # it can be opened
    except OSError as error:
        raise TextError(f"{name} cannot be read: {error.strerror}.") from error

    def chunks() -> Iterator[bytes]:
        try:
            with path.open("rb") as file:
                while data := file.read(CHUNK_BYTES):
                    yield data
        except OSError as error:
            raise TextError(f"{name} cannot be read: {error.strerror}.") from error

    return chunks


def _read_source(raw: _RawText, cleaning: str, in_memory_bytes: int) -> SourceText:
    """Decode and clean one text, into memory or into the cache, and log what was decided."""
    digest, size = hashlib.sha256(), 0
    for chunk in raw.chunks():
        digest.update(chunk)
        size += len(chunk)
    content: str | StoredText
    if size <= in_memory_bytes:
        prepared = _prepare(raw, cleaning)
        content, facts = "".join(prepared.pieces), prepared.facts
    else:
        content, facts = _store_text(raw, cleaning, digest.hexdigest())
    encoding = Encoding(facts["encoding"], facts["encoding_from"])
    Damage(facts["damaged"], facts.pop("first_damage")).warn(raw.name, encoding)
    source = SourceText(name=raw.name, content=content, sha256=digest.hexdigest(), raw_bytes=size, **facts)
    _log_decisions(source, cleaning)
    return source


def _store_text(raw: _RawText, cleaning: str, sha256: str) -> tuple[StoredText, dict[str, Any]]:
    """The text in the cache: by its bytes, how they are read, and the code that does it."""

    def build(path: Path) -> dict[str, Any]:
        prepared = _prepare(raw, cleaning)
        return {"marks": write_pieces(prepared.pieces, path), **prepared.facts}

    modules = (cleaning_code, decoding, streams, unwrapping)
    code = hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()
    said = [raw.charset, raw.encoding and raw.encoding.origin]
    entry = stored("texts", ".txt", {"raw": sha256, "encoding": said, "cleaning": cleaning, "code": code}, build)
    facts = dict(entry.facts)
    marks = tuple((characters, size) for characters, size in facts.pop("marks"))
    return StoredText(entry.path, entry.sha256, marks, start=0, end=marks[-1][0]), facts


@dataclass(frozen=True)
class _Prepared:
    """A decoded and cleaned text, and fields of SourceText."""

    pieces: Iterator[str]
    facts: dict[str, Any]


def _prepare(raw: _RawText, cleaning: str) -> _Prepared:
    """Decide how a text is read and cleaned; its pieces do it."""
    encoding = raw.encoding or choose_encoding(raw.chunks, raw.name, raw.charset)
    damage = Damage()
    for _ in damage.watched(decoded_pieces(raw.chunks(), encoding.name)):
        pass
    facts = {"encoding": encoding.name, "encoding_from": encoding.origin}
    facts |= {"damaged": damage.count, "first_damage": damage.first}

    def pieces() -> Iterator[str]:
        return decoded_pieces(raw.chunks(), encoding.name)

    if cleaning == "gutenberg" or (cleaning == "auto" and looks_like_gutenberg(pieces)):
        cleaned = clean_gutenberg_pieces(pieces)
        facts |= {"cleaning": "gutenberg", "removed_head": cleaned.removed_head, "removed_foot": cleaned.removed_foot}
        return _Prepared(_not_blank(cleaned.pieces, raw.name), facts)
    facts |= {"cleaning": "none", "removed_head": 0, "removed_foot": 0}
    kept = pieces() if cleaning == "none" else _without_byte_order_mark(pieces)
    return _Prepared(_not_blank(kept, raw.name), facts)


def _without_byte_order_mark(pieces: Pieces) -> Iterator[str]:
    for number, piece in enumerate(pieces()):
        yield piece.removeprefix("\ufeff") if number == 0 else piece


def _not_blank(pieces: Iterator[str], name: str) -> Iterator[str]:
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
        done = "left as it is, no header or footer of Project Gutenberg"
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


def _builtin_text(name: str) -> str:
    """The reference text that comes with Python itself, its topics in alphabetical order."""
    if name != "builtin:python-docs":
        raise TextError(f"There is no text {name}: the one that is built in is builtin:python-docs.")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("This Python comes without pydoc_data, so there is no builtin:python-docs here.") from error
    return "\n\n\n".join(topics[topic].strip("\n") for topic in sorted(topics)) + "\n"


def _dataset_chunks(name: str, text_column: str) -> Chunks:
    """The rows of a dataset's text column, one after another, each ended by a line end, in UTF-8."""
    import datasets

    path, config, split = [*name.removeprefix("hf:").split(":", 2), "", ""][:3]
    if not path:
        raise TextError(f"{name} names no dataset: write hf:DATASET[:CONFIG[:SPLIT]].")
    try:
        loaded = datasets.load_dataset(path, config or None, split=split or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise TextError(f"{name} cannot be loaded: {reason}") from error
    rows = _choose_split(loaded, name)
    if text_column not in rows.column_names:
        raise TextError(
            f"{name} has no column {text_column!r}. Set text_column to one of {', '.join(rows.column_names)}."
        )

    def chunks() -> Iterator[bytes]:
        for batch in rows.select_columns([text_column]).iter(ROWS_AT_ONCE):
            values = (value for value in batch[text_column] if isinstance(value, str))
            text = "".join(value if value.endswith("\n") else f"{value}\n" for value in values)
            if text:
                yield text.encode()

    if not any(chunk.strip() for chunk in chunks()):
        raise TextError(f"{name}: column {text_column!r} holds no text in {len(rows):,} rows.")
    return chunks


def _choose_split(loaded, name: str):
    """The split that was asked for, else `train`, else the only one."""
    if not hasattr(loaded, "keys"):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise TextError(f"{name} has the splits {', '.join(loaded)}: name one, as in hf:DATASET:CONFIG:SPLIT.")
