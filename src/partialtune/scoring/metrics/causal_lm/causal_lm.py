"""Next-token metrics of a causal language model: sums and counts, a row a window -> loss, bits per byte, accuracy.

Loaded with `evaluate.load(PATH_OF_THIS_FILE, keep_in_memory=True)`, without a network. It works on sums and counts, so
that windows of any length and batches of any size give the same figures, and no logits are ever stored.
"""

import math

import datasets
import evaluate

_DESCRIPTION = """\
How well a causal language model predicts a text. Every window contributes its nats, the number of tokens that were
scored in it, and how many of them were the model's first choice or among its first five.
"""

_INPUTS = """
Args:
    nats: sum of -ln p(token) over the scored tokens, one number a window.
    tokens: scored tokens, one number a window.
    correct: scored tokens that were the most probable ones, one number a window.
    top5_correct: scored tokens that were among the five most probable ones, one number a window.
    text_tokens: tokens of the whole text (to compute, not to add_batch).
    text_bytes: bytes of the whole text in UTF-8 (to compute, not to add_batch).

Returns:
    loss: nats a token, sum(nats) / sum(tokens).
    perplexity: exp(loss), None if it overflows.
    bits_per_byte: loss / ln 2 * text_tokens / text_bytes; compares across tokenizers and ways to clean a text.
    next_token_accuracy, top5_accuracy: shares of the scored tokens, 0 to 1.
    tokens: scored tokens.
    bytes, text_tokens: as given.
    A value that is not finite is None.
"""


class CausalLM(evaluate.Metric):
    """Metrics of next-token prediction from sums and counts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "nats": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "correct": datasets.Value("int64"),
                    "top5_correct": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nats, tokens, correct, top5_correct, text_tokens: int, text_bytes: int) -> dict:
        count = sum(tokens)
        loss = math.fsum(nats) / count  # fsum rounds once: the order of the windows does not show
        return {
            "loss": _finite(loss),
            "perplexity": _exponential(loss),
            "bits_per_byte": _finite(loss / math.log(2) * text_tokens / text_bytes),
            "next_token_accuracy": sum(correct) / count,
            "top5_accuracy": sum(top5_correct) / count,
            "tokens": count,
            "bytes": text_bytes,
            "text_tokens": text_tokens,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exponential(loss: float) -> float | None:
    try:
        return _finite(math.exp(loss))
    except OverflowError:
        return None
