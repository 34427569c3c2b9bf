"""LoRA adapters in a plan: a model's structure and a `lora` -> the same structure with the adapters' matrices in it.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) leaves a matrix W as it is and adds (alpha / rank) B A to what
it does, with A (rank, inputs) and B (outputs, rank). W may train beside them, where a selector chooses it as well.

Names in the plan are the base's own for its weights, whose digests are then those of the base, and for adapters
`transformer.h.0.attn.c_attn.lora_A.weight`: as in `adapter_model.safetensors`, less `base_model.model.`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from partialtune.errors import RecipeError
from partialtune.grammar.lora_syntax import Lora, read_lora
from partialtune.grammar.selector_syntax import parse_selector
from partialtune.model.parameters import uncompiled
from partialtune.model.rows import count_rows
from partialtune.model.selectors import resolve_selectors
from partialtune.model.structure import ModelStructure, ParameterInfo

FACTOR = re.compile(r"(?P<module>.+)\.lora_[AB]\.weight")  # name of an adapter's matrix in a plan
# Matrices of state-space models that their kernels multiply with past the module's own forward: an adapter beside them
# would be left out of the product, and peft refuses most of them.
PAST_THE_MODULE = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("out_proj", "dt_proj")),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"), ("out_proj",)),
    "jamba": ("dt_proj",),
}


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters of a plan.

    Attributes:
        rank: Rows of A, columns of B.
        alpha: What B A is multiplied with, times the rank.
        modules: Paths of the matrices that get one.
        seed: Of the start values of A.
        target: Selectors that chose the matrices.
        beside_parts: Whether parts of the base train as well.
    """

    rank: int
    alpha: int
    modules: tuple[str, ...]
    seed: int
    target: tuple[str, ...]
    beside_parts: bool = False

    @property
    def selectors(self) -> tuple[str, ...]:
        """The target as a plan shows it: beside parts, whose selectors may be the same, as `lora: attention`."""
        return tuple(f"lora: {selector}" if self.beside_parts else selector for selector in self.target)

    def to_json(self) -> dict[str, Any]:
        """What `freeze_plan.json` holds. Without parts the plan's `selectors` are the target."""
        target = {"target": list(self.target)} if self.beside_parts else {}
        return {"rank": self.rank, "alpha": self.alpha, **target}


def checked_lora(given: Mapping[str, Any] | Lora | None) -> Lora | None:
    """What `plan_freeze` was given as `lora`, read and checked.

    Raises:
        RecipeError: With all that is wrong in it.
    """
    if given is None or isinstance(given, Lora):
        return given
    if not isinstance(given, Mapping):
        raise RecipeError(f"lora is {given!r}; it takes a mapping, such as {{'target': ['attention'], 'rank': 8}}.")
    lora, problems = read_lora(given)
    if problems:
        raise RecipeError("\n".join(f"lora, {problem}" for problem in problems))
    return lora


def with_adapters(
    model: nn.Module, structure: ModelStructure, lora: Lora, seed: int, beside_parts: bool
) -> tuple[ModelStructure, Adapter, dict[str, str]]:
    """The structure as it will be, with the two matrices of each adapter.

    They stand behind the last parameter of their module (its bias, where it has one): there peft puts them, and the
    plan's order is that of `named_parameters()` once it is applied.

    Args:
        model: May lie on the meta device.
        structure: Of the model.
        lora: What gets adapters.
        seed, beside_parts: As in `Adapter`.

    Returns:
        The structure, the adapters, and name of each of their matrices -> the selector that chose it.

    Raises:
        RecipeError: If a selector chooses no matrix in a block, or the model has adapters already.
    """
    model = uncompiled(model)
    modules = _adapted_modules(model, structure, lora)
    adapter = Adapter(lora.rank, lora.alpha, tuple(modules), seed, lora.target, beside_parts)
    shown = dict(zip(lora.target, adapter.selectors, strict=True))
    structure = replace(structure, parameters=tuple(_in_order(model, structure, modules, lora.rank)))
    factors = (FACTOR.fullmatch(info.name) for info in structure.parameters)
    return structure, adapter, {found[0]: shown[modules[found["module"]]] for found in factors if found}


