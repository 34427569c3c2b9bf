"""How well a model predicts a text: model + windows -> loss, perplexity, bits per byte and accuracies (plain floats).

    scored = scored_text([text], [token_ids], block_size=256)
    before = score_text(model, scored, batch_size=16, description="validation before")
    before, nats = score_tokens(model, scored, batch_size=16, description="validation before", watched=64)

The same windows are scored before and after training. Nothing is drawn at random and no mode is left changed, so
scoring does not alter the training that follows.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset

from partialtune.distributed import from_all, rank_and_processes
from partialtune.metrics import METRICS, WINDOW_SUMS
from partialtune.model.held_narrow import unrounded
from partialtune.model.train_mode import evaluating
from partialtune.progress import progress_bar
from partialtune.scoring.fast_scoring import FastScoring, score_by_all_logits
from partialtune.text.windows import chunked_windows

METRIC_FILE = Path(__file__).with_name("causal_lm.py")

T = TypeVar("T")


@dataclass(frozen=True)
class ScoredText:
    """A text as it is scored.

    Attributes:
        windows: Non-overlapping windows with `input_ids`, shape (windows, block_size).
        text_tokens: Tokens of the whole text, those outside the windows too.
        text_bytes: Bytes of the whole text in UTF-8, after cleaning.
        comes_back: Whether its tokens hold the whole text; else there are no bits per byte.
    """

    windows: Dataset
    text_tokens: int
    text_bytes: int
    comes_back: bool = True


def scored_text(
    texts: Sequence[str], token_ids: Sequence[np.ndarray], block_size: int, limit: int | None = None
) -> ScoredText:
    """Prepare texts for `score_text`.

    Args:
        texts: The sources, decoded and cleaned.
        token_ids: Their tokens, one array a source, shape (n,).
        block_size: Tokens per window.
        limit: Score at most so many windows, evenly spaced over all; None scores all.

    Raises:
        TextError: If no source is as long as a window.
    """
    windows = evenly_spaced(chunked_windows(token_ids, block_size, stride=block_size), limit)
    text_bytes = sum(len(text.encode("utf-8", errors="surrogatepass")) for text in texts)
    return ScoredText(windows=windows, text_tokens=sum(map(len, token_ids)), text_bytes=text_bytes)


def evenly_spaced(windows: Dataset, limit: int | None) -> Dataset:
    """At most `limit` windows, from the first to the last at equal distances; all of them with None."""
    if limit is None or len(windows) <= limit:
        return windows
    return windows.select(spaced_indices(len(windows), limit))


def spaced_indices(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers below `count`, from the first to the last at equal distances."""
    return np.linspace(0, count - 1, num=min(limit, count)).round().astype(int)


def score_text(
    model: torch.nn.Module,
    scored: ScoredText,
    batch_size: int,
    description: str | None,
    autocast_dtype: torch.dtype | None = None,
    fast: FastScoring | None = None,
) -> dict[str, float | int | None]:
    """Score every token of every window but the first one, which is context.

    Where torch.distributed runs, process r takes windows r, r + processes, ...; every process returns the figures of
    all windows and must therefore call this function.

    Args:
        model: A causal LM; it is scored in eval mode and gets every module's mode back.
        scored: What to score.
        batch_size: Windows per forward pass; the figures do not depend on it.
        description: Label of the progress bar; None shows none.
        autocast_dtype: Forward pass under autocast to this dtype; None computes in the model's own. Losses are taken
            from fp32 logits and summed in fp64 in either case.
        fast: Scores the batches, where it agrees with the model's own way; None takes that.

    Returns:
        The metrics of `metrics.METRICS`, `tokens` (scored), `bytes` and `text_tokens` (of the whole text). What is not
        finite is None, and so are the bits per byte of a text that does not come back from its tokens.
    """
    return score_windows(model, scored, batch_size, description, autocast_dtype=autocast_dtype, fast=fast).figures


