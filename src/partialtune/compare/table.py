"""Rows of a comparison -> the table in three forms: lines for a terminal, CSV, JSON."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from partialtune.compare.frontier import AXES, frontier_of
from partialtune.compare.results import Outcome, Row, Spread
from partialtune.metrics import HEADLINE
from partialtune.tables import draw_table
from partialtune.words import UNKNOWN, change, count, joined, percent, significant


def with_deviation(spread: Spread | None, decimals: int, sign: bool = False) -> str:
    """1.8498 ± 0.0012; without the second where there was one seed."""
    if spread is None:
        return UNKNOWN
    text = change(spread.mean, decimals) if sign else f"{spread.mean:,.{decimals}f}"
    return text if spread.deviation is None else f"{text} ± {spread.deviation:,.{decimals}f}"


def mean(spread: Spread | None) -> float | None:
    return spread.mean if spread else None


def audit_words(row: Row) -> str:
    """passed, or how many of its runs failed and with which exit code."""
    if not row.failed:
        return "passed"
    codes = joined(sorted({f"exit {outcome.code}" for outcome in row.failed}))
    return f"failed ({codes})" if not row.finished else f"{len(row.failed)} of {len(row.outcomes)} failed ({codes})"


def further_texts(rows: Sequence[Row]) -> list[str]:
    """Names of `eval_texts`."""
    return list(dict.fromkeys(name for row in rows for run in row.finished for name in run.measures.changes))


def comparison_lines(rows: Sequence[Row]) -> str:
    """The table for a terminal, best policy first."""
    texts = further_texts(rows)
    titles = ["policy", "trainable", "of all", "rate", "s/step", "MB", "before", "held-out bits/byte"]
    lines = [[*titles, *(f"{name}, change" for name in texts), "L2 delta", "audit"]]
    for row in by_quality(rows):
        lines.append(
            [
                row.name,
                count(row.trainable),
                percent(row.trainable / row.total),
                f"{row.learning_rate:g}",
                significant(mean(row.spread("step_seconds")), 3),
                count(mean(row.spread("peak_memory_mb"))),
                HEADLINE.words(mean(row.spread("before"))),
                with_deviation(row.spread("after"), 4),
                *(with_deviation(row.change(name), 4, sign=True) for name in texts),
                significant(mean(row.spread("l2_delta")), 3),
                audit_words(row),
            ]
        )
    return draw_table(lines, left=(0, -1))


def by_quality(rows: Sequence[Row]) -> list[Row]:
    """Fewest bits per byte first; what has no score last."""
    return sorted(rows, key=lambda row: (row.spread("after") is None, (row.spread("after") or Spread(0, None)).mean))


def comparison_csv(rows: Sequence[Row]) -> str:
    """One line a policy; numbers in full, nothing where a figure is unknown."""
    texts = further_texts(rows)
    buffer = io.StringIO()
    records = [_record(row, rows, texts) for row in rows]
    writer = csv.DictWriter(buffer, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _record(row: Row, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "policy": row.name,
        "trainable": " ".join(row.selectors),
        "method": row.outcomes[0].values.get("method", "partial"),
        "learning_rate": row.learning_rate,
        "trainable_parameters": row.trainable,
        "total_parameters": row.total,
        "trainable_share": row.trainable / row.total,
        "runs": len(row.outcomes),
        "failed": len(row.failed),
    }
    names = {"step_seconds": "median_step_seconds", "peak_memory_mb": "peak_memory_mb"}
    names |= {"before": "bits_per_byte_before", "after": "bits_per_byte_after"}
    names |= {"l2_delta": "l2_delta", "relative_delta": "relative_delta"}
    for measure, column in names.items():
        record |= _two_columns(column, row.spread(measure))
    for name in texts:
        record |= _two_columns(f"change_{name}", row.change(name))
    return record | {f"frontier_{axis.key}": row.name in frontier_of(rows, axis) for axis in AXES}


def _two_columns(column: str, spread: Spread | None) -> dict[str, float | None]:
    if spread is None:
        return {column: None, f"{column}_sd": None}
    return {column: spread.mean, f"{column}_sd": spread.deviation}


def comparison_json(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    """Everything, run by run."""
    return {
        "policies": [
            {
                **_record(row, rows, further_texts(rows)),
                "trainable": row.selectors,
                "learning_rates_tried": [asdict(trial) for trial in row.trials],
                "runs": [_run_json(outcome) for outcome in row.outcomes],
            }
            for row in rows
        ],
        "notes": list(notes),
    }


def _run_json(outcome: Outcome) -> dict[str, Any]:
    measured = asdict(outcome.measures) if outcome.measures else {}
    ended = {"seed": outcome.seed, "code": outcome.code, "reason": outcome.reason}
    return {"folder": str(outcome.folder), **ended, **measured}
