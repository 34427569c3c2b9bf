"""All that the states of a prefix depend on beside their rows: what a folder of kept states on disk is named for.

In:  a model with its fast paths on, and how many of its first blocks are frozen.
Out: facts, as JSON. States of other facts are never met, even where the weights are the same.

In memory one run is by itself, and weights, autocast and rows tell states apart. On disk runs meet that differ in all
else that a bit may depend on: the config (heads, rotary angles), the code, the libraries' versions, how attention is
computed, the device, the number of threads of a CPU. Last, the prefix computes 32 tokens: whatever else is different,
such as a patch that somebody put on, shows in their digest.
"""

import hashlib
import inspect
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from partialtune.engine.broken_off_pass import reach
from partialtune.engine.forward_stack import is_patched_by_others
from partialtune.errors import ModelError
from partialtune.model.config_keys import function_keys
from partialtune.model.conformance import probe_windows
from partialtune.model.structure import decoder_blocks
from partialtune.model.train_mode import evaluating

PROBED_TOKENS = 32
# Their code is known by their version; that of others by its source.
LIBRARIES = ("torch", "transformers", "peft", "partialtune")


def prefix_facts(model: nn.Module, blocks: int, digest: bytes, compiled: bool = False) -> dict[str, Any]:
    """Everything that the states behind the first `blocks` blocks depend on, beside their rows, as JSON.

    Args:
        model: The model itself, on its device, with all on it that it computes with.
        blocks: Number of blocks, at least 1.
        digest: Of the weights, see `prefix_weights.prefix_digest`.
        compiled: Whether the passes go through `torch.compile`.

    Raises:
        ModelError: If something is on the prefix of which it is not known what it computes.
    """
    config: Any = getattr(model, "config", None)
    modules = _modules_of_prefix(model, blocks)
    for name, module in modules.items():
        if module is not model and is_patched_by_others(module):  # on the model itself accelerate puts its autocast
            raise ModelError(f"another library has put a forward of its own on {name or type(module).__name__}")
    return {
        "weights": digest.hex(),
        "blocks": blocks,
        "held_as": sorted({str(parameter.dtype) for parameter in _parameters_of(modules)}),
        "config": function_keys(config.to_dict()) if config is not None else {},
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "code": sorted(map(_code_of, {type(module) for module in modules.values()})),
        "versions": {name: _version(name) for name in LIBRARIES},
        "compiled": compiled,
        **_arithmetic(next(model.parameters()).device),
        "probe": _probe(model, blocks),
    }


def _modules_of_prefix(model: nn.Module, blocks: int) -> dict[str, nn.Module]:
    """The modules, by name, but for later blocks, what lies in them, and the head."""
    behind = {module for block in decoder_blocks(model)[blocks:] for module in block.modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    behind |= set(head.modules()) if head is not None else set()
    return {name: module for name, module in model.named_modules() if module not in behind}


def _parameters_of(modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    held = [parameter for module in modules.values() for parameter in module._parameters.values()]
    return [parameter for parameter in held if parameter is not None and not parameter.requires_grad]


def _code_of(kind: type) -> str:
    """A module's class and its forward pass, in words; with a digest of the source where no version tells it."""
    forward: Any = inspect.unwrap(getattr(kind, "forward", kind))  # somebody may have put another one into the class
    words = []
    for part in (kind, forward):
        name, module = getattr(part, "__qualname__", type(part).__name__), str(part.__module__)
        words.append(f"{module}.{name}")
        if module.split(".")[0] not in LIBRARIES:
            try:
                source = inspect.getsource(part)
            except (OSError, TypeError) as error:
                raise ModelError(f"the source of {name} cannot be read") from error
            words.append(hashlib.sha256(source.encode()).hexdigest())
    return " ".join(words)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _arithmetic(device: torch.device) -> dict[str, Any]:
    """What products are computed with: another processor, or another number of threads, may sum in another order."""
    facts = {
        "device": device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cpu":
        facts |= {
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "mkldnn": torch.backends.mkldnn.enabled,
        }
    elif device.type == "cuda":
        facts |= {
            "processor": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "reduced_bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        }
    return facts


@cache
def _processor() -> str:
    """The processor's name: math libraries choose their code by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@torch.no_grad()
def _probe(model: nn.Module, blocks: int) -> str:
    """A digest of what the prefix gives for 32 tokens."""
    last = decoder_blocks(model)[blocks - 1]
    inputs = {"input_ids": probe_windows(model, PROBED_TOKENS, []), "use_cache": False}
    with evaluating(model):
        name = type(model).__name__
        given = reach(model, inputs, lambda stop: last.register_forward_hook(lambda _m, _args, out: stop(out)), name)
    states = given[0] if isinstance(given, tuple) else given
    return hashlib.sha256(states.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
