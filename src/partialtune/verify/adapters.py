"""A folder of LoRA adapters against its base: what each adapter adds to its matrix, and whether only those that may do.

The base's own weights are not in such a folder. What moved is what the adapters make of them: W + (alpha / rank) B A.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.errors import ModelError
from partialtune.model.digests import digest
from partialtune.model.parameters import plain_name
from partialtune.model.weight_files import Weights
from partialtune.run_folder import read_json
from partialtune.verify.claims import Claim, claim_of_selectors

NOTE = (
    "{name} holds adapters and none of the base's own weights. What moved is what they make of the base when they are "
    "merged into it."
)


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
        return sorted({f"{name.partition('.lora_')[0]}.weight" for name in self.tensors})

    def added_to(self, name: str) -> torch.Tensor:
        """What the adapter of the matrix `name` adds to it, in fp32."""
        path = name.removesuffix(".weight")
        product = self.tensors[f"{path}.lora_B.weight"].float() @ self.tensors[f"{path}.lora_A.weight"].float()
        return self.scale * (product.T if self.transposed else product)


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters in place of a model."""
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


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


def merged(base: Weights, adapters: Adapters) -> Weights:
    """The base as the adapters change it, one tensor at a time."""
    adapted = set(adapters.adapted)

    def read(name: str) -> torch.Tensor:
        values = base.read(name)
        return values.float() + adapters.added_to(name) if name in adapted else values

    return Weights(
        adapters.folder, adapters.name, base.config, base.structure, base.buffers, (), base.streamed, read=read
    )


def claim_of_adapters(
    base: Weights, adapters: Adapters, plan: Path, trainable: Sequence[str] | None
) -> tuple[Claim | None, tuple[str, ...]]:
    """What may be adapted, by selectors or by the run's plan, and adapters that are not those that the run ended with.

    Raises:
        ModelError: If the plan cannot be read.
        RecipeError: If a selector cannot be applied.
    """
    if trainable is not None:
        return claim_of_selectors(base.structure, trainable), ()
    if not plan.is_file():
        return None, ()
    try:
        content = read_json(plan)
        entries = {entry["name"]: entry for entry in content["parameters"]}
        adapter = content.get("adapter")
        scale = adapter["alpha"] / adapter["rank"] if adapter else None
        planned = {name: entry["sha256_after"] for name, entry in entries.items() if entry["trainable"]}
        before = {name: entry["sha256_before"] for name, entry in entries.items() if name not in planned}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{adapters.name}: its {plan.name} cannot be read as a freeze plan ({error}).") from error
    others = {name for name in planned.keys() | adapters.tensors.keys() if not _is_as_planned(name, planned, adapters)}
    return (
        Claim(
            text=f"only what {plan.name} of {adapters.name} adapts may move; base and adapters have to be as it "
            f"says ({len(before):,} and {len(planned):,} digests)",
            trainable=frozenset(f"{name.partition('.lora_')[0]}.weight" for name in planned),
            before={name: sha256 for name, sha256 in before.items() if sha256 and name in base.structure.by_name},
            scale=scale,
        ),
        tuple(sorted(others)),
    )


def _is_as_planned(name: str, planned: dict[str, str], adapters: Adapters) -> bool:
    return name in planned and name in adapters.tensors and digest(adapters.tensors[name]) == planned[name]
