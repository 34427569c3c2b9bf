"""Forward passes that end on the way: as soon as a value inside them is there.

In: a model and token ids. Out: the value, or which modules the pass meets before the first block.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from partialtune.errors import ModelError, PartialtuneError, in_one_line, is_ours
from partialtune.model.structure import read_structure
from partialtune.model.train_mode import evaluating


class _Reached(Exception):
    """The forward pass has come as far as it was wanted to."""


def reach(
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    hook: Callable[[Callable[[Any], None]], Any],
    name: str,
    what: str = "its forward pass",
) -> Any:
    """A value inside a forward pass, which ends as soon as it is there.

    reach(model, inputs, lambda stop: block.register_forward_hook(lambda _module, _args, out: stop(out)), "Llama")
        -> the block's output

    Args:
        forward: A causal language model, or the forward of what in it gets token ids.
        inputs: What it is called with.
        hook: Registers a hook that calls `stop(value)`, and returns its handle.
        name: Of the model, in an error.
        what: The pass, in an error.

    Returns:
        The first value that `stop` is called with.

    Raises:
        ModelError: If the model raises anything in it, or calls the hook's module never. Errors of this package's own
            code, which runs inside the pass, are raised as they are.
    """
    found: list[Any] = []

    def stop(value: Any) -> None:
        found.append(value)
        raise _Reached

    handle = hook(stop)
    try:
        forward(**inputs)
    except _Reached:
        return found[0]
    except PartialtuneError:
        raise
    except Exception as error:  # a model may raise anything: KeyError, RuntimeError, an assertion
        if is_ours(error):
            raise
        words = in_one_line(error)
        raise ModelError(f"{name}: {what} fails ({type(error).__name__}: {words}).") from error
    finally:
        handle.remove()
    raise ModelError(f"{name}: its forward pass calls no module for a block, or none for its head.")


def modules_before_blocks(model: nn.Module, input_ids: torch.Tensor) -> list[str]:
    """Names of the modules without parameters that the forward pass meets before the first block: dropouts, mostly.

    They belong to the frozen prefix. A module without parameters follows its parent's mode: in train mode, GPT-2's
    dropout of the embeddings would make other states in every pass.

    Args:
        model: A causal language model.
        input_ids: int64 (B, T), any.
    """
    path = read_structure(model).blocks_path
    met: dict[str, None] = {}  # in the order of their calls
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: met.update({name: None}))
        for name, module in model.named_modules()
        if not name.startswith(f"{path}.") and name != path and next(module.parameters(), None) is None
    ]
    try:
        first = model.get_submodule(f"{path}.0")
        with evaluating(model):
            inputs = {"input_ids": input_ids, "use_cache": False}
            name = type(model).__name__
            reach(model, inputs, lambda stop: first.register_forward_pre_hook(lambda *_: stop(None)), name)
    finally:
        for hook in hooks:
            hook.remove()
    return list(met)
