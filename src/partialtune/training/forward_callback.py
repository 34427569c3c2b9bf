"""A callback that also sees the forward passes of training: Trainer has no event between forward and backward.

In: the model of the events, which stays as it is but for one hook while it trains.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback


class ForwardCallback(TrainerCallback):
    """Gets `after_forward` at the end of each forward pass with gradients in train mode; evaluation is left out.

    The hook is on the model that Trainer hands to its callbacks, without the wrappers of DDP and `torch.compile`.
    """

    _handle: RemovableHandle | None = None

    def after_forward(self, inputs: Mapping[str, Any], output: Any) -> None:
        """A forward pass is over.

        Args:
            inputs: The keyword arguments of the model.
            output: What it gave, with a loss in it where it was given labels.
        """
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._leave()  # of a training that ended by an error, and so without its last event
        if model is not None:
            self._handle = model.register_forward_hook(_Hook(self.after_forward), with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self._leave()

    def _leave(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _NoHook:
    """Stands in for the hook in a copy of the model, which is not the one that trains."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Hook:
    """The hook. A copy of the model, or a pickled one, gets one that does nothing: clocks and data sets stay here.

    Args:
        see: Called after each forward pass of training, with the model's keyword arguments and its output.
    """

    def __init__(self, see: Callable[[Mapping[str, Any], Any], None]) -> None:
        self._see = see

    # The clock and the list of batches are no part of a graph. The model's own forward stays one graph: dynamo leaves
    # `__call__` with its hooks to Python, and compiles `forward` beneath it.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._see(kwargs, output)

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()
