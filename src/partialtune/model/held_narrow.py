"""Frozen matrices held in 16 bits: which ones of a model, put in place and widened again.

    hold_narrow(model)               # a model loaded in bf16 now computes as its fp32 copy does
    widen(model, plan.trainable)     # these are fp32 parameters, as anybody's
    round_frozen(model, plan.frozen) # those of an fp32 base too: trained on rounded values, scored and saved unrounded

Of a language model matrices stay in 16 bits: those of its blocks, embeddings and head, which are nearly all of it. The
rest (norms, biases, other towers, buffers) is widened for good. Widening is exact; only `round_frozen` rounds.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from partialtune.model.narrow_weights import NARROW, NarrowWeight, widen_parameter
from partialtune.model.parameters import exact_values_of, named_weights
from partialtune.model.structure import read_structure

_UNROUNDED: ContextVar[bool] = ContextVar("unrounded", default=False)


@contextmanager
def unrounded() -> Iterator[None]:
    """Within it a model computes with the values that it saves: it matters after `round_frozen` alone."""
    before = _UNROUNDED.set(True)
    try:
        yield
    finally:
        _UNROUNDED.reset(before)


def is_unrounded() -> bool:
    """Whether a model is to compute with the values that it saves."""
    return _UNROUNDED.get()


class WithNarrowWeights(nn.Module):
    """Mixed into the class of a module that holds such matrices. Their attributes are properties.

    So it is for whoever takes the attribute, the module's own forward or other code; `named_parameters()` gives the
    matrices as they are held.

    Attributes:
        narrow_weights: The attributes.
        own_class: The module's class without this.
    """

    narrow_weights: tuple[str, ...]
    own_class: type

    @torch.compiler.disable  # a graph would hold the wide copies
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _narrow_weight(self, attribute: str) -> Any:
        parameter: Any = self._parameters[attribute]
        exact = exact_values_of(parameter) if _UNROUNDED.get() else None
        if exact is not None:
            return exact.to(parameter.device)  # for one product: on a GPU it is copied there
        return NarrowWeight.over(parameter) if parameter.dtype in NARROW else parameter

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What is saved is in fp32: `from_pretrained` loads a file of two dtypes in one, and would round the other."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Once for all modules that hold it: a tie is known in a state dict by its memory.
        made: dict[int, torch.Tensor] = destination.__dict__.setdefault("_widened", {})
        for attribute in () if keep_vars else self.narrow_weights:
            parameter: Any = self._parameters[attribute]
            if parameter is not None and parameter.dtype in NARROW and prefix + attribute in destination:
                if id(parameter) not in made:
                    exact = exact_values_of(parameter)
                    made[id(parameter)] = parameter.detach().float() if exact is None else exact
                destination[prefix + attribute] = made[id(parameter)]

    def __setattr__(self, name: str, value: Any) -> None:
        # Of a tie that is made again: `head.weight = embedding.weight`.
        held: Any = value.matrix if isinstance(value, NarrowWeight) else value
        if (name in self.narrow_weights and held is None) or isinstance(held, nn.Parameter):
            self.register_parameter(name, held)
        else:
            super().__setattr__(name, held)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Its class is made when it is needed, and pickle looks for classes by their names."""
        return _new_with_narrow, (self.own_class, self.narrow_weights), *super().__reduce_ex__(2)[2:]


class ComputesInFp32(nn.Module):
    """Mixed into the class of a model that holds such matrices.

    transformers asks a model's first parameter for its dtype, and writes that into the config of what is saved, by
    which a reload would round everything.
    """

    own_class: type

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_model, (self.own_class,), *super().__reduce_ex__(2)[2:]


def hold_narrow(model: nn.Module) -> None:
    """Let the matrices of 16 bits stay as they are held, and all modules compute with their fp32 values.

    What else is held in 16 bits is widened. Doing it again changes nothing.

    Args:
        model: A causal language model. Its parameters may be of several dtypes.
    """
    of_language, keep = _matrices_of_language(model), set[int]()
    for _, parameter in named_weights(model):
        if parameter.dtype not in NARROW:
            continue
        if id(parameter) in of_language:
            keep.add(id(parameter))
        else:
            parameter.data = parameter.data.float()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in NARROW:
                module._buffers[key] = buffer.float()
        if keep and isinstance(module, PreTrainedModel):
            module.__class__ = _computing_in_fp32(own_class_of(module))
        else:
            _let_hold(module, tuple(key for key, p in module._parameters.items() if p is not None and id(p) in keep))


def _matrices_of_language(model: nn.Module) -> set[int]:
    """ids of the matrices of blocks, embeddings and head that modules hold, not the model's class itself."""
    inside = {
        part.name
        for part in read_structure(model).parameters
        if part.block is not None or part.component.startswith(("embeddings", "head"))
    }
    of_models = {id(p) for m in model.modules() if isinstance(m, PreTrainedModel) for p in m._parameters.values()}
    named = named_weights(model)
    return {id(p) for name, p in named if name in inside and p.dim() > 1 and id(p) not in of_models}


