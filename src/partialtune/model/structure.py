"""The structure of a causal language model: nn.Module -> each tensor once, with all its names, block and component.

Only the module tree is read: the model is not run, not changed, and may lie on the meta device.
"""

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from partialtune.errors import ModelError, RecipeError
from partialtune.model.layout import Layout, Place
from partialtune.model.parameters import plain_name, uncompiled
from partialtune.model.row_parameters import rows_by_matrix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterInfo:
    """One tensor of the model. Block, component and rank are those of the place that the forward pass meets first."""

    name: str  # the one that model.named_parameters() gives
    aliases: tuple[str, ...]  # other names of the same tensor
    shape: tuple[int, ...]
    numel: int
    block: int | None  # None outside the blocks
    component: str  # one of layout.COMPONENTS; a tied head's is embeddings.tokens
    is_bias: bool
    forward_rank: int  # 0 before the blocks, 1 + index in a block, then the final norm's, then the head's
    places: tuple[Place, ...]  # one for `name` and for each alias, in this order


@dataclass(frozen=True)
class ModelStructure:
    """All parameters of a model, in the order of model.named_parameters()."""

    model_name: str
    blocks_path: str  # block 3 is the module f"{blocks_path}.3"
    block_count: int
    parameters: tuple[ParameterInfo, ...]
    fixed: frozenset[str] = frozenset()  # first names of those that no selector adds, see `with_fixed`

    @cached_property
    def ties(self) -> list[tuple[str, str]]:
        """Pairs (name, alias), one for each alias."""
        return [(info.name, alias) for info in self.parameters for alias in info.aliases]

    @cached_property
    def total(self) -> int:
        """Number of parameters; a tied tensor counts once."""
        return sum(info.numel for info in self.parameters)

    @cached_property
    def by_name(self) -> dict[str, ParameterInfo]:
        """Every name, aliases too -> its tensor."""
        return {place.name: info for info in self.parameters for place in info.places}

    def first_in_forward_order(self, names: Iterable[str]) -> str | None:
        """The one of these parameters that the forward pass meets first: backward need not go past it. None for none.

        Within one rank (the embeddings, a block) it is the one that the model registers first.
        """
        wanted = {self.by_name[name].name for name in names}
        found = [info for info in self.parameters if info.name in wanted]
        return min(found, key=lambda info: info.forward_rank).name if found else None


