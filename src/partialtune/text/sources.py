"""A text source as a recipe names it -> the texts it stands for -> the bytes of each, chunk by chunk.

Each kind of source is one class here and one entry in SOURCES. To add one, such as `gutenberg:829`, write a
class with `form`, `help`, `prefix` and a `read` that returns a RawText, put it into SOURCES before File, and test it in
tests/test_text.py. Decoding, cleaning, tokens, the cache, what a run records of its texts, messages and the help text
take it from there.
"""

import difflib
import glob
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from partialtune.errors import TextError
from partialtune.net.addresses import ADDRESS, LEFT_OUT, lacks_secrets, without_secrets
from partialtune.text.decoding import Chunks, Encoding

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20  # read at once
ROWS_AT_ONCE = 1000  # of a dataset
# Endings of files with columns, and how `datasets` loads them: braces, names and \\n of a JSONL are no text to learn.
TABLES: dict[str, dict[str, str]] = {
    **{ending: {"path": "json"} for ending in (".jsonl", ".ndjson", ".json")},
    ".csv": {"path": "csv"},
    ".tsv": {"path": "csv", "sep": "\t"},
    ".parquet": {"path": "parquet"},
}


@dataclass(frozen=True)
class RawText:
    """The bytes of one text.

    Attributes:
        name: How the text is called in messages and in a run's record; without secrets.
        chunks: Returns the bytes in order, from the beginning at every call.
        charset: That of the HTTP header, if one came with the text.
        encoding: How the bytes are read, where that is known; else it is found out.
    """

    name: str
    chunks: Chunks
    charset: str | None = None
    encoding: Encoding | None = None


class Source:
    """A kind of text source.

    Attributes:
        form: How it is named, in messages: "Give an http(s) URL, a path, ...".
        help: The same in the help text of `--text`, with more detail.
        prefix: What its names begin with.
        on_network: Whether its texts may have to be fetched. Those that lie on this machine are compared with the ones
            of a finished run when its recipe is started again.
    """

    form: str
    help: str
    prefix: str = ""
    on_network: bool = False

    def claims(self, name: str) -> bool:
        """Whether a name in a recipe is one of this kind."""
        return name.startswith(self.prefix)

    def expand(self, name: str) -> list[str]:
        """The texts that a name stands for, each by a name of its own.

        All names of a recipe are expanded before any text is read. So a path is looked up here: `~` is replaced, and
        what is missing is named together with everything else that is missing.

        Raises:
            TextError: If there is none.
        """
        return [name]

    def read(self, name: str, text_column: str) -> RawText:
        """One of the expanded names -> its bytes. Nothing large is read before `chunks` is called.

        Args:
            name: The text.
            text_column: The column that holds the text, where the source has columns.

        Raises:
            TextError: If the text cannot be found, fetched or read; from `chunks` too, where that is found out later.
        """
        raise NotImplementedError


class BuiltIn(Source):
    """The reference text that comes with Python itself, its topics in alphabetical order."""

    form = "builtin:python-docs"
    help = "builtin:python-docs (the reference text in every CPython)"
    prefix = "builtin:"

    def read(self, name: str, text_column: str) -> RawText:
        if name != self.form:
            raise TextError(f"There is no text {name}: the one that is built in is {self.form}.")
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise TextError(f"This Python comes without pydoc_data, so there is no {self.form} here.") from error
        data = ("\n\n\n".join(topics[topic].strip("\n") for topic in sorted(topics)) + "\n").encode()
        return RawText(name, lambda: iter((data,)), encoding=Encoding("utf-8", "built in"))


class HubDataset(Source):
    """A data set: hf:DATASET[:CONFIG[:SPLIT]]. The rows of its text column, each ended by a line end, in UTF-8."""

    form = "hf:DATASET"
    help = "hf:DATASET[:CONFIG[:SPLIT]]"
    prefix = "hf:"
    on_network = True

    def read(self, name: str, text_column: str) -> RawText:
        path, config, split = [*name.removeprefix(self.prefix).split(":", 2), "", ""][:3]
        if not path:
            raise TextError(f"{name} names no dataset: write hf:DATASET[:CONFIG[:SPLIT]].")
        chunks = _column_chunks(name, text_column, path=path, name=config or None, split=split or None)
        return RawText(name, chunks, encoding=Encoding("utf-8", "dataset"))


