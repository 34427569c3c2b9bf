"""A trained model <-> `delta.safetensors` and `delta.json`: the values that moved, and what they belong to.

`delta.safetensors` holds trained parameters whole, in fp32, under the names of `named_parameters()`; it holds results,
not differences, so that no rounding stands between a delta and its model. Of a matrix of which some rows were trained
it holds these rows, (n, width), and `delta.json` says which they are. `delta.json` names the base and holds sha256
digests of all its parameters and of the result's: another base is refused, and the result is checked. LoRA adapters
that trained beside these parts lie beside them, see `delta_adapters`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from partialtune import __version__
from partialtune.delta_adapters import check_adapters, read_sha256, write_beside_delta
from partialtune.distributed import from_main, is_main
from partialtune.errors import ModelError
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import PlannedParameter
from partialtune.model.config_keys import config_digest
from partialtune.model.digests import digests_of, digests_on_main, whole_on_main
from partialtune.model.new_tokens import BaseTensor
from partialtune.model.parameters import is_sharded, named_weights, plain_name, with_other_rows
from partialtune.model.row_parameters import rows_by_matrix
from partialtune.model.rows import Rows, as_rows, as_runs, count_rows, other_rows_name, put_rows, row_numbers, take_rows
from partialtune.run_folder import DELTA_FILE, VALUES_FILE, is_delta, read_json, write_json
from partialtune.words import joined

logger = logging.getLogger(__name__)

FORMAT = 2  # of both files; later ones are refused
FIRST_FORMAT = 1  # what is written where whole parameters alone are stored, for versions that know no more


@dataclass(frozen=True)
class Base:
    """The model that a delta belongs to.

    Attributes:
        model_name_or_path: Hub id, folder or `builtin:` name.
        revision: Of the Hub, as in the recipe.
        commit: That it resolved to; None where the base does not come from the Hub.
    """

    model_name_or_path: str
    revision: str = "main"
    commit: str | None = None

    @property
    def location(self) -> str:
        """For `checkpoint_folder`: `ID@COMMIT` for a model of the Hub."""
        return f"{self.model_name_or_path}@{self.commit}" if self.commit else self.model_name_or_path

    def __str__(self) -> str:
        return self.model_name_or_path + (f" (commit {self.commit})" if self.commit else "")


@dataclass(frozen=True)
class Delta:
    """A delta checkpoint, its values left in their file.

    Attributes:
        folder: Where it lies.
        name: What messages call it.
        base: What it belongs to.
        head: `untied` where the head has a matrix of its own that the base's does not have.
        before: sha256 of each parameter of the base by name, an untied head included.
        after: The same of the result.
        stored: Names of the parameters in `delta.safetensors`.
        config: sha256 of the result's config.json, see `config_keys.config_digest`; None in older deltas, which have
            none.
        rows: Of parameters of which rows alone are stored, which ones; all of the others is the base's.
        other_rows: sha256 of the other rows of each of these, the same before and after; None where it was not known.
        adapters: sha256 of each file of the adapters that belong to it, by its name; empty where there are none.
        base_rows: How many rows the base has of each tensor that new tokens changed. `before` has its digest there.
        length: How many rows the result has of these; 0 where there are no new tokens.
    """

    folder: Path
    name: str
    base: Base
    head: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    stored: frozenset[str]
    config: str | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)
    other_rows: Mapping[str, str | None] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    base_rows: Mapping[str, int] = field(default_factory=dict)
    length: int = 0

    @property
    def grows(self) -> bool:
        """Whether the result has more rows of tokens than its base."""
        return any(rows < self.length for rows in self.base_rows.values())

    def put(self, parameter: str, values: torch.Tensor) -> None:
        """Write what is stored of a parameter into its values of the base, in place."""
        if parameter in self.rows:
            put_rows(values, self.rows[parameter], self.read(parameter).to(values.device, values.dtype))
        else:
            values.copy_(self.read(parameter))

    def read(self, parameter: str) -> torch.Tensor:
        """What is stored of a parameter, fp32: all of its values, or its `rows`."""
        with safe_open(self.folder / VALUES_FILE, framework="pt", backend="pread") as file:
            return file.get_tensor(parameter)


def write_delta(
    folder: Path,
    model: PreTrainedModel,
    plan: FreezePlan,
    before: Mapping[str, str],
    after: Mapping[str, str],
    base: Base,
) -> None:
    """Write a trained model as a delta, its configuration beside it. All processes of a run call this together.

    Args:
        folder: Where to.
        model: Trained. Sharded parameters are gathered.
        plan: What was trained.
        before: sha256 of every parameter at the start, as the audit has it, and of frozen rows.
        after: At the end. What changed though it is frozen is stored too, of rows the whole matrix.
        base: The model that was loaded.
    """
    wanted = _wanted(plan, before, after)
    gathered = ((name, whole_on_main(parameter)) for name, parameter in named_weights(model) if name in wanted)
    values = {name: wanted[name](tensor) for name, tensor in gathered if tensor is not None}
    if is_main():  # after the gathering, which every process must reach
        _write(folder, model, plan, values, before, after, base)


def write_delta_of_state(
    folder: Path,
    model: PreTrainedModel,
    plan: FreezePlan,
    before: Mapping[str, str],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """As `write_delta`, with digests of the model as it is now and the base that it names.

    All processes call this together where the model is sharded, and one process alone where it is not.

    Args:
        folder, model, plan, before: As for `write_delta`.
        state_dict: The model's, where it was gathered from several processes already.
    """
    planned = {parameter.name for parameter in plan.parameters}
    tensors = named_weights(model) if state_dict is None else state_dict.items()
    named = {plain_name(name): tensor.detach() for name, tensor in tensors if plain_name(name) in planned}
    parts = with_other_rows(named.items(), plan.rows)
    name = model.config.name_or_path or type(model).__name__  # made of a config, it has no place
    base = Base(name, commit=getattr(model.config, "_commit_hash", None))
    if any(map(is_sharded, named.values())):
        write_delta(folder, model, plan, before, from_main(digests_on_main(parts, plan.frozen_rows)), base)
        return
    after = digests_of(parts, plan.frozen_rows)
    values = {name: stored(named[name]) for name, stored in _wanted(plan, before, after).items()}
    _write(folder, model, plan, values, before, after, base)


def _wanted(
    plan: FreezePlan, before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name of each parameter that is stored -> what makes of its values those that are."""
    rows = _stored_rows(plan, before, after)

    def stored(name: str, values: torch.Tensor) -> torch.Tensor:
        part = take_rows(values, rows[name]) if name in rows else values
        return part.to("cpu", torch.float32).contiguous()

    names = [p.name for p in plan.parameters if p.trainable or before[p.name] != after[p.name] or _base(plan, p.name)]
    return {name: partial(stored, name) for name in names}


