"""A finished run's folder -> report.html: one self-contained page, what the run did and whether to trust it."""

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from partialtune.pages.figures import Figure, describe_figures, render_figure
from partialtune.pages.run_files import RunFiles, read_run
from partialtune.pages.templating import page_environment
from partialtune.pages.wording import (
    audit_problems,
    count,
    joined,
    percent,
    score_changes,
    significant,
    text_label,
    trained_share,
    verdict,
)

SHOWN_DIGITS = 8  # of a sha256 digest in a table; freeze_plan.json holds them whole
WHITE_SPACE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}


def write_report(run: str | os.PathLike) -> Path:
    """Write `report.html` into the folder of a finished run.

    The page asks nothing of the network: styles, script and images are in it, and its content security policy allows
    no other script than its own.

    Args:
        run: The run's folder.

    Returns:
        Path of the page.
    """
    files = read_run(run)
    page = files.folder / "report.html"
    page.write_text(render_report(files), encoding="utf-8", errors="replace")  # a token may hold half a surrogate pair
    return page


def render_report(run: RunFiles) -> str:
    """The page as text."""
    environment = page_environment(
        autoescape=True, visible=visible, percent=percent, count=count, significant=significant
    )
    script = environment.get_template("report.js").render()
    return environment.get_template("report.html.j2").render(
        run=run,
        passed=run.audit["passed"],
        selectors=joined(run.selectors),
        share=trained_share(run),
        findings=verdict(run),
        problems=audit_problems(run),
        recipe=[(key, yaml_words(value)) for key, value in run.recipe.items()],
        texts=[
            (text_label(name), entry["after"].get("tokens"), score_changes(entry)) for name, entry in run.texts.items()
        ],
        figures=[(figure, image(run, figure), image(run, figure, dark=True)) for figure in describe_figures(run)],
        prompts=[prompt_comparison(entry) for entry in run.evaluation.get("prompts", [])],
        groups=group_rows(run),
        parameters=[parameter_row(run, parameter) for parameter in run.plan["parameters"]],
        performance=performance_rows(run.performance),
        provenance=provenance_rows(run),
        sources=run.record.get("sources", []),
        style=Markup(environment.get_template("report.css").render()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def image(run: RunFiles, figure: Figure, dark: bool = False) -> str:
    """The figure as a data URI."""
    return "data:image/png;base64," + base64.b64encode(render_figure(run, figure, dark)).decode()


def visible(text: str) -> Markup:
    """Text of a token with its white space and control characters to be seen, for HTML.

    visible(" the") -> <span class="space">␣</span>the
    """
    parts = []
    for character in text:
        if character in WHITE_SPACE:
            parts.append(Markup('<span class="space">{}</span>').format(WHITE_SPACE[character]))
        elif character.isprintable():
            parts.append(escape(character))
        else:
            parts.append(Markup('<span class="space">{}</span>').format(character.encode("unicode_escape").decode()))
    return Markup("").join(parts) or Markup('<span class="space">(empty)</span>')


def yaml_words(value: Any) -> str:
    """A recipe's value on one line: a list as its entries with commas, anything else as it could stand in a recipe."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(yaml_words, value))
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


@dataclass(frozen=True)
class NextToken:
    """A row of a prompt's table; `is_new` where the other side's table lacks the token."""

    token: str
    probability: float | None
    width: float  # of the bar, in percent of the table's largest probability
    is_new: bool


def prompt_comparison(entry: Mapping[str, Any]) -> dict[str, Any]:
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
        )
        for side, title in (("before", "Before"), ("after", "After"))
    ]
    return {"prompt": entry["prompt"], "kl": entry["kl"], "sides": sides}


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, and what the column sorts by (None comes last)."""

    text: str
    sort: float | str | None
    kind: str = ""


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
        "prefix_cache": ("Frozen prefix cached", str),
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
