"""Rows of a comparison -> comparison.html: one self-contained page in the form of a run's report."""

from collections.abc import Mapping, Sequence

from partialtune.compare.frontier import AXES, before_of, frontier_alt, frontier_of
from partialtune.compare.results import Outcome, Row, Spread
from partialtune.compare.table import audit_words, by_quality, further_texts, mean, with_deviation
from partialtune.metrics import HEADLINE
from partialtune.pages.findings import Finding
from partialtune.pages.html import Cell, data_uri, html_environment, style_and_script, yaml_words
from partialtune.pages.run_files import as_list
from partialtune.words import change, count, counted, joined, percent, significant

NUMBER = "number"
RATE_WORDS = (
    "Each policy ran with the rate in bold. It was chosen without the held-out text: a trial{length}, with the first "
    "seed, trained on the first part of the training text and was scored, in bits per byte, on the rest of it."
)
GROUND_KEYS = ("model_name_or_path", "text", "eval_texts", "block_size", "window_sampling", "validation_share")
LENGTH_KEYS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


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
        ground=ground_rows(rows),
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


# --- tables


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
        Cell(row.name, row.name, "trained"),
        Cell(count(row.trainable), row.trainable),
        Cell(percent(row.trainable / row.total), row.trainable / row.total),
        Cell(significant(step, 3), step),
        Cell(count(memory), memory),
        spread_cell(row.spread("after")),
        *(spread_cell(row.change(text), sign=True) for text in texts),
        Cell(audit_words(row), audit_words(row), "changed" if row.failed else ""),
        Cell(f"{row.learning_rate:g}", row.learning_rate),
        Cell(significant(l2, 3), l2),
        Cell(percent(relative), relative),
        Cell(on, on),
        Cell(trained_words(row), trained_words(row)),
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
    return [Cell(row.name, row.name), *cells]


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
        Cell(name, name),
        Cell(str(outcome.seed), outcome.seed),
        Cell(significant(step, 3), step),
        Cell(count(memory), memory),
        *(Cell("–" if figure is None else f"{figure:.4f}".replace("-", "−"), figure) for figure in figures),
        Cell(ended, ended, "" if found else "changed"),
        Cell(outcome.folder.name, outcome.folder.name, "digest"),
    ]


def ground_rows(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What all runs had in common."""
    outcomes = [outcome for row in rows for outcome in row.outcomes]
    first = outcomes[0].values
    shared = [
        (key.replace("_", " ").capitalize(), yaml_words(first[key]))
        for key in (*GROUND_KEYS, *LENGTH_KEYS)
        if key in first and all(outcome.values.get(key) == first[key] for outcome in outcomes)
    ]
    facts = next((outcome.facts for outcome in outcomes if outcome.facts["windows"]), outcomes[0].facts)
    windows = [(f"Windows, {name.replace('_', ' ')}", count(n)) for name, n in (facts["windows"] or {}).items()]
    digests = [(f"sha256 of text {number}", digest) for number, digest in enumerate(facts["sources"], 1)]
    seeds = sorted({outcome.seed for outcome in outcomes})
    return [*shared, ("Seeds", ", ".join(map(str, seeds))), *windows, *digests]
