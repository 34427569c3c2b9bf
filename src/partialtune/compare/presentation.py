"""Rows of a comparison -> how it is shown: lines for a terminal, CSV, JSON, and comparison.html.

The page is self-contained and in the form of a run's report.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from partialtune.compare.frontier import AXES, before_of, frontier_alt, frontier_of
from partialtune.compare.outcomes import Outcome, Row, Spread
from partialtune.metrics import HEADLINE
from partialtune.pages.findings import Finding
from partialtune.pages.html import Cell, cell, data_uri, html_environment, style_and_script, yaml_words
from partialtune.pages.run_files import as_list
from partialtune.tables import draw_table
from partialtune.words import MINUS, UNKNOWN, change, count, counted, joined, percent, significant

NUMBER = "number"
NEARLY = 0.9  # of the best gain: what costs less and gains so much is worth a look
RATE_WORDS = (
    "Each policy ran with the rate in bold. It was chosen without the held-out text: a trial{length}, with the first "
    "seed, trained on the first part of the training text and was scored, in bits per byte, on the rest of it."
)
SHOWN_KEYS = (  # of the recipes, where all runs agree
    *("model_name_or_path", "text", "replay", "eval_texts", "block_size", "window_sampling", "validation_share"),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
)


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


def winner_words(rows: Sequence[Row]) -> str:
    """Which policy did best on the held-out text, and which takes the least time of those that gained nearly as much.

    Empty where no run has scores.
    """
    scored = [row for row in by_quality(rows) if row.spread("after") and row.spread("before")]
    if not scored:
        return ""
    best, after = scored[0], scored[0].spread("after")
    before = mean(best.spread("before"))
    words = f"Best: {best.name}, {HEADLINE.words(before)} -> {with_deviation(after, 4)} bits per byte of held-out text."
    near = [row for row in scored if gain_of(row) >= NEARLY * gain_of(best) and row.spread("step_seconds")]
    if gain_of(best) <= 0 or not near:
        return words
    cheapest = min(near, key=lambda row: mean(row.spread("step_seconds")))
    same = "the same" if cheapest is best else cheapest.name
    seconds = significant(mean(cheapest.spread("step_seconds")), 3)
    return f"{words}\nCheapest with {NEARLY:.0%} of its gain: {same}, {seconds} s a step."


def gain_of(row: Row) -> float:
    """Bits per byte of held-out text that a policy gained, on average over its seeds."""
    return mean(row.spread("before")) - mean(row.spread("after"))


def comparison_lines(rows: Sequence[Row]) -> str:
    """The winner, and the table for a terminal, best policy first."""
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
    table = draw_table(lines, left=(0, -1))
    return f"{words}\n\n{table}" if (words := winner_words(rows)) else table


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


# --- the page


def render_page(title: str, rows: Sequence[Row], notes: Sequence[str], figure: Mapping[str, bytes]) -> str:
    """The page as text.

    Args:
        title: The comparison's name.
        rows: What was compared.
        notes: What a reader should know beside the figures.
        figure: The frontier as PNG, `light` and `dark`.
    """
    environment = html_environment()
    failed = [(row.name, run.seed, run.code, run.reason) for row in rows for run in row.failed]
    texts = further_texts(rows)
    return environment.get_template("comparison.html.j2").render(
        title=title,
        lead=subtitle(rows),
        verdict=verdict_words(rows, len(failed)),
        failed=failed,
        findings=[finding for finding in (best(rows), cheapest(rows), *forgetful(rows, texts)) if finding],
        figure={name: data_uri(png) for name, png in figure.items()} | {"alt": frontier_alt(rows)},
        several_seeds=any(len(row.outcomes) > 1 for row in rows),
        columns=policy_columns(texts),
        rows=[policy_row(row, rows, texts) for row in by_quality(rows)],
        rate_words=rate_words(rows),
        trial_columns=trial_columns(rows),
        trials=[trial_row(row, rates_of(rows)) for row in rows if row.trials],
        run_columns=run_columns(texts),
        runs=[run_row(row.name, outcome, texts) for row in rows for outcome in row.outcomes],
        ground=common_rows(rows),
        notes=notes,
        **style_and_script(environment),
    )


def subtitle(rows: Sequence[Row]) -> str:
    """Base, text, number of policies and seeds in a line."""
    values = rows[0].outcomes[0].values
    seeds = max(len(row.outcomes) for row in rows)
    before = before_of(rows)
    parts = [
        f"{values.get('model_name_or_path')} on {joined(as_list(values.get('text')), 60)}",
        "1 policy" if len(rows) == 1 else f"{len(rows)} policies",
        counted(seeds, "seed"),
        *([f"{HEADLINE.words(before)} bits per byte before training"] if before else []),
    ]
    return " · ".join(parts)


def verdict_words(rows: Sequence[Row], failed: int) -> str:
    """All audits passed, or how many runs failed."""
    runs = sum(len(row.outcomes) for row in rows)
    return f"{failed} of {counted(runs, 'run')} failed" if failed else f"All audits passed, {counted(runs, 'run')}"


def best(rows: Sequence[Row]) -> Finding | None:
    """The policy with the fewest bits per byte."""
    first, before = by_quality(rows)[0], before_of(rows)
    after = first.spread("after")
    if after is None or before is None:
        return None
    value = f"{HEADLINE.words(before)} → {HEADLINE.words(after.mean)}"
    return Finding("good", "Best held-out bits per byte", value, f"{first.name}, {trains(first)}.")


def cheapest(rows: Sequence[Row]) -> Finding | None:
    """The policy that trains fewest parameters among those with at least nine tenths of the best one's gain."""
    before = before_of(rows)
    if before is None:
        return None
    gains = [(row, before - spread.mean) for row in rows if (spread := row.spread("after"))]
    most = max((gain for _, gain in gains), default=0.0)
    if most <= 0:
        return None
    row, gain = min(((row, gain) for row, gain in gains if gain >= 0.9 * most), key=lambda entry: entry[0].trainable)
    detail = f"{row.name}, {trains(row)}: the fewest with 90% of the best gain or more (it has {percent(gain / most)})."
    return Finding("plain", "Least trained for most of it", count(row.trainable), detail)


