"""A Trainer's model is sharded (FSDP2) before its training begins, so that the base is scored in shards too.

    trainer = Trainer(...)          # model whole, or on the meta device where the main process sends its weights
    attach(trainer, plan)
    shard_model(trainer)            # every process holds its shards, of the main one's weights where these are sent
    trainer.train()

Trainer shards in `train()`, and accelerate shards only together with an optimizer: so long a process that has loaded
no weights could compute nothing, and a model that fits no single device could not be scored.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_apply_ac, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import PreTrainedModel, Trainer, TrainingArguments

from partialtune.engine.plan_optimizer import bare_optimizer
from partialtune.errors import RecipeError
from partialtune.model.parameters import is_sharded
from partialtune.model.train_mode import has_dropout


def check_sharding(model: Any, plugin: FullyShardedDataParallelPlugin) -> None:
    """Stop where a model cannot be sharded in the way that its launcher says.

    Args:
        model: As it was loaded.
        plugin: What accelerate makes of the launcher's settings, or of the recipe's `fsdp_config`.

    Raises:
        RecipeError: In words.
    """
    has_blocks, policy = getattr(model, "_no_split_modules", None), plugin.auto_wrap_policy
    policy = policy.func if isinstance(policy, partial) else policy
    if policy is size_based_auto_wrap_policy and any(isinstance(module, nn.ModuleList) for module in model.modules()):
        raise RecipeError(
            "fsdp_auto_wrap_policy is SIZE_BASED_WRAP: it shards the list of the blocks as one, which FSDP2 does not "
            "take. Set TRANSFORMER_BASED_WRAP, which shards each block by itself."
        )
    kinds = sorted({type(module).__name__ for module in model.modules()})
    unknown = [name for name in plugin.transformer_cls_names_to_wrap or () if name not in kinds]
    if policy is transformer_auto_wrap_policy and unknown:
        own = f": {', '.join(sorted(has_blocks))}" if has_blocks else ""
        raise RecipeError(
            f"fsdp_transformer_layer_cls_to_wrap names {unknown[0]}, and {type(model).__name__} has no such module. "
            f"Name the class of its blocks, or leave the key out for those that the model names itself{own}."
        )
    if plugin.activation_checkpointing and isinstance(model, PreTrainedModel) and has_dropout(model.config):
        raise RecipeError(
            "fsdp_activation_checkpointing computes a block again with other random numbers than the first time, so "
            "that with dropout the gradients are those of another model. Set it to false, and "
            "activation_checkpointing: true in the recipe, which draws the same again; or say dropout: 0."
        )


def plugin_of(args: TrainingArguments) -> FullyShardedDataParallelPlugin:
    """What accelerate will make of the settings of recipe and launcher."""
    return FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))


def hand_losses_on_unrounded(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let a sharded model that computes in 16 bits give its loss as it has taken it, in fp32.

    accelerate has FSDP round all that a module gives to 16 bits, the loss too: 8.4785 and 8.4834 are both 8.5 then,
    and neither the best checkpoint nor an early end can be told by it.

    Args:
        plugin: Of FSDP2, before the model is sharded.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype in (torch.bfloat16, torch.float16):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def shard_model(trainer: Trainer) -> None:
    """Shard the model of a Trainer now, as accelerate does in `train()`, which then finds it sharded.

    Args:
        trainer: Under FSDP2. `torch_compile` wraps the model before it is sharded, and so does nothing here.
    """
    if trainer.args.torch_compile:
        return
    accelerator, plugin = trainer.accelerator, trainer.accelerator.state.fsdp_plugin
    model = trainer.model
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
        plugin.activation_checkpointing = False  # it is done: `prepare` would wrap each block once more
    trainer.model = trainer.model_wrapped = fsdp2_prepare_model(accelerator, model)


def shards_in(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of an optimizer, group by group, if they are sharded already; else nothing."""
    groups = [list(group["params"]) for group in bare_optimizer(optimizer).param_groups]
    return groups if any(is_sharded(parameter) for group in groups for parameter in group) else []


def put_back(optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Let an optimizer hold the parameters that it held before accelerate prepared it together with a sharded model.

    accelerate finds a parameter again by the address of its values. Shards without values, as a process has them of a
    parameter with fewer rows than there are processes, are all at address 0: one would stand in the place of all.

    Args:
        optimizer: Itself or accelerate's wrapper.
        groups: Of `shards_in`, taken before. Nothing is done where it is empty.
    """
    for group, parameters in zip(bare_optimizer(optimizer).param_groups, groups, strict=False):
        group["params"] = list(parameters)
