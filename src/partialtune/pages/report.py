"""A run's folder -> report.html: one self-contained page, what the run did and whether to trust it.

Of a run that is not finished it shows what there is: how far it has come, losses, samples, what trains. While the run
goes on, the page says so and loads itself again.
"""

import os
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from partialtune.files import write_whole
from partialtune.pages.figures import KINDS, Figure, describe_figures, render_figure
from partialtune.pages.findings import (
    audit_problems,
    new_tokens_words,
    quantized_words,
    score_changes,
    text_label,
    trained_share,
    verdict,
)
from partialtune.pages.html import data_uri, html_environment, style_and_script, yaml_words
from partialtune.pages.loading_snippet import loading_snippet, prompt_of
from partialtune.pages.report_tables import (
    group_rows,
    parameter_row,
    performance_rows,
    provenance_rows,
    rank_rows,
    rank_words,
    sample_history,
    sampling_words,
    shift_section,
    token_sections,
)
from partialtune.pages.run_files import RunFiles, read_run
from partialtune.pages.step_figures import learning_curves
from partialtune.words import counted, joined

MOST_LINES = 3
REPORT_FILE = "report.html"
REFRESH_SECONDS = 30
REFRESHING = b'<meta http-equiv="refresh"'


def write_report(run: str | os.PathLike, training: bool = False) -> Path:
    """Write `report.html` into the folder of a run, finished or not.

    The page asks nothing of the network: styles, script and images are in it, and its content security policy allows
    no other script than its own.

    Args:
        run: The run's folder.
        training: Whether the run goes on.

    Returns:
        Path of the page.

    Raises:
        InputError: If the folder holds no run, or a file of it cannot be parsed.
        OSError: If the page cannot be written. What was there stays.
    """
    files = read_run(run, ended=False, training=training)
    page = files.folder / REPORT_FILE
    write_whole(page, render_report(files).encode(errors="replace"))  # a token may hold half a surrogate pair
    return page


def reloads_itself(folder: Path) -> bool:
    """Whether the page in a run's folder is that of a run which goes on."""
    try:
        with (folder / REPORT_FILE).open("rb") as page:
            return REFRESHING in page.read(2000)
    except OSError:
        return False


def render_report(run: RunFiles) -> str:
    """The page as text."""
    environment, now = html_environment(), datetime.now(UTC)
    return environment.get_template("report.html.j2").render(
        run=run,
        passed=run.audit["passed"],
        written=f"{now:%d %B %Y, %H:%M:%S} UTC".lstrip("0"),
        written_at=int(now.timestamp()),
        refresh=REFRESH_SECONDS if run.unfinished is not None and run.unfinished.training else None,
        samples=sample_history(run),
        facts=facts_of(run),
        command=(run.performance or {}).get("command"),
        forgets=any(name not in ("validation", "training") for name in run.texts),
        selectors=joined(run.selectors),
        share=trained_share(run),
        of_base=[words for words in (new_tokens_words(run), quantized_words(run)) if words],
        findings=verdict(run),
        problems=audit_problems(run),
        recipe=[(key, yaml_words(value)) for key, value in run.recipe.items()],
        texts=[
            (text_label(name), entry["after"].get("tokens"), score_changes(entry)) for name, entry in run.texts.items()
        ],
        figures=figures_by_section(run),
        sampled=sampled_words(run),
        prompts=sorted(prompts_with_samples(run), key=lambda pair: -(pair[0]["kl"] or 0.0)),  # what changed most first
        sampling=sampling_words(run),
        generate_command=generate_command(run),
        snippet=loading_snippet(run, place_of(run), variable="folder"),
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
    sections["spread"] = []
    left_out, folded = _of_movement(run)
    for figure in describe_figures(run):
        if run.unfinished is not None and figure.section != "learning":  # the others speak of the end
            continue
        if figure.path.name not in left_out:
            section = "spread" if figure.path.name in folded else figure.section
            sections[section].append((figure, image(run, figure), image(run, figure, dark=True)))
    return sections


def _of_movement(run: RunFiles) -> tuple[set[str], set[str]]:
    """Figures that the page leaves out, and those that it folds: what moved is shown once.

    A map says more than lines where more than three of its cells moved; with fewer a line for each says all.
    """
    moved = sum(group.trainable > 0 for group in run.groups())
    if moved > MOST_LINES:
        return set(), {"deltas_over_time.png", "deltas_over_steps.png"}
    return {"deltas_heatmap.png", "deltas_over_time.png"}, set()


def place_of(run: RunFiles) -> str:
    """The run's folder as its recipe names it: the page stays the same wherever a copy of the folder lies."""
    return str(run.recipe.get("output_dir") or run.folder)


def generate_command(run: RunFiles) -> str:
    """The command that lets the run and its base continue a prompt."""
    return shlex.join(["partialtune", "generate", place_of(run), "--prompt", prompt_of(run), "--beside-base"])


def facts_of(run: RunFiles) -> list[str]:
    """When the run began, how long it took, and on what; nothing of runs of earlier versions."""
    known = run.performance or {}
    facts = []
    if known.get("began"):
        facts.append(f"{datetime.fromisoformat(known['began']):%d %B %Y, %H:%M} UTC".lstrip("0"))
    if known.get("run_seconds"):
        facts.append(duration_words(known["run_seconds"]))
    if run.record.get("device"):
        processes = run.record.get("processes", 1)
        facts.append(str(run.record["device"]) + (f", {counted(processes, 'process')}" if processes > 1 else ""))
    return facts


def duration_words(seconds: float) -> str:
    """42 -> 42 s, 100 -> 1 min 40 s, 5000 -> 1 h 23 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
