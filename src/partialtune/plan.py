"""The freeze plan: model + selectors -> data that says what trains and why; and the one place that applies it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from partialtune.errors import RecipeError
from partialtune.selectors import resolve_selectors
from partialtune.structure import read_structure

HEAD_CHOICES = ("tied", "untied")


@dataclass(frozen=True)
class PlannedParameter:
    """One tensor of the model and what happens to it.

    Attributes:
        name: Full dotted name, as in `model.named_parameters()` once the plan is applied.
        shape: Its shape.
        numel: Number of values.
        block: Index of its decoder block, None outside the blocks.
        component: Its part of the model, see `structure.COMPONENTS`.
        trainable: Whether any phase of the run trains it.
        selector: The selector that chose it, None where it is frozen.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    block: int | None
    component: str
    trainable: bool
    selector: str | None


@dataclass(frozen=True)
class Phase:
    """From `from_step` on `trainable` learns, and backward has to reach `backward_from`."""

    from_step: int
    trainable: tuple[str, ...]
    backward_from: str | None


@dataclass(frozen=True)
class FreezePlan:
    """What trains and what stays, decided before anything is touched. Print it, save it, test it without weights.

    Attributes:
        model_name: For messages.
        selectors: As they were given.
        head: `untied` where the head is to get a matrix of its own; `tied` where the model stays as it is.
        block_count: Number of decoder blocks.
        parameters: Every tensor once, in the order of `named_parameters()`.
        ties: Pairs of names that are one tensor.
        phases: What trains from which step on; the first starts at step 0.
    """

    model_name: str
    selectors: tuple[str, ...]
    head: str
    block_count: int
    parameters: tuple[PlannedParameter, ...]
    ties: tuple[tuple[str, str], ...]
    phases: tuple[Phase, ...]

    @property
    def total_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters if parameter.trainable)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that some phase trains."""
        return [parameter.name for parameter in self.parameters if parameter.trainable]

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that no phase trains."""
        return [parameter.name for parameter in self.parameters if not parameter.trainable]

    @property
    def backward_from(self) -> str | None:
        """First trainable parameter in forward order: backward stops there. None where nothing trains."""
        return self.phases[-1].backward_from

    def groups(self) -> dict[str, list[PlannedParameter]]:
        """Parameters by place, in the plan's order: `block_07/attention` in blocks, `final_norm` outside them."""
        width = max(2, len(str(self.block_count - 1)))
        grouped: dict[str, list[PlannedParameter]] = {}
        for parameter in self.parameters:
            inside = f"block_{parameter.block:0{width}d}/" if parameter.block is not None else ""
            grouped.setdefault(inside + parameter.component, []).append(parameter)
        return grouped

    def to_json(self, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
        """The content of `freeze_plan.json`.

        Args:
            before: sha256 digest by parameter name at the start; empty where no weights were read.
            after: The same at the end.
        """
        return {
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "backward_from": self.backward_from,
            "head": self.head,
            "selectors": list(self.selectors),
            "ties": [list(pair) for pair in self.ties],
            "phases": [
                {"from_step": phase.from_step, "backward_from": phase.backward_from, "trainable": list(phase.trainable)}
                for phase in self.phases
            ],
            "parameters": [
                {
                    "name": parameter.name,
                    "shape": list(parameter.shape),
                    "numel": parameter.numel,
                    "block": parameter.block,
                    "component": parameter.component,
                    "trainable": parameter.trainable,
                    "selector": parameter.selector,
                    "sha256_before": before.get(parameter.name),
                    "sha256_after": after.get(parameter.name),
                }
                for parameter in self.parameters
            ],
        }


def plan_freeze(model: nn.Module, trainable: Sequence[str], head: str = "tied") -> FreezePlan:
    """Decide which parameters of `model` train. The model is not touched and may lie on the meta device.

    Args:
        model: A causal language model.
        trainable: Selectors, read from left to right: `embeddings`, `blocks[-2:]`, `final_norm`, `head`, `all`,
            `/regex/`, `!selector`, ...
        head: `untied` gives the head a matrix of its own where the model ties it to the token embedding.

    Returns:
        The plan; `apply_plan` carries it out.

    Raises:
        RecipeError: If a selector matches nothing, contradicts a tie, or nothing is left to train.
    """
    if head not in HEAD_CHOICES:
        raise RecipeError(f"head is {head!r}; allowed are {', '.join(HEAD_CHOICES)}.")
    structure = read_structure(model, head=head)
    chosen = resolve_selectors(structure, trainable)
    unties = head == "untied" and structure.total != read_structure(model).total
    parameters = tuple(
        PlannedParameter(
            name=info.name,
            shape=info.shape,
            numel=info.numel,
            block=info.block,
            component=info.component,
            trainable=info.name in chosen,
            selector=chosen.get(info.name),
        )
        for info in structure.parameters
    )
    phase = Phase(from_step=0, trainable=tuple(chosen), backward_from=structure.first_in_forward_order(chosen))
    return FreezePlan(
        model_name=structure.model_name,
        selectors=tuple(trainable),
        head="untied" if unties else "tied",
        block_count=structure.block_count,
        parameters=parameters,
        ties=tuple(tuple(pair) for pair in structure.ties),
        phases=(phase,),
    )


def apply_plan(model: nn.Module, plan: FreezePlan) -> None:
    """Untie the head where the plan says so and set `requires_grad`. Nothing else in the package does either.

    From then on `model.train()` leaves modules that hold parameters, but none that trains, in eval mode with all
    below them, so that dropout in frozen blocks stays off. A module without parameters follows its parent.

    Raises:
        RecipeError: If the plan was made for another model.
    """
    if plan.head == "untied":
        untie_head(model)
    parameters = dict(model.named_parameters())
    if set(parameters) != {planned.name for planned in plan.parameters}:
        strangers = sorted(set(parameters) ^ {planned.name for planned in plan.parameters})
        raise RecipeError(
            f"This plan was made for another model ({plan.model_name}): {len(strangers)} parameter names differ, "
            f"{strangers[0]} first. Make a plan for this model with plan_freeze."
        )
    for planned in plan.parameters:
        parameters[planned.name].requires_grad_(planned.trainable)
    model._modules_kept_in_eval = tuple(modules_without_trainables(model))
    model.train = MethodType(train_what_is_trainable, model)
    model.train(model.training)


def untie_head(model: nn.Module) -> None:
    """Give the head its own copy of the token embedding, and say so in the config, so that no reload ties them again.

    `from_pretrained(tie_word_embeddings=False)` would leave the new head randomly initialised.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}  # what save_pretrained and tie_weights go by


def modules_without_trainables(model: nn.Module) -> Iterator[str]:
    """Names of the topmost modules that hold parameters of which none trains."""

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        flags = [parameter.requires_grad for parameter in module.parameters()]
        if flags and not any(flags):
            yield path
            return
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def train_what_is_trainable(self: nn.Module, mode: bool = True) -> nn.Module:
    """`nn.Module.train` for a model under a plan: frozen modules stay in eval mode."""
    type(self).train(self, mode)
    if mode:
        for path in self._modules_kept_in_eval:
            module = self.get_submodule(path)
            type(module).train(module, False)
    return self
