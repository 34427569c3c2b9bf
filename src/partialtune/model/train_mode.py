"""What a model does differently while it trains: dropout, LayerDrop, activation checkpointing; and eval mode meanwhile.

In: a model or its config. Each function changes it in place, or for as long as a `with` lasts.

LayerDrop (Fan et al. 2019, https://arxiv.org/abs/1909.11556) leaves a whole block out of a step with some probability.
The decoder decides it by its own train mode, which it has as soon as anything in it trains: frozen blocks would be
left out too, and no gradient would come where the only block that trains is.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from partialtune.errors import ModelError

# attention_dropout, resid_pdrop, hidden_dropout_prob, attn_drop_rate, ...
DROPOUT = re.compile(r"dropout|pdrop|(?:^|_)drop(?:_(?:rate|prob|p))?$")
# What is dropped there is no value of an activation: whole layers, branches and paths (stochastic depth), tokens on
# their way to experts, whose share also scales what is computed in eval mode.
NO_DROPOUT = re.compile(r"(?:layer|block|path|token|router)_?drop|drop_?(?:layer|block|path|token|connect)")
LAYER_DROP = re.compile(r"(?:\w+_)?layer_?drop(?:_rate|_prob)?")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
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
            module.training = training  # not module.train(), which would set all below it too


# ---- dropout ---------------------------------------------------------------------------------------------------------


def is_dropout(key: str) -> bool:
    """Whether a field of a config is the probability of a dropout, by its name."""
    return DROPOUT.search(key) is not None and NO_DROPOUT.search(key) is None


def set_dropout(config: PreTrainedConfig, share: float) -> None:
    """Put `share` on every dropout of `config`: of its own, of the text model in it, and of the parts of that.

    Raises:
        ModelError: If a field does not take it.
    """
    for part, key, _ in _dropouts(config):
        _set(part, key, share)


def has_dropout(config: PreTrainedConfig) -> bool:
    """Whether a model of this config draws at random, in train mode, which activations it drops."""
    return any(share > 0 for _, _, share in _dropouts(config))


def _dropouts(config: PreTrainedConfig) -> list[tuple[PreTrainedConfig, str, float]]:
    """Every dropout of `config`, of the text model in it, and of the parts of that: whose, its key, its probability."""
    text = config.get_text_config()
    return [
        (part, key, value)
        for part in {id(part): part for part in (config, text, *_parts(text))}.values()
        for key, value in part.to_dict().items()
        if is_dropout(key) and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """MPT and DBRX keep the dropout of attention in a config within their config."""
    return [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def _set(config: PreTrainedConfig, key: str, share: float) -> None:
    """Fields are checked against their types: most take a float, MPT's attention an int alone."""
    try:
        setattr(config, key, share)
    except StrictDataclassError as error:
        if share == int(share) and isinstance(getattr(config, key), int):
            setattr(config, key, int(share))
            return
        raise ModelError(
            f"dropout is {share:g}, and {key} of {type(config).__name__} takes no such value: a config that holds it "
            f"could not be loaded again. Say dropout: 0, or dropout: model."
        ) from error


# ---- LayerDrop -------------------------------------------------------------------------------------------------------


def _layer_drops(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, float]]:
    """Where blocks are left out at random in train mode: (dotted name, module, attribute, probability above 0).

    Modules read it from their config as they are made: the config is not what counts, and keeps its value.
    """
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if LAYER_DROP.fullmatch(key) and isinstance(value, int | float) and value > 0:
                yield f"{path}.{key}" if path else key, module, key, value


def stop_layer_drop(model: nn.Module) -> str:
    """Switch LayerDrop off in the model, for good. Its config keeps its value, which is what is saved.

    Returns:
        What was switched off, in words; empty where the model has no LayerDrop.
    """
    found = list(_layer_drops(model))
    for _, module, key, _ in found:
        setattr(module, key, 0.0)
    if not found:
        return ""
    was = ", ".join(f"{name} {share:g}" for name, _, _, share in found)
    return f"LayerDrop is off (it was {was}): no block may be left out of a step. The config keeps its value."


@contextmanager
def no_layer_drop(model: nn.Module) -> Iterator[None]:
    """Within it no block is left out, as under a plan; afterwards the model is as it was."""
    found = list(_layer_drops(model))
    for _, module, key, _ in found:
        setattr(module, key, 0.0)
    try:
        yield
    finally:
        for _, module, key, share in found:
            setattr(module, key, share)


# ---- activation checkpointing ----------------------------------------------------------------------------------------


def check_support(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises ModelError where the recipe asks for checkpointing and the model has none."""
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} has no activation checkpointing. Take activation_checkpointing out, and lower "
            f"per_device_train_batch_size if memory is short (gradient_accumulation_steps makes up for it)."
        )
