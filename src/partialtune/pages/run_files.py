"""A run's folder -> RunFiles: its recipe, plan, audit, scores, log, samples and weight deltas as plain data."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from partialtune.errors import InputError
from partialtune.model.rows import count_rows, other_rows_name, rows_in_words
from partialtune.run_folder import SAMPLES_FILE, STATE_FILE, exit_code_of, read_json

OUTER_ORDER = ("embeddings.tokens", "embeddings.positions", "embeddings.other", "final_norm", "head", "other")
NO_VERDICT: Mapping[str, Any] = {
    "passed": None,
    "frozen": {"changed": [], "l2_delta": None},
    "trainable": {"unmoved": [], "below_precision": [], "not_in_optimizer": [], "l2_delta": None},
}
BLOCK_ORDER = ("attention", "mixer", "mlp", "norms", "other")


@dataclass(frozen=True)
class DeltaHistory:
    """How far each parameter had moved from its start, at every report of `weight_deltas.jsonl`.

    Attributes:
        steps: Steps with a report, ascending.
        l2_by_step: step -> name -> L2 norm of the change; None where a frozen parameter changed by an unknown distance.
        norm_before: name -> L2 norm of the parameter before training, l2_delta / relative_delta. Parameters that never
            moved have none, since both are 0.
        last: name -> its line at the last report.
    """

    steps: tuple[int, ...]
    l2_by_step: Mapping[int, Mapping[str, float | None]]
    norm_before: Mapping[str, float]
    last: Mapping[str, Mapping[str, Any]]

    def l2_delta(self, names: Iterable[str], step: int) -> float | None:
        """L2 norm of the change of `names` taken together at `step`; None where one of them is unknown."""
        distances = [self.l2_by_step[step][name] for name in names]
        return None if None in distances else math.hypot(*distances)

    def relative_delta(self, names: Iterable[str], step: int) -> float | None:
        """sqrt(sum of l2_delta^2) / sqrt(sum of norm_before^2) of `names` taken together.

        The norms count the parameters that moved in some report: of those which never did, the files hold no norm.
        Exactly 0 where nothing moved, None where the distance is unknown or every norm before was 0.
        """
        names = list(names)
        distance = self.l2_delta(names, step)
        # hypot: the parameters are parts of one long vector, so squares add up and not lengths
        norm = math.hypot(*(self.norm_before.get(name, 0.0) for name in names))
        if not distance:
            return distance
        return distance / norm if norm else None


@dataclass(frozen=True)
class Group:
    """The parameters of one component in one block, or of one component outside the blocks (`block` None)."""

    block: int | None
    component: str
    parameters: tuple[Mapping[str, Any], ...] = field(repr=False)

    @property
    def label(self) -> str:
        return self.component if self.block is None else f"block {self.block} {self.component}"

    @property
    def names(self) -> list[str]:
        return [parameter["name"] for parameter in self.parameters]

    @property
    def trained_names(self) -> list[str]:
        return [parameter["name"] for parameter in self.parameters if parameter["trainable"]]

    @property
    def total(self) -> int:
        return sum(parameter["numel"] for parameter in self.parameters)

    @property
    def trainable(self) -> int:
        return sum(map(learning, self.parameters))


def learning(parameter: Mapping[str, Any]) -> int:
    """How many values of an entry of `freeze_plan.json` train: those of its rows that do, where only some do."""
    if not parameter["trainable"]:
        return 0
    rows = parameter.get("rows")
    return parameter["numel"] if rows is None else count_rows(rows) * math.prod(parameter["shape"][1:])


def frozen_rows_name(parameter: Mapping[str, Any]) -> str | None:
    """What audits call the frozen rows of an entry of `freeze_plan.json`; None unless only some of its rows train."""
    rows = parameter.get("rows")
    return None if rows is None else other_rows_name(parameter["name"], tuple((start, stop) for start, stop in rows))


def runs_in_words(runs: Sequence[Sequence[int]]) -> str:
    """runs_in_words([[3, 5], [7, 8]]) -> "3:5,7"; eight runs at most."""
    return rows_in_words(tuple((start, stop) for start, stop in runs), 8)


@dataclass(frozen=True)
class Unfinished:
    """How far a run has come that has not taken its last step, or has no verdict yet.

    Attributes:
        step, steps: Optimizer steps taken, and of how many; None where nothing in the folder says it.
        training: Whether it goes on.
        reason: Why it does not, empty where that is not known.
    """

    step: int
    steps: int | None
    training: bool
    reason: str = ""


@dataclass(frozen=True)
class RunFiles:
    """What a run left in its folder. Files that a run may lack are empty here.

    Attributes:
        folder: The run's folder.
        recipe: `recipe.yaml` without its key `run`.
        record: The mapping under `run`: versions, precision, base_commit, sources.
        plan, audit, evaluation, performance, insight: The JSON files of these names, `plan` is `freeze_plan.json`.
        log: `log_history` of `trainer_state.json`; losses in it may be non-finite.
        deltas: `weight_deltas.jsonl`.
        samples: prompt -> step -> continuation, of `samples.jsonl`.
        unfinished: None for a run that came to its end. Of another, `audit` says nothing yet unless it failed, and
            what is written after training is empty here: an earlier end may have left it.
    """

    folder: Path
    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    plan: Mapping[str, Any]
    audit: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    performance: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    deltas: DeltaHistory
    insight: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    unfinished: Unfinished | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def selectors(self) -> list[str]:
        """The recipe's `trainable`, and blocks in turn; `all` without both, as it may be for full fine-tuning.

        Adapters beside it are shown as the plan shows them: `lora: attention`; with new tokens the plan's selectors
        are, which have those of their rows.
        """
        if self.plan.get("new_tokens"):
            return as_list(self.plan.get("selectors"))
        target = as_list((self.recipe.get("lora") or {}).get("target"))
        if target and self.adapts:
            return target
        sampling = self.recipe.get("block_sampling")
        in_turn = [f"{sampling['blocks']} blocks in turn"] if sampling else []
        beside = [f"lora: {one}" for one in target]
        return [*as_list(self.recipe.get("trainable")), *in_turn, *beside] or ["all"]

    @property
    def draws(self) -> int | None:
        """How many draws of blocks there were, None where that is not written."""
        file = self.folder / "block_draws.jsonl"
        return file.read_text(encoding="utf-8").count("\n") if file.is_file() else None

    @property
    def adapts(self) -> bool:
        """Whether LoRA adapters trained and nothing else, so that the folder holds these and not a whole model."""
        beside = self.recipe.get("trainable") or self.recipe.get("schedule")
        return self.recipe.get("method") == "lora" or bool(self.recipe.get("lora") and not beside)

    @property
    def adapts_beside_parts(self) -> bool:
        """Whether LoRA adapters trained beside parts of the base, so that the folder holds a delta and these."""
        return bool(self.recipe.get("lora")) and not self.adapts

    @property
    def replays(self) -> bool:
        """Whether a second text was mixed into the steps, so that the scored text `replay` is that one."""
        return bool(self.recipe.get("replay"))

    @property
    def replayed_sources(self) -> list[Mapping[str, Any]]:
        """What was recorded of the text that was replayed."""
        return list((self.record.get("replay") or {}).get("sources", []))

    @property
    def texts(self) -> dict[str, Mapping[str, Any]]:
        """Scored texts of `evaluation.json`: held-out text first, then training text, then the others."""
        scored = {name: entry for name, entry in self.evaluation.items() if name != "prompts"}
        first = [name for name in ("validation", "training") if name in scored]
        return {name: scored[name] for name in [*first, *(name for name in scored if name not in first)]}

    @property
    def frozen(self) -> list[Mapping[str, Any]]:
        return [parameter for parameter in self.plan["parameters"] if not parameter["trainable"]]

    @property
    def frozen_values(self) -> int:
        """Number of all values that are frozen, in tensors that are frozen whole and in rows of others."""
        return sum(parameter["numel"] - learning(parameter) for parameter in self.plan["parameters"])

    @property
    def frozen_rows(self) -> list[str]:
        """What audits call the frozen rows of each matrix of which others train."""
        return [name for parameter in self.trained if (name := frozen_rows_name(parameter)) is not None]

    @property
    def freezes(self) -> bool:
        """Whether anything is frozen."""
        return bool(self.frozen or self.frozen_rows)

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        return [parameter for parameter in self.plan["parameters"] if parameter["trainable"]]

    @property
    def head_is_tied(self) -> bool:
        """Whether the token embedding also serves as the head."""
        tokens = {p["name"] for p in self.plan["parameters"] if p["component"] == "embeddings.tokens"}
        has_head = any(parameter["component"] == "head" for parameter in self.plan["parameters"])
        return not has_head and any(tokens & set(pair) for pair in self.plan["ties"])

    def groups(self) -> list[Group]:
        """The plan's parameters by block and component, in the order of the forward pass."""
        members: dict[tuple[int | None, str], list[Mapping[str, Any]]] = {}
        for parameter in self.plan["parameters"]:
            members.setdefault((parameter["block"], parameter["component"]), []).append(parameter)
        return [Group(*place, tuple(members[place])) for place in sorted(members, key=forward_order)]


