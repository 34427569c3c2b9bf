"""Finished runs -> what is compared: the figures of each run, and those of a policy over its seeds."""

import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from partialtune.compare.learning_rates import RateTrial
from partialtune.compare.run_queue import FAILURES
from partialtune.errors import FreezeViolation, InputError, UploadIncomplete
from partialtune.freeze.adapter_plan import FACTOR
from partialtune.metrics import HEADLINE
from partialtune.net.addresses import sources_without_secrets
from partialtune.pages.run_files import RunFiles, as_list, parsed, plan_of, read_run
from partialtune.recipe.key_rules import training_defaults
from partialtune.run_folder import EXIT_FILE, exit_code_of, read_json
from partialtune.training.resume_check import recipe_differences

SEED = re.compile(r"(?<=.)-seed\d+$")  # endings that a comparison gives to the folders of its runs
RATE_AND_SEED = re.compile(r"(?<=.)-lr[\d.e+-]+-seed\d+$|(?<=.)-seed\d+$")


@dataclass(frozen=True)
class Measures:
    """What one run that ended well measured.

    Attributes:
        step_seconds: Median seconds of an optimizer step.
        peak_memory_mb: Of its process, units of 2^20 bytes.
        before, after: Bits per byte of the held-out text; None where they are not finite.
        changes: Text of `eval_texts` -> change of its bits per byte; above 0 is what was forgotten.
        l2_delta: Distance of the trained parameters from the base, L2.
        relative_delta: The same over their norm before; None where that was 0.
    """

    step_seconds: float | None
    peak_memory_mb: float | None
    before: float | None
    after: float | None
    changes: dict[str, float | None]
    l2_delta: float | None
    relative_delta: float | None


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes:
        folder: Its folder.
        values: Its recipe, flat.
        total_parameters, trainable_parameters: Of its plan.
        facts: `sources` (sha256 of each text), `windows` (training, held out) and `stopped_early`, as it recorded them.
        digests: Parameter of the base -> sha256 before training.
        texts: Scored text -> (bytes, tokens); empty where it failed.
        measures: None where it failed.
        code, reason: Of `exit.json`.
    """

    folder: Path
    values: Mapping[str, Any]
    total_parameters: int
    trainable_parameters: int
    facts: Mapping[str, Any]
    digests: Mapping[str, str]
    texts: Mapping[str, tuple[int, int]]
    measures: Measures | None
    code: int
    reason: str

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", training_defaults()["seed"]))

    @property
    def data_seed(self) -> int:
        """Of the order and the draw of windows: `seed` where the recipe names no other."""
        given = self.values.get("data_seed")
        return self.seed if given is None else int(given)

    @property
    def learning_rate(self) -> float:
        return float(self.values.get("learning_rate", training_defaults()["learning_rate"]))


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, and standard deviation (n - 1) where there are several."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread | None":
        """None where a value is unknown, or there is none."""
        if not values or None in values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A policy in the table: its runs, which differ in their seeds alone.

    Attributes:
        name: What it is called.
        outcomes: Its runs, by seed.
        trials: Learning rates that were tried, ascending; empty where none were.
    """

    name: str
    outcomes: Sequence[Outcome]
    trials: Sequence[RateTrial] = field(default=())

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.measures]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.measures]

    @property
    def learning_rate(self) -> float:
        return self.outcomes[0].learning_rate

    @property
    def trainable(self) -> int:
        return self.outcomes[0].trainable_parameters

    @property
    def total(self) -> int:
        return self.outcomes[0].total_parameters

    @property
    def selectors(self) -> list[str]:
        """What the recipe trains, in its own words."""
        values = self.outcomes[0].values
        words = as_list(values.get("trainable"))
        words += [f"schedule of {len(values['schedule'])}"] if values.get("schedule") else []
        sampling = values.get("block_sampling")
        words += [f"{sampling['blocks']} blocks in turn"] if sampling else []
        words += [f"lora: {selector}" for selector in as_list((values.get("lora") or {}).get("target"))]
        parts = values.get("part_learning_rates") or {}
        rates = [f"{selector} at {rate:g}" for selector, rate in parts.items()]
        rates += [f"layer_decay {values['layer_decay']:g}"] if values.get("layer_decay") else []
        return [*(words or ["all"]), *rates]

    def spread(self, measure: str) -> Spread | None:
        """A field of `Measures` over the runs that ended well."""
        return Spread.of([getattr(outcome.measures, measure) for outcome in self.finished])

    def change(self, text: str) -> Spread | None:
        """Change of a further text's bits per byte."""
        return Spread.of([outcome.measures.changes.get(text) for outcome in self.finished])


