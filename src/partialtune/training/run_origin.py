"""What a run begins with, kept as `origin.json` in its checkpoints: base, texts, windows, what each phase trains.

A run that goes on compares it with its own (`check_origin`), and keeps what `auto` chose when it began.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import TrainingArguments

from partialtune.engine.checkpoint_files import read_with_care
from partialtune.engine.prefix_choice import PrefixPhase, without_memory
from partialtune.errors import InputError
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.rates import rates_in_words
from partialtune.model.config_keys import differences_between, function_keys
from partialtune.model.digests import digests
from partialtune.recipe.arguments import ModelArguments
from partialtune.recipe.recipe import Recipe
from partialtune.run_folder import (
    read_json,
)
from partialtune.training.other_processes import Dealing
from partialtune.training.settings import data_seed, windows_a_step
from partialtune.training.training_data import RunData, traits_of_windows

logger = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
WINDOW_SETTINGS = ("text_cleaning", "block_size", "window_stride", "window_sampling", "validation_share")


@dataclass(frozen=True)
class BaseOrigin:
    """The base: its name, the Hub's commit, sha256 by parameter as it was loaded, the keys of its config that count."""

    name: str
    commit: str | None
    sha256: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)  # older checkpoints have none


@dataclass(frozen=True)
class SourceOrigin:
    """A training text as it was read."""

    name: str
    sha256: str


@dataclass(frozen=True)
class PhaseOrigin:
    """What trains from a step on."""

    from_step: int
    trainable: list[str]


@dataclass(frozen=True)
class Choices:
    """What `auto` became; None in older checkpoints, which then choose again."""

    bf16: bool | None = None
    prefix_cache: list[PrefixPhase] | None = None


@dataclass(frozen=True)
class RunOrigin:
    """What a run begins with: the content of `origin.json`.

    Attributes:
        base, text, phases, choices: As in their classes.
        windows: The recipe's settings of windows, their seed, how many make a step on all processes together, how many
            there are, and a digest of some.
        rates: `part_learning_rates` and `layer_decay` in words; None where the recipe has neither.
        sampling: The plan's, where blocks learn in turn.
        new_tokens: What was added to the tokenizer, as in `freeze_plan.json`; None where nothing was.
        dealt: How windows were dealt out when the run began; None where its number of processes has not changed.
    """

    base: BaseOrigin
    text: list[SourceOrigin]
    windows: dict[str, Any]
    phases: list[PhaseOrigin]
    choices: Choices
    rates: dict[str, str] | None = None
    sampling: dict[str, Any] | None = None
    new_tokens: list[dict[str, Any]] | None = None
    dealt: Dealing | None = None


def origin_of(
    recipe: Recipe,
    *,
    args: TrainingArguments,
    model: nn.Module,
    data: RunData,
    plan: FreezePlan,
    prefix: Sequence[PrefixPhase],
    dealt: Dealing | None = None,
) -> RunOrigin:
    """What a run begins with.

    Args:
        recipe: Of the run.
        args: Trainer's arguments, in which `bf16: auto` is decided.
        model: The base as it was loaded, before the plan is applied.
        data: Texts and windows.
        plan: What trains in which phase.
        prefix: What `prefix_cache: auto` became.
        dealt: How the run began, where its number of processes has changed.
    """
    name, config = recipe.model.model_name_or_path, model.config
    return RunOrigin(
        BaseOrigin(name, getattr(config, "_commit_hash", None), digests(model), function_keys(config.to_dict())),
        [SourceOrigin(source.name, source.sha256) for source in data.sources],
        {
            **{key: getattr(recipe.text, key) for key in WINDOW_SETTINGS},
            "data_seed": data_seed(args),
            "windows a step": windows_a_step(args),
            **traits_of_windows(data),
        },
        [PhaseOrigin(phase.from_step, list(phase.trainable)) for phase in plan.phases],
        Choices(args.bf16, list(prefix)),
        rates_in_words(plan) or None,
        None if plan.sampling is None else plan.sampling.to_json(),
        plan.new_tokens.to_json() if plan.new_tokens else None,
        dealt,
    )


