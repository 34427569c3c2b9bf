"""Is it the same run? Everything that decides whether a run may start in a folder, or go on from a checkpoint.

Three things are compared, each with what the present run would begin with:
    the recipe in the output folder      `standing_of`, before anything is loaded
    the checkpoint's optimizer           `check_checkpoint`: the parameters that it holds
    the checkpoint's `origin.json`       `check_origin`: base, texts, windows, what each phase trains

`origin.json` is what a run began with, kept in each of its checkpoints. It also holds what `auto` chose, which a run
that goes on keeps and does not choose again.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from partialtune.engine.checkpoint_files import damage_of, newest_whole_checkpoint, read_with_care
from partialtune.engine.plan_optimizer import saved_groups
from partialtune.engine.prefix_choice import PrefixPhase
from partialtune.errors import InputError, RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.rates import rates_in_words
from partialtune.model.config_keys import differences_between, function_keys
from partialtune.model.digests import digests
from partialtune.model.rows import name_with_rows
from partialtune.net.addresses import SOURCE_KEYS, same_sources
from partialtune.recipe.arguments import ModelArguments, argument_fields, default_of
from partialtune.recipe.early_stopping import implied_by_early_stopping
from partialtune.recipe.key_rules import training_defaults
from partialtune.recipe.recipe import Recipe
from partialtune.run_folder import (
    RECIPE_FILE,
    check_writable,
    has_taken_a_step,
    is_finished,
    is_left_by_a_start,
    read_json,
    recorded_recipe,
)
from partialtune.training.settings import data_seed, windows_a_step
from partialtune.training.training_data import RunData, traits_of_windows

logger = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
WINDOW_SETTINGS = ("text_cleaning", "block_size", "window_stride", "window_sampling", "validation_share")

# Keys that do not make it another run: where it is put, where it goes on from, what is logged and pushed.
FREE_KEYS = (
    *("run", "output_dir", "resume_from_checkpoint", "push_to_hub", "report_to", "run_name", "project"),
    *("disable_tqdm", "include_num_input_tokens_seen"),
)
FREE_PREFIXES = ("logging_", "log_", "hub_", "trackio_")


# ---- the recipe in the output folder ---------------------------------------------------------------------------------


class Standing(Enum):
    """What an output folder means for a run that wants to use it: where it starts, goes on, or has nothing to do."""

    NEW = "absent or empty"
    UNSTARTED = "holds this run, interrupted before its first optimizer step"
    BEGUN = "holds this run, not finished"
    FINISHED = "holds this run, finished"


def standing_of(folder: Path, values: Mapping[str, Any], resume: str | None) -> Standing:
    """Look at an output folder without touching it.

    Args:
        folder: The recipe's `output_dir`.
        values: The recipe, flat.
        resume: The recipe's `resume_from_checkpoint`.

    Raises:
        RecipeError: If it holds anything but this run, or this run without leave to go on, or cannot be written.
    """
    check_writable(folder)
    if not folder.is_dir() or all(is_left_by_a_start(path.name) for path in folder.iterdir()):
        return Standing.NEW
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(
            f"output_dir: {folder} is not empty and holds no run of partialtune. "
            f"Name another folder: --output_dir {folder}-2. Nothing was touched."
        )
    earlier = recorded_recipe(folder)
    different = recipe_differences(earlier, values)
    if different:
        raise RecipeError(
            f"output_dir: {folder} holds a run of another recipe; they differ in {', '.join(different)}. "
            f"Name another folder: --output_dir {folder}-2. Nothing was touched."
        )
    if is_finished(folder) and not _goes_further(earlier, values):
        return Standing.FINISHED
    if "run" in earlier and not has_taken_a_step(folder):  # else a person has put the recipe there
        return Standing.UNSTARTED
    if resume is None:
        raise RecipeError(
            f"output_dir: {folder} holds this run, begun and not finished. Go on with it: "
            f"--resume_from_checkpoint auto; or name another folder: --output_dir {folder}-2. Nothing was touched."
        )
    return Standing.BEGUN


def _goes_further(earlier: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return int(values.get("max_steps", -1)) > int(earlier.get("max_steps", -1))


def recipe_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys in which two recipes are not the same run, in the order of the dataclasses; empty if they are.

    Output folder, logging, pushing, resuming and a larger max_steps in `b` do not count. A key that was not given
    counts as its default.

    Args:
        a: Values of the run that exists, as in `Recipe.values`; its key `run` is ignored.
        b: Values of the run to start.
    """
    old, new = _effective(a), _effective(b)
    differing = [key for key in {**old, **new} if not _is_same(key, old.get(key), new.get(key)) and not _is_free(key)]
    if "max_steps" in differing and new["max_steps"] > old["max_steps"] > 0:
        differing.remove("max_steps")
    return differing


