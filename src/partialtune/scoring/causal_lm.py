"""The table of metrics as a metric of the `evaluate` library: sums and counts, a row a window -> scores.

Loaded with `evaluate.load(PATH_OF_THIS_FILE, keep_in_memory=True)`, without a network; the library copies the file and
reads its imports by a pattern, so each stands on a line of its own. It works on sums and counts, so that windows of any
length and batches of any size give the same figures, and no logits are ever stored.
"""

import datasets
import evaluate

from partialtune.metrics import METRICS, WINDOW_SUMS, figures

_DESCRIPTION = """\
How well a causal language model predicts a text. Every window contributes its nats, the number of tokens that were
scored in it, and how many of them were the model's first choice or among its first five.
"""

_INPUTS = f"""
Args:
    {", ".join(WINDOW_SUMS)}: what `partialtune.metrics.WINDOW_SUMS` takes of a window's tokens, one number a window.
    text_tokens: tokens of the whole text (to compute, not to add_batch).
    text_bytes: bytes of the whole text in UTF-8 (to compute, not to add_batch).

Returns:
    {", ".join(METRICS)}: None where a value is not finite.
    tokens: scored tokens.
    bytes, text_tokens: as given.
"""


class CausalLM(evaluate.Metric):
    """Metrics of next-token prediction from sums and counts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value(entry.type) for name, entry in WINDOW_SUMS.items()}),
        )

    def _compute(self, text_tokens: int, text_bytes: int, **columns: list[float]) -> dict:
        return figures(columns, text_tokens, text_bytes)
