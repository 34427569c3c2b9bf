"""Is it the same run? Everything that decides whether a run may start in a folder, or go on from a checkpoint.

Three things are compared, each with what the present run would begin with:
    the recipe in the output folder      `standing_of`, before anything is loaded
    the checkpoint's optimizer           `check_checkpoint`: the parameters that it holds
    the checkpoint's `origin.json`       `run_origin.check_origin`: base, texts, windows, what each phase trains
"""

import logging
from collections.abc import Mapping
from dataclasses import MISSING
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from partialtune.distributed import rank_and_processes
from partialtune.engine.checkpoint_files import damage_of, newest_whole_checkpoint, read_with_care
from partialtune.engine.sharded_saves import parameters_of_optimizer
from partialtune.errors import InputError, RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.rows import name_with_rows
from partialtune.net.addresses import SOURCE_KEYS, same_sources
from partialtune.recipe.arguments import argument_fields, default_of
from partialtune.recipe.early_stopping import implied_by_early_stopping
from partialtune.recipe.key_rules import training_defaults
from partialtune.run_folder import (
    RECIPE_FILE,
    check_writable,
    has_taken_a_step,
    is_finished,
    is_left_by_a_start,
    recorded_recipe,
)

logger = logging.getLogger(__name__)


# Keys that do not make it another run: where it is put, where it goes on from, what is logged, shown and pushed.
FREE_KEYS = (
    *("run", "output_dir", "resume_from_checkpoint", "push_to_hub", "report_to", "run_name", "project"),
    *("disable_tqdm", "include_num_input_tokens_seen", "sample_steps"),
)
# Keys that may change with the number of processes, as long as together they give the same windows a step.
DEALING_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
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
    if resume is not None and _may_be_dealt_otherwise(earlier, folder):
        different = [
            key for key in different if key not in DEALING_KEYS
        ]  # `suited_accumulation` keeps what they make up
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


def _may_be_dealt_otherwise(earlier: Mapping[str, Any], folder: Path) -> bool:
    """Whether a run that was begun goes on, or went on already, on another number of processes."""
    record = earlier.get("run")
    if not isinstance(record, dict) or is_finished(folder) or not has_taken_a_step(folder):
        return False
    return "accumulation" in record or record.get("processes") != rank_and_processes()[1]


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
    if not any(checkpoint.glob("optimizer*")):
        raise InputError(f"{checkpoint} holds no optimizer: going on with a fresh one would be another run.")
    with read_with_care(checkpoint):
        held = parameters_of_optimizer(checkpoint)
    if held is None:  # FSDP has gathered them into a file of another name
        return
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
