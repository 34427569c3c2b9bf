"""Where a token embedding (or a head of its own) trained: its rows before and after, how often each token occurs.

A row is a token. One that the training text never holds is moved by the head's share alone (it is a wrong answer
everywhere), by weight decay, or not at all.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import CHUNK, named_weights, whole
from partialtune.model.rows import row_numbers
from partialtune.scoring.prompts import decode_after
from partialtune.text.windows import release_pages

SHOWN_TOKENS = 40
COUNTED_AT_ONCE = 1 << 22  # token ids of a memory map
TOKEN_MATRICES = ("embeddings.tokens", "head")


class TokenTexts:
    """Token id -> its text as it stands within a text: `texts[262]` is `" the"` for GPT-2.

    Some decoders strip the space of a text's first token; here every token follows another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._known: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = decode_after(self._anchor, [token_id], self._tokenizer)
        return self._known[token_id]


def token_counts(token_ids: Sequence[np.ndarray]) -> np.ndarray:
    """How often each token occurs.

    token_counts([np.array([0, 2]), np.array([2])]) -> [1, 0, 2]

    Args:
        token_ids: One array a source, shape (n,).

    Returns:
        int64, shape (largest id + 1,).
    """
    counts = np.zeros(0, dtype=np.int64)
    for ids in token_ids:
        for at in range(0, len(ids), COUNTED_AT_ONCE):
            more = np.bincount(ids[at : at + COUNTED_AT_ONCE], minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
            # the map's pages that were read count as memory of this process until they are given back
            release_pages(ids)
    return counts


def row_changes(before: torch.Tensor, now: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """||after - before|| and ||before|| of each row, fp64, shape (rows,). before, now: (rows, width)."""
    changes, norms = [], []
    rows = max(1, CHUNK // before.shape[1])
    for old, new in zip(before.split(rows), now.split(rows), strict=True):
        old = old.double()
        changes.append(torch.linalg.vector_norm(new.cpu().double() - old, dim=1))
        norms.append(torch.linalg.vector_norm(old, dim=1))
    return torch.cat(changes).numpy(), torch.cat(norms).numpy()


def moved_tokens(
    model: nn.Module,
    plan: FreezePlan,
    before: Mapping[str, torch.Tensor],
    counts: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    computes: bool = True,
) -> dict[str, Any]:
    """The tokens whose rows moved most, in each trained matrix that has one row a token.

    Args:
        model: After training.
        plan: The plan that was applied to it.
        before: A copy of what trains of each parameter from before training, by name: `Snapshot.copies`.
        counts: `token_counts` of the training text.
        tokenizer: The model's tokenizer.
        computes: As in `effective_ranks`.

    Returns:
        `matrices`: what `describe_rows` gives and the parameter's `name` and `component` for each; `seconds`.
    """
    started = time.perf_counter()
    parameters = dict(named_weights(model))
    vocabulary = len(tokenizer)
    found = []
    for entry in plan.parameters:
        if not (entry.trainable and entry.component in TOKEN_MATRICES and len(entry.shape) == 2):
            continue
        if entry.shape[0] < vocabulary:  # a projection beside the embedding, an adapter's factor
            continue
        # all processes gather, since a sharded parameter takes them all; one of them computes
        now = whole(parameters[entry.name])
        if computes:
            changes, norms = row_changes(before[entry.name], entry.learning_part(now))
            ids = np.array(row_numbers(entry.rows or ((0, len(now)),)))
            # rows beyond the vocabulary are padding and no token's
            tokens = ids < vocabulary
            if tokens.any():
                rows = describe_rows(changes[tokens], norms[tokens], counts, tokenizer, ids[tokens])
                found.append({"name": entry.name, "component": entry.component, **rows})
    return {"matrices": found, "seconds": round(time.perf_counter() - started, 3)}


def describe_rows(
    changes: np.ndarray,
    norms: np.ndarray,
    counts: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    ids: np.ndarray | None = None,
) -> dict[str, Any]:
    """What the rows of one matrix did.

    Args:
        changes, norms: `row_changes`, shape (tokens,).
        counts: How often each token occurs; ids beyond its end do not.
        tokenizer: For the tokens' texts.
        ids: Of the tokens, ascending, where only some rows trained; all from 0 on where absent.

    Returns:
        `tokens`, `moved` (by any amount) and `occurring` (number of tokens); `moved_absent`, those that moved without
        occurring; `rank_correlation` of count and relative delta over the tokens that occur (Spearman 1904), None where
        one of them is constant; `most`: `[{token, id, count, l2_delta, relative_delta}]`, largest relative delta first;
        `by_count`: quantiles of the relative delta of tokens that occur `from` to `to` times.
    """
    ids = np.arange(len(changes)) if ids is None else ids
    present = np.zeros(len(changes), dtype=np.int64)
    counted = ids < len(counts)
    present[counted] = counts[ids[counted]]
    known = (norms > 0) & np.isfinite(changes) & np.isfinite(norms)
    relative = np.divide(changes, norms, out=np.zeros_like(changes), where=known)
    texts = TokenTexts(tokenizer)
    most = [index for index in np.argsort(-relative, kind="stable")[:SHOWN_TOKENS].tolist() if relative[index] > 0]
    occurring = known & (present > 0)
    return {
        "tokens": len(changes),
        "moved": int((changes != 0).sum()),
        "occurring": int((present > 0).sum()),
        "moved_absent": int(((changes != 0) & (present == 0)).sum()),
        "rank_correlation": rank_correlation(present[occurring], relative[occurring]),
        "most": [
            {
                "token": texts[int(ids[index])],
                "id": int(ids[index]),
                "count": int(present[index]),
                "l2_delta": float(changes[index]),
                "relative_delta": float(relative[index]),
            }
            for index in most
        ],
        "by_count": quantiles_by_count(present[known], relative[known]),
    }


def quantiles_by_count(counts: np.ndarray, relative: np.ndarray) -> list[dict[str, Any]]:
    """Quantiles of the relative delta of tokens that occur 0, 1, 2 to 3, 4 to 7, ... times."""
    bins = np.ceil(np.log2(counts + 1)).astype(int)  # 0 -> 0, 1 -> 1, 2..3 -> 2, 4..7 -> 3
    rows = []
    for number in np.unique(bins).tolist():
        values = relative[bins == number]
        low, middle, high = (float(quantile) for quantile in np.quantile(values, [0.1, 0.5, 0.9]))
        ends = {"from": 2 ** (number - 1), "to": 2**number - 1} if number else {"from": 0, "to": 0}
        rows.append({**ends, "tokens": len(values), "p10": low, "median": middle, "p90": high})
    return rows


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float | None:
    """Spearman's: the correlation of ranks, ties sharing their mean rank. None where it has no value."""
    if len(left) < 2:
        return None
    ranks = [_mean_ranks(values) for values in (left, right)]
    if min(rank.std() for rank in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    # equal values have the ranks ends - sizes + 1 to ends, whose mean lies in the middle
    return (ends - (sizes - 1) / 2)[inverse]
