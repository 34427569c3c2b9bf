"""Text sources as a recipe names them -> decoded, cleaned texts, each with where it came from and how it was read.

A source is an http(s) address, a path, a glob, `builtin:python-docs` or `hf:DATASET[:CONFIG[:SPLIT]]`.
"""

import difflib
import glob
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from partialtune.cleaning import Cleaned, clean_gutenberg, is_gutenberg
from partialtune.decoding import Decoded, decode_text
from partialtune.errors import TextError

logger = logging.getLogger(__name__)

CLEANINGS = ("auto", "gutenberg", "none")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)


@dataclass(frozen=True)
class SourceText:
    """One text and its origin.

    Attributes:
        name: The source: an address without password, a path, `builtin:...` or `hf:...`.
        text: The text that is trained on.
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
    text: str
    sha256: str
    raw_bytes: int
    encoding: str
    encoding_from: str
    cleaning: str
    removed_head: int
    removed_foot: int
    damaged: int


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


def read_texts(sources: Sequence[str], cleaning: str = "auto", text_column: str = "text") -> list[SourceText]:
    """Read text sources, one SourceText a file, in the order of the sources; a glob's files are sorted.

    Args:
        sources: See the module's description.
        cleaning: As in `load_text`.
        text_column: The column of a dataset (`hf:...`) that holds the text.

    Raises:
        TextError: If a text cannot be fetched, read or decoded, or nothing is left of it. All missing files are named.
    """
    if cleaning not in CLEANINGS:
        raise TextError(f"text_cleaning is {cleaning!r}: choose one of {', '.join(CLEANINGS)}.")
    names = _expand_all(sources)
    return [_read_source(name, cleaning, text_column) for name in names]


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


def _read_source(name: str, cleaning: str, text_column: str) -> SourceText:
    """Fetch or open, decode and clean one text, and log what was decided."""
    if name.startswith("builtin:"):
        raw = _builtin_text(name).encode()
        decoded = Decoded(raw.decode(), "utf-8", "built in", 0)
    elif name.startswith("hf:"):
        raw = _dataset_text(name, text_column).encode()
        decoded = Decoded(raw.decode(), "utf-8", "dataset", 0)
    else:
        name, raw, charset = _raw_file(name)
        decoded = decode_text(raw, name, charset)
    done, cleaned = _clean(decoded.text, cleaning)
    if not cleaned.text.strip():
        raise TextError(f"{name}: nothing is left after cleaning. Use text_cleaning: none, or check the file.")
    source = SourceText(
        name=name,
        text=cleaned.text,
        sha256=hashlib.sha256(raw).hexdigest(),
        raw_bytes=len(raw),
        encoding=decoded.encoding,
        encoding_from=decoded.encoding_from,
        cleaning=done,
        removed_head=cleaned.removed_head,
        removed_foot=cleaned.removed_foot,
        damaged=decoded.damaged,
    )
    _log_decisions(source, cleaning)
    return source


def _raw_file(name: str) -> tuple[str, bytes, str | None]:
    """The name to show, the bytes and the HTTP charset of a file or an address."""
    charset = None
    path = Path(name)
    if _ADDRESS.match(name):
        from partialtune.download import fetch  # requests is not needed for files

        download = fetch(name)
        name, path, charset = download.url, download.path, download.charset
    try:
        return name, path.read_bytes(), charset
    except OSError as error:
        raise TextError(f"{name} cannot be read: {error.strerror}.") from error


def _clean(text: str, cleaning: str) -> tuple[str, Cleaned]:
    """What was done, and the result."""
    if cleaning == "gutenberg" or (cleaning == "auto" and is_gutenberg(text)):
        return "gutenberg", clean_gutenberg(text)
    return "none", Cleaned(text if cleaning == "none" else text.removeprefix("\ufeff"), 0, 0)


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
        f"{len(source.text):,}",
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


def _dataset_text(name: str, text_column: str) -> str:
    """The rows of a dataset's text column, one after another, each ended by a line end."""
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
    values = rows[text_column]
    lines = [value if value.endswith("\n") else f"{value}\n" for value in values if isinstance(value, str)]
    if not any(line.strip() for line in lines):
        raise TextError(f"{name}: column {text_column!r} holds no text in {len(rows):,} rows.")
    return "".join(lines)


def _choose_split(loaded, name: str):
    """The split that was asked for, else `train`, else the only one."""
    if not hasattr(loaded, "keys"):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise TextError(f"{name} has the splits {', '.join(loaded)}: name one, as in hf:DATASET:CONFIG:SPLIT.")
