"""What the report's tables hold and its sentences say: a run's files -> rows of cells and words for the template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from partialtune.pages.findings import replayed_share
from partialtune.pages.html import Cell, cell, yaml_words
from partialtune.pages.insight_figures import matrices, share_of_possible, shift, token_matrices
from partialtune.pages.run_files import RunFiles, frozen_rows_name, runs_in_words
from partialtune.words import change, count, counted, joined, megabytes, percent, significant

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
                cell(group.component),
                cell(group.block),
                cell(group.total, count),
                trainable_cell(group.trainable),
                cell(group.trainable / group.total, percent),
                cell(l2, significant),
                cell(relative, percent),
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
    names = {parameter["name"], frozen_rows_name(parameter)}
    changed = "changed" if names.intersection(run.audit["frozen"]["changed"]) else ""
    rows = parameter.get("rows")
    chosen = (parameter["selector"] or "") + (f", rows {runs_in_words(rows)}" if rows else "")
    return [
        cell(parameter["name"]),
        cell(parameter["component"]),
        cell(parameter["block"]),
        Cell(" × ".join(map(str, parameter["shape"])), parameter["numel"]),
        cell(parameter["numel"], count),
        Cell(chosen or "frozen", chosen, "trained" if trainable else "frozen"),
        cell(l2, significant),
        cell(relative, percent),
        cell(largest, significant),
        cell(digest, kind=f"digest {changed}"),
    ]


def digest_words(parameter: Mapping[str, Any]) -> str:
    """The start of the digest; both where it changed. Where only some rows train, that of the others behind it."""
    words = _digest_pair(parameter["sha256_before"], parameter["sha256_after"])
    if parameter.get("rows") is None:
        return words
    others = (parameter.get("sha256_other_rows_before"), parameter.get("sha256_other_rows_after"))
    return f"{words}; other rows {_digest_pair(*others)}"


def _digest_pair(before: str | None, after: str | None) -> str:
    if not before or not after:
        return "–"
    if before == after:
        return f"= {before[:SHOWN_DIGITS]}"
    return f"≠ {before[:SHOWN_DIGITS]} → {after[:SHOWN_DIGITS]}"


def performance_rows(performance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure with its unit); what was not measured is left out."""
    known: dict[str, tuple[str, Callable[[Any], str]]] = {
        "median_step_seconds": ("Median step", lambda value: f"{significant(value, 3)} s"),
        "tokens_per_second": ("Throughput", lambda value: f"{significant(value, 3)} tokens/s"),
        "peak_memory_mb": ("Peak memory", lambda value: megabytes(value * 2**20)),
        "flops_per_step": ("Arithmetic a step", arithmetic),
        "utilisation": ("Utilisation", percent),
        "time_shares": ("Time by part", time_by_part),
        "callback_share": ("Time of deltas and audit", percent),
        "prefix_cache": ("Frozen prefix cached", str),
        "training_seconds": ("All steps", lambda value: f"{significant(value, 3)} s"),
        "run_seconds": ("Whole run", lambda value: f"{significant(value, 3)} s"),
        "samples_seconds": ("Samples while training", lambda value: f"{significant(value, 3)} s"),
        "page_seconds": ("Pages while training", lambda value: f"{significant(value, 3)} s"),
        "saved_files_check_seconds": ("Reading saved files back", lambda value: f"{significant(value, 3)} s"),
    }
    rows = []
    for key, value in performance.items():
        if key in ("began", "command"):  # stand at the head of the page
            continue
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
    if run.record.get("replay"):
        rows += [
            ("Windows, replayed text", count(run.record["replay"]["windows"])),
            ("Replayed", replayed_share(run)),
        ]
    return rows + [(name, str(version)) for name, version in run.record.get("versions", {}).items()]


# --- insight.json: sampled continuations


def sampling_words(run: RunFiles) -> str | None:
    """How the sampled continuations were drawn; None where there are none."""
    settings = run.insight.get("sampled_continuations")
    if not settings:
        return None
    return f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, seed {settings['seed']}"


# --- samples.jsonl: continuations while it trained

MOST_SAMPLES = 5  # rows of a prompt: with the other prompts folded they fill a telephone's screen


