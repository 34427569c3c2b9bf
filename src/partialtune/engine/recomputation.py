"""Activation checkpointing that keeps the saving of freezing: exactly the blocks that backward passes are recomputed.

Left to itself transformers makes the embeddings' output require gradients, so that backward runs through every frozen
block, and it does not checkpoint blocks in eval mode, which frozen ones are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from partialtune.engine.forward_stack import Worn, put_on
from partialtune.errors import RecipeError
from partialtune.model.parameters import uncompiled
from partialtune.model.structure import decoder_blocks


def recompute_from(model: nn.Module, first_block: int) -> list[Worn]:
    """Recompute the blocks from number `first_block` on in backward, also those in eval mode, and no others.

    Blocks in train mode are left to transformers, which `activation_checkpointing_enable` has told to. So are blocks
    that it does not mark: with `every_n_layers` it marks some.

    Returns:
        What was put on the blocks, to be taken off when another phase begins.

    Raises:
        RecipeError: If checkpointing is reentrant.
    """
    model = uncompiled(model)
    # Switched on by activation_checkpointing_enable(): it makes backward run through every frozen block to the input.
    model.disable_input_require_grads()
    blocks = decoder_blocks(model)
    for block in blocks[first_block:]:
        if getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant"):
            raise RecipeError(
                "Reentrant activation checkpointing gives a block no gradient whose input needs none, as that of the "
                "first block above the frozen ones. Say use_reentrant: False in activation_checkpointing_kwargs."
            )
    marked = (one for one in blocks[first_block:] if getattr(one, "gradient_checkpointing", False))
    worn = [put_on(block, partial(_recomputed, block)) for block in marked]
    if first_block:
        worn.append(put_on(blocks[0], _without_gradients))
    return worn


def _without_gradients(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a frozen block below which nothing trains.

    TRL's DPOTrainer switches checkpointing off and on again in every step, for the reference, and with it gradients of
    the input; peft's adapters get them twice, of which transformers takes one away again.
    """
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
    named = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    return forward(*detached, **named)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`forward`, checkpointed where gradients are wanted and transformers would not do it. The mode stays eval.

    `_gradient_checkpointing_func` is private to transformers: its checkpoint function with the recipe's keywords, which
    `activation_checkpointing_enable` puts on every block, and which its GradientCheckpointingLayer calls in train mode
    alone. Should it go, `test_exactly_the_blocks_that_backward_passes_are_recomputed` (tests/test_schedules.py) fails.
    """
    if block.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return block._gradient_checkpointing_func(partial(forward, **kwargs), *args)
