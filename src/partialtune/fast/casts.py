"""Frozen weights under autocast: cast to 16 bits once, where autocast casts them again in every forward pass.

The parameters themselves stay as they are, in fp32: what is digested, compared and saved is never a copy.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


class CastOnce:
    """16-bit copies of frozen weight matrices, made when a module is first called, and used while autocast is on.

    Args:
        model: The model itself; its `nn.Linear` and `Conv1D` modules take part while their weight is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[nn.Module, torch.Tensor] = {}
        self._patched: list[nn.Module] = []

    def begin(self) -> None:
        """Take part as the parameters now learn or not; copies that were made before are dropped."""
        self.end()
        for module in self._model.modules():
            if type(module) in PRODUCTS and not module.weight.requires_grad and "forward" not in vars(module):
                module.forward = self._cast_forward(module)
                self._patched.append(module)

    def end(self) -> None:
        """Leave the modules as they were."""
        for module in self._patched:
            vars(module).pop("forward", None)
        self._patched.clear()
        self.forget_copies()

    def forget_copies(self) -> None:
        """Drop the copies. What is called again gets a new one."""
        self._copies.clear()

    @property
    def bytes(self) -> int:
        """Size of the copies that there are."""
        return sum(copy.nbytes for copy in self._copies.values())

    def _cast_forward(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        product, plain = PRODUCTS[type(module)], module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            kind = x.device.type
            if not torch.is_autocast_enabled(kind):
                return plain(x)
            dtype = torch.get_autocast_dtype(kind)
            copy = self._copies.get(module)
            if copy is None or copy.dtype != dtype:
                copy = self._copies[module] = module.weight.detach().to(dtype)
            return product(x, copy, module.bias)

        return forward


def _conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(..., D) times (D, E), as `Conv1D` does it."""
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


PRODUCTS: dict[type, Callable[..., torch.Tensor]] = {nn.Linear: F.linear, Conv1D: _conv1d}