class WebAddress(Source):
    """An http(s) address of a plain text, or of a file with columns; fetched once, then taken from the cache."""

    form = "an http(s) URL"
    help = "http(s) URL"
    on_network = True

    def claims(self, name: str) -> bool:
        return ADDRESS.match(name) is not None

    def expand(self, name: str) -> list[str]:
        if lacks_secrets(name):
            raise TextError(
                f"{name} was written down without its password or token: {LEFT_OUT} stands in their place. Give the "
                "whole address again, as the first recipe had it: --text 'ADDRESS', --eval_texts '{NAME: ADDRESS}', "
                "--replay '{text: ADDRESS, share: 0.2}'."
            )
        if name.lower().startswith(("http://", "https://")):
            return [name]
        shown = without_secrets(name)
        raise TextError(f"{shown}: texts are fetched over http and https only. Download it and give the file's path.")

    def read(self, name: str, text_column: str) -> RawText:
        from partialtune.net.download import fetch  # requests is not needed for files

        download = fetch(name)
        ending = PurePosixPath(urlsplit(name).path).suffix
        return _file_text(download.path, download.url, ending, text_column, download.charset)


class File(Source):
    """A path or a glob of text files, or of files with columns."""

    form = "a path, a glob"
    help = "path, glob (sorted)"

    def expand(self, name: str) -> list[str]:
        path = Path(name).expanduser()
        if path.is_file():
            return [str(path)]
        if path.is_dir():
            count = sum(1 for _ in path.glob("*.txt"))
            raise TextError(f"{name} is a folder. Name its files with a glob, such as {path}/*.txt ({count} files).")
        if path.exists():
            raise TextError(
                f"{name} is no regular file (a device or a pipe): save the text to a file and give its path."
            )
        if glob.has_magic(name):
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
            if files:
                return files
            raise TextError(
                f"{name} matches no file in {Path.cwd()}." if not path.is_absolute() else f"{name} matches no file."
            )
        raise TextError(_explain_missing(name, path))

    def read(self, name: str, text_column: str) -> RawText:
        return _file_text(Path(name), name, PurePosixPath(name).suffix, text_column)


# The first that claims a name reads it; File, last, claims every name.
SOURCES: tuple[Source, ...] = (BuiltIn(), HubDataset(), WebAddress(), File())
_IN_MESSAGES = sorted(SOURCES, key=lambda source: source.prefix != "")  # what needs no prefix is named first
SOURCE_FORMS = " or ".join(", ".join(source.form for source in _IN_MESSAGES).rsplit(", ", 1))
SOURCE_HELP = ", ".join(source.help for source in _IN_MESSAGES)


def source_of(name: str) -> Source:
    """The kind of a text source."""
    return next(source for source in SOURCES if source.claims(name))


def raw_text(name: str, text_column: str) -> RawText:
    """One text -> its bytes, fetched or found. Arguments and errors as in `Source.read`."""
    return source_of(name).read(name, text_column)


def expand_sources(sources: Sequence[str]) -> list[str]:
    """The sources with globs expanded; every problem in one error. A file that comes up twice is read once."""
    names: dict[str, None] = {}  # in order, each once
    problems: list[str] = []
    for source in sources:
        try:
            expanded = source_of(source).expand(source)
        except TextError as error:
            problems.append(str(error))
            continue
        repeated = [name for name in expanded if name in names]
        if repeated:
            logger.warning("Named more than once, read once: %s", ", ".join(map(without_secrets, repeated)))
        names.update(dict.fromkeys(expanded))
    if problems:
        raise TextError("\n".join(problems))
    if not names:
        raise TextError(f"No text is named: give {SOURCE_FORMS}.")
    return list(names)


def _explain_missing(source: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no file {source}: the folder {path.parent.absolute()} does not exist."
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
    return f"There is no file {source} in {path.parent.absolute()}.{hint}"


def _file_text(path: Path, name: str, ending: str, text_column: str, charset: str | None = None) -> RawText:
    """A file that lies here: its text column where it has columns, else its bytes."""
    table = TABLES.get(ending.lower())
    if table:
        chunks = _column_chunks(name, text_column, data_files=[str(path)], split="train", **table)
        return RawText(name, chunks, encoding=Encoding("utf-8", f"column {text_column}"))
    return RawText(name, _file_chunks(path, name), charset)


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


def _column_chunks(name: str, text_column: str, /, **settings: Any) -> Chunks:
    """The rows of the text column of what `datasets.load_dataset(**settings)` loads, one line each, in UTF-8."""
    import datasets

    try:
        loaded = datasets.load_dataset(**settings)
    except Exception as error:  # a library's that reads others' files: an empty JSONL is a StopIteration
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error) or type(error).__name__
        raise TextError(f"{name} cannot be loaded: {reason}") from error
    rows = _choose_split(loaded, name)
    if text_column not in rows.column_names:
        raise TextError(
            f"{name} has no column {text_column!r}. Set text_column to one of {', '.join(rows.column_names)}."
            + (" To train on the file as it is, give it the ending .txt." if "data_files" in settings else "")
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
