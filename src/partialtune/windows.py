"""Token windows: texts (str) -> token ids (n,) int32 -> datasets.Dataset with input_ids (block_size,) int32.

    train_text, held_out_text = split_text(text, validation_share=0.1)     # before windows are made
    token_ids = [tokenize_text(train_text, tokenizer)]                     # one array a source
    windows = chunked_windows(token_ids, block_size=256, stride=256)       # or random_windows(..., seed=42)

Windows never cross sources. They lie in memory as Arrow fixed-size lists, four bytes a token.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from partialtune.errors import RecipeError, TextError
from partialtune.progress import progress_bar

PIECE_CHARACTERS = (
    1 << 20
)  # tokenised at once; 20 MB in one go took 2.8 GB of memory, in pieces 0.2 GB, and twice as long
SEAM_CONTEXT = 200  # characters on each side of a seam that are tokenised both ways before the seam is used
SEAM_CANDIDATES = 50
WORD_SEARCH = 200  # characters on each side of the held-out share's start in which a word's end is looked for
ZERO_WIDTH_JOINER = "\N{ZERO WIDTH JOINER}"
SLAB_WINDOWS = 4096  # windows written between two updates of the progress bar

_WORD_END = re.compile(r"(?<=\S)(?=\s)")  # before a run of white space, where byte-level BPE starts a new word


def split_text(text: str, validation_share: float) -> tuple[str, str]:
    """Hold out the end of a text.

    split_text("one two three four", validation_share=0.25) -> ("one two three", " four")

    The cut lies `validation_share` of the characters before the end, moved to the nearest start of a run of white space
    so that no word is torn: what is held out begins with white space. A text without white space nearby (WORD_SEARCH
    characters) is cut at the share itself, but not between a character and the marks that combine with it.

    Args:
        text: One source, decoded and cleaned.
        validation_share: Share of the characters to hold out, 0 <= share < 1. With 0 nothing is held out.

    Returns:
        (text to train on, held-out text); joined they are the text again.

    Raises:
        RecipeError: If the share is outside 0 <= share < 1.
    """
    if not 0 <= validation_share < 1:
        raise RecipeError(f"validation_share is {validation_share}, allowed is 0 (nothing held out) up to below 1.")
    held_out = round(len(text) * validation_share)
    if held_out == 0:
        return text, ""
    cut = _nearest_cut(text, len(text) - held_out)
    return text[:cut], text[cut:]


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of a whole text, as if it had been tokenised in one go.

    Special tokens appear only where the tokenizer itself puts them in front of a text (a BOS); one that it would put at
    the end is left out, because the text goes on from window to window. Long texts are tokenised in pieces: memory
    stays small and progress can be shown. A piece ends only before white space, and only where the tokens around the
    seam come out the same whole and cut; where no such place exists the rest is tokenised at once.

    Args:
        text: One source, decoded and cleaned.
        tokenizer: The model's tokenizer. Its `model_max_length` does not apply, windows are cut later.

    Returns:
        Token ids, int32, shape (n,).
    """
    ids = [np.asarray(_leading_special_ids(tokenizer), dtype=np.int32)]
    with progress_bar(len(text), "tokenising", "characters", unit_scale=True, delay=1) as bar:
        start = 0
        while start < len(text):
            end = _piece_end(text, start, tokenizer)
            ids.append(_encode(text[start:end], tokenizer))
            bar.update(end - start)
            start = end
    return np.concatenate(ids)


def chunked_windows(token_ids: Sequence[np.ndarray], block_size: int, stride: int) -> Dataset:
    """Cut each source from its beginning into windows of equal length.

    chunked_windows([np.array([1, 2, 3, 4, 5])], block_size=2, stride=2) -> input_ids [[1, 2], [3, 4]]

    Args:
        token_ids: One array a source, shape (n,), int32.
        block_size: Tokens per window, at least 2 (one of context, one to predict).
        stride: Tokens from one window's start to the next one's; `block_size` repeats no token.

    Returns:
        A dataset with `input_ids` of shape (windows, block_size). The tail of a source that fills no window is dropped.

    Raises:
        TextError: If no source is as long as a window.
    """
    _require_a_window(token_ids, block_size)
    sources = [
        np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(ids, dtype=np.int32), block_size)[::stride]
        for ids in token_ids
        if len(ids) >= block_size
    ]
    slabs = (source[at : at + SLAB_WINDOWS] for source in sources for at in range(0, len(source), SLAB_WINDOWS))
    return _write_windows(slabs, block_size, total=sum(map(len, sources)))


