"""Measurements -> a table for the terminal, and JSON."""

from collections.abc import Sequence
from typing import Any

from partialtune.tables import draw_table
from partialtune.training.performance import PARTS

LEAST_STEPS = 3  # counted steps below which nothing is said to be faster than full fine-tuning
HEADINGS = ("", "trains", "s/step", "min–max", "of full", "tokens/s", "peak MB", "of full", "utilisation", *PARTS)


def with_ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements with `of_full`: seconds a step and peak memory as shares of full fine-tuning's, null if unknown
    or where fewer than `LEAST_STEPS` steps were counted.

    `full` gives way to it.
    """
    rows = []
    for result in results:
        full = results[result["full"]]
        measured = "error" not in result and "error" not in full
        measured = measured and min(result["counted_steps"], full["counted_steps"]) >= LEAST_STEPS
        of_full = {
            "time": result["median_step_seconds"] / full["median_step_seconds"] if measured else None,
            "memory": result["peak_memory_mb"] / full["peak_memory_mb"] if measured else None,
        }
        rows.append({**{key: value for key, value in result.items() if key != "full"}, "of_full": of_full})
    return rows


def bench_json(rows: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """`steps`, `torch`, and the measurements: seconds, MB of 2^20 bytes, shares."""
    import torch

    return {"steps": steps, "torch": torch.__version__, "results": list(rows)}


def bench_table(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """One line a variant, and what the figures mean."""
    measured = next(row for row in rows if "error" not in row)
    table = draw_table([HEADINGS, *(_cells(row) for row in rows)])
    on_host = measured["device"].startswith(("cpu", "mps"))
    precisions = " and ".join(dict.fromkeys(row["precision"] for row in rows if "error" not in row))
    counted = min(row["counted_steps"] for row in rows if "error" not in row)
    few = [f"of full: takes {LEAST_STEPS} counted steps or more, here {counted}: --steps {LEAST_STEPS + 1}."]
    return "\n".join(
        [
            table,
            "",
            f"{measured['device']}, {precisions}, median of {max(1, steps - 1)} steps on random weights and tokens.",
            *(few if counted < LEAST_STEPS else []),
            "min–max: seconds of the fastest and the slowest of these steps.",
            f"peak MB: {'of the whole process, libraries too' if on_host else 'of tensors on the GPU'}.",
            "utilisation: matrix products that the policy needs / seconds / rate of products measured here.",
            "data to callbacks: shares of the time of all these steps.",
        ]
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return (f"{row['label']}: {row['error']}", *[""] * (len(HEADINGS) - 1))
    return (
        row["label"],
        _share(row["trainable_parameters"] / row["total_parameters"]),
        f"{row['median_step_seconds']:.3g}",
        f"{row['fastest_step_seconds']:.3g}–{row['slowest_step_seconds']:.3g}",
        _ratio(row, "time"),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_memory_mb']:,.0f}",
        _ratio(row, "memory"),
        _share(row["utilisation"]),
        *(_share(row["time_shares"][part]) for part in PARTS),
    )


def _ratio(row: dict[str, Any], what: str) -> str:
    return "" if row["counted_steps"] < LEAST_STEPS else _share(row["of_full"][what])


def _share(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"
