"""Texts -> token ids (n,) int32: exactly those of the whole text, though it is tokenised in pieces and word by word.

    ids = tokenize_text("It was the best of times.", tokenizer)
    one, two = token_ids_of([text, stored_text], tokenizer)         # texts on disk: made once, kept in the cache

Pieces keep memory small; they end only at seams that were proved. Words keep it fast: each word that a text repeats is
tokenised once, where that is exact. Byte-level BPE splits a text by a pattern before it merges anything, and for the
patterns below no part of the split reaches from one word into the white space before the next one. Such a word's tokens
depend on nothing but the word with the white space before it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
import transformers
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from partialtune.cache import cached_by_content
from partialtune.progress import progress_bar
from partialtune.text.stored_text import StoredText

# Tokenised at once: 20 MB in one go took 2.8 GB of memory, in pieces 0.2 GB, and twice as long.
PIECE_CHARACTERS = 1 << 20
SEAM_CONTEXT = 200  # characters on each side of a seam that are tokenised both ways before the seam is used
SEAM_CANDIDATES = 50
SEAM_STRETCH = 4096  # characters in which candidates are looked for at a time
MOST_WORDS = 1 << 17  # learnt, about 25 MB; then those that were not met since the last time are forgotten
WORDS_AT_ONCE = 1000  # given to the tokenizer as one sequence; it takes several sequences in parallel
_AFTER_ANYTHING = re.compile(r"\s*\S+|\s+")
_AFTER_LETTERS = re.compile(r"\s*\S.*?(?:(?<=[^\W_])(?=\s)|\Z)|\s+", re.S)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PATTERNS = {  # a tokenizer's pattern -> its words here; Llama 3 and Qwen take line ends to the punctuation before them
    "byte level": _AFTER_ANYTHING,
    r"['’](?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+": _AFTER_ANYTHING,
    _LLAMA_3: _AFTER_LETTERS,
    _LLAMA_3.replace("{1,3}", ""): _AFTER_LETTERS,
}
_SPACE_FOR_PYTHON_ONLY = re.compile("[\x1c-\x1f]")  # white space here, other characters for the tokenizer
WORD_END = re.compile(r"(?<=\S)(?=\s)")  # before a run of white space, where byte-level BPE starts a new word


class WordTokens:
    """The words of a tokenizer that were met so far, and their ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._pattern = word_pattern(tokenizer)
        self._known: dict[str, bytes] = {}  # word -> its ids, int32
        self._older: dict[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray | None:
        """Token ids of a text without special tokens around it, int32; None where words are no way to tokenise it."""
        if self._pattern is None or _SPACE_FOR_PYTHON_ONLY.search(text):
            return None
        words = self._pattern.findall(text)
        self._learn(set(words))
        return np.frombuffer(b"".join(map(self._known.__getitem__, words)), dtype=np.int32)

    def _learn(self, words: set[str]) -> None:
        """Make sure that all of these words are known."""
        if len(self._known) > MOST_WORDS:
            self._older, self._known = self._known, {}
        new = words.difference(self._known)
        met_before = new.intersection(self._older)
        self._known.update((word, self._older[word]) for word in met_before)
        self._known.update(self._encoded(list(new - met_before)))

    def _encoded(self, words: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Each word with its ids."""
        groups = [words[at : at + WORDS_AT_ONCE] for at in range(0, len(words), WORDS_AT_ONCE)]
        encodings = self._backend.encode_batch(groups, is_pretokenized=True, add_special_tokens=False)
        for group, encoding in zip(groups, encodings, strict=True):
            ids = np.asarray(encoding.ids, dtype=np.int32).tobytes()
            # word_ids: for each id the number of its word, ascending. 4 bytes an id.
            ends = 4 * np.searchsorted(encoding.word_ids, np.arange(len(group)), side="right")
            for word, (start, end) in zip(group, pairwise([0, *ends.tolist()]), strict=True):
                yield word, ids[start:end]


def word_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What a word is for a tokenizer whose words do not depend on each other; None if that is not known."""
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", False):
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
    # With any of these a word alone may come out otherwise than in its text: merges dropped at random, a normaliser
    # that sees the neighbours, ids cut off or filled up, an added token that takes the white space behind it.
    if model["type"] != "BPE" or model.get("dropout") or parts["normalizer"] or parts["truncation"] or parts["padding"]:
        return None
    if any(token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"]) for token in added):
        return None
    return _PATTERNS.get(_split_pattern(parts["pre_tokenizer"] or {}))


def _split_pattern(pre_tokenizer: dict) -> str | None:
    """The pattern by which a tokenizer splits a text before it merges."""
    *before, level = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if level.get("type") != "ByteLevel" or level["add_prefix_space"]:
        return None
    if not before:
        return "byte level" if level["use_regex"] else None
    if len(before) > 1 or before[0]["type"] != "Split" or level["use_regex"]:
        return None
    isolated = before[0]["behavior"] == "Isolated" and not before[0]["invert"]
    return before[0]["pattern"].get("Regex") if isolated else None


def token_ids_of(texts: Sequence[str | StoredText], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The token ids of each text, shape (n,), int32; memory-mapped from one file if any of the texts lies on disk."""
    in_memory = [text for text in texts if isinstance(text, str)]
    if len(in_memory) == len(texts):
        words = WordTokens(tokenizer)  # what one text taught serves the next
        return [tokenize_text(text, tokenizer, words) for text in in_memory]

    def build(path: Path) -> dict[str, Any]:
        words = WordTokens(tokenizer)
        with path.open("wb") as file:
            return {"lengths": [_write_tokens(token_pieces(text, tokenizer, words), file) for text in texts]}

    made_of = {"texts": [_identity(text) for text in texts], "tokenizer": tokenizer_fingerprint(tokenizer)}
    entry = cached_by_content("tokens", ".bin", made_of, build)
    if not sum(entry.facts["lengths"]):  # a text of a few characters, all held out; an empty file cannot be mapped
        return [np.empty(0, dtype=np.int32) for _ in texts]
    ids = np.memmap(entry.path, dtype="<i4", mode="r")
    return np.split(ids, np.cumsum(entry.facts["lengths"])[:-1])


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase, words: WordTokens | None = None) -> np.ndarray:
    """Token ids of a whole text, as if it had been tokenised in one go.

    Special tokens appear only where the tokenizer itself puts them in front of a text (a BOS); one that it would put at
    the end is left out, because the text goes on from window to window. Long texts are tokenised in pieces: memory
    stays small and progress can be shown. A piece ends only before white space, and only where the tokens around the
    seam come out the same whole and cut; where there is no such place the piece goes on until there is one.

    Args:
        text: One source, decoded and cleaned.
        tokenizer: The model's tokenizer. Its `model_max_length` does not apply, windows are cut later.
        words: What the tokenizer's words are, where several texts share it; it grows.

    Returns:
        Token ids, int32, shape (n,).
    """
    return np.concatenate(list(token_pieces(text, tokenizer, words)))


def token_pieces(
    text: str | StoredText, tokenizer: PreTrainedTokenizerBase, words: WordTokens | None = None
) -> Iterator[np.ndarray]:
    """The token ids of `tokenize_text`, in order, about a million characters at a time."""
    yield np.asarray(_leading_special_ids(tokenizer), dtype=np.int32)
    if words is None:
        words = WordTokens(tokenizer)
    pieces = (text,) if isinstance(text, str) else text.pieces()
    with progress_bar(len(text), "tokenising", "characters", unit_scale=True, delay=1) as bar:
        for piece in _cut_at_seams(pieces, tokenizer):
            ids = words.encode(piece)
            yield _encode(piece, tokenizer) if ids is None else ids
            bar.update(len(piece))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a tokenizer cuts a text."""
    if getattr(tokenizer, "is_fast", False):
        # truncation and padding are set by whoever used the tokenizer last, and cut nothing here
        state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        rules = [json.dumps(state, sort_keys=True), getattr(tokenizer, "split_special_tokens", False)]
    else:
        rules = [Hasher.hash(tokenizer)]
    versions = [tokenizers.__version__, transformers.__version__, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps([rules, versions]).encode()).hexdigest()


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


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    # verbose=False turns off the one warning about model_max_length for this call alone
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by itself: [] for GPT-2, [BOS] for Llama."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    decorated = tokenizer("a")["input_ids"]
    places = [at for at in range(len(decorated)) if decorated[at : at + len(plain)] == plain]
    return decorated[: places[0]] if places else []


def _cut_at_seams(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The same text in pieces that end at proven seams."""
    text, start = "", 0  # what was not given out yet begins at `start`
    for piece in pieces:
        text, start = text[start:] + piece, 0
        # The last SEAM_CONTEXT characters wait for the next piece: a seam is proved by what follows it.
        while end := _seam(text, start, len(text) - SEAM_CONTEXT, tokenizer):
            yield text[start:end]
            start = end
    while end := _seam(text, start, len(text), tokenizer):
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _seam(text: str, start: int, last: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where the piece that begins at `start` can end: at the first stretch with a proven seam, before `last`."""
    stretch = min(SEAM_STRETCH, PIECE_CHARACTERS // 8)
    for limit in range(start + PIECE_CHARACTERS, last, stretch):
        candidates = [match.start() for match in WORD_END.finditer(text, limit - stretch, limit)]
        # the last ones first: the fewer pieces, the fewer proofs
        for seam in candidates[: -SEAM_CANDIDATES - 1 : -1]:
            left, right = text[seam - SEAM_CONTEXT : seam], text[seam : seam + SEAM_CONTEXT]
            # Proved: no token spans the seam, and none on either side depends on what lies across it. White space alone
            # is no proof: in Llama 3's pattern ".\n" is one token.
            cut = np.concatenate([_encode(left, tokenizer), _encode(right, tokenizer)])
            if np.array_equal(cut, _encode(left + right, tokenizer)):
                return seam
    return None
