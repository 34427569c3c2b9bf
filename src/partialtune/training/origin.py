"""What a run began with, kept in each of its checkpoints: a run goes on only from a checkpoint of the same run.

`origin.json` holds the base (commit, sha256 by parameter, config), the texts, the windows, how many of them make a
step, what each phase trains, and what `auto` chose, which is kept and not chosen again.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from partialtune.errors import FreezeViolation, InputError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.config_keys import differences_between, function_keys
from partialtune.model.digests import digests
from partialtune.recipe.arguments import ModelArguments, TextArguments
from partialtune.scoring.evaluation import evenly_spaced
from partialtune.text.reading import SourceText
from partialtune.training.checkpoints import read_with_care

logger = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
WINDOWS_COMPARED = 256
WINDOW_SETTINGS = ("text_cleaning", "block_size", "window_stride", "window_sampling", "validation_share")


def origin_of(
    base: ModelArguments,
    model: nn.Module,
    text: TextArguments,
    sources: Sequence[SourceText],
    windows: Dataset,
    plan: FreezePlan,
    data_seed: int,
    windows_a_step: int,
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run begins with, as in `origin.json`.

    Args:
        base, text: The recipe's settings.
        model: The base as it was loaded, before the plan is applied.
        sources: The training texts as they were read.
        windows: Training windows.
        plan: What trains in which phase.
        data_seed: Decides the order of the windows.
        windows_a_step: On all processes together, accumulated ones too.
        choices: Recipe key -> what its `auto` became.
    """
    settings = {key: getattr(text, key) for key in WINDOW_SETTINGS}
    commit = getattr(model.config, "_commit_hash", None)
    config = function_keys(model.config.to_dict())
    return {
        "base": {"name": base.model_name_or_path, "commit": commit, "sha256": digests(model), "config": config},
        "text": [{"name": source.name, "sha256": source.sha256} for source in sources],
        "windows": {**settings, "data_seed": data_seed, "windows a step": windows_a_step, **_sample(windows)},
        "phases": [{"from_step": phase.from_step, "trainable": list(phase.trainable)} for phase in plan.phases],
        "choices": dict(choices),
    }


def _sample(windows: Dataset) -> dict[str, Any]:
    """Their number, and a digest of some of them: another tokenizer or another cleaning shows there."""
    ids = np.asarray(evenly_spaced(windows, WINDOWS_COMPARED).with_format("numpy")["input_ids"][:], dtype="<i4")
    return {"number of windows": len(windows), "tokens": hashlib.sha256(ids.tobytes()).hexdigest()}


def write_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Put `origin.json` into a checkpoint."""
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_origin(checkpoint: Path) -> dict[str, Any]:
    """The `origin.json` of a checkpoint.

    Raises:
        InputError: If it has none that can be read.
    """
    with read_with_care(checkpoint):
        origin = json.loads((checkpoint / ORIGIN_FILE).read_text(encoding="utf-8"))
        return {key: origin[key] for key in ("base", "text", "windows", "phases", "choices")}


def with_choices(said: Mapping[str, Any], begun: Mapping[str, Any] | None) -> dict[str, Any]:
    """Recipe keys with what their `auto` became when the run began, where it goes on."""
    chosen = begun["choices"] if begun else {}
    kept = {key: chosen[key] for key, value in said.items() if value == "auto" and key in chosen}
    for key, value in kept.items():
        logger.info("%s: auto -> %s, as when the run began.", key, str(value).lower())
    return {**said, **kept}


def same_base(base: ModelArguments, begun: Mapping[str, Any] | None) -> ModelArguments:
    """The base at the commit that the run began with, where it goes on: a branch may have moved on the Hub."""
    then = begun["base"] if begun else {}
    commit = then.get("commit")
    if not commit or then.get("name") != base.model_name_or_path or commit == base.model_revision:
        return base
    logger.info("Base: %s at commit %s, as when the run began.", base.model_name_or_path, commit)
    return replace(base, model_revision=commit)


def check_origin(checkpoint: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Stop where a checkpoint belongs to another run than the one that wants to go on from it.

    Args:
        checkpoint: For the message.
        saved: Its `origin.json`.
        present: `origin_of` the present run.

    Raises:
        InputError: If base, text, windows or trainable parameters differ; names every difference.
    """
    with read_with_care(checkpoint):
        found = [
            *_base_differences(saved["base"], present["base"]),
            *_text_differences(saved["text"], present["text"]),
            *_window_differences(saved["windows"], present["windows"]),
            *_phase_differences(saved["phases"], present["phases"]),
        ]
    if found:
        raise InputError(
            f"{checkpoint} belongs to another run. Go on with what that run began with, or start in a new output_dir "
            f"without resume_from_checkpoint. They differ in\n" + "\n".join(f"  {difference}" for difference in found)
        )


