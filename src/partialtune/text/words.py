"""Tokens of a text word by word: each word that a text repeats is tokenised once -> token ids (n,) int32.

Only where that is exact: byte-level BPE splits a text by a pattern before it merges anything, and for the patterns
below no part of the split reaches from one word into the white space before the next one. Such a word's tokens depend
on nothing but the word with the white space before it.
"""

import json
import re
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

MOST_WORDS = 1 << 18  # remembered, about 50 MB; then the half that was used most is kept
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
        self._places: dict[str, int] = {}  # word -> its place in the arrays
        self._starts = self._lengths = self._uses = np.empty(0, dtype=np.int64)  # (words,)
        self._ids = np.empty(0, dtype=np.int32)  # of all words, one after another

    def encode(self, text: str) -> np.ndarray | None:
        """Token ids of a text without special tokens around it, int32; None where words are no way to tokenise it."""
        if self._pattern is None or _SPACE_FOR_PYTHON_ONLY.search(text):
            return None
        if len(self._places) > MOST_WORDS:
            self._forget_rare_words()
        words = self._pattern.findall(text)
        self._learn([word for word in set(words) if word not in self._places])
        places = np.fromiter(map(self._places.__getitem__, words), dtype=np.int64, count=len(words))
        self._uses += np.bincount(places, minlength=len(self._uses))
        lengths = self._lengths[places]
        ends = np.cumsum(lengths)
        shifts = np.repeat(self._starts[places] - (ends - lengths), lengths)  # from the text's tokens to the table's
        return self._ids[shifts + np.arange(len(shifts))]

    def _forget_rare_words(self) -> None:
        """Keep the words that were used most, and count from now on."""
        kept = np.zeros(len(self._uses), dtype=bool)
        kept[np.argsort(self._uses)[len(self._uses) - MOST_WORDS // 2 :]] = True
        words = [word for word, is_kept in zip(self._places, kept.tolist(), strict=True) if is_kept]
        self._ids = self._ids[np.repeat(kept, self._lengths)]
        self._lengths = self._lengths[kept]
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._uses = np.zeros(len(words), dtype=np.int64)
        self._places = dict(zip(words, range(len(words)), strict=True))

    def _learn(self, words: list[str]) -> None:
        if not words:
            return
        encoded = [one.ids for one in self._backend.encode_batch_fast(words, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(words))
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._places.update(zip(words, range(len(self._lengths), len(self._lengths) + len(words)), strict=True))
        self._ids = np.append(self._ids, np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
        self._starts, self._lengths = np.append(self._starts, starts), np.append(self._lengths, lengths)
        self._uses = np.append(self._uses, np.zeros(len(words), dtype=np.int64))


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