def _adapted_modules(model: nn.Module, structure: ModelStructure, lora: Lora) -> dict[str, str]:
    """Path of each linear layer that gets an adapter -> the selector that chose it."""
    # of peft's own, or of a plan before this one: they would be adapted in their turn
    there = next((info.name for info in structure.parameters if FACTOR.fullmatch(info.name)), None)
    if there is not None:
        raise RecipeError(
            f"{lora.said_as}: the model has adapters already ({there}). Load the base anew, or choose them as what "
            f"they are: trainable ['/.*lora_[AB].*/']."
        )
    target = list(lora.target)
    chosen = {
        module: selector
        for name, selector in resolve_selectors(structure, target).items()
        if (module := _adaptable(model, structure.by_name[name])) is not None
    }
    _check_every_selector_adapts(model, structure, lora)
    if not chosen:
        raise RecipeError(f"{lora.said_as} [{', '.join(target)}]: no matrix is left to adapt.")
    return chosen


def _adaptable(model: nn.Module, info: ParameterInfo) -> str | None:
    """The path of the module whose matrix this parameter is, if it stands in a block and is one that LoRA adapts."""
    path, _, kind = info.name.rpartition(".")
    if path.rpartition(".")[2] in PAST_THE_MODULE.get(getattr(model.config, "model_type", ""), ()):
        return None
    fits = info.block is not None and kind == "weight" and isinstance(model.get_submodule(path), nn.Linear | Conv1D)
    return path if fits else None


def _check_every_selector_adapts(model: nn.Module, structure: ModelStructure, lora: Lora) -> None:
    useless = [
        text
        for text in lora.target
        if not parse_selector(text).removes
        and not any(_adaptable(model, structure.by_name[name]) for name in resolve_selectors(structure, [text]))
    ]
    if useless:
        instead = "method: partial" if lora.said_as == "trainable" else "train it as it is, with trainable"
        raise RecipeError(
            f"{lora.said_as}, {', '.join(useless)}: {lora.method} adapts matrices of linear layers in the blocks, and "
            f"this chooses none. Take attention, mlp or blocks[...], or {instead}."
        )


def _in_order(
    model: nn.Module, structure: ModelStructure, modules: Mapping[str, str], rank: int
) -> Iterator[ParameterInfo]:
    infos = structure.parameters
    for info, following in zip(infos, [*infos[1:], None], strict=True):
        yield info
        path = info.name.rpartition(".")[0]
        if path in modules and (following is None or following.name.rpartition(".")[0] != path):
            inputs, outputs = _width(model.get_submodule(path))
            for kind, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                name = f"{path}.{kind}.weight"
                yield replace(
                    info,
                    name=name,
                    aliases=(),
                    shape=shape,
                    numel=shape[0] * shape[1],
                    is_bias=False,
                    places=(replace(info.places[0], name=name),),
                )


def _width(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer; GPT-2's Conv1D holds its matrix the other way round."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def adapted_matrix(name: str) -> str:
    """adapted_matrix("h.0.attn.c_attn.lora_A.weight") -> "h.0.attn.c_attn.weight"; another name is given back."""
    found = FACTOR.fullmatch(name)
    return f"{found['module']}.weight" if found else name


def merged_plan(content: Mapping[str, Any], after: Mapping[str, str]) -> dict[str, Any]:
    """A run's `freeze_plan.json` for the model in which its adapters are merged: their matrices are what has moved.

    Args:
        content: Of the run's file.
        after: sha256 by name of the parameters of the merged model.
    """
    selectors = {adapted_matrix(e["name"]): e["selector"] for e in content["parameters"] if FACTOR.fullmatch(e["name"])}
    parameters = [
        {
            **entry,
            "trainable": entry["trainable"] or entry["name"] in selectors,
            "selector": entry["selector"] or selectors.get(entry["name"]),
            "sha256_after": after[entry["name"]],
        }
        for entry in content["parameters"]
        if not FACTOR.fullmatch(entry["name"])
    ]
    moving = [_moving(entry) for entry in parameters if entry["trainable"]]
    phases = [
        {
            **phase,
            "backward_from": adapted_matrix(phase["backward_from"]),
            "trainable": list(dict.fromkeys(map(adapted_matrix, phase["trainable"]))),
        }
        for phase in content["phases"]
    ]
    changed = {
        "total_parameters": sum(entry["numel"] for entry in parameters),
        "trainable_parameters": sum(moving),
        "backward_from": adapted_matrix(content["backward_from"]),
        "phases": phases,
        "parameters": parameters,
    }
    return {"merged_adapters" if key == "adapter" else key: changed.get(key, value) for key, value in content.items()}


def _moving(entry: Mapping[str, Any]) -> int:
    """Number of the values of an entry of `freeze_plan.json` that may move."""
    rows = entry.get("rows")
    return entry["numel"] if rows is None else count_rows(rows) * (entry["numel"] // entry["shape"][0])
