"""Next-token shift: scores of the tokens of held-out windows before and after -> what became likelier, and where."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from partialtune.insight.moved_tokens import TokenTexts
from partialtune.scoring.prompts import decode_after

WATCHED_WINDOWS = 64
SHOWN_PLACES = 10
SHOWN_TOKENS = 15
PLACES_A_TOKEN = 2  # so that one frequent token does not fill the list
TOKENS_BEFORE, TOKENS_AFTER = 24, 8  # of context
LARGEST_SHIFT = 12.0  # bits; the ends of the histogram hold what lies beyond


def next_token_shift(
    windows: np.ndarray, before: np.ndarray, after: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What training did to the probability of each token that really came next.

    Args:
        windows: Token ids, shape (windows, block_size).
        before, after: nats = -ln p of each token but a window's first, shape (windows, block_size - 1); those that are
            not finite before or after are passed over.
        tokenizer: The model's tokenizer.

    Returns:
        `windows`, `positions`; `rose_share`, the share of positions whose token became likelier; `mean_bits`, by how
        much on average, log2(p after / p before); `histogram` of these bits, `edges` and `counts`, the outer bins
        open; `rose` and `fell`: places `{window, position, token, id, before, after, text_before, text_after}`, by
        difference of probability, at most two a token; `gained` and `lost`: tokens
        `{token, id, occurrences, bits, before, after}` by their share in the change of the loss, `bits` summed over
        their occurrences, `before` and `after` being mean probabilities.
    """
    targets = windows[:, 1:]
    finite = np.isfinite(before) & np.isfinite(after)
    if not finite.any():
        return {"windows": len(windows), "positions": 0}
    # nats to bits; fp64, since the sums over a token's places add thousands of them
    bits = np.where(finite, (before.astype(float) - after) / np.log(2), 0.0)
    # nats are -ln p, so p = exp(-nats): (windows, block_size - 1)
    p_before, p_after = np.exp(-before.astype(float)), np.exp(-after.astype(float))
    difference = np.where(finite, p_after - p_before, 0.0)
    texts = TokenTexts(tokenizer)

    def place(window: int, at: int) -> dict[str, Any]:
        return {
            "window": window,
            "position": at + 1,
            "before": float(p_before[window, at]),
            "after": float(p_after[window, at]),
            **in_context(windows[window].tolist(), at + 1, tokenizer),
        }

    return {
        "windows": len(windows),
        "positions": int(finite.sum()),
        "rose_share": float((bits[finite] > 0).mean()),
        "mean_bits": float(bits[finite].mean()),
        "histogram": histogram(bits[finite]),
        "rose": [place(*at) for at in _foremost(difference, targets)],
        "fell": [place(*at) for at in _foremost(-difference, targets)],
        **by_token(targets[finite], bits[finite], p_before[finite], p_after[finite], texts.__getitem__),
    }


def in_context(ids: list[int], at: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Token number `at` of a window and the text around it."""
    prefix, following = ids[max(0, at - TOKENS_BEFORE) : at], ids[at + 1 : at + 1 + TOKENS_AFTER]
    return {
        "token": decode_after(prefix, [ids[at]], tokenizer),
        "id": ids[at],
        "text_before": tokenizer.decode(prefix, clean_up_tokenization_spaces=False),
        "text_after": decode_after([*prefix, ids[at]], following, tokenizer) if following else "",
    }


def histogram(bits: np.ndarray) -> dict[str, list]:
    """How many positions shifted by how many bits; the first and the last bin hold all beyond them too."""
    edges = np.arange(-LARGEST_SHIFT, LARGEST_SHIFT + 0.5, 0.5)
    counts, _ = np.histogram(np.clip(bits, -LARGEST_SHIFT, LARGEST_SHIFT), edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def by_token(
    targets: np.ndarray, bits: np.ndarray, before: np.ndarray, after: np.ndarray, text: Callable[[int], str]
) -> dict[str, list[dict[str, Any]]]:
    """Tokens that gained and lost most in all their places together. All arrays: (positions,)."""
    # ids: (distinct,) ascending; places: (positions,) index into ids, by which bincount sums to (distinct,)
    ids, places, occurrences = np.unique(targets, return_inverse=True, return_counts=True)
    sums = [np.bincount(places, weights=values) for values in (bits, before, after)]

    def described(at: int) -> dict[str, Any]:
        total, *means = (float(values[at]) for values in sums)
        seen = int(occurrences[at])
        return {
            "token": text(int(ids[at])),
            "id": int(ids[at]),
            "occurrences": seen,
            "bits": total,
            "before": means[0] / seen,
            "after": means[1] / seen,
        }

    order = np.argsort(-sums[0], kind="stable").tolist()
    gained = [described(at) for at in order[:SHOWN_TOKENS] if sums[0][at] > 0]
    lost = [described(at) for at in order[::-1][:SHOWN_TOKENS] if sums[0][at] < 0]
    return {"gained": gained, "lost": lost}


def _foremost(values: np.ndarray, targets: np.ndarray) -> Iterator[tuple[int, int]]:
    """(window, column) of the largest positive values, at most `PLACES_A_TOKEN` of one target."""
    seen: dict[int, int] = {}
    shown = 0
    for flat in np.argsort(-values, axis=None, kind="stable").tolist():
        place = divmod(flat, values.shape[1])
        token = int(targets[place])
        if values[place] <= 0 or shown == SHOWN_PLACES:
            return
        seen[token] = seen.get(token, 0) + 1
        if seen[token] <= PLACES_A_TOKEN:
            shown += 1
            yield place
