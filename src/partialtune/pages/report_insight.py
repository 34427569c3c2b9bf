"""The insight sections of the report: `insight.json` and prompts -> rows and sentences for the template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partialtune.pages.html import Cell
from partialtune.pages.insight_figures import matrices, share_of_possible, shift, token_matrices
from partialtune.pages.run_files import RunFiles
from partialtune.words import change, count, counted, joined, percent, significant


@dataclass(frozen=True)
class NextToken:
    """A row of a prompt's table; `is_new` where the other side's table lacks the token."""

    token: str
    probability: float | None
    width: float  # of the bar, in percent of the table's largest probability
    is_new: bool


def prompt_comparisons(run: RunFiles) -> list[dict[str, Any]]:
    """Every prompt of the run with its sampled continuations, where it has some."""
    entries = run.evaluation.get("prompts", [])
    samples = run.insight.get("sampled_continuations", {}).get("prompts", [])
    samples = samples if len(samples) == len(entries) else [None] * len(entries)
    return [prompt_comparison(entry, sample) for entry, sample in zip(entries, samples, strict=True)]


def sampling_words(run: RunFiles) -> str | None:
    """How the sampled continuations were drawn; None where there are none."""
    settings = run.insight.get("sampled_continuations")
    if not settings:
        return None
    return f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}, seed {settings['seed']}"


def prompt_comparison(entry: Mapping[str, Any], sample: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A prompt before and after, ready for two tables that share one scale."""
    known = [token["probability"] or 0.0 for side in ("before", "after") for token in entry[side]]
    largest = max(known, default=0.0) or 1.0
    ids = {side: {token["id"] for token in entry[side]} for side in ("before", "after")}
    sides = [
        (
            title,
            [
                NextToken(
                    token["token"],
                    token["probability"],
                    100 * (token["probability"] or 0.0) / largest,
                    side == "after" and token["id"] not in ids["before"],
                )
                for token in entry[side]
            ],
            entry[f"continuation_{side}"],
            None if sample is None else sample[side],
        )
        for side, title in (("before", "Before"), ("after", "After"))
    ]
    return {"prompt": entry["prompt"], "kl": entry["kl"], "sides": sides}


# --- effective ranks


def rank_rows(run: RunFiles) -> list[list[Cell]]:
    """Rows of the table of effective ranks, one for each trained matrix."""
    rows = []
    for entry in matrices(run):
        share = share_of_possible(entry)
        stack = f"{entry['matrices']} of " if entry["matrices"] > 1 else ""
        rows.append(
            [
                Cell(entry["name"], entry["name"]),
                Cell(entry["component"], entry["component"]),
                Cell("" if entry["block"] is None else str(entry["block"]), entry["block"]),
                Cell(stack + " × ".join(map(str, entry["shape"])), entry["shape"][0] * entry["shape"][1]),
                Cell(significant(entry["effective_rank"]), entry["effective_rank"]),
                Cell(percent(share), share, bar=share),
                Cell(significant(entry["stable_rank"]), entry["stable_rank"]),
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
        {"name": entry["component"], "words": token_words(entry), "rows": token_rows(entry)}
        for entry in token_matrices(run)
    ]


def token_words(entry: Mapping[str, Any]) -> str:
    """What the rows of a matrix did, in a few sentences."""
    tokens, occurring, absent = entry["tokens"], entry["occurring"], entry["moved_absent"]
    words = (
        f"Of {counted(tokens, 'token')} {count(occurring)} occur in the training text; {count(entry['moved'])} moved"
    )
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
            Cell(token["token"], token["token"], "token"),
            Cell(str(token["id"]), token["id"]),
            Cell(count(token["count"]), token["count"]),
            Cell(percent(token["relative_delta"]), token["relative_delta"], bar=token["relative_delta"] / largest),
            Cell(significant(token["l2_delta"]), token["l2_delta"]),
        ]
        for token in entry["most"]
    ]


# --- the next-token shift


@dataclass(frozen=True)
class Place:
    """A token of held-out text in its context, with its probability before and after in percent of 1."""

    text_before: str
    token: str
    text_after: str
    before: float
    after: float
    where: str


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
    places = [("Rose most", places_of(found["rose"])), ("Fell most", places_of(found["fell"]))]
    tokens = [("Gained most", shifted_rows(found["gained"])), ("Lost most", shifted_rows(found["lost"]))]
    return {"words": words, "places": places, "tokens": tokens}


def places_of(entries: Sequence[Mapping[str, Any]]) -> list[Place]:
    return [
        Place(
            entry["text_before"],
            entry["token"],
            entry["text_after"],
            100 * entry["before"],
            100 * entry["after"],
            f"window {entry['window']}, token {entry['position']}",
        )
        for entry in entries
    ]


def shifted_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    largest = max((abs(entry["bits"]) for entry in entries), default=0.0) or 1.0
    return [
        [
            Cell(entry["token"], entry["token"], "token"),
            Cell(count(entry["occurrences"]), entry["occurrences"]),
            Cell(percent(entry["before"]), entry["before"]),
            Cell(percent(entry["after"]), entry["after"]),
            Cell(
                change(entry["bits"], 1 if abs(entry["bits"]) < 100 else 0),
                entry["bits"],
                bar=abs(entry["bits"]) / largest,
            ),
        ]
        for entry in entries
    ]