def random_windows(token_ids: Sequence[np.ndarray], block_size: int, seed: int) -> Dataset:
    """Draw tokens // block_size windows with replacement, every possible start in any source being equally likely.

    Args:
        token_ids: One array a source, shape (n,), int32.
        block_size: Tokens per window, at least 2.
        seed: Seed of the draw; the same seed and texts give the same windows in the same order.

    Returns:
        A dataset with `input_ids` of shape (tokens // block_size, block_size), in the order drawn.

    Raises:
        TextError: If no source is as long as a window.
    """
    _require_a_window(token_ids, block_size)
    fitting = [np.asarray(ids, dtype=np.int32) for ids in token_ids if len(ids) >= block_size]
    stream = np.concatenate(fitting)
    source_at = np.cumsum([0] + [len(ids) for ids in fitting])  # where each source begins in the stream
    starts_before = np.cumsum([0] + [len(ids) - block_size + 1 for ids in fitting])
    count = sum(map(len, token_ids)) // block_size
    drawn = np.random.default_rng(seed).integers(starts_before[-1], size=count)
    source = np.searchsorted(starts_before, drawn, side="right") - 1
    offsets = source_at[source] + drawn - starts_before[source]
    slabs = (
        stream[offsets[at : at + SLAB_WINDOWS, None] + np.arange(block_size)] for at in range(0, count, SLAB_WINDOWS)
    )
    return _write_windows(slabs, block_size, total=count)


def _nearest_cut(text: str, target: int) -> int:
    """The start of a run of white space nearest to `target`, else a character near it."""
    low = max(0, target - WORD_SEARCH)
    word_ends = [match.start() for match in _WORD_END.finditer(text, low, target + WORD_SEARCH)]
    if word_ends:
        return min(word_ends, key=lambda cut: abs(cut - target))
    cut = target
    while cut > 1 and (unicodedata.category(text[cut]).startswith("M") or ZERO_WIDTH_JOINER in text[cut - 1 : cut + 1]):
        cut -= 1
    return cut


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


def _piece_end(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the piece that begins at `start` ends: at a proven seam, or at the end of the text."""
    limit = start + PIECE_CHARACTERS
    if limit >= len(text):
        return len(text)
    candidates = [match.start() for match in _WORD_END.finditer(text, limit - PIECE_CHARACTERS // 8, limit)]
    for seam in candidates[: -SEAM_CANDIDATES - 1 : -1]:
        left, right = text[seam - SEAM_CONTEXT : seam], text[seam : seam + SEAM_CONTEXT]
        cut = np.concatenate([_encode(left, tokenizer), _encode(right, tokenizer)])
        if np.array_equal(cut, _encode(left + right, tokenizer)):
            return seam
    return len(text)


def _require_a_window(token_ids: Sequence[np.ndarray], block_size: int) -> None:
    """Raise TextError unless some source is as long as a window."""
    lengths = sorted((len(ids) for ids in token_ids), reverse=True)
    if lengths and lengths[0] >= block_size:
        return
    longest = lengths[0] if lengths else 0
    found = f"the text has {longest:,}"
    if len(lengths) > 1:
        found = f"the longest of {len(lengths)} texts, which windows do not cross, has {longest:,}"
    lower = f"lower block_size to at most {longest:,}, " if longest >= 2 else ""
    raise TextError(
        f"No window fits: block_size asks for {block_size:,} tokens and {found}. Change one of these: {lower}"
        f"give a longer text, or change validation_share (the training and the held-out text need a window each)."
    )


def _write_windows(slabs: Iterator[np.ndarray], block_size: int, total: int) -> Dataset:
    """Collect slabs of windows, each (windows, block_size) int32, in one in-memory dataset.

    Windows that lie side by side are not copied: Arrow takes over the memory of the token ids.
    """
    columns = []
    with progress_bar(total, "windows", "windows", delay=1) as bar:
        for slab in slabs:
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(slab.reshape(-1)), block_size))
            bar.update(len(slab))
    table = pa.table({"input_ids": pa.chunked_array(columns)})
    # the fingerprint that Dataset would compute copies the table several times over to hash it, and nothing is cached
    return Dataset(table, fingerprint=generate_random_fingerprint())