def score_tokens(
    model: torch.nn.Module,
    scored: ScoredText,
    batch_size: int,
    description: str | None,
    watched: int,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[dict[str, float | int | None], np.ndarray]:
    """As `score_text`, and what single tokens scored, at no further cost: `figures` and `nats` of `score_windows`."""
    found = score_windows(model, scored, batch_size, description, watched, autocast_dtype)
    return found.figures, found.nats


class TextScores(NamedTuple):
    """What a text scored.

    Attributes:
        figures: As `score_text` returns them.
        nats: -ln p(token | those before it in its window) of the watched windows, fp32, shape
            (watched, block_size - 1): column t is the window's token t + 1.
        sums: What each window contributes, fp64, shape (windows, `WINDOW_SUMS`).
    """

    figures: dict[str, float | int | None]
    nats: np.ndarray
    sums: np.ndarray


def score_windows(
    model: torch.nn.Module,
    scored: ScoredText,
    batch_size: int,
    description: str | None,
    watched: int = 0,
    autocast_dtype: torch.dtype | None = None,
    fast: FastScoring | None = None,
) -> TextScores:
    """As `score_text`, and what single windows and tokens scored, at no further cost.

    Args:
        watched: Windows of which every token's score is kept: so many, evenly spaced (`spaced_indices`).
        fast: Scores the batches, where it agrees with the model's own way; None takes that.
        Others: As for `score_text`.
    """
    rank, processes = rank_and_processes()
    count = len(scored.windows)
    # Every process runs equally many forward passes, because a sharded model communicates in each of them: who has one
    # window less than the others scores window 0 once more and drops that row.
    mine = list(range(rank, count, processes))
    padded = mine + [0] * (-(-count // processes) - len(mine))
    device = next(model.parameters()).device
    windows = scored.windows.with_format("numpy")
    wanted = spaced_indices(count, watched).tolist()
    kept: dict[int, np.ndarray] = {}
    keep = set(wanted)

    def ids_of(batch: list[int]) -> torch.Tensor:
        return torch.from_numpy(windows[batch]["input_ids"]).to(device)

    rows: list[list[float]] = []
    bar = progress_bar(count, description, "windows", **({} if description else {"disable": True}))
    with ExitStack() as held:
        held.enter_context(bar)
        held.enter_context(evaluating(model))
        held.enter_context(unrounded())
        held.enter_context(torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None))
        own = partial(score_by_all_logits, model)
        score = held.enter_context(fast.active(ids_of(padded[:1]))) if fast is not None and padded else own
        for at in range(0, len(padded), batch_size):
            batch = padded[at : at + batch_size]
            nats, hits = score(ids_of(batch))
            rows += _rows(nats, hits)
            kept |= {index: line.numpy().copy() for index, line in zip(batch, nats, strict=True) if index in keep}
            bar.update(min(len(batch) * processes, count - bar.n))
    shares = from_all(rows[: len(mine)])
    ordered = [shares[at % processes][at // processes] for at in range(count)]
    kept = dict(_gathered(list(kept.items())))
    nats_of_watched = np.array([kept[index] for index in wanted], dtype=np.float32)
    sums = np.array(ordered, dtype=np.float64)
    return TextScores(figures_of(ordered, scored), nats_of_watched, sums)


def _rows(nats: torch.Tensor, hits: torch.Tensor) -> list[list[float]]:
    """One row a window, in the order of `WINDOW_SUMS`. nats: (B, T - 1), hits: (B, T - 1, 5)."""
    columns = [window_sum.of(nats, hits).tolist() for window_sum in WINDOW_SUMS.values()]
    return [list(row) for row in zip(*columns, strict=True)]


def _gathered(rows: list[T]) -> list[T]:
    """The rows of all processes."""
    return [row for share in from_all(rows) for row in share]


def figures_of(rows: Sequence[Sequence[float]], scored: ScoredText) -> dict[str, float | int | None]:
    """The figures of `score_text`, of what windows contributed.

    Args:
        rows: Of all its windows or of some, each in the order of `WINDOW_SUMS`.
        scored: The text.
    """
    found = _metric_of(rows, scored.text_tokens, scored.text_bytes)
    if not scored.comes_back:
        found |= {key: None for key, metric in METRICS.items() if metric.per_byte}
    return found


def _metric_of(rows: Sequence[Sequence[float]], text_tokens: int, text_bytes: int) -> dict[str, float | int | None]:
    # in memory: no Arrow or lock files that two runs on one machine could share
    metric = metric_class()(keep_in_memory=True)
    metric.add_batch(**dict(zip(WINDOW_SUMS, map(list, zip(*rows, strict=True)), strict=True)))
    return metric.compute(text_tokens=text_tokens, text_bytes=text_bytes)


@cache
def metric_class() -> Callable[..., Any]:
    """The class in `METRIC_FILE`, which the library copies and imports under a lock: once a process."""
    import evaluate  # several seconds on its own

    return type(evaluate.load(str(METRIC_FILE), keep_in_memory=True))