def write_origin(folder: Path, origin: RunOrigin | None) -> None:
    """Put `origin.json` into a checkpoint; of a Trainer that was told of no origin an empty one."""
    values = [] if origin is None else asdict(origin, dict_factory=without_memory).items()
    content = {key: value for key, value in values if value is not None}
    (folder / ORIGIN_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_origin(checkpoint: Path) -> RunOrigin:
    """The `origin.json` of a checkpoint.

    Raises:
        InputError: If it has none that can be read.
    """
    with read_with_care(checkpoint):
        try:
            # not validate_json: names of files that are no UTF-8 hold surrogates, which its parser refuses
            return TypeAdapter(RunOrigin).validate_python(read_json(checkpoint / ORIGIN_FILE))
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"]))
            raise ValueError(f"{ORIGIN_FILE}, {place}: {wrong['msg']}") from error


def with_choices(given: Mapping[str, Any], saved: RunOrigin | None) -> dict[str, Any]:
    """Trainer's keys of a recipe with what their `auto` became when the run began, where it goes on."""
    if saved is None or saved.choices.bf16 is None or given.get("bf16") != "auto":
        return dict(given)
    logger.info("bf16: auto -> %s, as when the run began.", str(saved.choices.bf16).lower())
    return {**given, "bf16": saved.choices.bf16}


def at_saved_commit(base: ModelArguments, saved: RunOrigin | None) -> ModelArguments:
    """The base at the commit that the run began with, where it goes on: a branch may have moved on the Hub."""
    commit = saved.base.commit if saved is not None and saved.base.name == base.model_name_or_path else None
    if not commit or commit == base.model_revision:
        return base
    logger.info("Base: %s at commit %s, as when the run began.", base.model_name_or_path, commit)
    return replace(base, model_revision=commit)


def check_origin(checkpoint: Path, saved: RunOrigin, present: RunOrigin) -> None:
    """Stop where a checkpoint belongs to another run than the one that wants to go on from it.

    Args:
        checkpoint: For the message.
        saved: Its `origin.json`.
        present: `origin_of` the present run.

    Raises:
        InputError: If base, text, windows or trainable parameters differ; names every difference.
    """
    found = [
        *_setting_differences({"new_tokens": saved.new_tokens}, {"new_tokens": present.new_tokens}),
        *_base_differences(saved.base, present.base),
        *_text_differences(saved.text, present.text),
        *_setting_differences(saved.windows, present.windows),
        *_phase_differences(saved.phases, present.phases),
        *_setting_differences(saved.rates or {}, dict.fromkeys(saved.rates or {}) | (present.rates or {})),
        *_setting_differences({"block_sampling": saved.sampling}, {"block_sampling": present.sampling}),
    ]
    if found:
        raise InputError(
            f"{checkpoint} belongs to another run. Go on with what that run began with, or start in a new output_dir "
            f"without resume_from_checkpoint. They differ in\n" + "\n".join(f"  {difference}" for difference in found)
        )


def _base_differences(then: BaseOrigin, now: BaseOrigin) -> Iterator[str]:
    differing = [name for name, sha256 in now.sha256.items() if then.sha256.get(name) != sha256]
    if differing:
        bases = [base.name + (f" at {base.commit}" if base.commit else "") for base in (then, now)]
        share = f"{len(differing)} of {len(now.sha256)} parameters, {differing[0]} first"
        yield f"base: {share} ({bases[0]} then, {bases[1]} now)"
    known = then.config.keys() & now.config.keys()  # another version of transformers knows other keys
    changes = differences_between(*({key: base.config[key] for key in known} for base in (then, now)))
    if changes:
        yield f"base: its config.json, {', '.join(changes)}"


def _text_differences(then: Sequence[SourceOrigin], now: Sequence[SourceOrigin]) -> Iterator[str]:
    if len(then) != len(now):
        yield f"text: {len(then)} sources then, {len(now)} now"
        return
    for old, new in zip(then, now, strict=True):
        if old.sha256 != new.sha256:
            yield f"text: {new.name} has another content than {old.name} had (sha256)"


def _setting_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    gone = [key for key in then if key.startswith("replay") and key not in now]
    for key, value in {**now, **dict.fromkeys(gone)}.items():
        if key == "tokens":
            if then.get(key) != value:
                yield "windows: their tokens (another tokenizer, text or version of partialtune)"
        elif then.get(key) != value:
            yield f"{key}: {then.get(key)} then, {value} now"


def _phase_differences(then: Sequence[PhaseOrigin], now: Sequence[PhaseOrigin]) -> Iterator[str]:
    steps = [[phase.from_step for phase in phases] for phases in (then, now)]
    if steps[0] != steps[1]:
        yield f"schedule: phases from step {steps[0]} then, {steps[1]} now"
        return
    for old, new in zip(then, now, strict=True):
        for names, when in (
            (set(old.trainable) - set(new.trainable), "then, not now"),
            (set(new.trainable) - set(old.trainable), "now, not then"),
        ):
            if names:
                yield f"trainable from step {new.from_step}: {len(names)} parameters {when}, such as {min(names)}"
