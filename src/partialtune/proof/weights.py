"""A model's parameters as the proof sees them: plain dotted names, whole values, sha256 digests."""

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import nn

INSIDE_PEFT = re.compile(r"\.base_layer(?=\.)|(?<=\.lora_[AB])\.default(?=\.)")
CHUNK = 4 * 2**20  # elements handled at once, 16 MB in fp32: keeps temporaries small beside any model


def plain_name(name: str) -> str:
    """The name of a parameter without what torch.compile, DDP and peft put into it.

    plain_name("_orig_mod.transformer.wte.weight") -> "transformer.wte.weight"
    plain_name("base_model.model.h.0.c_fc.base_layer.weight") -> "h.0.c_fc.weight"
    plain_name("base_model.model.h.0.c_fc.lora_A.default.weight") -> "h.0.c_fc.lora_A.weight"
    """
    if "_orig_mod." in name:
        name = name.replace("_orig_mod.", "")
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    return INSIDE_PEFT.sub("", name)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of `model` once, under its plain name, in the order of `named_parameters()`."""
    for name, parameter in model.named_parameters():
        yield plain_name(name), parameter


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All values of a parameter, shape as declared, without gradient.

    A parameter sharded by `fully_shard` is gathered, so that a shard is never taken for the whole: every process of
    its mesh has to call this together.
    """
    values = parameter.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def chunks_of(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Consecutive flat pieces of at most `CHUNK` elements, in C order."""
    yield from values.reshape(-1).split(CHUNK) if values.numel() else ()


def digest(parameter: torch.Tensor) -> str:
    """sha256 over a parameter's values as little-endian fp32 in C order, 64 hex digits.

    Widening bf16 or fp16 to fp32 is exact: a 16-bit base and an fp32 result have equal digests where no value changed.
    """
    sha = hashlib.sha256()
    for piece in chunks_of(whole(parameter)):
        array = piece.to("cpu", torch.float32).contiguous().numpy()
        sha.update(array.astype("<f4", copy=False).data)
    return sha.hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """`digest` of every parameter by plain name."""
    return {name: digest(parameter) for name, parameter in named_weights(model)}


def bit_sum(parameter: torch.Tensor) -> int:
    """Sum of a parameter's bit patterns read as integers: a quick check on its own device between two digests.

    It sees every single changed bit. It is no proof: changes that cancel (two values swapped) pass, which is what the
    digests at every save and at the end are for.
    """
    values = whole(parameter).contiguous()
    integers = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    return int(integers.sum(dtype=torch.int64))
