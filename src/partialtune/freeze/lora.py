"""LoRA, as a baseline: model + selectors -> a freeze plan of small adapters beside frozen matrices, and the adapters.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) leaves a matrix W as it is and adds (alpha / rank) B A to what
it does, with A (rank, inputs) and B (outputs, rank). B begins at 0, so that an adapted model begins as its base.

Names in the plan are the base's own for its weights, whose digests are then those of the base, and for adapters
`transformer.h.0.attn.c_attn.lora_A.weight`: as in `adapter_model.safetensors`, less `base_model.model.`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.errors import HOW_TO_INSTALL_PEFT, ModelError, RecipeError, is_peft_installed
from partialtune.freeze.plan import Adapter, FreezePlan, Phase, PlannedParameter
from partialtune.freeze.rates import with_rates
from partialtune.grammar.rate_syntax import read_layer_decay, read_part_rates
from partialtune.grammar.selector_syntax import parse_selector
from partialtune.model.loading import model_location
from partialtune.model.selectors import resolve_selectors
from partialtune.model.structure import ModelStructure, ParameterInfo, read_structure, with_fixed

ADAPTER = "default"  # peft's name for the only one
IN_FILES = "base_model.model."  # before every name in `adapter_model.safetensors`


def plan_lora(
    model: nn.Module,
    trainable: Sequence[str],
    rank: int = 8,
    alpha: int = 16,
    seed: int = 0,
    *,
    part_learning_rates: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
) -> FreezePlan:
    """Decide which matrices of `model` get adapters. The model is not touched and may lie on the meta device.

    plan_lora(gpt2, ["attention"]).trainable -> ["transformer.h.0.attn.c_attn.lora_A.weight", ...]

    Args:
        model: A causal language model.
        trainable: Selectors, as for `plan_freeze`: every matrix in a block that they choose gets an adapter. What they
            choose beside these (norms, biases) stays frozen.
        rank, alpha, seed: As in `Adapter`.
        part_learning_rates, layer_decay: As for `plan_freeze`. An adapter has the rate of the matrix that it adapts.

    Raises:
        RecipeError: If a selector chooses no matrix in a block, or a rate is wrong.
    """
    selectors = [trainable] if isinstance(trainable, str) else list(trainable)
    structure = with_fixed(read_structure(model), model)
    chosen = {
        module: selector
        for name, selector in resolve_selectors(structure, selectors).items()
        if (module := _adaptable(model, structure.by_name[name])) is not None
    }
    _check_every_selector_adapts(model, structure, selectors)
    if not chosen:
        raise RecipeError(f"trainable [{', '.join(selectors)}]: no matrix is left to adapt.")
    parameters = with_rates(
        tuple(_with_adapters(model, structure, chosen, rank)), structure, part_learning_rates, layer_decay
    )
    learning = [parameter for parameter in parameters if parameter.trainable]
    first_block = min(parameter.block for parameter in learning if parameter.block is not None)
    first = next(parameter for parameter in learning if parameter.block == first_block)
    return FreezePlan(
        model_name=structure.model_name,
        selectors=tuple(selectors),
        head="tied",
        block_count=structure.block_count,
        parameters=parameters,
        ties=tuple(structure.ties),
        phases=(Phase(0, tuple(parameter.name for parameter in learning), first.name, first_block),),
        adapter=Adapter(rank, alpha, tuple(chosen), seed),
        part_learning_rates=tuple(read_part_rates(part_learning_rates)[0].items()),
        layer_decay=read_layer_decay(layer_decay)[0],
    )


def _adaptable(model: nn.Module, info: ParameterInfo) -> str | None:
    """The path of the module whose matrix this parameter is, if it stands in a block and is one that LoRA adapts."""
    path, _, kind = info.name.rpartition(".")
    fits = info.block is not None and kind == "weight" and isinstance(model.get_submodule(path), nn.Linear | Conv1D)
    return path if fits else None


def _check_every_selector_adapts(model: nn.Module, structure: ModelStructure, selectors: Sequence[str]) -> None:
    useless = [
        text
        for text in selectors
        if not parse_selector(text).removes
        and not any(_adaptable(model, structure.by_name[name]) for name in resolve_selectors(structure, [text]))
    ]
    if useless:
        raise RecipeError(
            f"trainable, {', '.join(useless)}: method lora adapts matrices of linear layers in the blocks, and this "
            f"chooses none. Take attention, mlp or blocks[...], or method: partial."
        )


def _with_adapters(
    model: nn.Module, structure: ModelStructure, chosen: dict[str, str], rank: int
) -> Iterator[PlannedParameter]:
    """Every parameter as it is, and after those of an adapted module the adapter's two matrices."""
    infos = structure.parameters
    for info, following in zip(infos, [*infos[1:], None], strict=True):
        fixed = info.name in structure.fixed
        yield PlannedParameter(info.name, info.shape, info.numel, info.block, info.component, fixed=fixed)
        path = info.name.rpartition(".")[0]
        # Behind the module's last parameter (its bias, where it has one): there peft puts the adapter, and the plan's
        # order is that of named_parameters() once it is applied.
        if path in chosen and (following is None or following.name.rpartition(".")[0] != path):
            inputs, outputs = _width(model.get_submodule(path))
            for name, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                yield PlannedParameter(
                    name=f"{path}.{name}.weight",
                    shape=shape,
                    numel=shape[0] * shape[1],
                    block=info.block,
                    component=info.component,
                    selector=chosen[path],
                    from_step=0,
                )


def _width(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer; GPT-2's Conv1D holds its matrix the other way round."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


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
    tensors = get_peft_model_state_dict(model, state_dict, ADAPTER, save_embedding_layers=False)
    tensors = {f"{IN_FILES}{name}": values.contiguous() for name, values in tensors.items()}
    save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_adapters(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put the values of an `adapter_model.safetensors` into the adapters of a model."""
    from peft import set_peft_model_state_dict

    plain = {name.removeprefix(IN_FILES): values for name, values in tensors.items()}
    unexpected = set_peft_model_state_dict(model, plain, ADAPTER).unexpected_keys
    if unexpected:
        raise ModelError(f"The checkpoint's adapters are of another model: {unexpected[0]} has no place in this one.")
