"""A finished run's folder -> README.md: a model card that says what trained, what it brought, how to check it."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment

from partialtune.files import write_whole
from partialtune.metrics import IN_CARD_METADATA, METRICS
from partialtune.model.base_card import STATED
from partialtune.pages.figures import describe_figures
from partialtune.pages.findings import (
    audit_problems,
    length_finding,
    new_tokens_words,
    quantized_words,
    replayed_share,
    score_changes,
    text_label,
    trained_share,
    verdict,
)
from partialtune.pages.html import page_environment
from partialtune.pages.loading_snippet import auto_class, base_is_bundled, loading_snippet, needs_partialtune
from partialtune.pages.run_files import RunFiles, read_run
from partialtune.run_folder import is_delta

UNNAMED = "NAMESPACE/NAME"  # stands for the repository of a run that was not pushed anywhere yet
TAGS = ["partialtune", "partial-fine-tuning", "layer-freezing"]
# What could be inline Markdown, HTML, a table's bar, a formula or a link; underscores and colons inside words are text.
SYNTAX = re.compile(r"[&<>|`*\[\]\\~$#@]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=[wW]{3})\.")


def write_card(run: str | os.PathLike) -> Path:
    """Write `README.md`, a model card, into the folder of a finished run.

    Language and licence are those of the base, where it says what it is: the run recorded them under `run` in
    `recipe.yaml`.

    Args:
        run: The run's folder.

    Returns:
        Path of the card.
    """
    files = read_run(run)
    card = files.folder / "README.md"
    # a token in a continuation may hold half a surrogate pair, which UTF-8 cannot hold
    write_whole(card, str(ModelCard(render_card(files))).encode(errors="replace"))
    return card


def name_repository(run: Path, repo_id: str, revision: str | None = None) -> None:
    """Put the repository into a card, wherever it names none yet or the one of an earlier push. The rest stays.

    Args:
        run: The run's folder.
        repo_id: On the Hub.
        revision: The branch that readers of the card load from, None for `main`.
    """
    card = run / "README.md"
    text = before = card.read_text(encoding="utf-8")
    named = re.search(r'^repository = "([^"]+)"$', text, re.MULTILINE)
    # A name alone, as of a `hub_model_id` without a namespace, may be any word of the card.
    text = re.sub(r'^(repository = ")[^"/]+"$', rf'\1{repo_id}"', text, flags=re.MULTILINE)
    for old in dict.fromkeys([UNNAMED, *([named[1]] if named and "/" in named[1] else [])]):
        text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w/-])", repo_id, text)
    for pattern, beside in (
        (r"(from_pretrained\(repository)(?:, revision=\"[^\"]*\")?", f', revision="{revision}"'),
        (r"(partialtune\.load\(repository)(?: \+ \"@[^\"]*\")?", f' + "@{revision}"'),
        (rf"^(partialtune verify \S+ {re.escape(repo_id)})(?:@\S+)?$", f"@{revision}"),
    ):
        text = re.sub(pattern, rf"\1{beside if revision else ''}", text, flags=re.MULTILINE)
    if text != before:
        write_whole(card, text.encode())


def render_card(run: RunFiles) -> str:
    """The card as text: YAML between dashes, then Markdown."""
    return (
        _environment()
        .get_template("card.md.j2")
        .render(
            metadata=metadata(run).to_yaml(),
            run=run,
            name=model_name(run),
            base=base_model(run),
            repository=repository(run),
            revision=run.recipe.get("hub_revision"),
            verifiable_base=verifiable_base(run),
            share=trained_share(run),
            of_base=[words for words in (new_tokens_words(run), quantized_words(run)) if words],
            is_delta=is_delta(run.folder),
            needs_partialtune=needs_partialtune(run),
            auto_class=auto_class(run),
            snippet=loading_snippet(run, repository(run), run.recipe.get("hub_revision")),
            findings=verdict(run),
            problems=audit_problems(run),
            texts=[(text_label(name), score_changes(entry)) for name, entry in run.texts.items()],
            prompts=run.evaluation.get("prompts", []),
            figures=describe_figures(run),
            sources=run.record.get("sources", []),
            replayed_share=replayed_share(run),
            stopped=length_finding(run),
            versions=run.record.get("versions", {}),
            frozen_values=run.frozen_values,
        )
    )


@cache  # as that of the HTML templates
def _environment() -> Environment:
    """The environment of the card's template: Markdown, in which every value goes through one of the filters."""
    return page_environment(autoescape=False, plain=plain, code=code, cell=cell_code)


