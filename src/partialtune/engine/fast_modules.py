"""Modules computed in a cheaper way while training: GELU in one operation, frozen weights cast to 16 bits once.

In: a model, whose modules are exchanged or get another `forward`. Out: the model as it was, when it is taken off. The
parameters themselves stay as they are, in fp32: what is digested, compared and saved is never a copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from partialtune.engine.forward_stack import Worn, computes_otherwise, has_hooks_of_others, is_patched_by_others, put_on
from partialtune.model.packed_weights import PackedWeight

# GELU by tanh as a chain of seven operations (GPT-2's `gelu_new`), all the same function:
#     0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))    (Hendrycks and Gimpel 2016, section 2)
# The chain keeps five tensors of the MLP's width for backward, torch's fused operation its input alone: of GPT-2 and
# 16 x 256 tokens one such tensor is 4096 x 3072 x 4 bytes = 50 MB a block.
CHAINS = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)


@contextmanager
def fused_gelu(model: nn.Module) -> Iterator[int]:
    """Within it, `model` computes these activations fused; its config, names and parameters stay as they are.

    Yields:
        How many were replaced.
    """
    chains = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in CHAINS  # the class itself: one derived from it may compute something else
        and not (has_hooks_of_others(child) or computes_otherwise(child))
    ]
    for parent, name, _ in chains:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    try:
        yield len(chains)
    finally:
        for parent, name, child in chains:
            setattr(parent, name, child)


class CastOnce:
    """16-bit copies of frozen weight matrices, made when a module is first called, and used while autocast is on.

    Autocast alone casts every matrix again in every forward pass. It keeps a copy only where the weight requires
    gradients, and only until the pass ends.

    Args:
        model: The model itself; its `nn.Linear` and `Conv1D` modules take part while their weight is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[nn.Module, torch.Tensor] = {}
        self._worn: list[Worn] = []

    def begin(self) -> None:
        """Take part as the parameters now learn or not; copies that were made before are dropped."""
        self.end()
        for module in self._model.modules():
            # A `forward` of the instance's own is somebody else's patch (a hook of accelerate), whose work would be
            # left out: the product here calls nothing beneath it.
            if type(module) not in PRODUCTS or module.weight.requires_grad or is_patched_by_others(module):
                continue
            if not isinstance(module.weight, PackedWeight):  # of which a copy would be what packing saves
                self._worn.append(put_on(module, partial(self._product, module)))

    def end(self) -> None:
        """Leave the modules as they were."""
        for worn in self._worn:
            worn.take_off()
        self._worn.clear()
        self.forget_copies()

    def forget_copies(self) -> None:
        """Drop the copies. What is called again gets a new one."""
        self._copies.clear()

    @property
    def bytes(self) -> int:
        """Size of the copies that there are."""
        return sum(copy.nbytes for copy in self._copies.values())

    def _product(self, module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return forward(x)
        dtype = torch.get_autocast_dtype(kind)
        if module.weight.dtype == dtype:  # held in 16 bits: nothing to cast
            return forward(x)
        copy = self._copies.get(module)
        if copy is None or copy.dtype != dtype:
            copy = self._copies[module] = module.weight.detach().to(dtype)
        return PRODUCTS[type(module)](x, copy, module.bias)


def _conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(..., D) times (D, E), as `Conv1D` does it."""
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


PRODUCTS: dict[type, Callable[..., torch.Tensor]] = {nn.Linear: F.linear, Conv1D: _conv1d}
