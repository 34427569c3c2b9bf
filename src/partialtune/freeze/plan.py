"""The freeze plan: model + selectors -> data that says what trains, from when on, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from partialtune.errors import RecipeError
from partialtune.grammar.schedule_syntax import read_schedule
from partialtune.model.selectors import resolve_selectors
from partialtune.model.structure import ModelStructure, read_structure, with_fixed

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
        selector: The selector that chose it, None where it is frozen.
        from_step: First step of the phase that adds it, None where it is frozen.
        learning_rate: What that phase says, None where the recipe's holds.
        fixed: Whether the model's own code never trains it, so that no selector adds it.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    block: int | None
    component: str
    selector: str | None = None
    from_step: int | None = None
    learning_rate: float | None = None
    fixed: bool = False

    @property
    def trainable(self) -> bool:
        """Whether any phase of the run trains it."""
        return self.from_step is not None


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the same parameters learn.

    Attributes:
        from_step: Its first step; steps count from 0. None where `from_epoch` says it, before the text is read.
        trainable: Names of all that learns from then on, in the order of `named_parameters()`.
        backward_from: First of them in forward order: backward stops there.
        first_block: First block that backward passes, the number of blocks where it passes none.
        from_epoch: The epoch at which it begins, in a plan made before the text is read.
    """

    from_step: int | None
    trainable: tuple[str, ...]
    backward_from: str
    first_block: int
    from_epoch: float | None = None

    @property
    def start(self) -> str:
        """`step 40`, or `epoch 1.5`."""
        return f"step {self.from_step}" if self.from_epoch is None else f"epoch {self.from_epoch:g}"


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters of a plan.

    Attributes:
        rank: Rows of A, columns of B.
        alpha: What B A is multiplied with, times the rank.
        modules: Paths of the matrices that get one.
        seed: Of the start values of A.
    """

    rank: int
    alpha: int
    modules: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class FreezePlan:
    """What trains and what stays, decided before anything is touched. Print it, save it, test it without weights.

    Attributes:
        model_name: For messages.
        selectors: As they were given, those of later phases last.
        head: `untied` where the head is to get a matrix of its own; `tied` where the model stays as it is.
        block_count: Number of decoder blocks.
        parameters: Every tensor once, in the order of `named_parameters()`.
        ties: Pairs of names that are one tensor.
        phases: What trains from which step on; the first starts at step 0.
        adapter: For LoRA: what `apply_plan` puts into the model, and what alone trains.
    """

    model_name: str
    selectors: tuple[str, ...]
    head: str
    block_count: int
    parameters: tuple[PlannedParameter, ...]
    ties: tuple[tuple[str, str], ...]
    phases: tuple[Phase, ...]
    adapter: Adapter | None = None

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
    def fixed(self) -> list[str]:
        """Names of the frozen parameters that the model's own code never trains: no selector adds them."""
        return [parameter.name for parameter in self.parameters if parameter.fixed]

    @property
    def backward_from(self) -> str:
        """First trainable parameter in forward order: backward stops there, in the last phase."""
        return self.phases[-1].backward_from

    def phase_at(self, step: int) -> Phase:
        """The phase that step number `step`, counted from 0, belongs to; the first for a negative number."""
        return next((phase for phase in reversed(self.phases) if phase.from_step <= step), self.phases[0])

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
            "fixed": self.fixed,
            **({"adapter": {"rank": self.adapter.rank, "alpha": self.adapter.alpha}} if self.adapter else {}),
            "phases": [
                {
                    "from_step": phase.from_step,
                    **({} if phase.from_epoch is None else {"from_epoch": phase.from_epoch}),
                    "backward_from": phase.backward_from,
                    "trainable": list(phase.trainable),
                }
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


def plan_freeze(
    model: nn.Module,
    trainable: Sequence[str],
    head: str = "tied",
    schedule: Sequence[Mapping[str, Any]] = (),
) -> FreezePlan:
    """Decide which parameters of `model` train. The model is not touched and may lie on the meta device.

    Args:
        model: A causal language model.
        trainable: Selectors, read from left to right: `embeddings`, `blocks[-2:]`, `final_norm`, `head`, `all`,
            `/regex/`, `!selector`, ... May be empty where the schedule adds something at step 0. What the model's own
            code never trains (sinusoidal tables, biases of routers) stays frozen under all of them.
        head: `untied` gives the head a matrix of its own where the model ties it to the token embedding.
        schedule: Later phases, `{"from_step": 40, "trainable": [...], "learning_rate": 1e-5}`: each adds to what
            trains; in its list `!selector` takes away from what that list adds.

    Returns:
        The plan; `apply_plan` carries it out.

    Raises:
        RecipeError: If a selector matches nothing that can train, contradicts a tie, or nothing is left to train; if a
            phase adds nothing or is wrong in itself.
    """
    if head not in HEAD_CHOICES:
        raise RecipeError(f"head is {head!r}; allowed are {', '.join(HEAD_CHOICES)}.")
    first = [trainable] if isinstance(trainable, str) else list(trainable)
    additions = _additions(first, schedule)
    structure = with_fixed(read_structure(model, head=head), model)
    unties = head == "untied" and structure.total != read_structure(model).total
    learning = _what_learns(structure, additions)
    parameters = tuple(
        PlannedParameter(
            name=info.name,
            shape=info.shape,
            numel=info.numel,
            block=info.block,
            component=info.component,
            fixed=info.name in structure.fixed,
            **learning.get(info.name, {}),
        )
        for info in structure.parameters
    )
    return FreezePlan(
        model_name=structure.model_name,
        selectors=tuple(selector for addition in additions for selector in addition["trainable"]),
        head="untied" if unties else "tied",
        block_count=structure.block_count,
        parameters=parameters,
        ties=tuple((name, other) for name, other in structure.ties),
        phases=_phases(structure, parameters),
    )


def _additions(first: list[str], schedule: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the schedule in steps, checked, and before them what trains from the start."""
    entries, problems = read_schedule(schedule, trains_from_start=bool(first))
    if any("from_epoch" in entry for entry in entries):
        problems.append("from_epoch: how many steps an epoch has is known once the text is read. Say from_step here.")
    if problems:
        raise RecipeError("\n".join(f"schedule, {problem}" for problem in problems))
    return [{"from_step": 0, "trainable": first}, *entries] if first or not entries else entries


def _what_learns(structure: ModelStructure, additions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of each trainable parameter -> selector, step and rate of the first entry that adds it."""
    learning: dict[str, dict[str, Any]] = {}
    for number, addition in enumerate(additions):
        step, rate = addition["from_step"], addition.get("learning_rate")
        try:
            chosen = resolve_selectors(structure, addition["trainable"])
        except RecipeError as problem:
            raise RecipeError(f"schedule, from step {step}: {problem}" if number else str(problem)) from problem
        new = {name: selector for name, selector in chosen.items() if name not in learning}
        if not new:
            raise RecipeError(
                f"schedule, from step {step}: [{', '.join(addition['trainable'])}] adds nothing, all of it trains "
                f"already since step {max(learning[name]['from_step'] for name in chosen)}. Take the entry out."
            )
        learning |= {n: {"selector": s, "from_step": step, "learning_rate": rate} for n, s in new.items()}
    return learning


def _phases(structure: ModelStructure, parameters: Sequence[PlannedParameter]) -> tuple[Phase, ...]:
    phases = []
    for step in sorted({parameter.from_step for parameter in parameters if parameter.trainable}):
        names = tuple(p.name for p in parameters if p.trainable and p.from_step <= step)
        backward_from = structure.first_in_forward_order(names)
        rank = structure.by_name[backward_from].forward_rank  # 1 + index in a block
        phases.append(Phase(step, names, backward_from, first_block=min(max(rank - 1, 0), structure.block_count)))
    return tuple(phases)
