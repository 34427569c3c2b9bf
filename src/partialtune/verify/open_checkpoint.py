"""A checkpoint's folder -> its weights by parameter name, whether it holds a whole model, a delta or LoRA adapters.

A delta is read over its base. Adapters do not hold the base's own weights either: what moved is what they make of the
matrices that they adapt, W + (alpha / rank) B A. Nothing is rebuilt: each read gives one tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.delta_checkpoint import Delta, check_base, read_delta
from partialtune.errors import ModelError
from partialtune.freeze.adapter_plan import adapted_matrix
from partialtune.model.checkpoint_folder import checkpoint_folder, holds_adapters
from partialtune.model.digests import digests_of
from partialtune.model.loading import empty_model, load_config
from partialtune.model.parameters import plain_name
from partialtune.model.structure import read_structure
from partialtune.model.weight_files import Weights, open_weights
from partialtune.run_folder import is_delta, read_json


def open_checkpoint(folder: Path, name: str, at_hand: Weights | None = None) -> Weights:
    """The weights of a whole model, or of the model that a delta stands for, its adapters merged where it has some.

    Args:
        folder: Holds the checkpoint.
        name: What messages call it.
        at_hand: A model that is open already. Where it is a delta's base, no other one is opened.

    Raises:
        ModelError: If the files are damaged, or neither `at_hand` nor the model that a delta names is its base.
    """
    if not is_delta(folder):
        return open_weights(folder, name)
    parts = open_delta(folder, name, at_hand)
    return open_adapters(folder, name, parts).merged_into(parts) if holds_adapters(folder) else parts


# ---- deltas ---------------------------------------------------------------------------------------------------------


def open_delta(folder: Path, name: str, at_hand: Weights | None) -> Weights:
    """What a delta stores over what its base holds, streamed where the base is; without adapters that belong to it."""
    delta = read_delta(folder, name)
    base = at_hand if at_hand is not None and _digests(delta, at_hand) == delta.before else _named_base(delta)
    config = load_config(str(folder))
    structure = read_structure(empty_model(config))
    structure_of = structure.by_name

    def read(wanted: str) -> torch.Tensor:
        # A tied parameter may be stored under any of its names.
        others = [place.name for place in structure_of[wanted].places] if wanted in structure_of else []
        stored = next((one for one in (wanted, *others) if one in delta.stored), None)
        if stored is None or stored not in delta.rows:
            return base.read(wanted) if stored is None else delta.read(stored)
        of_base = base.read(wanted)
        values = torch.zeros(structure_of[wanted].shape)  # 16 bits widened, which is exact
        values[: len(of_base)] = of_base  # rows of new tokens, which the base does not have, are all stored
        delta.put(stored, values)
        return values

    return Weights(folder, name, config, structure, base.buffers, base.unused, streamed=base.streamed, read=read)


def _named_base(delta: Delta) -> Weights:
    try:
        base = open_weights(*checkpoint_folder(delta.base.location))
    except ModelError as error:
        raise ModelError(f"{delta.name} is a delta of {delta.base}, which cannot be had: {error}") from error
    check_base(delta, base.name, _digests(delta, base))
    return base


def _digests(delta: Delta, base: Weights) -> Mapping[str, str]:
    """Of the base's parameters under the delta's names; a name that the base lacks has none."""
    known = [name for name in delta.before if name in base.structure.by_name]
    return digests_of((name, base.read(name)) for name in known)


# ---- adapters -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapters:
    """The adapters in a folder.

    Attributes:
        folder: Where they are.
        name: What messages call them.
        tensors: `transformer.h.0.attn.c_attn.lora_A.weight` -> values.
        scale: alpha / rank.
        transposed: Whether the base's matrices are (inputs, outputs), as GPT-2's.
    """

    folder: Path
    name: str
    tensors: dict[str, torch.Tensor]
    scale: float
    transposed: bool

    @property
    def adapted(self) -> list[str]:
        """Names of the base's matrices that have an adapter."""
        return sorted({adapted_matrix(name) for name in self.tensors})

    def added_to(self, name: str) -> torch.Tensor:
        """What the adapter of the matrix `name` adds to it, in fp32."""
        path = name.removesuffix(".weight")
        # B (outputs, rank) @ A (rank, inputs) -> (outputs, inputs), as nn.Linear has its weight
        product = self.tensors[f"{path}.lora_B.weight"].float() @ self.tensors[f"{path}.lora_A.weight"].float()
        return self.scale * (product.T if self.transposed else product)

    def merged_into(self, base: Weights) -> Weights:
        """The base as the adapters change it, one tensor at a time. The base is a delta's model, where there is one."""
        adapted = set(self.adapted)

        def read(name: str) -> torch.Tensor:
            values = base.read(name)
            return values.float() + self.added_to(name) if name in adapted else values

        return Weights(self.folder, self.name, base.config, base.structure, base.buffers, (), base.streamed, read=read)


def open_adapters(folder: Path, name: str, base: Weights) -> Adapters:
    """Read the adapters of a base.

    Raises:
        ModelError: If the files are damaged, of another kind than plain LoRA, or of another base.
    """
    try:
        config = read_json(folder / ADAPTER_CONFIG_NAME)
        tensors = load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME)
        scale = config["lora_alpha"] / config["r"]
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: its adapters cannot be read ({error}). Fetch them again.") from error
    # With these the product is not all that is added, or not by one scale for all matrices.
    others = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    plain = {plain_name(key): values for key, values in tensors.items()}
    kinds = {key.rpartition(".lora_")[2] for key in plain}
    if others or config.get("peft_type") != "LORA" or kinds != {"A.weight", "B.weight"}:
        raise ModelError(f"{name} holds other adapters than plain LoRA: merge them into their base and compare that.")
    adapters = Adapters(folder, name, plain, scale, transposed=bool(config.get("fan_in_fan_out")))
    for matrix in adapters.adapted:
        info = base.structure.by_name.get(matrix)
        if info is None or tuple(adapters.added_to(matrix).shape) != info.shape:
            raise ModelError(f"{name} has an adapter for {matrix}, which {base.name} does not have in that shape.")
    return adapters
