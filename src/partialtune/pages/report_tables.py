"""Rows of the report's tables: what trained, every parameter, what it cost, where it comes from."""

from collections.abc import Mapping
from typing import Any

from partialtune.pages.html import Cell
from partialtune.pages.html_text import yaml_words
from partialtune.pages.run_files import RunFiles
from partialtune.words import count, percent, significant

SHOWN_DIGITS = 8  # of a sha256 digest in a table; freeze_plan.json holds them whole


def group_rows(run: RunFiles) -> list[list[Cell]]:
    """Rows of the table of what trained, one for each component and block."""
    step = run.deltas.steps[-1] if run.deltas.steps else None
    rows = []
    for group in run.groups():
        l2 = relative = None
        if step is not None:
            l2, relative = run.deltas.l2_delta(group.names, step), run.deltas.relative_delta(group.names, step)
        rows.append(
            [
                Cell(group.component, group.component),
                Cell("" if group.block is None else str(group.block), group.block),
                Cell(count(group.total), group.total),
                trainable_cell(group.trainable),
                Cell(percent(group.trainable / group.total), group.trainable / group.total),
                Cell(significant(l2), l2),
                Cell(percent(relative), relative),
            ]
        )  # fmt: skip
    return rows


def trainable_cell(values: int) -> Cell:
    return Cell(count(values), values, "trained") if values else Cell("frozen", 0, "frozen")


def parameter_row(run: RunFiles, parameter: Mapping[str, Any]) -> list[Cell]:
    """A row of the table of parameters."""
    line = run.deltas.last.get(parameter["name"], {})
    l2, relative, largest = (line.get(key) for key in ("l2_delta", "relative_delta", "max_abs_delta"))
    trainable = parameter["trainable"]
    digest = digest_words(parameter)
    changed = "changed" if parameter["name"] in run.audit["frozen"]["changed"] else ""
    return [
        Cell(parameter["name"], parameter["name"]),
        Cell(parameter["component"], parameter["component"]),
        Cell("" if parameter["block"] is None else str(parameter["block"]), parameter["block"]),
        Cell(" × ".join(map(str, parameter["shape"])), parameter["numel"]),
        Cell(count(parameter["numel"]), parameter["numel"]),
        Cell(parameter["selector"] or "frozen", parameter["selector"] or "", "trained" if trainable else "frozen"),
        Cell(significant(l2), l2),
        Cell(percent(relative), relative),
        Cell(significant(largest), largest),
        Cell(digest, digest, f"digest {changed}"),
    ]


def digest_words(parameter: Mapping[str, Any]) -> str:
    """The start of the digest; both where it changed."""
    before, after = parameter["sha256_before"], parameter["sha256_after"]
    if not before or not after:
        return "–"
    if before == after:
        return f"= {before[:SHOWN_DIGITS]}"
    return f"≠ {before[:SHOWN_DIGITS]} → {after[:SHOWN_DIGITS]}"


def performance_rows(performance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure with its unit); what was not measured is left out."""
    known = {
        "median_step_seconds": ("Median step", lambda value: f"{significant(value, 3)} s"),
        "tokens_per_second": ("Throughput", lambda value: f"{significant(value, 3)} tokens/s"),
        "peak_memory_mb": ("Peak memory", lambda value: f"{count(value)} MiB"),
        "flops_per_step": ("Arithmetic a step", arithmetic),
        "utilisation": ("Utilisation", percent),
        "time_shares": ("Time by part", time_by_part),
        "callback_share": ("Time of deltas and audit", percent),
        "prefix_cache": ("Frozen prefix cached", str),
        "saved_files_check_seconds": ("Reading saved files back", lambda value: f"{significant(value, 3)} s"),
    }
    rows = []
    for key, value in performance.items():
        label, words = known.get(key, (key.replace("_", " ").capitalize(), other_words))
        if value is not None:
            rows.append((label, words(value)))
    return rows


def arithmetic(flops: float) -> str:
    """2.35e12 -> 2.35 TFLOP."""
    unit, factor = ("TFLOP", 1e12) if flops >= 1e11 else ("GFLOP", 1e9)
    return f"{significant(flops / factor, 3)} {unit}"


def time_by_part(shares: Mapping[str, float]) -> str:
    """{"forward": 0.4, "backward": 0.6} -> forward 40%, backward 60%."""
    return ", ".join(f"{part} {percent(share)}" for part, share in shares.items())


def other_words(value: Any) -> str:
    return significant(value) if isinstance(value, int | float) and not isinstance(value, bool) else yaml_words(value)


def provenance_rows(run: RunFiles) -> list[tuple[str, str]]:
    """(what, value) of the model, how it ran, and versions."""
    known = {"base_commit": "Base commit", "precision": "Precision", "processes": "Processes", "device": "Device"}
    rows = [("Base model", str(run.recipe.get("model_name_or_path", "–")))]
    rows += [(label, str(run.record[key])) for key, label in known.items() if run.record.get(key) is not None]
    windows = run.record.get("windows", {}).items()
    rows += [(f"Windows, {name.replace('_', ' ')}", count(number)) for name, number in windows]
    return rows + [(name, str(version)) for name, version in run.record.get("versions", {}).items()]
