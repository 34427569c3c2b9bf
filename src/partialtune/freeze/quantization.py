"""`frozen_quantization`: which frozen matrices of a plan are held in 8 or 4 bits, and a model that holds them so.

Held so are the weights of linear layers in the decoder blocks that no phase trains and that are no other parameter's
tensor too. Embeddings, head, norms, biases and fused experts stay as they are.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from partialtune.errors import HOW_TO_INSTALL_BITSANDBYTES, ModelError, RecipeError, is_bitsandbytes_installed
from partialtune.model.digests import digest
from partialtune.model.packed_weights import KINDS, PackedWeight, pack, packable, packed_size
from partialtune.model.parameters import is_sharded, named_weights, plain_name
from partialtune.model.structure import ModelStructure
from partialtune.words import megabytes

if TYPE_CHECKING:  # for its type alone: a plan is made with its quantisation
    from partialtune.freeze.plan import FreezePlan

# What DDP does not broadcast when it wraps a model: torch's name for it, which its own
# `_set_params_and_buffers_to_ignore_for_model` sets. A packed matrix has no memory of its shape, and DDP would copy it.
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def with_quantization(
    plan: "FreezePlan", model: nn.Module, structure: ModelStructure, kind: str | None
) -> "FreezePlan":
    """The plan, in which frozen matrices of the blocks are quantised.

    Args:
        plan: What trains.
        model: That it is made for.
        structure: Of the model.
        kind: `int8`, `nf4`, or None for none.

    Raises:
        RecipeError: If it is none of these, bitsandbytes is not installed, or nothing is left to quantise.
    """
    if kind is None:
        return plan
    if kind not in KINDS:
        raise RecipeError(f"frozen_quantization is {kind!r}; allowed are {', '.join(KINDS)}. Leave it out for neither.")
    if not is_bitsandbytes_installed():
        raise RecipeError(HOW_TO_INSTALL_BITSANDBYTES)
    linear = {
        plain_name(f"{path}.weight") for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    tied = {name for pair in structure.ties for name in pair}
    parameters = tuple(
        replace(p, quantized=not p.trainable and p.block is not None and p.name in linear - tied and packable(p.shape))
        for p in plan.parameters
    )
    if not any(parameter.quantized for parameter in parameters):
        raise RecipeError(
            f"frozen_quantization: nothing is left to quantise in {plan.model_name}. It takes frozen weights of linear "
            f"layers in the decoder blocks. Leave it out."
        )
    return replace(plan, parameters=parameters, frozen_quantization=kind)


def quantize_frozen(model: nn.Module, plan: "FreezePlan") -> None:
    """Let a model hold what its plan quantises in few bits, one matrix after another. Doing it again changes nothing.

    Args:
        model: Has the plan's parameters. One without values (meta, fake) stays as it is.
        plan: What is quantised.

    Raises:
        RecipeError: If the model is sharded, or holds in few bits what this plan does not.
    """
    wanted, kind = set(plan.quantized), plan.frozen_quantization or ""
    present = {name: weight for name, weight in named_weights(model) if isinstance(weight, PackedWeight)}
    strangers = [name for name, weight in present.items() if name not in wanted or weight.kind != kind]
    if strangers:
        raise RecipeError(
            f"{strangers[0]} is held in {present[strangers[0]].kind} by an earlier plan, and this one holds it "
            f"otherwise: its own values are gone. Load the model anew."
        )
    if not wanted:
        return
    ignored = []
    for path, module in model.named_modules():
        weight, name = module._parameters.get("weight"), f"{path}.weight"
        if weight is None or plain_name(name) not in wanted:
            continue
        if is_sharded(weight):
            raise RecipeError(
                "frozen_quantization: FSDP shards parameters, and a packed matrix cannot be sharded. Launch without it "
                "(DDP), or leave frozen_quantization out."
            )
        ignored.append(name)
        if has_values(weight) and not isinstance(weight, PackedWeight):
            packed = pack(weight, kind, digest(weight))
            weight.requires_grad_(False).grad = None  # an optimizer that was made before drops it
            module._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
    model.save_pretrained = partial(_refuse_to_save, kind)
    setattr(model, IGNORED_BY_DDP, list(dict.fromkeys([*getattr(model, IGNORED_BY_DDP, ()), *ignored])))


def _refuse_to_save(kind: str, *args: Any, **kwargs: Any) -> None:
    """In the place of `model.save_pretrained`, which would write codes as if they were weights.

    Raises:
        ModelError: In any case.
    """
    raise ModelError(
        f"Frozen matrices of this model are held in {kind}, and the base's own values are not in memory: it is "
        f"saved as a delta of its base. An attached Trainer does so: trainer.save_model(folder), then "
        f"partialtune.load(folder)."
    )


def has_values(weight: torch.Tensor) -> bool:
    """Whether there is something to pack: a forecast carries its plan out on tensors without values."""
    return not weight.is_meta and type(weight.data) in (torch.Tensor, PackedWeight)


def quantization_line(plan: "FreezePlan") -> str | None:
    """`nf4: 154 frozen matrices of the blocks, 880,803,840 values in 472.5 MB`; None where nothing is quantised."""
    if plan.frozen_quantization is None:
        return None
    held = [parameter for parameter in plan.parameters if parameter.quantized]
    size = sum(packed_size(parameter.shape, plan.frozen_quantization) for parameter in held)
    values = sum(parameter.numel for parameter in held)
    return (
        f"{plan.frozen_quantization}: {len(held)} frozen matrices of the blocks, {values:,} values, are held in "
        f"{megabytes(size, 1)} ({size / values:.2f} bytes a value)"
    )
