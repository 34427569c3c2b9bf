"""Token windows: texts (str) -> token ids (n,) int32 -> datasets.Dataset with input_ids (block_size,) int32.

    train_text, held_out_text = split_text(text, validation_share=0.1)     # before windows are made
    token_ids = [tokenize_text(train_text, tokenizer)]                     # one array a source
    windows = chunked_windows(token_ids, block_size=256, stride=256)       # or random_windows(..., seed=42)

Windows never cross sources. They are Arrow fixed-size lists, four bytes a token, in memory or in a memory-mapped file.
A text may also be a `StoredText`, whose pieces are read from disk, and token ids a memory map.
"""

import mmap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from tqdm import tqdm

from partialtune.cache import cached_by_content
from partialtune.errors import RecipeError, TextError
from partialtune.progress import progress_bar
from partialtune.text.stored_text import StoredText
from partialtune.text.tokenizing import WORD_END

WORD_SEARCH = 200  # characters on each side of the held-out share's start in which a word's end is looked for
CUT_CONTEXT = 20 * WORD_SEARCH  # characters on each side of it that are read from a stored text
ZERO_WIDTH_JOINER = "\N{ZERO WIDTH JOINER}"
SLAB_WINDOWS = 1024  # windows written between two updates of the progress bar

Text = str | StoredText


def split_text(text: Text, validation_share: float) -> tuple[Text, Text]:
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
    target = len(text) - held_out
    if isinstance(text, str):
        cut = _nearest_cut(text, target) if held_out else len(text)
        return text[:cut], text[cut:]
    before = max(0, target - CUT_CONTEXT)
    around = text.part(before, min(len(text), target + CUT_CONTEXT)).read()
    cut = before + _nearest_cut(around, target - before) if held_out else len(text)
    return text.part(0, cut), text.part(cut, len(text))