def check_start(origin: Mapping[str, Any], digests_before: Mapping[str, str]) -> None:
    """Make sure that what the audit takes for the start is the base as it was loaded: the "before" scores lie between.

    Some models rescale their weights in place when they are evaluated (RWKV). The audit would then compare with the
    rescaled ones, and a reload of what is saved would rescale them again.

    Args:
        origin: `origin_of` the run.
        digests_before: sha256 by name of every parameter in the audit's snapshot, an untied head's too.

    Raises:
        FreezeViolation: If a parameter differs, whatever the recipe allows: no later verdict would mean anything.
    """
    loaded = origin["base"]["sha256"]
    changed = [name for name, sha256 in loaded.items() if digests_before.get(name) != sha256]
    if changed:
        raise FreezeViolation(
            f"{len(changed)} of {len(loaded)} parameters changed between loading and the first step, {changed[0]} "
            f"first: this model changes its own weights when it is evaluated, so that what would be saved is not what "
            f"is scored. It cannot be trained here. Take a setting of its config that switches this off."
        )


def _base_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    differing = [name for name, sha256 in now["sha256"].items() if then["sha256"].get(name) != sha256]
    if differing:
        bases = [f"{base['name']}{' at ' * bool(base['commit'])}{base['commit'] or ''}" for base in (then, now)]
        share = f"{len(differing)} of {len(now['sha256'])} parameters, {differing[0]} first"
        yield f"base: {share} ({bases[0]} then, {bases[1]} now)"
    configs = [base.get("config", {}) for base in (then, now)]  # checkpoints from before it was kept have none
    known = configs[0].keys() & configs[1].keys()  # another version of transformers knows other keys
    changes = differences_between(*({key: config[key] for key in known} for config in configs))
    if changes:
        yield f"base: its config.json, {', '.join(changes)}"


def _text_differences(then: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    if len(then) != len(now):
        yield f"text: {len(then)} sources then, {len(now)} now"
        return
    for old, new in zip(then, now, strict=True):
        if old["sha256"] != new["sha256"]:
            yield f"text: {new['name']} has another content than {old['name']} had (sha256)"


def _window_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key, value in now.items():
        if key == "tokens":
            if then.get(key) != value:
                yield "windows: their tokens (another tokenizer, text or version of partialtune)"
        elif then.get(key) != value:
            yield f"{key}: {then.get(key)} then, {value} now"


def _phase_differences(then: Sequence[Any], now: Sequence[Any]) -> Iterator[str]:
    steps = [[phase["from_step"] for phase in phases] for phases in (then, now)]
    if steps[0] != steps[1]:
        yield f"schedule: phases from step {steps[0]} then, {steps[1]} now"
        return
    for old, new in zip(then, now, strict=True):
        for names, when in (
            (set(old["trainable"]) - set(new["trainable"]), "then, not now"),
            (set(new["trainable"]) - set(old["trainable"]), "now, not then"),
        ):
            if names:
                yield f"trainable from step {new['from_step']}: {len(names)} parameters {when}, such as {min(names)}"