def read_structure(model: nn.Module, head: str = "tied") -> ModelStructure:
    """Find out what every parameter of a causal language model is.

    Args:
        model: What `AutoModelForCausalLM` gives, also on the meta device, with PEFT adapters, or wrapped by
            `torch.compile`. The names here are without what these put into them, see `weights.plain_name`.
        head: "tied" describes the model as it is. "untied" describes it as it will be when the head has a tensor of
            its own; the two are equal where the model does not tie.

    Raises:
        RecipeError: If `head` is neither of the two, or more than the head is tied, which cannot be untied alone.
        ModelError: If the model is quantised, or has no token embeddings or decoder blocks that can be found.
    """
    if head not in ("tied", "untied"):
        raise RecipeError(f"head is {head!r}. It can be 'tied' (as the model is) or 'untied' (a tensor of its own).")
    model = uncompiled(model)
    _refuse_quantised(model)
    layout = Layout(model)
    if head == "untied":
        _refuse_other_ties(model)
    if layout.towers:
        logger.info("beside the blocks in %s there are %s, of component `other`", layout.blocks, layout.towers)

    tensors: dict[tuple[int, bool], tuple[nn.Parameter, list[Place]]] = {}
    of_rows = {id(trained.parameter) for trained in rows_by_matrix(model).values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in of_rows:  # of a matrix that is described as a whole
            continue
        place = replace(layout.place(name), name=plain_name(name))
        key = (id(parameter), head == "untied" and place.component == "head")  # True: will be a tensor of its own
        tensors.setdefault(key, (parameter, []))[1].append(place)
    _refuse_shared_memory(model)
    return ModelStructure(
        model_name=getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
        blocks_path=layout.blocks,
        block_count=layout.block_count,
        parameters=tuple(_describe(tensor, places, layout.block_count) for tensor, places in tensors.values()),
    )


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in their order."""
    return model.get_submodule(read_structure(model).blocks_path)


def with_fixed(structure: ModelStructure, model: nn.Module) -> ModelStructure:
    """The structure, with what the model's own code never trains: sinusoidal tables, biases of routers, ...

    Such code makes a parameter without `requires_grad`. The model itself does not tell: `from_pretrained` lets every
    parameter require gradients, and its user may have frozen anything by hand. So its class is built once more from its
    config on the meta device, without weights (0.02 to 0.04 s), and its flags are those of a new model.

    Args:
        structure: Of `model`, by `read_structure`.
        model: As for `read_structure`. Nothing is known of what is no `PreTrainedModel`: then nothing is fixed.
    """
    model = uncompiled(model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, PreTrainedModel):
        return structure
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            new = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # noqa: BLE001 - a class of the user's own that needs more than a config raises anything
        logger.warning(
            "%s cannot be built from its config alone (%s: %s): what its code keeps fixed is not known, and counts as "
            "any other parameter.",
            *(type(model).__name__, type(error).__name__, error),
        )
        return structure
    names = [name for name, parameter in new.named_parameters() if not parameter.requires_grad]
    if getattr(model.config, "sinusoidal_embeddings", False):  # XLM: transformers 5 loses the flag that its code sets
        names += [info.name for info in structure.parameters if info.component == "embeddings.positions"]
    return replace(structure, fixed=frozenset(structure.by_name[n].name for n in names if n in structure.by_name))


def _describe(tensor: nn.Parameter, places: list[Place], block_count: int) -> ParameterInfo:
    def rank(place: Place) -> int:
        if place.block is not None:
            return 1 + place.block
        return {"final_norm": 1 + block_count, "head": 2 + block_count}.get(place.component, 0)

    first = min(places, key=lambda place: (rank(place), place.component == "other"))
    name, *aliases = [place.name for place in places]
    return ParameterInfo(
        name=name,
        aliases=tuple(aliases),
        shape=tuple(tensor.shape),
        numel=tensor.numel(),
        block=first.block,
        component=first.component,
        is_bias=places[0].is_bias,
        forward_rank=rank(first),
        places=tuple(places),
    )


def _refuse_quantised(model: nn.Module) -> None:
    if not getattr(model, "is_quantized", False):
        _refuse_other_numbers(model)
    narrow = [name for name, p in model.named_parameters() if not p.is_floating_point() or p.dtype.itemsize < 2]
    if narrow or getattr(model, "is_quantized", False):
        found = f" ({narrow[0]} is {model.get_parameter(narrow[0]).dtype})" if narrow else ""
        raise ModelError(
            f"{type(model).__name__} is quantised{found}: such weights cannot be trained, and no bit-exact claim about "
            f"them would hold. Load the model in float32, bfloat16 or float16, without a quantization_config."
        )


def _refuse_other_numbers(model: nn.Module) -> None:
    """Complex numbers, and integers too wide to be quantised ones: nothing here trains or saves such a parameter."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex() or (not parameter.is_floating_point() and parameter.dtype.itemsize > 1):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(
                f"{type(model).__name__}: {name} is {kind}. partialtune plans floating-point parameters only (float32, "
                f"bfloat16, float16). Register what is no such number as a buffer: a buffer has to keep every bit too."
            )


def _refuse_shared_memory(model: nn.Module) -> None:
    """Two parameters over one memory would be trained twice and frozen by half. A tie shares the parameter itself."""
    owners: dict[tuple[int, torch.Size], str] = {}
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor or parameter.data_ptr() == 0:  # sharded, meta or empty
            continue
        other = owners.setdefault((parameter.data_ptr(), parameter.shape), name)
        if other != name:
            raise ModelError(
                f"{other} and {name} are two parameters that share one memory. A tie has to share the parameter: call "
                f"model.tie_weights(), or give one of the two a copy of its own."
            )


def _refuse_other_ties(model: nn.Module) -> None:
    """Stop where more is tied than head and embedding: a config that says no longer so would untie all of it."""
    embedding, head = (getattr(model, f"get_{side}_embeddings")() for side in ("input", "output"))
    embedding = embedding._parameters.get("weight")
    if head is None or head._parameters.get("weight") is not embedding:
        return
    # Peft's wrapper has the names of the model within, which are not its own.
    owner = next((module for module in model.modules() if "all_tied_weights_keys" in vars(module)), model)
    ties = getattr(owner, "all_tied_weights_keys", None) or {}
    weights = dict(owner.named_parameters(remove_duplicate=False))
    others = sorted(alias for alias in ties if alias in weights and weights[alias] is not embedding)
    if others:
        raise RecipeError(
            f"head: untied is impossible for {type(model).__name__}: {others[0]} is tied to {ties[others[0]]}, and "
            f"transformers unties all or nothing. Leave head out, so that the head stays tied."
        )
