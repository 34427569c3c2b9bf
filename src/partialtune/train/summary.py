"""The end of a run in a few lines: how far the weights moved, the verdict, the scores, the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialtune.metrics import IN_CLOSING_LINES, METRICS, Metric
from partialtune.pages.findings import is_withheld
from partialtune.proof.audit_result import Audit


def closing_words(folder: Path, audit: Audit, scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What the terminal shows last.

    Args:
        folder: The run's folder.
        audit: The final audit.
        scores: TEXT -> `before` and `after`, as in `evaluation.json`.
    """
    return "\n".join(
        [
            *_weight_lines(audit),
            "",
            *_score_lines(scores),
            "",
            f"Everything is in {folder}; the page to look at is {folder / 'report.html'}",
        ]
    )


def _weight_lines(audit: Audit) -> list[str]:
    changed = [*dict.fromkeys([*audit.changed, *audit.changed_buffers, *audit.other_names])]
    frozen = "changed: " + ", ".join(changed) if changed else "0.0, every bit kept"
    moved = "unknown" if audit.trainable_l2_delta is None else f"{audit.trainable_l2_delta:.6g}"
    return [
        "Change of the weights, L2 norm",
        f"  frozen     {audit.frozen_parameters:>5} tensors  {frozen}",
        f"  trainable  {audit.trainable_parameters:>5} tensors  {moved}",
        "Verdict: freeze audit passed." if audit.passed else f"Verdict: freeze audit FAILED: {audit.violations()}.",
    ]


def _score_lines(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    columns = [(METRICS[key], 26 if at else 24) for at, key in enumerate(IN_CLOSING_LINES)]
    lines = ["".join([f"{'text':<14}", *(f"{metric.label:>{width}}" for metric, width in columns)])]
    for name, pair in scores.items():
        lines.append(
            "".join([f"{name:<14}", *(f"{_before_after(metric, pair):>{width}}" for metric, width in columns)])
        )
    return lines


def _before_after(metric: Metric, pair: Mapping[str, Mapping[str, Any]]) -> str:
    if metric.per_byte and is_withheld(pair):
        return "withheld"
    return " -> ".join(_number(pair[side][metric.key], metric.decimals) for side in ("before", "after"))


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"
