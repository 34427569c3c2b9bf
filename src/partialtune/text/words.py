"""Tokens of a text word by word: each word that a text repeats is tokenised once -> token ids (n,) int32.

Only where that is exact: byte-level BPE splits a text by a pattern before it merges anything, and for the patterns
below no part of the split reaches from one word into the white space before the next one. Such a word's tokens depend
on nothing but the word with the white space before it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

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
            ends = 4 * np.searchsorted(encoding.word_ids, np.arange(len(group)), side="right")
            for word, (start, end) in zip(group, pairwise([0, *ends.tolist()]), strict=True):
                yield word, ids[start:end]


def word_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What a word is for a tokenizer whose words do not depend on each other; None if that is not known."""
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", False):
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = parts["model"], parts["added_tokens"]
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
