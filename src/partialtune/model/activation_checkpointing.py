"""Activation checkpointing that keeps the saving of freezing: exactly the blocks that backward passes are recomputed.

Left to itself transformers makes the embeddings' output require gradients, so that backward runs through every frozen
block, and it does not checkpoint blocks in eval mode, which frozen ones are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from partialtune.errors import ModelError
from partialtune.model.structure import read_structure


def check_support(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises ModelError where the recipe asks for checkpointing and the model has none."""
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} has no activation checkpointing. Take activation_checkpointing out, and lower "
            f"per_device_train_batch_size if memory is short (gradient_accumulation_steps makes up for it)."
        )


def recompute_from(model: nn.Module, first_block: int) -> None:
    """Recompute the blocks from number `first_block` on in backward, also those in eval mode, and no others.

    Blocks in train mode are left to transformers, which `activation_checkpointing_enable` has told to. So are blocks
    that it does not mark: with `every_n_layers` it marks some.
    """
    model.disable_input_require_grads()
    keep_activations(model)
    for block in _blocks(model)[first_block:]:
        if getattr(block, "gradient_checkpointing", False):
            block.forward = _recomputed(block, block.forward)


def keep_activations(model: nn.Module) -> None:
    """Undo `recompute_from`."""
    for block in _blocks(model):
        vars(block).pop("forward", None)


def _blocks(model: nn.Module) -> nn.ModuleList:
    return model.get_submodule(read_structure(model).blocks_path)


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, checkpointed where gradients are wanted and transformers would not do it. The mode stays eval."""

    def forward_of_frozen_block(*args: Any, **kwargs: Any) -> Any:
        if block.training or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return block._gradient_checkpointing_func(partial(forward, **kwargs), *args)

    return forward_of_frozen_block
