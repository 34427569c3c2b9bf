"""A finished run's folder -> report.html: one self-contained page, what the run did and whether to trust it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialtune.files import write_whole
from partialtune.pages.figures import KINDS, Figure, describe_figures, render_figure
from partialtune.pages.findings import (
    audit_problems,
    new_tokens_words,
    score_changes,
    text_label,
    trained_share,
    verdict,
)
from partialtune.pages.html import data_uri, html_environment, style_and_script, yaml_words
from partialtune.pages.report_tables import (
    group_rows,
    parameter_row,
    performance_rows,
    provenance_rows,
    rank_rows,
    rank_words,
    sampling_words,
    shift_section,
    token_sections,
)
from partialtune.pages.run_files import RunFiles, read_run
from partialtune.pages.step_figures import learning_curves
from partialtune.words import counted, joined


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
    write_whole(page, render_report(files).encode(errors="replace"))  # a token may hold half a surrogate pair
    return page


def render_report(run: RunFiles) -> str:
    """The page as text."""
    environment = html_environment()
    return environment.get_template("report.html.j2").render(
        run=run,
        passed=run.audit["passed"],
        selectors=joined(run.selectors),
        share=trained_share(run),
        new_tokens=new_tokens_words(run),
        findings=verdict(run),
        problems=audit_problems(run),
        recipe=[(key, yaml_words(value)) for key, value in run.recipe.items()],
        texts=[
            (text_label(name), entry["after"].get("tokens"), score_changes(entry)) for name, entry in run.texts.items()
        ],
        figures=figures_by_section(run),
        sampled=sampled_words(run),
        prompts=prompts_with_samples(run),
        sampling=sampling_words(run),
        ranks=rank_rows(run),
        rank_words=rank_words(run) if "effective_ranks" in run.insight else None,
        tokens=token_sections(run),
        shift=shift_section(run),
        groups=group_rows(run),
        parameters=[parameter_row(run, parameter) for parameter in run.plan["parameters"]],
        performance=performance_rows(run.performance),
        provenance=provenance_rows(run),
        sources=run.record.get("sources", []),
        **style_and_script(environment),
    )


def figures_by_section(run: RunFiles) -> dict[str, list[tuple[Figure, str, str]]]:
    """Section of the page -> its figures, each with its image for a light and for a dark background."""
    sections: dict[str, list[tuple[Figure, str, str]]] = {kind.section: [] for kind in KINDS.values()}
    for figure in describe_figures(run):
        images = (image(run, figure), image(run, figure, dark=True))
        sections[figure.section].append((figure, *images))
    return sections


def prompts_with_samples(run: RunFiles) -> list[tuple[Mapping[str, Any], Mapping[str, str] | None]]:
    """Every prompt of the run and its sampled continuations, None where it has none."""
    entries = run.evaluation.get("prompts", [])
    samples = run.insight.get("sampled_continuations", {}).get("prompts", [])
    samples = samples if len(samples) == len(entries) else [None] * len(entries)
    return list(zip(entries, samples, strict=True))


def sampled_words(run: RunFiles) -> str:
    """What the learning curves were scored on, empty where there are none."""
    sampled = [
        f"{text_label(curve.name)} on {counted(curve.sampled, 'window')}, evenly spaced"
        for curve in learning_curves(run)
        if curve.sampled
    ]
    return "; ".join(sampled)


def image(run: RunFiles, figure: Figure, dark: bool = False) -> str:
    """The figure as a data URI."""
    return data_uri(render_figure(run, figure, dark))