def forgetful(rows: Sequence[Row], texts: Sequence[str]) -> list[Finding]:
    """For each further text, how far the least and the most forgetful policy changed its bits per byte."""
    findings = []
    for text in texts:
        known = sorted(((spread.mean, row.name) for row in rows if (spread := row.change(text))), key=lambda e: e[0])
        if known:
            (low, least), (high, most) = known[0], known[-1]
            value = f"{change(low)} to {change(high)}"
            detail = f"Change of bits per byte; least {least}, most {most}. Above 0 was forgotten."
            findings.append(Finding("plain", f"Change on {text}", value, detail))
    return findings


def trains(row: Row) -> str:
    return f"{percent(row.trainable / row.total)} of the parameters"


# --- the page's tables


def three_digits(value: float | None) -> str:
    return significant(value, 3)


def four_decimals(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}".replace("-", MINUS)


def policy_columns(texts: Sequence[str]) -> list[tuple[str, str]]:
    numbers = ["Parameters", "Share", "s/step", "MB", "Held-out, after", *(f"Change, {text}" for text in texts)]
    return [
        ("Policy", ""),
        *((title, NUMBER) for title in numbers),
        ("Audit", ""),
        *((title, NUMBER) for title in ("Rate", "L2 delta", "Relative delta")),
        ("Frontier of", ""),
        ("Trains", ""),
    ]


