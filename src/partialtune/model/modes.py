"""Train and eval mode of a model's modules, kept over what is done in between."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule has the mode that it had, frozen ones in eval too.

    no_grad, not inference_mode: buffers that a forward pass makes (rotary tables) must be usable in training later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