def sample_history(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, rows), each row (steps, continuation); a continuation that stays the same is one row.

    Where there are more rows than `MOST_SAMPLES`, these are evenly spaced, the first and the last among them.
    """
    return [(prompt, _spaced(_changes(history))) for prompt, history in run.samples.items()]


def _changes(history: Mapping[int, str]) -> list[tuple[str, str]]:
    stretches: list[tuple[list[int], str]] = []
    for step, text in sorted(history.items()):
        if stretches and stretches[-1][1] == text:
            stretches[-1][0].append(step)
        else:
            stretches.append(([step], text))
    return [(count(steps[0]) + (f" to {count(steps[-1])}" if steps[1:] else ""), text) for steps, text in stretches]


def _spaced(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(rows) <= MOST_SAMPLES:
        return rows
    return [rows[round(at * (len(rows) - 1) / (MOST_SAMPLES - 1))] for at in range(MOST_SAMPLES)]


# --- effective ranks


def rank_rows(run: RunFiles) -> list[list[Cell]]:
    """Rows of the table of effective ranks, one for each trained matrix."""
    rows = []
    for entry in matrices(run):
        share = share_of_possible(entry)
        stack = f"{entry['matrices']} of " if entry["matrices"] > 1 else ""
        rows.append(
            [
                cell(entry["name"]),
                cell(entry["component"]),
                cell(entry["block"]),
                Cell(stack + " × ".join(map(str, entry["shape"])), entry["shape"][0] * entry["shape"][1]),
                cell(entry["effective_rank"], significant),
                cell(share, percent, bar=share),
                cell(entry["stable_rank"], significant),
            ]
        )
    return rows


def rank_words(run: RunFiles) -> str:
    """How long the ranks took, and what was left out."""
    found = run.insight["effective_ranks"]
    words = f"Computed in {significant(found['seconds'], 2)} s from the weights before and after."
    if found["left_out"]:
        left_out = joined(found["left_out"], 160)
        words += f" Left out, since they would have taken too long: {left_out}."
    return words if found["matrices"] else "No matrix trained, and what is no matrix has no rank."


# --- the token embedding


def token_sections(run: RunFiles) -> list[dict[str, Any]]:
    """For each trained matrix with a row a token: `name`, `words`, and `rows` of its table."""
    return [
        {"name": entry["component"], "words": token_words(entry, run.replays), "rows": token_rows(entry)}
        for entry in token_matrices(run)
    ]


def token_words(entry: Mapping[str, Any], replays: bool = False) -> str:
    """What the rows of a matrix did, in a few sentences."""
    tokens, occurring, absent = entry["tokens"], entry["occurring"], entry["moved_absent"]
    text = "the training text or the replayed one" if replays else "the training text"
    words = f"Of {counted(tokens, 'token')} {count(occurring)} occur in {text}; {count(entry['moved'])} moved"
    words += f", {count(absent)} of them without occurring." if absent else ", none without occurring."
    correlation = entry["rank_correlation"]
    if correlation is not None:
        strength = "hardly depends on" if abs(correlation) < 0.2 else "grows with" if correlation > 0 else "falls with"
        value = change(correlation, 2)
        words += f" Among those that occur, movement {strength} how often they do (rank correlation {value})."
    return words


def token_rows(entry: Mapping[str, Any]) -> list[list[Cell]]:
    largest = max((token["relative_delta"] for token in entry["most"]), default=0.0) or 1.0
    return [
        [
            cell(token["token"], kind="token"),
            cell(token["id"]),
            cell(token["count"], count),
            cell(token["relative_delta"], percent, bar=token["relative_delta"] / largest),
            cell(token["l2_delta"], significant),
        ]
        for token in entry["most"]
    ]


# --- the next-token shift


def shift_section(run: RunFiles) -> dict[str, Any] | None:
    """`words`, `places` (title, entries) and `tokens` (title, rows); None where the run has no shift."""
    found = shift(run)
    if not found:
        return None
    words = (
        f"{count(found['positions'])} tokens of {counted(found['windows'], 'window')} of held-out text, evenly spaced: "
        f"{percent(found['rose_share'])} became likelier, and a token's probability changed by "
        f"{change(found['mean_bits'], 2)} bits on average (the bits a token that the loss fell by)."
    )
    places = [("Rose most", found["rose"]), ("Fell most", found["fell"])]
    tokens = [("Gained most", shifted_rows(found["gained"])), ("Lost most", shifted_rows(found["lost"]))]
    return {"words": words, "places": places, "tokens": tokens}


def shifted_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    largest = max((abs(entry["bits"]) for entry in entries), default=0.0) or 1.0
    return [
        [
            cell(entry["token"], kind="token"),
            cell(entry["occurrences"], count),
            cell(entry["before"], percent),
            cell(entry["after"], percent),
            cell(entry["bits"], bits_words, bar=abs(entry["bits"]) / largest),
        ]
        for entry in entries
    ]


def bits_words(bits: float) -> str:
    return change(bits, 1 if abs(bits) < 100 else 0)