def chunked_windows(token_ids: Sequence[np.ndarray], block_size: int, stride: int, path: Path | None = None) -> Dataset:
    """Cut each source from its beginning into windows of equal length.

    chunked_windows([np.array([1, 2, 3, 4, 5])], block_size=2, stride=2) -> input_ids [[1, 2], [3, 4]]

    Args:
        token_ids: One array a source, shape (n,), int32.
        block_size: Tokens per window, at least 2 (one of context, one to predict).
        stride: Tokens from one window's start to the next one's; `block_size` repeats no token.
        path: Arrow file to write the windows to, which is then memory-mapped; None keeps them in memory.

    Returns:
        A dataset with `input_ids` of shape (windows, block_size). The tail of a source that fills no window is dropped.

    Raises:
        TextError: If no source is as long as a window.
    """
    _require_a_window(token_ids, block_size)
    fitting = [ids for ids in token_ids if len(ids) >= block_size]
    slabs = (slab for ids in fitting for slab in _slabs(ids, block_size, stride))
    total = sum((len(ids) - block_size) // stride + 1 for ids in fitting)
    return _write_windows(slabs, block_size, total, path)


def random_windows(token_ids: Sequence[np.ndarray], block_size: int, seed: int, path: Path | None = None) -> Dataset:
    """Draw tokens // block_size windows with replacement, every possible start in any source being equally likely.

    Args:
        token_ids: One array a source, shape (n,), int32.
        block_size: Tokens per window, at least 2.
        seed: Seed of the draw; the same seed and texts give the same windows in the same order.
        path: Arrow file to write the windows to, which is then memory-mapped; None keeps them in memory.

    Returns:
        A dataset with `input_ids` of shape (tokens // block_size, block_size), in the order drawn.

    Raises:
        TextError: If no source is as long as a window.
    """
    _require_a_window(token_ids, block_size)
    fitting = [ids for ids in token_ids if len(ids) >= block_size]
    # starts_before[s]: starts in the sources before s; a draw below starts_before[s + 1] falls into source s or before
    starts_before = np.cumsum([0] + [len(ids) - block_size + 1 for ids in fitting])
    count = sum(map(len, token_ids)) // block_size
    drawn = np.random.default_rng(seed).integers(starts_before[-1], size=count)
    slabs = (
        _gathered(fitting, starts_before, drawn[at : at + SLAB_WINDOWS], block_size)
        for at in range(0, count, SLAB_WINDOWS)
    )
    return _write_windows(slabs, block_size, count, path)


def cached_windows(
    token_ids: Sequence[np.ndarray], made_by: Sequence[Any], make: Callable[[Path | None], Dataset]
) -> Dataset:
    """The windows of texts: in memory for tokens in memory, else in an Arrow file.

    Args:
        token_ids: What `tokenizing.token_ids_of` returned.
        made_by: What else the windows depend on, as JSON: how they are cut, block size, stride or seed.
        make: Makes them, into the file that it is given.
    """
    if not any(isinstance(ids, np.memmap) for ids in token_ids):
        return make(None)
    files = sorted({Path(ids.filename).name for ids in token_ids})  # a file's name says what is in it
    entry = cached_by_content(
        "windows", ".arrow", {"tokens": files, "made_by": list(made_by)}, lambda path: {"windows": len(make(path))}
    )
    return Dataset.from_file(str(entry.path))


def _slabs(ids: np.ndarray, block_size: int, stride: int) -> Iterator[np.ndarray]:
    """The windows of one source, (windows, block_size) int32 at a time."""
    # a view of shape (starts, block_size): overlapping windows share the memory of the ids
    views = np.lib.stride_tricks.sliding_window_view(np.ascontiguousarray(ids, dtype=np.int32), block_size)[::stride]
    for at in range(0, len(views), SLAB_WINDOWS):
        yield views[at : at + SLAB_WINDOWS]
        release_pages(ids)


def _gathered(sources: Sequence[np.ndarray], starts_before: np.ndarray, drawn: np.ndarray, block_size: int):
    """The windows that were drawn, (windows, block_size) int32; a draw counts the starts of all sources in order."""
    rows = np.empty((len(drawn), block_size), dtype=np.int32)
    source = np.searchsorted(starts_before, drawn, side="right") - 1
    for number in np.unique(source):
        mine = source == number
        starts = drawn[mine] - starts_before[number]
        rows[mine] = sources[number][starts[:, None] + np.arange(block_size)]
        release_pages(sources[number])
    return rows


def release_pages(ids: np.ndarray) -> None:
    """Give the pages of a memory map back; they are counted as memory of the process as long as they are mapped."""
    mapped = getattr(ids, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def _nearest_cut(text: str, target: int) -> int:
    """The start of a run of white space nearest to `target`, else a character near it."""
    low = max(0, target - WORD_SEARCH)
    word_ends = [match.start() for match in WORD_END.finditer(text, low, target + WORD_SEARCH)]
    if word_ends:
        return min(word_ends, key=lambda cut: abs(cut - target))
    cut = target
    # no white space near (Chinese, say): not between a letter and its accents, nor inside a family of emoji
    while cut > 1 and (unicodedata.category(text[cut]).startswith("M") or ZERO_WIDTH_JOINER in text[cut - 1 : cut + 1]):
        cut -= 1
    return cut


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


def _write_windows(slabs: Iterator[np.ndarray], block_size: int, total: int, path: Path | None) -> Dataset:
    """Collect slabs of windows, each (windows, block_size) int32, in one dataset, in memory or in an Arrow file.

    In memory, windows that lie side by side are not copied: Arrow takes over the memory of the token ids.
    """
    schema = pa.schema({"input_ids": pa.list_(pa.int32(), block_size)})
    with progress_bar(total, "windows", "windows", delay=1) as bar:
        batches = _record_batches(slabs, schema, bar)
        if path is None:
            table = pa.Table.from_batches(batches, schema)
            # the fingerprint that Dataset computes copies the table several times to hash it, and nothing is cached
            return Dataset(table, fingerprint=generate_random_fingerprint())
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    return Dataset.from_file(str(path))


def _record_batches(slabs: Iterator[np.ndarray], schema: pa.Schema, bar: tqdm) -> Iterator[pa.RecordBatch]:
    for slab in slabs:
        windows = pa.FixedSizeListArray.from_arrays(pa.array(slab.reshape(-1)), slab.shape[1])
        yield pa.record_batch([windows], schema=schema)
        bar.update(len(slab))