def forward_order(place: tuple[int | None, str]) -> tuple[int, int, int, str]:
    """Sorting key of (block, component): embeddings, blocks, final norm, head."""
    block, component = place
    order = OUTER_ORDER if block is None else BLOCK_ORDER
    rank = order.index(component) if component in order else len(order)
    stage = 1 if block is not None else 0 if component.startswith("embeddings") else 2
    return stage, -1 if block is None else block, rank, component


def as_list(value: Any) -> list[Any]:
    """A scalar counts as a list of one, as in a recipe; None as an empty one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def read_run(folder: str | os.PathLike, *, ended: bool = True, training: bool = False) -> RunFiles:
    """Read a run's folder.

    Args:
        folder: Folder with at least `recipe.yaml` and `freeze_plan.json`; of a run that ended also with `audit.json`.
        ended: Refuse a run that did not come to its end, unless it has an audit all the same.
        training: The run goes on: what an earlier end of it left is not read.

    Raises:
        InputError: If one of these files is missing, or one cannot be parsed.
    """
    folder = Path(folder)
    needed = ("recipe.yaml", "freeze_plan.json", *(("audit.json",) if ended else ()))
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is not the folder of a {'finished run' if ended else 'run'}: it has no {', '.join(missing)}. "
            f"Give the output_dir of a run that {'ended' if ended else 'has begun to train'}."
        )
    recipe = dict(parsed(folder / "recipe.yaml", yaml.safe_load))
    record = recipe.pop("run", None) or {}
    audit = parsed(folder / "audit.json", json.loads)
    state = parsed(folder / STATE_FILE, json.loads)
    unfinished = None if ended else _unfinished(folder, audit, state, record, training)
    if unfinished is not None:
        state = _newest_state(folder, state)
        unfinished = replace(unfinished, step=state.get("global_step", 0), steps=state.get("max_steps"))
        audit = audit if audit.get("passed") is False else NO_VERDICT
    at_end = {} if unfinished is not None else parsed(folder / "insight.json", json.loads)
    return RunFiles(
        folder=folder,
        recipe=recipe,
        record=record,
        plan=parsed(folder / "freeze_plan.json", plan_of),
        audit=audit,
        evaluation={} if unfinished is not None else parsed(folder / "evaluation.json", json.loads),
        performance={} if unfinished is not None else parsed(folder / "performance.json", json.loads),
        log=state.get("log_history", []),
        deltas=parsed(folder / "weight_deltas.jsonl", lambda text: read_deltas(whole_lines(text)))
        or DeltaHistory((), {}, {}, {}),
        insight=at_end,
        samples=parsed(folder / SAMPLES_FILE, read_samples),
        unfinished=unfinished,
    )


def _unfinished(
    folder: Path, audit: Mapping[str, Any], state: Mapping[str, Any], record: Mapping[str, Any], training: bool
) -> Unfinished | None:
    """That a run is not finished, with its reason; None for one that is, a failed audit's too.

    An audit alone does not tell: a run that a signal ends writes one too.
    """
    steps = state.get("global_step"), state.get("max_steps")
    all_taken = None in steps or steps[0] >= steps[1] or bool(record.get("stopped_early"))
    if not training and audit and (all_taken or audit.get("passed") is False):
        return None
    reason = ""
    if not training and exit_code_of(folder) is not None:
        reason = str(read_json(folder / "exit.json").get("reason", ""))
    return Unfinished(0, None, training, reason)


def _newest_state(folder: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Trainer's state of the most steps: a run that was killed left that of its last checkpoint, or of its page."""
    states = [state, *(parsed(file, json.loads) for file in folder.glob(f"checkpoint-*/{STATE_FILE}"))]
    return max(states, key=lambda one: one.get("global_step") or 0)


