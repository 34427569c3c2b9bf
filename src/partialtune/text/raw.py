"""The name of one text source -> its bytes, chunk by chunk, and what is known of their encoding."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from partialtune.errors import TextError
from partialtune.net.addresses import ADDRESS
from partialtune.text.decoding import Chunks, Encoding

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
    """The bytes of a source, the charset of its HTTP header, or its encoding where that is known."""

    name: str
    chunks: Chunks
    charset: str | None = None
    encoding: Encoding | None = None


def raw_text(name: str, text_column: str) -> RawText:
    """Fetch or find a source; nothing of a file is read yet."""
    if name.startswith("builtin:"):
        data = _builtin_text(name).encode()
        return RawText(name, lambda: iter((data,)), encoding=Encoding("utf-8", "built in"))
    if name.startswith("hf:"):
        return RawText(name, _dataset_chunks(name, text_column), encoding=Encoding("utf-8", "dataset"))
    charset = None
    path = Path(name)
    table = TABLES.get(PurePosixPath(urlsplit(name).path if ADDRESS.match(name) else name).suffix.lower())
    if ADDRESS.match(name):
        from partialtune.net.download import fetch  # requests is not needed for files

        download = fetch(name)
        name, path, charset = download.url, download.path, download.charset
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
    path, config, split = [*name.removeprefix("hf:").split(":", 2), "", ""][:3]
    if not path:
        raise TextError(f"{name} names no dataset: write hf:DATASET[:CONFIG[:SPLIT]].")
    return _column_chunks(name, text_column, path=path, name=config or None, split=split or None)


def _column_chunks(name: str, text_column: str, /, **settings: Any) -> Chunks:
    """As `_dataset_chunks`, of what `datasets.load_dataset(**settings)` loads; `name` is what messages call it."""
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
