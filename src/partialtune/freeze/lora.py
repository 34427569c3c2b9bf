"""LoRA adapters in a model: put in as a plan says, saved for peft, loaded again.

What of a plan are adapters is decided in `adapter_plan`. B begins at 0, so that an adapted model begins as its base.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.errors import HOW_TO_INSTALL_PEFT, ModelError, is_peft_installed
from partialtune.freeze.adapter_plan import Adapter
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.grammar.lora_syntax import lora_of_method
from partialtune.model.loading import model_location

ADAPTER = "default"  # peft's name for the only one
IN_FILES = "base_model.model."  # before every name in `adapter_model.safetensors`


def plan_lora(
    model: nn.Module, trainable: Sequence[str], rank: int = 8, alpha: int = 16, seed: int = 0, **others: Any
) -> FreezePlan:
    """`method: lora`: `plan_freeze(model, [], lora={"target": trainable, "rank": rank, "alpha": alpha}, seed=seed)`.

    `others`: part_learning_rates, layer_decay and frozen_quantization of `plan_freeze`.

    plan_lora(gpt2, ["attention"]).trainable -> ["transformer.h.0.attn.c_attn.lora_A.weight", ...]

    Raises:
        RecipeError: If a selector chooses no matrix in a block, or a rate is wrong.
    """
    target = [trainable] if isinstance(trainable, str) else list(trainable)
    return plan_freeze(model, [], lora=lora_of_method(target, rank, alpha), seed=seed, **others)


def add_adapters(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapters of a plan into the model, in place.

    Raises:
        ModelError: If peft is not installed.
    """
    if not is_peft_installed():
        raise ModelError(f"Method {HOW_TO_INSTALL_PEFT}")
    # peft itself: `model.add_adapter` asks for the peft that transformers was made with, which may not be out yet.
    from peft import LoraConfig, inject_adapter_in_model

    swapped = any(isinstance(model.get_submodule(path), Conv1D) for path in adapter.modules)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.modules),
        fan_in_fan_out=swapped,  # GPT-2's Conv1D holds (inputs, outputs); peft warns where it is not told
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():  # the run's own random numbers go on as if no adapter had been made
        torch.manual_seed(adapter.seed)  # of A; B begins at 0
        inject_adapter_in_model(config, model, ADAPTER)
    name = getattr(model.config, "name_or_path", "")
    config.base_model_name_or_path = model_location(name) if name.startswith("builtin:") else name
    config.revision = getattr(model.config, "_commit_hash", None)


def save_adapters(model: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model's adapters and their configuration into a folder, for `PeftModel.from_pretrained(base, folder)`.

    Args:
        model: Adapted by `add_adapters`.
        folder: Made if it is missing.
        state_dict: The model's, where it had to be gathered from several processes.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    # False: adapters lie in blocks alone. Left to itself peft asks the Hub whether the base's vocabulary has grown.
    write_adapters(model, folder, get_peft_model_state_dict(model, state_dict, ADAPTER, save_embedding_layers=False))
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def write_adapters(
    model: nn.Module, folder: Path, tensors: Mapping[str, torch.Tensor], base: str | None = None
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: Adapted by `add_adapters`.
        folder: Is there.
        tensors: Of the adapters, by the plan's names.
        base: What the configuration names as the base, where it is not the model that was loaded.
    """
    named = {f"{IN_FILES}{name}": values.contiguous() for name, values in tensors.items()}
    save_file(named, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    if base is not None:
        config.base_model_name_or_path, config.revision = base, None
    config.save_pretrained(folder)


def load_adapters(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put the values of an `adapter_model.safetensors` into the adapters of a model."""
    from peft import set_peft_model_state_dict

    plain = {name.removeprefix(IN_FILES): values for name, values in tensors.items()}
    unexpected = set_peft_model_state_dict(model, plain, ADAPTER).unexpected_keys
    if unexpected:
        raise ModelError(f"The checkpoint's adapters are of another model: {unexpected[0]} has no place in this one.")
