"""Patches on the `forward` of single modules, with one owner: put on in order, taken off in any order.

    worn = put_on(block, lambda forward, *args, **kwargs: forward(*args, **kwargs))    # the outermost of this module
    worn.take_off()                                                                    # whatever was put on since

Casts, the prefix cache and activation checkpointing all stand in for a block's `forward`. Were each to keep what it
found there and put that back, the first to leave would put back a patch that is gone, and the last erase one that is
not. Here all patches of a module are one list, and `module.forward` is one object that calls them.

A `forward` of the module's own that was there before (another library's patch) stays beneath, and is there again when
the last of ours has left. One that another library puts over ours is left where it is.
"""

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

# transformers' hooks collect what a pass is asked for, as by output_hidden_states: such a pass is not cached. Ours look
# at no logits and no states.
NOT_OTHERS = ("transformers.", "partialtune.")
# Libraries whose own `forward` on a module gives of the same input the same output: other kernels, other devices.
KNOWN = ("transformers", "partialtune", "accelerate", "torch", "peft", "liger_kernel", "kernels")
# accelerate keeps what it found beneath its own: `_original_forward` for autocast, `_old_forward` for devices.
PLACES = frozenset({"forward", "_original_forward", "_old_forward"})
Patch = Callable[..., Any]  # (forward of what lies beneath, *args, **kwargs) -> what the module gives


class Patched:
    """What `module.forward` is while patches are on: calls them, the one that was put on last first.

    A copy of the model, or one that is pickled while it trains, has none of them: patches belong to the training that
    goes on, and hold states and copies of weights.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: Callable[..., Any] | None = vars(module).get("forward")  # another library's patch
        self.patches: list[Patch] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.found or _own_forward(self.module)
        for patch in self.patches:
            forward = partial(patch, forward)
        return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.found is not None:
            return copy.deepcopy(self.found, memo)
        return _own_forward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.found is not None:
            return _itself, (self.found,)
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return MethodType(type(module).forward, module)


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


class Worn:
    """A patch that is on a module.

    Args:
        patched: What calls it.
        patch: Itself.
    """

    def __init__(self, patched: Patched, patch: Patch) -> None:
        self._patched, self._patch = patched, patch

    def take_off(self) -> None:
        """Take it off, and leave the others on. Once it is off, nothing happens."""
        patched, module = self._patched, self._patched.module
        patched.patches = [patch for patch in patched.patches if patch is not self._patch]
        if patched.patches or vars(module).get("forward") is not patched:  # somebody else's is over ours: it calls on
            return
        if patched.found is None:
            del module.forward  # the class' own method is found again
        else:
            module.forward = patched.found


def is_patched_by_others(module: nn.Module) -> bool:
    """Whether another library has put a `forward` of its own on a module."""
    present = vars(module).get("forward")
    return present is not None and (not isinstance(present, Patched) or present.found is not None)


def computes_otherwise(module: nn.Module, known: Sequence[Any] = ()) -> bool:
    """Whether a `forward` stands on a module that belongs neither to its class nor to a library that is known.

    Args:
        module: Any module.
        known: Others that are known: what `strange_forwards` found before.
    """
    return any(all(one is not other for other in known) for one in strange_forwards(module))


def strange_forwards(module: nn.Module) -> list[Any]:
    """What stands in the place of a module's `forward`, of somebody who is not known."""
    if PLACES.isdisjoint(module.__dict__):  # asked for each module in each pass, and hardly ever otherwise
        return []
    present = [module.__dict__.get(name) for name in PLACES]
    present = [one.found if isinstance(one, Patched) else one for one in present]
    return [one for one in present if one is not None and not _is_known(one, type(module))]


def _is_known(forward: Any, owner: type[nn.Module]) -> bool:
    while isinstance(forward, (MethodType, partial)):
        forward = forward.__func__ if isinstance(forward, MethodType) else forward.func
    # Layers that come from the Hub as kernels hold no state, by the rule of `kernels`, which puts them there.
    from_hub = re.fullmatch(r"\w+\.forward", getattr(forward, "__qualname__", ""))
    if forward is owner.forward or (hasattr(owner, "kernel_layer_name") and from_hub):
        return True
    # Not `__module__`, which functools.wraps copies from what is wrapped.
    where = getattr(forward, "__globals__", {}).get("__name__") or type(forward).__module__
    return where.partition(".")[0] in KNOWN


def has_hooks_of_others(module: nn.Module) -> bool:
    """Whether somebody wants to see what a module is called with, or what it gives."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith(NOT_OTHERS) for hook in hooks)


def put_on(module: nn.Module, patch: Patch) -> Worn:
    """Let `patch(forward, *args, **kwargs)` stand in for the module's `forward`, over all that is on already.

    Args:
        module: Any module.
        patch: Gets what lies beneath as its first argument, and calls it or not.
    """
    patched = vars(module).get("forward")
    if not isinstance(patched, Patched):
        patched = module.forward = Patched(module)
    patched.patches.append(patch)
    return Worn(patched, patch)
