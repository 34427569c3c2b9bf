"""The end of a run in a few lines: how far the weights moved, the verdict, the scores, the folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialtune.pages.wording import is_withheld
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
    lines = [f"{'text':<14}{'bits per byte':>24}{'perplexity':>26}"]
    for name, pair in scores.items():
        bits = f"{_number(pair['before']['bits_per_byte'], 4)} -> {_number(pair['after']['bits_per_byte'], 4)}"
        bits = "withheld" if is_withheld(pair) else bits
        perplexity = f"{_number(pair['before']['perplexity'], 2)} -> {_number(pair['after']['perplexity'], 2)}"
        lines.append(f"{name:<14}{bits:>24}{perplexity:>26}")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"