def parsed(file: Path, parse) -> Any:
    """What `parse` makes of the file's text; an empty dict where the file is absent.

    Raises:
        InputError: If the file cannot be parsed.
    """
    if not file.is_file():
        return {}
    try:
        found = parse(file.read_text(encoding="utf-8"))
        if parse in (json.loads, yaml.safe_load) and not isinstance(found, dict):
            raise ValueError(f"it holds {'a list' if isinstance(found, list) else repr(found)[:40]}, and no mapping")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file} is damaged: {error}. Restore it, or run the recipe again.") from error


def plan_of(text: str) -> dict[str, Any]:
    """Parse `freeze_plan.json`."""
    plan = json.loads(text)
    if not (isinstance(plan, dict) and isinstance(plan.get("parameters"), list)):
        raise ValueError("it lists no parameters")  # noqa: TRY004 - as a file that is no JSON
    return plan


def whole_lines(text: str) -> str:
    """Without the half of a line that a process left which was killed while it wrote."""
    return text[: text.rfind("\n") + 1]


def read_deltas(text: str) -> DeltaHistory:
    """Parse the lines of `weight_deltas.jsonl`. Where a step was reported twice, the later line counts."""
    l2_by_step: dict[int, dict[str, float | None]] = {}
    norm_before: dict[str, float] = {}
    last: dict[str, dict[str, Any]] = {}
    for row in text.splitlines():
        line = json.loads(row)
        name = line["name"]
        l2_by_step.setdefault(line["step"], {})[name] = line["l2_delta"]
        # the norm is in no file of its own; it is the same at every report, so any one with a change gives it
        if line["relative_delta"] and line["l2_delta"]:
            norm_before[name] = line["l2_delta"] / line["relative_delta"]
        if name not in last or line["step"] >= last[name]["step"]:
            last[name] = line
    return DeltaHistory(tuple(sorted(l2_by_step)), l2_by_step, norm_before, last)


def read_samples(text: str) -> dict[str, dict[int, str]]:
    """Parse the lines of `samples.jsonl`: prompt -> step -> continuation."""
    found: dict[str, dict[int, str]] = {}
    for row in whole_lines(text).splitlines():
        line = json.loads(row)
        found.setdefault(line["prompt"], {})[line["step"]] = line["continuation"]
    return found
