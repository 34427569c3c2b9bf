"""A freeze plan carried out: the only place that unties a head, adds adapters, sets `requires_grad` or eval mode."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from torch import nn

from partialtune.errors import RecipeError
from partialtune.freeze.lora import add_adapters
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.quantization import quantize_frozen
from partialtune.model.held_narrow import hold_narrow, round_frozen, widen
from partialtune.model.parameters import named_learners, named_weights, uncompiled
from partialtune.model.row_parameters import forget_rows, train_rows
from partialtune.model.train_mode import stop_layer_drop

logger = logging.getLogger(__name__)


def apply_plan(model: nn.Module, plan: FreezePlan) -> None:
    """Untie the head or add adapters where the plan says so; set `requires_grad` for all that any phase trains.

    From then on `model.train()` leaves modules that hold parameters, but none that trains, in eval mode with all
    below them, so that dropout in frozen blocks stays off. A module without parameters follows its parent. LayerDrop is
    switched off: no block is left out of a step. What the plan quantises is packed, in its place. Applying the same
    plan again changes nothing.

    Args:
        model: The model that the plan was made for. One that `torch.compile` has wrapped is treated as what it wraps.
        plan: What trains.

    Raises:
        RecipeError: If the plan was made for another model.
    """
    model = uncompiled(model)
    if plan.frozen_dtype is not None:
        hold_narrow(model)
    if plan.head == "untied":
        untie_head(model)
    planned = {parameter.name for parameter in plan.parameters}
    if plan.adapter is not None and {name for name, _ in named_weights(model)} != planned:  # else it has them already
        add_adapters(model, plan.adapter)
    present = {name for name, _ in named_weights(model)}
    if present != planned:
        strangers = sorted(present ^ planned)
        raise RecipeError(
            f"This plan was made for another model ({plan.model_name}): {len(strangers)} parameter names differ, "
            f"{strangers[0]} first: plan after wrapping. Make a plan for this model with plan_freeze, after all that "
            f"changes its parameters (get_peft_model, resize_token_embeddings, tie_weights)."
        )
    planned_shape = {parameter.name: tuple(parameter.shape) for parameter in plan.parameters}
    for name, parameter in named_weights(model):
        # Of a shard the shape is the whole one. bitsandbytes packs 4-bit values, whose shape says nothing.
        if parameter.is_floating_point() and tuple(parameter.shape) != planned_shape[name]:
            raise RecipeError(
                f"This plan was made for another model ({plan.model_name}): {name} had the shape "
                f"{planned_shape[name]} and has {tuple(parameter.shape)}. Make a plan for this model with plan_freeze, "
                f"after all that changes its parameters (get_peft_model, resize_token_embeddings)."
            )
    quantize_frozen(model, plan)
    # Whatever phase trains it: memory is at its largest in the last one, and DDP wants one dtype of each parameter.
    widen(model, plan.trainable, with_neighbours=plan.rows)
    if plan.frozen_dtype == "bf16":
        # Not what stands in one module with matrices of which rows train: `widen` has it in fp32 beside those.
        beside = {name.rpartition(".")[0] for name in plan.rows}
        kept = {name for name in plan.frozen if name.rpartition(".")[0] in beside}
        round_frozen(model, set(plan.frozen).difference(plan.quantized, kept))
    train_rows(model, plan.rows, dict(named_weights(model)))
    if switched_off := stop_layer_drop(model):
        logger.warning(switched_off)
    # On the instance: Trainer calls model.train() at every step and after every evaluation. Not a method of a class of
    # our own, whose name save_pretrained would write into the config; nor a bound method, which pickle looks for in the
    # model, by the function's name.
    model.train = partial(_train_what_is_trainable, model)
    let_learn(model, plan.trainable)


def let_learn(model: nn.Module, names: Iterable[str], also_in_eval: Iterable[str] = ()) -> None:
    """Set `requires_grad` for these parameters and for no others, and note which modules stay in eval mode.

    Args:
        model: A model under a plan.
        names: Of the parameters.
        also_in_eval: Names of further modules that stay in eval mode, as those of a frozen prefix do.
    """
    model = uncompiled(model)  # whose own `train` is the one that `apply_plan` replaced
    chosen = set(names)
    weights = dict(named_weights(model))
    for name, learner in named_learners(model):
        weights[name].requires_grad_(learner is weights[name] and name in chosen)
        learner.requires_grad_(name in chosen)
    model._modules_kept_in_eval = (*_modules_without_trainables(model), *also_in_eval)
    model.train(model.training)


def untie_head(model: nn.Module) -> None:
    """Give the head its own copy of the token embedding, and say so in the config, so that no reload ties them again.

    `from_pretrained(tie_word_embeddings=False)` would leave the new head randomly initialised.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head._parameters.get("weight") is not embedding._parameters.get("weight"):
        return
    forget_rows(model, id(embedding._parameters["weight"]))  # those of an earlier plan, which were both modules'
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    # Both: of a composite model the text part has a config of its own, which its own code reads.
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        # {alias: first name}, made once from the config: what save_pretrained and tie_weights go by. Left as it is, the
        # one may leave the head out of the file, and the other tie it again.
        model.all_tied_weights_keys = {}


def _modules_without_trainables(model: nn.Module) -> Iterator[str]:
    """Names of the topmost modules that hold parameters of which none trains."""

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        flags = [parameter.requires_grad for parameter in module.parameters()]
        if flags and not any(flags):
            yield path
            return
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def _train_what_is_trainable(self: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` for a model under a plan: frozen modules stay in eval mode, as long as they are frozen.

    But for token embeddings that Trainer has told to add noise (NEFTune): its hook goes by their own mode, and a table
    does nothing else by it.
    """
    type(self).train(self, mode)
    if mode:
        for module in _still_frozen(self):
            type(module).train(module, False)
            for noisy in (inner for inner in module.modules() if hasattr(inner, "neftune_noise_alpha")):
                noisy.training = True
    return self


def _still_frozen(model: nn.Module) -> Iterator[nn.Module]:
    """What stays in eval mode: not what somebody has let learn since, as a later training of all of it does."""
    for path in model._modules_kept_in_eval:
        with suppress(AttributeError):  # it was taken out of the model, which is for the audit to say
            module = model.get_submodule(path)
            if not any(parameter.requires_grad for parameter in module.parameters()):
                yield module