def read_outcome(folder: str | os.PathLike, code: int | None = None, reason: str = "") -> Outcome:
    """Read a run that has ended, well or not.

    Args:
        folder: The run's folder.
        code, reason: How its process ended, where that is known; else `exit.json` says it.

    Raises:
        InputError: If it holds no run, the run has not ended, or it held no text out.
    """
    folder = Path(folder)
    missing = [name for name in ("recipe.yaml", "freeze_plan.json") if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is not the folder of a run: it has no {', '.join(missing)}. {_other(folder)}")
    values = dict(parsed(folder / "recipe.yaml", yaml.safe_load))
    record = values.pop("run", None) or {}
    plan = parsed(folder / "freeze_plan.json", plan_of)
    if code is None or code in FAILURES:
        code, reason = ended(folder)
    run = read_run(folder) if code == 0 else None
    if run and not run.audit["passed"]:  # a recipe with allow_failed_audit ends with 0 all the same
        run, code, reason = None, FreezeViolation.exit_code, "the freeze audit failed"
    texts = run.texts if run else {}
    # what a policy replays is its own choice: the others need not have it
    common = {name: pair for name, pair in texts.items() if name != "replay" or not values.get("replay")}
    # adapters are no part of the base: their start is drawn from the seed
    adapts = values.get("method") == "lora" or values.get("lora")
    of_the_base = [entry for entry in plan["parameters"] if not (adapts and FACTOR.fullmatch(entry["name"]))]
    return Outcome(
        folder=folder,
        values=values,
        total_parameters=plan["total_parameters"],
        trainable_parameters=plan["trainable_parameters"],
        facts={
            "sources": [source.get("sha256") for source in record.get("sources", [])],
            "windows": record.get("windows"),
            "stopped_early": record.get("stopped_early"),
        },
        digests={entry["name"]: entry["sha256_before"] for entry in of_the_base},
        texts={name: (pair["before"]["bytes"], pair["before"]["tokens"]) for name, pair in common.items()},
        measures=measures_of(run) if run else None,
        code=code,
        reason=reason,
    )


def failed_early(
    folder: Path, values: Mapping[str, Any], total: int, trainable: int, code: int, reason: str
) -> Outcome:
    """A run that ended before it had written its plan."""
    facts: dict[str, Any] = {"sources": [], "windows": None, "stopped_early": None}
    return Outcome(folder, sources_without_secrets(values), total, trainable, facts, {}, {}, None, code, reason)


def ended(folder: Path) -> tuple[int, str]:
    """(exit code, reason) of a run. A push that did not complete is no failure here.

    Raises:
        InputError: If it has not ended, or in a way that leaves nothing to compare.
    """
    code = exit_code_of(folder)
    if code is None:  # scores that are there may be those of an earlier end, from before it went on
        raise InputError(f"{folder} holds a run that has not ended. Finish it: --resume_from_checkpoint auto.")
    if code in (0, UploadIncomplete.exit_code):
        return 0, ""
    reason = str(read_json(folder / EXIT_FILE).get("reason", ""))
    if code in FAILURES:
        return code, reason
    raise InputError(f"{folder} holds a run that ended with exit code {code} ({reason}). Finish it, or leave it out.")


def measures_of(run: RunFiles) -> Measures:
    """The figures of a run that ended well.

    Raises:
        InputError: If it scored no held-out text.
    """
    held_out = run.texts.get("validation")
    if held_out is None:
        raise InputError(f"{run.folder} held no text out (validation_share 0): there is nothing to compare it by.")
    last = run.deltas.steps[-1] if run.deltas.steps else None
    names = [parameter["name"] for parameter in run.trained]
    further = {name: pair for name, pair in run.texts.items() if name not in ("validation", "training")}
    return Measures(
        step_seconds=run.performance.get("median_step_seconds"),
        peak_memory_mb=run.performance.get("peak_memory_mb"),
        before=held_out["before"][HEADLINE.key],
        after=held_out["after"][HEADLINE.key],
        changes={name: change_of(pair) for name, pair in further.items()},
        l2_delta=run.audit["trainable"]["l2_delta"],
        relative_delta=run.deltas.relative_delta(names, last) if last is not None else None,
    )


def change_of(pair: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Bits per byte after less before."""
    before, after = (pair[side][HEADLINE.key] for side in ("before", "after"))
    return None if before is None or after is None else after - before


def grouped(outcomes: Sequence[Outcome]) -> list[Row]:
    """Runs -> rows, in the order given: runs whose recipes differ in nothing but the seed are one policy."""
    groups: list[list[Outcome]] = []
    for outcome in outcomes:
        # every run of the group, not the first alone: a seed may occur in it once
        group = next((group for group in groups if all(same_policy(run, outcome) for run in group)), None)
        if group is None:
            groups.append([outcome])
        else:
            group.append(outcome)
    names = unique_names([group[0].folder for group in groups])
    return [Row(name, sorted(group, key=lambda run: run.seed)) for name, group in zip(names, groups, strict=True)]


def same_policy(a: Outcome, b: Outcome) -> bool:
    """Whether two runs repeat one recipe with different seeds."""
    different = {*recipe_differences(a.values, b.values), *recipe_differences(b.values, a.values)}
    return a.seed != b.seed and different <= {"seed", "data_seed"}


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Folder names without `-lrRATE-seedN`; with the rate, or folders above, where that tells them apart."""
    names = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, names), default=1) + 1):
        shown = ["/".join(parts[-length:]) for parts in names]
        for ending in (RATE_AND_SEED, SEED):
            # the shortest names that differ: without rate and seed, then with the rate, then with one more folder
            plain = [ending.sub("", name) for name in shown]
            if len(set(plain)) == len(plain):
                return plain
    return shown


def _other(folder: Path) -> str:
    recipes = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    return f"Its recipes are {folder}/*.yaml." if recipes else "Give the output_dir of a run that has ended."