def _is_same(key: str, old: Any, new: Any) -> bool:
    same = old == new and (key != "part_learning_rates" or [*old] == [*new])  # their order counts: the last wins
    return same or (key in SOURCE_KEYS and same_sources(old, new))


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.startswith(FREE_PREFIXES)


def _effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the defaults of every key that was not given, and with what those defaults stand for."""
    defaults = {key: default_of(entry) for key, entry in argument_fields().items()}
    defaults |= training_defaults()
    defaults |= implied_by_early_stopping(values)
    held_out = values.get("validation_share") != 0
    defaults |= {"eval_strategy": "steps" if held_out else "no", "activation_checkpointing": False}
    effective = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    for key, other in (("window_stride", "block_size"), ("data_seed", "seed")):
        effective[key] = effective[other] if effective[key] is None else effective[key]
    if effective["method"] == "full":
        effective["trainable"] = ["all"]
    return {key: value for key, value in effective.items() if value is not MISSING}


# ---- the checkpoint: its files and its optimizer ---------------------------------------------------------------------


def checkpoint_to_resume(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that a recipe's `resume_from_checkpoint` asks for; None for a start from the base.

    Raises:
        InputError: If the one that it names is not whole.
    """
    if resume == "auto":
        return newest_whole_checkpoint(folder)
    if not resume:
        return None
    _check_whole(Path(resume), read=True)
    return Path(resume)


def _check_whole(checkpoint: Path, read: bool) -> None:
    damage = damage_of(checkpoint, read)
    if damage:
        raise InputError(
            f"{checkpoint} is no whole checkpoint of partialtune: {'; '.join(damage[:3])}. "
            f"`--resume_from_checkpoint auto` takes the newest whole one of output_dir."
        )


def check_checkpoint(checkpoint: Path, plan: FreezePlan) -> None:
    """Stop where a run cannot go on from a checkpoint as if it had never stopped. Nothing is loaded.

    Raises:
        InputError: If it is not whole, or its optimizer held other parameters than the plan trains at its step.
    """
    _check_whole(checkpoint, read=False)  # `checkpoint_to_resume` has read it
    with read_with_care(checkpoint):
        step = _checked_state(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))).global_step
    file = checkpoint / OPTIMIZER_NAME
    if not any(checkpoint.glob("optimizer*")):
        raise InputError(f"{checkpoint} holds no optimizer: going on with a fresh one would be another run.")
    if not file.is_file():  # sharded: PyTorch keeps it in a folder of its own, by name
        return
    with read_with_care(checkpoint):
        groups = saved_groups(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        held = {str(name) for group in groups for name in group["params"]}
    trained = {name_with_rows(name, plan.rows.get(name)) for name in plan.phase_at(step - 1).trainable}
    if held != trained:
        both = {"not in the plan": sorted(held - trained), "not in the checkpoint": sorted(trained - held)}
        differences = "; ".join(f"{len(names)} {where}, as {names[0]}" for where, names in both.items() if names)
        raise InputError(
            f"{checkpoint} does not fit: its optimizer holds {len(held)} parameters, and up to step {step} this plan "
            f"trains {len(trained)} ({differences}). Go on with the recipe of that run, or start in a new output_dir."
        )


def _checked_state(state: TrainerState) -> TrainerState:
    """The state, if its fields that a resumed run builds on are of their types."""
    whole = [state.global_step, state.max_steps, state.num_train_epochs, state.save_steps, state.logging_steps]
    if not all(isinstance(number, int | float) and number >= 0 for number in whole):
        raise ValueError(f"{TRAINER_STATE_NAME} holds no numbers of steps")
    history = state.log_history
    if not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
        raise ValueError(f"{TRAINER_STATE_NAME} holds no history")
    return state


# ---- the checkpoint: origin.json -------------------------------------------------------------------------------------


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
    """

    base: BaseOrigin
    text: list[SourceOrigin]
    windows: dict[str, Any]
    phases: list[PhaseOrigin]
    choices: Choices
    rates: dict[str, str] | None = None
    sampling: dict[str, Any] | None = None
    new_tokens: list[dict[str, Any]] | None = None


def origin_of(
    recipe: Recipe,
    *,
    args: TrainingArguments,
    model: nn.Module,
    data: RunData,
    plan: FreezePlan,
    prefix: Sequence[PrefixPhase],
) -> RunOrigin:
    """What a run begins with.

    Args:
        recipe: Of the run.
        args: Trainer's arguments, in which `bf16: auto` is decided.
        model: The base as it was loaded, before the plan is applied.
        data: Texts and windows.
        plan: What trains in which phase.
        prefix: What `prefix_cache: auto` became.
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
    )


def write_origin(folder: Path, origin: RunOrigin | None) -> None:
    """Put `origin.json` into a checkpoint; of a Trainer that was told of no origin an empty one."""
    content = {} if origin is None else {key: value for key, value in asdict(origin).items() if value is not None}
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