def widen(model: nn.Module, names: Collection[str], with_neighbours: Collection[str] = ()) -> None:
    """Hold these parameters in fp32. Each stays the same object, so that ties and optimizers keep it.

    A model whose matrices were not held by `hold_narrow` keeps its dtypes.

    Args:
        model: The model.
        names: As `named_weights` gives them. Those that are wide already stay as they are.
        with_neighbours: Names among them whose modules hold nothing in 16 bits afterwards: matrices with rows that
            train, of which the class of the module has to know.
    """
    holders = list(modules_with_narrow(model))
    held = {id(module._parameters[key]) for module in holders for key in module.narrow_weights}
    named = dict(named_weights(model))
    wanted = {id(named[name]) for name in names if id(named[name]) in held}
    alone = {id(named[name]) for name in with_neighbours}
    for module in holders:
        direct = [parameter for parameter in module._parameters.values() if parameter is not None]
        if alone.intersection(map(id, direct)):
            wanted.update(id(parameter) for parameter in direct)
    for parameter in named.values():
        if id(parameter) in wanted:
            widen_parameter(parameter)
    for module in holders:
        parameters = module._parameters
        _let_hold(module, tuple(k for k in module.narrow_weights if getattr(parameters[k], "dtype", None) in NARROW))


def round_frozen(model: nn.Module, frozen: Collection[str]) -> None:
    """Hold frozen fp32 matrices of blocks, embeddings and head rounded to bf16. Their exact values stay on the CPU.

    The exact values count in what is digested and saved, and within `unrounded`. They are the tensors that the model
    held: of one that was loaded as views of its files, these files.

    Args:
        model: The model, in which all that trains is in fp32 by now.
        frozen: Names as `named_weights` gives them. Doing it again changes nothing.
    """
    of_language, wanted = _matrices_of_language(model), set(frozen)
    for name, parameter in named_weights(model):
        if name in wanted and id(parameter) in of_language and parameter.dtype == torch.float32:
            parameter.exact_values = parameter.data.cpu()
            parameter.data = parameter.data.to(torch.bfloat16)
    hold_narrow(model)


def held_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """`model.state_dict()` without copies: matrices as they are held, in 16 bits, or the exact values behind them.

    The model's own state dict widens all of them, which takes the memory of an fp32 model.
    """
    exact = {name: (tensor, exact_values_of(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: tensor if values is None else values for name, (tensor, values) in exact.items()}


def rounding_words(model: nn.Module) -> str:
    """What tells states of a rounded model from others: `rounded`, `unrounded`; empty where nothing is rounded."""
    holders = modules_with_narrow(model)
    is_rounded = any(exact_values_of(m._parameters[key]) is not None for m in holders for key in m.narrow_weights)
    return ("unrounded" if _UNROUNDED.get() else "rounded") if is_rounded else ""


def modules_with_narrow(model: nn.Module) -> Iterator[WithNarrowWeights]:
    """Every module of a model that holds a matrix in 16 bits."""
    return (module for module in model.modules() if isinstance(module, WithNarrowWeights))


def narrow_values(model: nn.Module, left_out: Collection[str] = ()) -> dict[str, int]:
    """dtype of the matrices that are held in 16 bits (`bfloat16`) -> number of their values.

    Args:
        model: The model.
        left_out: Names of parameters that do not count: what is to be widened.
    """
    found: dict[str, int] = {}
    held = {id(m._parameters[key]) for m in modules_with_narrow(model) for key in m.narrow_weights}
    for name, parameter in named_weights(model):
        if id(parameter) in held and parameter.dtype in NARROW and name not in left_out:
            kind = str(parameter.dtype).removeprefix("torch.")
            found[kind] = found.get(kind, 0) + parameter.numel()
    return found


def _let_hold(module: nn.Module, attributes: tuple[str, ...]) -> None:
    own: type = module.own_class if isinstance(module, WithNarrowWeights) else type(module)
    module.__class__ = _with_narrow(own, attributes) if attributes else own


@cache
def _with_narrow(own: type, attributes: tuple[str, ...]) -> type:
    """A module's class, of which these attributes are matrices held in 16 bits."""

    def matrix(attribute: str) -> property:
        return property(lambda module: module._narrow_weight(attribute))

    members: dict[str, Any] = {"__module__": own.__module__, "__doc__": own.__doc__, "own_class": own}
    members |= {"narrow_weights": attributes, **{name: matrix(name) for name in attributes}}
    bases: tuple[type, ...] = (WithNarrowWeights, own)
    return type(own.__name__, bases, members)


def _new_with_narrow(own: type, attributes: tuple[str, ...]) -> nn.Module:
    """What pickle makes before it fills it."""
    return nn.Module.__new__(_with_narrow(own, attributes))


@cache
def _computing_in_fp32(own: type) -> type:
    members = {"__module__": own.__module__, "__doc__": own.__doc__, "own_class": own}
    bases: tuple[type, ...] = (ComputesInFp32, own)
    return type(own.__name__, bases, members)


def _new_model(own: type) -> nn.Module:
    return nn.Module.__new__(_computing_in_fp32(own))


def own_class_of(module: nn.Module) -> type:
    """The class that a module has, or had before rows of it trained or its matrices were held in 16 bits."""
    return getattr(module, "own_class", type(module))