def policy_row(row: Row, rows: Sequence[Row], texts: Sequence[str]) -> list[Cell]:
    """A policy in the table of policies."""
    on = ", ".join(axis.key for axis in AXES if row.name in frontier_of(rows, axis))
    step, memory, l2, relative = (
        mean(row.spread(name)) for name in ("step_seconds", "peak_memory_mb", "l2_delta", "relative_delta")
    )
    return [
        cell(row.name, kind="trained"),
        cell(row.trainable, count),
        cell(row.trainable / row.total, percent),
        cell(step, three_digits),
        cell(memory, count),
        spread_cell(row.spread("after")),
        *(spread_cell(row.change(text), sign=True) for text in texts),
        cell(audit_words(row), kind="changed" if row.failed else ""),
        cell(row.learning_rate, "{:g}".format),
        cell(l2, three_digits),
        cell(relative, percent),
        cell(on),
        cell(trained_words(row)),
    ]


def trained_words(row: Row) -> str:
    method = row.outcomes[0].values.get("method", "partial")
    return joined(row.selectors, 60) if method != "lora" else f"LoRA beside {joined(row.selectors, 50)}"


def spread_cell(spread: Spread | None, sign: bool = False) -> Cell:
    return Cell(with_deviation(spread, 4, sign), mean(spread))


def rates_of(rows: Sequence[Row]) -> list[float]:
    """Learning rates that were tried, ascending."""
    return sorted({trial.learning_rate for row in rows for trial in row.trials})


def rate_words(rows: Sequence[Row]) -> str:
    """How the rates were chosen."""
    lengths = {trial.steps for row in rows for trial in row.trials} - {None}
    return RATE_WORDS.format(length=f" of {count(lengths.pop())} steps" if len(lengths) == 1 else "")


def trial_columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [("Policy", ""), *((f"{rate:g}", NUMBER) for rate in rates_of(rows))]


def trial_row(row: Row, rates: Sequence[float]) -> list[Cell]:
    """A policy's trials; the chosen rate in bold."""
    found = {trial.learning_rate: trial for trial in row.trials}
    cells = []
    for rate in rates:
        trial = found.get(rate)
        text = "" if trial is None else trial.failure or f"{trial.bits_per_byte:.4f}"
        kind = "trained" if rate == row.learning_rate else ""
        cells.append(Cell(text, trial.bits_per_byte if trial else None, kind))
    return [cell(row.name), *cells]


def run_columns(texts: Sequence[str]) -> list[tuple[str, str]]:
    numbers = ["Seed", "s/step", "MB", "Before", "After", *(f"Change, {text}" for text in texts)]
    return [("Policy", ""), *((title, NUMBER) for title in numbers), ("Ended", ""), ("Folder", "")]


def run_row(name: str, outcome: Outcome, texts: Sequence[str]) -> list[Cell]:
    """One run."""
    found = outcome.measures
    figures = [found.before, found.after, *(found.changes.get(text) for text in texts)] if found else []
    figures += [None] * (2 + len(texts) - len(figures))
    step, memory = (found.step_seconds, found.peak_memory_mb) if found else (None, None)
    ended = "well" if found else f"exit {outcome.code}"
    return [
        cell(name),
        cell(outcome.seed),
        cell(step, three_digits),
        cell(memory, count),
        *(cell(figure, four_decimals) for figure in figures),
        cell(ended, kind="" if found else "changed"),
        cell(outcome.folder.name, kind="digest"),
    ]


def common_rows(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What all runs had in common."""
    outcomes = [outcome for row in rows for outcome in row.outcomes]
    first = outcomes[0].values
    shared = [
        (key.replace("_", " ").capitalize(), yaml_words(first[key]))
        for key in SHOWN_KEYS
        if key in first and all(outcome.values.get(key) == first[key] for outcome in outcomes)
    ]
    facts = next((outcome.facts for outcome in outcomes if outcome.facts["windows"]), outcomes[0].facts)
    windows = [(f"Windows, {name.replace('_', ' ')}", count(n)) for name, n in (facts["windows"] or {}).items()]
    digests = [(f"sha256 of text {number}", digest) for number, digest in enumerate(facts["sources"], 1)]
    seeds = sorted({outcome.seed for outcome in outcomes})
    return [*shared, ("Seeds", ", ".join(map(str, seeds))), *windows, *digests]
