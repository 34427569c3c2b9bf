"""The table of metrics: how each score of a text is computed, what it is called and which way is better.

All that computes or shows a score reads this table. The evaluation before and after a run (`evaluation.json`), the
report and the model card show every row; the last lines of a run, the card's YAML and comparisons those that the lists
below the table name; `metric_for_best_model` may be a row that is made of the loss.

A new metric is one row of `METRICS`. Where it is made of something that is not summed yet, `WINDOW_SUMS` gets a row
too: what a window contributes, of the scores of its tokens.

    Metric("bits_per_token", "bits per token", "lower", "bits/token", of_loss=lambda loss, *_: loss / math.log(2))
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from partialtune.words import UNKNOWN, change, significant

if TYPE_CHECKING:
    from torch import Tensor

Sums = Mapping[str, float]
LARGEST_EXPONENT = 700  # exp of more is no number


class WindowSum(NamedTuple):
    """What each window contributes: numbers of an Arrow type, shape (B,), of the scores of its tokens.

    nats: -ln p of each scored token, shape (B, T - 1).
    hits: `hits[..., k]` says whether the (k + 1)-th most probable token is the right one; bool, shape (B, T - 1, 5), or
        fewer than 5 where the vocabulary is smaller.
    """

    type: str
    of: Callable[["Tensor", "Tensor"], "Tensor"]


# Sums and counts, not means: the mean of the windows' means would be wrong where windows differ in length.
WINDOW_SUMS = {
    "nats": WindowSum("float64", lambda nats, hits: nats.double().sum(1)),  # fp64: on the CPU, since MPS has none
    # ones in the shape of the scored tokens: a sum of bool is int64, on every device
    "tokens": WindowSum("int64", lambda nats, hits: hits.new_ones(hits.shape[:2]).sum(1)),
    "correct": WindowSum("int64", lambda nats, hits: hits[..., 0].sum(1)),
    "top5_correct": WindowSum("int64", lambda nats, hits: hits.any(-1).sum(1)),
}


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        key: Its name in `evaluation.json`, in logs and in recipes.
        label: What people read.
        better: Which way is better.
        unit: Of the value; the change of a `share` is shown in percentage points, of others in percent of what it was.
        of_sums: The value, of the sums over all windows (`WINDOW_SUMS`). May overflow; what is not finite becomes None.
        of_loss: In its place, for a metric that is made of the mean loss: (nats a token, tokens of the whole text, its
            bytes) -> value. Only such a metric can choose the best model: Trainer's evaluations know the loss alone.
        per_byte: It relates to the text's bytes: withheld where the text does not come back from its tokens.
        write: Value -> how it is written; three decimals where it is absent, a percentage for a share.
        decimals: In tables of the terminal.
    """

    key: str
    label: str
    better: Literal["lower", "higher"]
    unit: str
    of_sums: Callable[[Sums], float] | None = None
    of_loss: Callable[[float, float, float], float] | None = None
    per_byte: bool = False
    write: Callable[[float], str] | None = None
    decimals: int = 4

    def value(self, sums: Sums, text_tokens: int, text_bytes: int) -> float | None:
        """Its value for a text; None where that is not finite."""
        try:
            if self.of_loss is not None:
                value = self.of_loss(sums["nats"] / sums["tokens"], text_tokens, text_bytes)
            else:
                value = self.of_sums(sums)
        except OverflowError:
            return None
        return value if math.isfinite(value) else None

    def words(self, value: float | None) -> str:
        """A value in its usual form: 5.385, 218.1, 31.2%."""
        if value is None:
            return UNKNOWN
        if self.write is not None:
            return self.write(value)
        return f"{100 * value:.1f}%" if self.unit == "share" else f"{value:.3f}"

    def change_words(self, before: float | None, after: float | None) -> str:
        """The change of a score: in percent of what it was, or in points for a share."""
        if before is None or after is None:
            return UNKNOWN
        if self.unit == "share":
            return f"{change(100 * (after - before), 1)} points"
        return f"{change(100 * (after / before - 1), 1)}%" if before else UNKNOWN

    def improved(self, before: float | None, after: float | None) -> bool | None:
        """Whether it became better; None where it did not change or is unknown."""
        if before is None or after is None or before == after:
            return None
        return (after > before) == (self.better == "higher")


METRICS = {
    metric.key: metric
    for metric in (
        Metric("loss", "loss (nats/token)", "lower", "nats/token", of_loss=lambda loss, *_: loss),
        Metric(
            "perplexity",
            "perplexity",
            "lower",
            "",
            of_loss=lambda loss, *_: math.exp(loss),
            write=lambda value: significant(value) if value < 1e6 else f"{value:.3g}",
            decimals=2,
        ),
        Metric(  # compares across tokenizers and ways to clean a text, as the others do not
            "bits_per_byte",
            "bits per byte",
            "lower",
            "bits/byte",
            of_loss=lambda loss, tokens, size: loss / math.log(2) * tokens / size,
            per_byte=True,
        ),
        Metric(
            "next_token_accuracy",
            "next-token accuracy",
            "higher",
            "share",
            of_sums=lambda sums: sums["correct"] / sums["tokens"],
        ),
        Metric(
            "top5_accuracy",
            "top-5 accuracy",
            "higher",
            "share",
            of_sums=lambda sums: sums["top5_correct"] / sums["tokens"],
        ),
    )
}
# Where there is no room for all: the last lines that a run prints, and the YAML at the head of its model card.
IN_CLOSING_LINES = ("bits_per_byte", "perplexity")
IN_CARD_METADATA = ("perplexity", "bits_per_byte")
# What the held-out text, learning curves and comparisons are judged by.
HEADLINE = METRICS["bits_per_byte"]
# What can choose the best model.
CHOOSES_BEST = tuple(metric.key for metric in METRICS.values() if metric.of_loss is not None)


def figures(columns: Mapping[str, Sequence[float]], text_tokens: int, text_bytes: int) -> dict[str, Any]:
    """The scores of a text as `evaluation.json` holds them.

    Args:
        columns: Each of `WINDOW_SUMS`, a number a window.
        text_tokens, text_bytes: Of the whole text, what lies outside the windows too.
    """
    # fsum rounds once: the order of the windows, which differs with the number of processes, does not show
    sums = {
        name: (math.fsum if WINDOW_SUMS[name].type == "float64" else sum)(column) for name, column in columns.items()
    }
    values = {key: metric.value(sums, text_tokens, text_bytes) for key, metric in METRICS.items()}
    return {**values, "tokens": sums["tokens"], "bytes": text_bytes, "text_tokens": text_tokens}


def best_model_metric(name: str | None) -> Metric | None:
    """The row that a `metric_for_best_model` names, with or without Trainer's `eval_`; None where it names none."""
    return METRICS.get((name or "").removeprefix("eval_"))


def value_of_loss(metric: Metric, loss: float, tokens_per_byte: float | None) -> float | None:
    """A metric of an evaluation during training, which knows the mean loss alone; None where it needs more."""
    if metric.of_loss is None or (metric.per_byte and not tokens_per_byte):
        return None
    try:
        return metric.of_loss(loss, tokens_per_byte or math.nan, 1)
    except OverflowError:
        return metric.of_loss(LARGEST_EXPONENT, tokens_per_byte or math.nan, 1)  # Trainer compares numbers: no None
