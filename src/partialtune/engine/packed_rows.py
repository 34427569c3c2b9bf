"""Does a model keep packed examples apart, so that each is computed as if it were alone?

In:  a batch without a mask whose position_ids begin anew within its rows, as packing and padding-free collators make
     them: input_ids (1, N), position_ids (1, N).
Out: why each of its examples cannot be kept by itself, in words; empty where it can. transformers keeps them apart by
     position_ids (eager, sdpa, flex) or by cu_seq_lens (flash attention); other code may not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from partialtune.engine.broken_off_pass import reach
from partialtune.engine.row_digests import BOUNDS, LONGEST, NUMBERS, SCALARS, WITHOUT_INFLUENCE
from partialtune.errors import ModelError
from partialtune.model.conformance import probe_windows
from partialtune.model.train_mode import evaluating

PROBED = 8  # tokens of each of the two examples of a probe
LOW = (torch.bfloat16, torch.float16)


def kind_of_packing(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides how a model keeps examples apart: one proof holds for all batches of a kind."""
    config: Any = getattr(model, "config", None)
    device = inputs["input_ids"].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    names = tuple(name for name in (*BOUNDS, NUMBERS, *LONGEST) if inputs.get(name) is not None)
    # flash attention goes by positions only where the batch is a single row
    return (getattr(config, "_attn_implementation", None), names, len(inputs["input_ids"]) > 1, autocast)


def why_not_apart(
    model: nn.Module, block: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], name: str
) -> str:
    """Why packed examples are not computed as each by itself, in words; empty where they are.

    Two examples are packed to a row, and the first is exchanged: the states of the second have to stay, and have to be
    those that it has alone. Three passes over 16 tokens, which end at the block.

    Args:
        model: The model itself.
        block: Whose output is compared: the last frozen one.
        forward: Of the module that gets token ids.
        inputs: What it was called with; only their kind matters. See `kind_of_packing`.
        name: Of the model's class, in an error.
    """
    ids = probe_windows(model, 3 * PROBED, [])[0].to(inputs["input_ids"].device)
    one, other, second = ids.split(PROBED)
    try:
        with evaluating(model):
            packed = _states(block, forward, _probe(inputs, [one, second]), name)[:, PROBED:]
            beside = _states(block, forward, _probe(inputs, [other, second]), name)[:, PROBED:]
            alone = _states(block, forward, _probe(inputs, [second]), name)
    except ModelError as error:
        return str(error).rstrip(".")
    low = packed.dtype in LOW or torch.is_autocast_enabled(ids.device.type)
    # Beside another example the same numbers are computed in the same order, alone in shapes of another size.
    for compared, allowed in ((beside, 1e-3 if low else 1e-5), (alone, 6e-2 if low else 1e-5)):
        if compared.shape != packed.shape:
            return f"a row gives states {tuple(compared.shape)} where {tuple(packed.shape)} were due"
        apart = float((compared.float() - packed.float()).norm() / packed.float().norm())
        if not apart <= allowed:  # NaN, too
            return f"an example that is packed with others has other states than by itself ({apart:.1e} off)"
    return ""


def _states(block: nn.Module, forward: Callable[..., Any], inputs: dict[str, Any], name: str) -> torch.Tensor:
    """States (B, T, D) that a block gives."""

    def hook(stop: Callable[[Any], None]) -> Any:
        def after(_block: nn.Module, _args: Any, output: Any) -> None:
            stop(output[0] if isinstance(output, tuple) else output)

        return block.register_forward_hook(after)

    return reach(forward, inputs, hook, name, "a pass over two packed examples")


def _probe(inputs: Mapping[str, Any], examples: list[torch.Tensor]) -> dict[str, Any]:
    """A batch of the kind of `inputs`: of one row, or two equal ones, that hold these examples."""
    first = int(inputs["position_ids"].min())  # 2 for RoBERTa and its like
    rows = min(2, len(inputs["input_ids"]))
    lengths = [len(example) for example in examples] * rows
    device, kind = inputs["position_ids"].device, inputs["position_ids"].dtype
    positions = torch.cat([torch.arange(first, first + len(one), device=device, dtype=kind) for one in examples])
    numbers = torch.cat([torch.full((len(one),), place, device=device) for place, one in enumerate(examples)])
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    whole = torch.cat(examples).to(inputs["input_ids"].dtype)
    made = {
        "input_ids": whole.repeat(rows, 1),
        "position_ids": positions.repeat(rows, 1),
        NUMBERS: numbers.repeat(rows, 1),
        **dict.fromkeys(BOUNDS, bounds),
        **dict.fromkeys(LONGEST, max(lengths)),
    }
    kept = {name: inputs[name] for name in inputs if name not in WITHOUT_INFLUENCE}
    probe = {name: value for name, value in kept.items() if isinstance(value, SCALARS)}
    for name, value in made.items():
        given = inputs.get(name)
        if given is None:
            continue
        is_tensor = isinstance(value, torch.Tensor) and isinstance(given, torch.Tensor)
        probe[name] = value.to(given.dtype) if is_tensor else value
    return {**probe, **({"use_cache": False} if "use_cache" in inputs else {})}