def _write(
    folder: Path,
    model: PreTrainedModel,
    plan: FreezePlan,
    values: Mapping[str, torch.Tensor],
    before: Mapping[str, str],
    after: Mapping[str, str],
    base: Base,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {name: values[name] for name in plan.adapters}
    aside = folder / f".{VALUES_FILE}.part"  # renamed when it is whole: a killed process leaves no half file
    save_file({n: v for n, v in values.items() if n not in adapters}, aside, metadata={"format": "pt"})
    os.replace(aside, folder / VALUES_FILE)
    _write_config(folder, model)
    content = {**_description(plan, before, after, base), "config_sha256": config_digest(folder / "config.json")}
    if plan.adapter is not None:
        content["adapters"] = write_beside_delta(folder, model, plan.adapter, adapters)
    write_json(folder / DELTA_FILE, content)  # last: with it the delta is whole


def _write_config(folder: Path, model: PreTrainedModel) -> None:
    """What `save_pretrained` writes beside weights: the two config files, of a model in fp32."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the class
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _stored_rows(plan: FreezePlan, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Rows]:
    """The matrices of which their rows that train alone are stored: the other rows have kept every bit."""
    names = {name: other_rows_name(name, rows) for name, rows in plan.rows.items()}
    kept = [name for name, other in names.items() if before.get(other) == after.get(other)]
    return {p.name: _with_new_rows(plan, p) for p in plan.parameters if p.name in kept}


def _base(plan: FreezePlan, name: str) -> BaseTensor | None:
    """The tensor of the base that new tokens changed: what they made of it is stored, though it may be frozen."""
    return plan.new_tokens.base.get(name) if plan.new_tokens else None


def _with_new_rows(plan: FreezePlan, parameter: PlannedParameter) -> Rows:
    """The rows that train, and all that the base does not have: of new tokens, in its padding too, and beyond it."""
    rows, new, base = row_numbers(plan.rows[parameter.name]), plan.new_tokens, _base(plan, parameter.name)
    further = range(base.shape[0], parameter.shape[0]) if base else ()
    return as_runs([*rows, *(row_numbers(new.rows) if new and base else ()), *further])


def _description(plan: FreezePlan, before: Mapping[str, str], after: Mapping[str, str], base: Base) -> dict[str, Any]:
    rows, adapters = _stored_rows(plan, before, after), set(plan.adapters)
    return {
        "format": FORMAT if rows or plan.adapter or plan.new_tokens else FIRST_FORMAT,
        "partialtune_version": __version__,
        "base": asdict(base),
        "head": plan.head,
        "selectors": list(plan.selectors),
        "ties": [list(pair) for pair in plan.ties],
        "trainable_parameters": plan.trainable_parameters,
        "total_parameters": plan.total_parameters,
        **({"new_tokens": plan.new_tokens.to_json()} if plan.new_tokens else {}),
        "parameters": [
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "trainable": parameter.trainable,
                "sha256_before": before[parameter.name],
                "sha256_after": after[parameter.name],
                **_description_of_rows(parameter.name, rows, after),
                **(plan.new_tokens.of_base(parameter.name) if plan.new_tokens else {}),
            }
            for parameter in plan.parameters
            if parameter.name not in adapters
        ],
    }


def _description_of_rows(name: str, rows: Mapping[str, Rows], after: Mapping[str, str]) -> dict[str, Any]:
    """The keys that only a matrix has of which rows are stored."""
    if name not in rows:
        return {}
    return {
        "rows": [list(run) for run in rows[name]],
        "sha256_other_rows": after.get(other_rows_name(name, rows[name])),
    }


def read_delta(folder: Path, name: str) -> Delta:
    """Open the delta checkpoint in a folder.

    Args:
        folder: Holds `delta.json`, `delta.safetensors` and `config.json`.
        name: What messages call it.

    Raises:
        ModelError: If it holds none, or one that is damaged or of a later format.
    """
    if not is_delta(folder):
        raise ModelError(
            f"{name} holds no {DELTA_FILE}, so it is no delta checkpoint. "
            f"A whole model loads with AutoModelForCausalLM.from_pretrained."
        )
    try:
        content = read_json(folder / DELTA_FILE)
        if content["format"] > FORMAT:
            raise ModelError(
                f"{name} is a delta of format {content['format']}, written by partialtune "
                f"{content['partialtune_version']}; this is {__version__}, which reads format {FORMAT}. Update it."
            )
        # pread: a mapped file would count as memory of this process, as far as it was read
        with safe_open(folder / VALUES_FILE, framework="pt", backend="pread") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        delta = Delta(
            folder=folder,
            name=name,
            base=Base(**content["base"]),
            head=content["head"],
            before={e["name"]: e.get("sha256_base", e["sha256_before"]) for e in content["parameters"]},
            after={entry["name"]: entry["sha256_after"] for entry in content["parameters"]},
            stored=frozenset(shapes),
            config=content.get("config_sha256"),
            rows={e["name"]: as_rows(e["rows"], e["shape"][0]) for e in content["parameters"] if "rows" in e},
            other_rows={e["name"]: e["sha256_other_rows"] for e in content["parameters"] if "rows" in e},
            adapters=read_sha256(content),
            base_rows={e["name"]: int(e["base_shape"][0]) for e in content["parameters"] if "base_shape" in e},
            length=max((int(e["shape"][0]) for e in content["parameters"] if "base_shape" in e), default=0),
        )
        _check_texts(delta)
        declared = {entry["name"]: _stored_shape(delta, entry) for entry in content["parameters"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{name}: the delta is damaged ({error}). Fetch it again.") from error
    _check_whole(delta, shapes, declared)
    check_adapters(folder, name, delta.adapters)
    return delta


def _stored_shape(delta: Delta, entry: Mapping[str, Any]) -> list[int]:
    rows = delta.rows.get(entry["name"])
    return entry["shape"] if rows is None else [count_rows(rows), *entry["shape"][1:]]


def _check_texts(delta: Delta) -> None:
    """Make sure that names and digests are texts: a damaged `delta.json` is an error here, not somewhere later.

    Raises:
        TypeError: If one is not.
    """
    base = delta.base
    texts = [base.model_name_or_path, base.revision, base.commit or "", delta.head]
    texts += [*delta.before.keys(), *delta.before.values(), *delta.after.values()]
    texts += [sha256 for sha256 in delta.other_rows.values() if sha256 is not None]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"{DELTA_FILE} has {wrong[0]!r:.40} where a text belongs")


def _check_whole(delta: Delta, shapes: Mapping[str, list[int]], declared: Mapping[str, list[int]]) -> None:
    """Make sure that every parameter that changed is stored, and nothing else than parameters in their shapes.

    Raises:
        ModelError: If not.
    """
    wrong = [name for name, shape in shapes.items() if declared.get(name) != shape]
    wrong += [name for name in declared if delta.before[name] != delta.after[name] and name not in delta.stored]
    if wrong:
        raise ModelError(
            f"{delta.name}: {VALUES_FILE} and {DELTA_FILE} do not belong together, they differ in {wrong[0]}. "
            f"Fetch both again."
        )


def check_config(delta: Delta) -> None:
    """Make sure that the delta's config.json is the one that the run ended with, since weights alone are no model.

    Raises:
        ModelError: If a key of it that changes the function has another value, or it cannot be read.
    """
    if delta.config is None:
        logger.warning(
            "%s was written before deltas held a digest of their config.json, so that file is taken unchecked. "
            "Save the run again with this version to have it checked.",
            delta.name,
        )
        return
    try:
        same = config_digest(delta.folder / "config.json") == delta.config
    except (OSError, ValueError) as error:
        raise ModelError(f"{delta.name}: its config.json cannot be read ({error}). Fetch it again.") from error
    if not same:
        raise ModelError(
            f"{delta.name}: its config.json is not the one that the run ended with (sha256 in {DELTA_FILE}), so its "
            f"weights would compute something else. Fetch it again."
        )


def check_base(delta: Delta, name: str, found: Mapping[str, str]) -> None:
    """Refuse a base other than the delta's.

    Args:
        delta: Says what the base's digests are.
        name: What messages call the base at hand.
        found: Its digests, an untied head included.

    Raises:
        ModelError: If a digest differs.
    """
    different = [name for name in delta.before.keys() | found.keys() if delta.before.get(name) != found.get(name)]
    if different:
        raise ModelError(
            f"{delta.name} is a delta of {delta.base}, and {name} is another model: "
            f"{len(different):,} of {len(delta.before):,} parameters differ ({joined(sorted(different), 160)}). "
            f"Name the model that was trained with --base."
        )


def put_stored(delta: Delta, model: nn.Module) -> None:
    """Write what a delta stores into a model of its base, in place, and make sure that it is what the run ended with.

    Raises:
        ModelError: If a digest differs.
    """
    parameters, learning = dict(named_weights(model)), rows_by_matrix(model)
    with torch.no_grad():
        for name in delta.stored:
            delta.put(name, parameters[name])
            if id(parameters[name]) in learning:  # where rows of it train: these learn through their own parameter
                learning[id(parameters[name])].read_from(parameters[name])
    check_result(delta, ((name, parameters[name]) for name in delta.stored))


def check_result(delta: Delta, stored: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Make sure that what the delta stores is what the run ended with.

    Raises:
        ModelError: If a digest differs.
    """
    damaged = [name for name, sha256 in digests_of(stored).items() if sha256 != delta.after[name]]
    if damaged:
        raise ModelError(
            f"{delta.name}: the delta is damaged, {joined(sorted(damaged), 160)} is not what the run ended with. "
            f"Fetch it again."
        )
