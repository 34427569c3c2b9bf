"""Tokens and windows of texts that lie on disk: made once, kept in the cache by content, memory-mapped.

Texts in memory stay in memory: for them the functions here do what `windows` does and store nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
import transformers
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from partialtune.cache import stored
from partialtune.text.streams import StoredText
from partialtune.text.windows import token_pieces, tokenize_text
from partialtune.text.words import WordTokens


def token_ids_of(texts: Sequence[str | StoredText], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The token ids of each text, shape (n,), int32; memory-mapped from one file if any of the texts lies on disk."""
    if all(isinstance(text, str) for text in texts):
        words = WordTokens(tokenizer)  # what one text taught serves the next
        return [tokenize_text(text, tokenizer, words) for text in texts]

    def build(path: Path) -> dict[str, Any]:
        words = WordTokens(tokenizer)
        with path.open("wb") as file:
            return {"lengths": [_write_tokens(token_pieces(text, tokenizer, words), file) for text in texts]}

    made_of = {"texts": [_identity(text) for text in texts], "tokenizer": tokenizer_fingerprint(tokenizer)}
    entry = stored("tokens", ".bin", made_of, build)
    if not sum(entry.facts["lengths"]):  # a text of a few characters, all held out; an empty file cannot be mapped
        return [np.empty(0, dtype=np.int32) for _ in texts]
    ids = np.memmap(entry.path, dtype="<i4", mode="r")
    return np.split(ids, np.cumsum(entry.facts["lengths"])[:-1])


def windows_of(
    token_ids: Sequence[np.ndarray], made_by: Sequence[Any], make: Callable[[Path | None], Dataset]
) -> Dataset:
    """The windows of texts: in memory for tokens in memory, else in an Arrow file.

    Args:
        token_ids: What `token_ids_of` returned.
        made_by: What else the windows depend on, as JSON: how they are cut, block size, stride or seed.
        make: Makes them, into the file that it is given.
    """
    if not any(isinstance(ids, np.memmap) for ids in token_ids):
        return make(None)
    files = sorted({Path(ids.filename).name for ids in token_ids})  # a file's name says what is in it
    entry = stored("windows", ".arrow", {"tokens": files, "made_by": list(made_by)}, lambda path: _count(make(path)))
    return Dataset.from_file(str(entry.path))


def utf8_bytes(texts: Sequence[str | StoredText]) -> int:
    """The size of texts in UTF-8."""
    return sum(
        len(text.encode("utf-8", errors="surrogatepass")) if isinstance(text, str) else text.utf8_bytes()
        for text in texts
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a tokenizer cuts a text."""
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        said = [json.dumps(state, sort_keys=True), getattr(tokenizer, "split_special_tokens", False)]
    else:
        said = [Hasher.hash(tokenizer)]
    versions = [tokenizers.__version__, transformers.__version__, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps([said, versions]).encode()).hexdigest()


def _write_tokens(pieces: Iterable[np.ndarray], file: BinaryIO) -> int:
    """Write a text's ids, four bytes each, and count them."""
    count = 0
    for ids in pieces:
        file.write(ids.astype("<i4").tobytes())
        count += len(ids)
    return count


def _identity(text: str | StoredText) -> list[Any]:
    if isinstance(text, str):
        return [hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()]
    return [text.sha256, text.start, text.end]


def _count(windows: Dataset) -> dict[str, int]:
    return {"windows": len(windows)}
