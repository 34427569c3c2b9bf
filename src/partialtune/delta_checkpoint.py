"""A trained model <-> `delta.safetensors` and `delta.json`: the values that moved, and what they belong to.

`delta.safetensors` holds trained parameters whole, in fp32, under the names of `named_parameters()`; it holds results,
not differences, so that no rounding stands between a delta and its model. `delta.json` names the base and holds
sha256 digests of all its parameters and of the result's: another base is refused, and the result is checked.

Where LoRA adapters trained beside these parts, `adapter_model.safetensors` and `adapter_config.json` lie beside them,
as peft writes them. They stand on the base with the delta's values in it, and `delta.json` holds their sha256 digests,
so that neither half is taken for the whole.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from partialtune import __version__
from partialtune.distributed import is_main
from partialtune.errors import ModelError
from partialtune.freeze.adapter_plan import FACTOR
from partialtune.freeze.lora import write_adapters
from partialtune.freeze.plan import FreezePlan
from partialtune.model.config_keys import config_digest
from partialtune.model.digests import digests_of, whole_on_main
from partialtune.model.parameters import named_weights, plain_name
from partialtune.model.row_parameters import rows_by_matrix
from partialtune.run_folder import DELTA_FILE, VALUES_FILE, is_delta, read_json, write_json
from partialtune.words import joined

logger = logging.getLogger(__name__)

FORMAT = 2  # of both files; later ones are refused
BEFORE_ADAPTERS = 1  # of deltas without adapters, which versions that know none can read
ADAPTER_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME)
# What `adapter_config.json` names as the base. Named by itself the base would be loaded without the delta's values by
# whoever follows that name, as transformers does with a Hub id.
UNDER_ADAPTERS = "the base with the values of delta.safetensors in it, which partialtune.load makes"


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
        adapters: sha256 of each file of the adapters that belong to it, by its name; empty where there are none.
    """

    folder: Path
    name: str
    base: Base
    head: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    stored: frozenset[str]
    config: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    def read(self, parameter: str) -> torch.Tensor:
        """The values of a stored parameter, fp32."""
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
        before: sha256 of every parameter at the start, as the audit has it.
        after: At the end. A frozen parameter that changed is stored too, so that the result is this very model.
        base: The model that was loaded.
    """
    wanted = _wanted(plan, before, after)
    gathered = ((name, whole_on_main(parameter)) for name, parameter in named_weights(model) if name in wanted)
    values = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in gathered if tensor is not None}
    if is_main():  # after the gathering, which every process must reach
        _write(folder, model, plan, values, before, after, base)


def write_delta_of_state(
    folder: Path,
    model: PreTrainedModel,
    plan: FreezePlan,
    before: Mapping[str, str],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """As `write_delta`, on the process that writes alone, and with digests of the model as it is now.

    Args:
        folder, model, plan, before: As for `write_delta`; the base is what the model's config names.
        state_dict: The model's, where it had to be gathered from several processes.
    """
    planned = {parameter.name for parameter in plan.parameters}
    tensors = named_weights(model) if state_dict is None else state_dict.items()
    named = {plain_name(name): values.detach() for name, values in tensors if plain_name(name) in planned}
    after = digests_of(named.items())
    values = {name: named[name].to("cpu", torch.float32).contiguous() for name in _wanted(plan, before, after)}
    name = model.config.name_or_path or type(model).__name__  # made of a config, it has no place
    base = Base(name, commit=getattr(model.config, "_commit_hash", None))
    _write(folder, model, plan, values, before, after, base)


def _wanted(plan: FreezePlan, before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    """A frozen parameter that changed is stored too, so that the result is this very model."""
    return {p.name for p in plan.parameters if p.trainable or before[p.name] != after[p.name]}


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
    of_adapters = set(plan.trainable) - set(plan.parts)
    aside = folder / f".{VALUES_FILE}.part"  # renamed when it is whole: a killed process leaves no half file
    save_file({n: v for n, v in values.items() if n not in of_adapters}, aside, metadata={"format": "pt"})
    os.replace(aside, folder / VALUES_FILE)
    _write_config(folder, model)
    content = {**_description(plan, before, after, base), "config_sha256": config_digest(folder / "config.json")}
    if plan.adapter is not None:
        write_adapters(model, folder, {n: v for n, v in values.items() if n in of_adapters}, UNDER_ADAPTERS)
        sha256 = {name: _sha256(folder / name) for name in ADAPTER_FILES}
        content["adapters"] = {**plan.adapter.to_json(), "sha256": sha256}
    write_json(folder / DELTA_FILE, content)  # last: with it the delta is whole


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_config(folder: Path, model: PreTrainedModel) -> None:
    """What `save_pretrained` writes beside weights: the two config files, of a model in fp32."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard renames the class
    model.config.dtype = "float32"
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _description(plan: FreezePlan, before: Mapping[str, str], after: Mapping[str, str], base: Base) -> dict[str, Any]:
    return {
        "format": BEFORE_ADAPTERS if plan.adapter is None else FORMAT,
        "partialtune_version": __version__,
        "base": asdict(base),
        "head": plan.head,
        "selectors": list(plan.selectors),
        "ties": [list(pair) for pair in plan.ties],
        "trainable_parameters": plan.trainable_parameters,
        "total_parameters": plan.total_parameters,
        "parameters": [
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "trainable": parameter.trainable,
                "sha256_before": before[parameter.name],
                "sha256_after": after[parameter.name],
            }
            for parameter in plan.parameters
            if plan.adapter is None or not FACTOR.fullmatch(parameter.name)
        ],
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
            before={entry["name"]: entry["sha256_before"] for entry in content["parameters"]},
            after={entry["name"]: entry["sha256_after"] for entry in content["parameters"]},
            stored=frozenset(shapes),
            config=content.get("config_sha256"),
            adapters=content.get("adapters", {}).get("sha256", {}),
        )
        _check_texts(delta)
        declared = {entry["name"]: entry["shape"] for entry in content["parameters"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{name}: the delta is damaged ({error}). Fetch it again.") from error
    _check_whole(delta, shapes, declared)
    _check_adapters(delta)
    return delta


def _check_texts(delta: Delta) -> None:
    """Make sure that names and digests are texts: a damaged `delta.json` is an error here, not somewhere later.

    Raises:
        TypeError: If one is not.
    """
    base = delta.base
    texts = [base.model_name_or_path, base.revision, base.commit or "", delta.head]
    texts += [*delta.before.keys(), *delta.before.values(), *delta.after.values(), *delta.adapters.values()]
    if not set(delta.adapters) <= set(ADAPTER_FILES):
        raise TypeError(f"{DELTA_FILE} names other files of adapters than {', '.join(ADAPTER_FILES)}")
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


def _check_adapters(delta: Delta) -> None:
    """Make sure that the adapters beside a delta are those that trained with it, and that they are all there.

    Raises:
        ModelError: If not.
    """
    for name in ADAPTER_FILES:
        there, expected = (delta.folder / name).is_file(), delta.adapters.get(name)
        if there and expected is None:
            raise ModelError(
                f"{delta.name} is a delta without adapters, and {name} lies beside it. Move the files adapter_* to a "
                f"folder of their own."
            )
        if expected is not None and not there:
            raise ModelError(
                f"{delta.name}: adapters trained beside what this delta holds, and {name} is missing: one without the "
                f"other is no model. Fetch it again."
            )
        if expected is not None and _sha256(delta.folder / name) != expected:
            raise ModelError(
                f"{delta.name}: {name} is not the one that trained beside this delta (sha256 in {DELTA_FILE}). "
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
    """Put what a delta stores into a model of its base, in place, and make sure that it is what the run ended with.

    Raises:
        ModelError: If a digest differs.
    """
    parameters, learning = dict(named_weights(model)), rows_by_matrix(model)
    with torch.no_grad():
        for name in delta.stored:
            parameters[name].copy_(delta.read(name))
            if id(parameters[name]) in learning:  # where only rows of it train
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