def plain(text: Any) -> str:
    """Text that Markdown shows as it is, within a line or a table: syntax becomes entities, line ends are shown.

    plain("a|b <i>") -> a&#124;b &#60;i&#62;
    """
    shown = str(text).replace("\n", " \u21b5 ").strip()
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in shown)
    return SYNTAX.sub(lambda match: f"&#{ord(match.group())};", shown)


def code(text: Any) -> str:
    """Text as a code span: fenced by more backticks than it holds, on one line."""
    shown = " ".join(str(text).split()) or " "
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    gap = " " if shown[0] == "`" or shown[-1] == "`" else ""
    return f"{fence}{gap}{shown}{gap}{fence}"


def cell_code(text: Any) -> str:
    """A code span in a table, where a bar would end the cell."""
    return code(text).replace("|", "\\|")


# --- metadata


def metadata(run: RunFiles) -> ModelCardData:
    """The card's YAML. A base model that is no Hub repository, an unknown language or licence are left out."""
    base = base_model(run)
    results = evaluation_results(run)
    relation = "adapter" if run.adapts else "finetune"
    about_base = {"base_model_relation": relation, "base_model_revision": run.record.get("base_commit")} if base else {}
    return ModelCardData(
        **{key: run.record.get(key) for key in STATED},
        library_name="peft" if run.adapts else "partialtune" if is_delta(run.folder) else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        tags=[*TAGS],
        model_name=model_name(run) if results else None,
        eval_results=results or None,
        **about_base,
    )


def base_model(run: RunFiles) -> str | None:
    """The base's Hub id. A commit of the base is known only where it came from the Hub; a folder has none."""
    name = str(run.recipe.get("model_name_or_path", ""))
    if base_is_bundled(run) or not run.record.get("base_commit") or Path(name).is_dir():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def verifiable_base(run: RunFiles) -> str | None:
    """The base as `partialtune verify` takes it, where others can get at it."""
    name = str(run.recipe.get("model_name_or_path", ""))
    if base_is_bundled(run):
        return name
    return f"{name}@{run.record['base_commit']}" if base_model(run) else None


def repository(run: RunFiles) -> str:
    """Where the run is pushed to, as far as is known."""
    return str(run.recipe.get("hub_model_id") or UNNAMED)


def model_name(run: RunFiles) -> str:
    """The name after the namespace that the run was to be pushed to, else the run's folder."""
    return str(run.recipe.get("hub_model_id") or run.name).rpartition("/")[2]


def evaluation_results(run: RunFiles) -> list[EvalResult]:
    """Perplexity and bits per byte after training. The training text is left out: a model's score on it says little."""
    sources = ", ".join(str(source["name"]) for source in run.record.get("sources", []))
    results = []
    for name, entry in run.texts.items():
        if name == "training":
            continue
        for metric in (METRICS[key] for key in IN_CARD_METADATA):
            if entry["after"].get(metric.key) is not None:
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Text generation",
                        dataset_type="text",
                        dataset_name=dataset_name(name, sources),
                        dataset_config=name,  # results of one type and configuration are taken for one data set
                        metric_type=metric.key,
                        metric_name=metric.label.capitalize(),
                        metric_value=round(float(entry["after"][metric.key]), 6),
                    )
                )
    return results


def dataset_name(name: str, sources: str) -> str:
    return f"held-out end of {sources}" if name == "validation" and sources else text_label(name)
