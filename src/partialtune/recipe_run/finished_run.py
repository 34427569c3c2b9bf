"""A finished run's folder -> `FinishedRun`: verdict, scores, distances, figures and model as Python objects.

Everything is read from the run's files, so that a run of last week is the same object as one that has just ended.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from partialtune.metrics import IN_CLOSING_LINES, METRICS, Metric
from partialtune.pages.figures import describe_figures, draw_figure
from partialtune.pages.findings import is_withheld
from partialtune.pages.run_files import DeltaHistory, RunFiles, read_run
from partialtune.proof.audit_result import Audit
from partialtune.run_folder import is_delta
from partialtune.tables import html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class FinishedRun:
    """What a run has found. A notebook shows it as a table of the scores before and after.

    Attributes:
        folder: The run's folder.
        scores: Text -> `before` and `after`, as in `evaluation.json`: `validation` (held out), `training`, eval_texts.
        prompts: Next tokens and continuations of each prompt before and after, as in `evaluation.json`.
        audit: What the freeze audit found; `audit.passed` is the verdict.
        deltas: How far each parameter had moved at every report.
        plan: What trained and what stayed, with the digests of each parameter, as in `freeze_plan.json`.
        files: All that the folder's files hold: recipe, log, performance, insight.
    """

    folder: Path
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    prompts: Sequence[Mapping[str, Any]]
    audit: Audit
    deltas: DeltaHistory
    plan: Mapping[str, Any]
    files: RunFiles = field(repr=False)

    @cached_property
    def figures(self) -> "dict[str, Figure]":
        """The figures of the report by name (`loss`, `deltas_heatmap`, ...), drawn when they are first asked for."""
        return {figure.path.stem: draw_figure(self.files, figure) for figure in describe_figures(self.files)}

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The adapted model, in fp32 and in eval mode, and its tokenizer, read from the folder.

        A delta is put over its base, and LoRA adapters are put into theirs (then it is a `peft.PeftModel`).

        Raises:
            ModelError: If the files, or the base of a delta or of adapters, cannot be read.
        """
        from partialtune.model.loading import load_tokenizer
        from partialtune.rebuild import load

        folder, trusted = str(self.folder), bool(self.files.recipe.get("trust_remote_code"))
        if not self.files.adapts or is_delta(self.folder):
            return load(folder, trust_remote_code=trusted), load_tokenizer(folder, "main", trusted)
        name = self.files.recipe["model_name_or_path"]
        revision = self.files.record.get("base_commit") or self.files.recipe.get("model_revision", "main")
        base = name if revision == "main" else f"{name}@{revision}"
        return load(folder, base, trusted), load_tokenizer(name, revision, trusted)

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.folder)!r}, {self.audit.verdict()})"

    def _repr_html_(self) -> str:
        """Verdict, scores before and after, and folder, for a notebook."""
        title = Markup("<b>{}</b> in {}").format(self.audit.verdict(), self.folder)
        return str(Markup("<div>{}{}</div>").format(title, html_table(score_rows(self.scores))))


def open_run(folder: str | os.PathLike) -> FinishedRun:
    """Open the folder of a run that has ended.

    open_run("outputs/quickstart").scores["validation"]["after"]["bits_per_byte"]

    Raises:
        InputError: If it is no such folder, or a file in it cannot be parsed.
    """
    files = read_run(folder)
    return FinishedRun(
        folder=files.folder,
        scores=files.texts,
        prompts=files.evaluation.get("prompts", []),
        audit=Audit.from_json(files.audit),
        deltas=files.deltas,
        plan=files.plan,
        files=files,
    )


# ---- rows and words that the end of a run in the terminal shares with a notebook -------------------------------------


def score_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """A row for each text, `before -> after` in each column; the titles first.

    Args:
        scores: As in `evaluation.json`, without its prompts.
    """
    metrics = [METRICS[key] for key in IN_CLOSING_LINES]
    rows = [(name, *(_before_after(metric, pair) for metric in metrics)) for name, pair in scores.items()]
    return [("text", *(metric.label for metric in metrics)), *rows]


def _before_after(metric: Metric, pair: Mapping[str, Mapping[str, Any]]) -> str:
    if metric.per_byte and is_withheld(pair):
        return "withheld"
    return " -> ".join(_number(pair[side][metric.key], metric.decimals) for side in ("before", "after"))


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"
