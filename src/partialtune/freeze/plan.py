"""The freeze plan: model + selectors -> data that says what trains, from when on, and why.

In:  a model, best on the meta device; selectors, and a schedule of further ones or blocks that learn in turn.
Out: `FreezePlan`. Nothing is touched: `freeze.apply` carries the plan out, and everything that has to know what trains
     (optimizer, audit, deltas, forecast, report) reads it from the plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from partialtune.errors import RecipeError
from partialtune.freeze.adapter_plan import FACTOR, Adapter, checked_lora, with_adapters
from partialtune.freeze.additions import additions_of, what_trains
from partialtune.freeze.block_sampling import BlockSampling, in_turn, plan_sampling
from partialtune.freeze.plan_table import padded_matrices, plan_html
from partialtune.freeze.planned import Phase, PlannedParameter
from partialtune.freeze.quantization import with_quantization
from partialtune.freeze.rates import rate_to_json, rates_to_json, with_rates
from partialtune.grammar.lora_syntax import NOT_WITH_NEW_TOKENS, Lora
from partialtune.grammar.sampling_syntax import NOT_WITH_A_SCHEDULE, NOT_WITH_LORA
from partialtune.grammar.schedule_syntax import STARTS
from partialtune.model.new_tokens import NewTokens, new_tokens_of
from partialtune.model.rows import Rows, other_rows_name
from partialtune.model.selectors import Chosen
from partialtune.model.structure import ModelStructure, read_structure, with_fixed

HEAD_CHOICES = ("tied", "untied")


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
        phases: What trains from which step on; the first starts at step 0. Where blocks learn in turn it is one, of all
            that may learn; what learns at one time says `phase_at`.
        adapter: For LoRA: what `apply_plan` puts into the model, and what trains, alone or beside parts of the base.
        sampling: The blocks that learn in turn; None where none do.
        part_learning_rates: Selectors with a rate of their own, of which the last that matches wins.
        layer_decay: Factor of the rate from one layer to the one below it.
        new_tokens: What `add_tokens` gave to the model before the plan was made.
        tokenizer_length: Tokens of the model's tokenizer, where they are known.
        frozen_quantization: In which bits frozen matrices of the blocks are held, `int8` or `nf4`; None for their own.
        frozen_dtype: `auto` where frozen matrices that the model holds in 16 bits stay so and all else is widened;
            `bf16` where frozen fp32 matrices are rounded besides; None where the model's dtypes are left as they are.
    """

    model_name: str
    selectors: tuple[str, ...]
    head: str
    block_count: int
    parameters: tuple[PlannedParameter, ...]
    ties: tuple[tuple[str, str], ...]
    phases: tuple[Phase, ...]
    adapter: Adapter | None = None
    sampling: BlockSampling | None = None
    part_learning_rates: tuple[tuple[str, float], ...] = ()
    layer_decay: float | None = None
    new_tokens: NewTokens | None = None
    tokenizer_length: int | None = None
    frozen_quantization: str | None = None
    frozen_dtype: str | None = None
    _draws: dict[int, Phase] = field(default_factory=dict, init=False, repr=False, compare=False)  # by their number

    @property
    def total_parameters(self) -> int:
        """Values of all parameters, a tied tensor once."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trainable_parameters(self) -> int:
        """Values that any phase trains; of a matrix of which rows train, those rows."""
        return sum(parameter.learning for parameter in self.parameters)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that some phase trains."""
        return [parameter.name for parameter in self.parameters if parameter.trainable]

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that no phase trains."""
        return [parameter.name for parameter in self.parameters if not parameter.trainable]

    @property
    def adapters(self) -> list[str]:
        """Names of the matrices of adapters."""
        return [name for name in self.trainable if FACTOR.fullmatch(name)] if self.adapter is not None else []

    @property
    def parts(self) -> list[str]:
        """Names of the base's own parameters that some phase trains: all that trains but adapters."""
        return [name for name in self.trainable if self.adapter is None or not FACTOR.fullmatch(name)]

    @property
    def rows(self) -> dict[str, Rows]:
        """Name of each matrix of which only some rows train -> which ones."""
        return {parameter.name: parameter.rows for parameter in self.parameters if parameter.rows is not None}

    @property
    def frozen_rows(self) -> dict[str, Rows]:
        """What the frozen rows of each such matrix are called by themselves -> the rows that they do not hold."""
        return {other_rows_name(name, rows): rows for name, rows in self.rows.items()}

    @property
    def quantized(self) -> list[str]:
        """Names of the frozen matrices that are held in the bits of `frozen_quantization`."""
        return [parameter.name for parameter in self.parameters if parameter.quantized]

    @property
    def leaves_base_out(self) -> bool:
        """Whether what is saved holds what was trained and not the base: adapters, or what was quantised."""
        return self.adapter is not None or self.frozen_quantization is not None

    @property
    def names_rates(self) -> bool:
        """Whether parts of it have rates of their own, which are then logged by name."""
        return bool(self.part_learning_rates) or self.layer_decay is not None

    @property
    def fixed(self) -> list[str]:
        """Names of the frozen parameters that the model's own code never trains: no selector adds them."""
        return [parameter.name for parameter in self.parameters if parameter.fixed]

    @property
    def backward_from(self) -> str:
        """First trainable parameter in forward order: backward stops there, in the last phase."""
        return self.phases[-1].backward_from

    @property
    def blocks_passed(self) -> range:
        """The blocks that backward runs through in the last phase, on its way to the first trainable parameter."""
        return range(self.phases[-1].first_block, self.block_count)

    @property
    def frozen_blocks_passed(self) -> list[int]:
        """Those of them that hold nothing that trains."""
        trained = {parameter.block for parameter in self.parameters if parameter.trainable}
        return [block for block in self.blocks_passed if block not in trained]

    @property
    def changes_on_the_way(self) -> bool:
        """Whether what learns is not the same in every step: there is a schedule, or blocks learn in turn."""
        return len(self.phases) > 1 or self.sampling is not None

    @property
    def what_changes(self) -> str:
        """The setting that lets other parameters learn later on, for messages."""
        return "schedule" if self.sampling is None else "block_sampling"

    @property
    def always(self) -> list[str]:
        """Names of the parameters that learn whatever block is drawn; all that trains where none are drawn."""
        return [parameter.name for parameter in self.parameters if parameter.trainable and not parameter.in_turn]

    def phase_at(self, step: int) -> Phase:
        """The phase that step number `step`, counted from 0, belongs to; the first for a negative number.

        Where blocks learn in turn it is a draw. Of one draw it is the same object each time.
        """
        if self.sampling is not None:
            return self._drawn(self.sampling.number_at(step), self.sampling)
        return next((phase for phase in reversed(self.phases) if phase.first_step <= step), self.phases[0])

    def _drawn(self, number: int, sampling: BlockSampling) -> Phase:
        if number not in self._draws:
            blocks = sampling.draw(number)
            learning = [p for p in self.parameters if p.trainable and (not p.in_turn or p.block in blocks)]
            self._draws[number] = _phase_of(learning, number * sampling.every, self.block_count)
        return self._draws[number]

    def groups(self) -> dict[str, list[PlannedParameter]]:
        """Parameters by place, in the plan's order: `block_07/attention` in blocks, `final_norm` outside them."""
        width = max(2, len(str(self.block_count - 1)))  # digits, so that the labels sort as text: block_02, block_10
        grouped: dict[str, list[PlannedParameter]] = {}
        for parameter in self.parameters:
            inside = f"block_{parameter.block:0{width}d}/" if parameter.block is not None else ""
            grouped.setdefault(inside + parameter.component, []).append(parameter)
        return grouped

    def _repr_html_(self) -> str:
        """What a notebook shows in the place of `repr(plan)`."""
        return str(plan_html(self))

    def to_json(
        self, before: Mapping[str, str], after: Mapping[str, str], packed: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The content of `freeze_plan.json`.

        Args:
            before: sha256 digest by parameter name at the start, and of the frozen rows of a matrix by their name in
                `frozen_rows`; empty where no weights were read.
            after: The same at the end.
            packed: sha256 of the bytes by which each quantised matrix is held; where it is known.
        """
        return {
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "backward_from": self.backward_from,
            "head": self.head,
            "selectors": list(self.selectors),
            "ties": [list(pair) for pair in self.ties],
            "fixed": self.fixed,
            **({"adapter": self.adapter.to_json()} if self.adapter else {}),
            **({"sampling": self.sampling.to_json()} if self.sampling else {}),
            **rates_to_json(self),
            **({"tokenizer_length": self.tokenizer_length} if padded_matrices(self) else {}),
            **({"new_tokens": self.new_tokens.to_json()} if self.new_tokens else {}),
            **({"frozen_quantization": self.frozen_quantization} if self.frozen_quantization else {}),
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
                    **({"in_turn": True} if parameter.in_turn else {}),
                    **rate_to_json(self, parameter),
                    **({} if parameter.rows is None else {"rows": [list(run) for run in parameter.rows]}),
                    "sha256_before": before.get(parameter.name),
                    "sha256_after": after.get(parameter.name),
                    **_digests_of_other_rows(parameter, before, after),
                    **(self.new_tokens.of_base(parameter.name) if self.new_tokens else {}),
                    **({"sha256_packed": (packed or {}).get(parameter.name)} if parameter.quantized else {}),
                }
                for parameter in self.parameters
            ],
        }


def _digests_of_other_rows(
    parameter: PlannedParameter, before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, str | None]:
    """The keys of `freeze_plan.json` that only a matrix of which some rows train has."""
    if parameter.rows is None:
        return {}
    name = other_rows_name(parameter.name, parameter.rows)
    return {"sha256_other_rows_before": before.get(name), "sha256_other_rows_after": after.get(name)}


def plan_freeze(
    model: nn.Module,
    trainable: Sequence[str],
    head: str = "tied",
    schedule: Sequence[Mapping[str, Any]] = (),
    before_text: bool = False,
    *,
    lora: Mapping[str, Any] | Lora | None = None,
    block_sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    part_learning_rates: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    frozen_quantization: str | None = None,
    frozen_dtype: str | None = None,
) -> FreezePlan:
    """Decide which parameters of `model` train. The model is not touched and may lie on the meta device.

    Args:
        model: A causal language model.
        trainable: Selectors, read from left to right: `embeddings`, `blocks[-2:]`, `final_norm`, `head`, `all`,
            `/regex/`, `!selector`, ... May be empty where the schedule adds something at step 0, or blocks learn in
            turn. What the model's own code never trains (sinusoidal tables, biases of routers) stays frozen under all
            of them.
        head: `untied` gives the head a matrix of its own where the model ties it to the token embedding.
        schedule: Later phases, `{"from_step": 40, "trainable": [...], "learning_rate": 1e-5}`: each adds to what
            trains; in its list `!selector` takes away from what that list adds.
        before_text: Whether phases may begin at `from_epoch`, for a plan that is shown and not carried out: how many
            steps an epoch has is known once the text is read.
        lora: Adapters, `{"target": ["attention"], "rank": 8, "alpha": 16}`: every matrix in a block that `target`
            chooses gets one, which learns from the first step. What `trainable` and `schedule` choose learns beside
            them; both may be empty here.
        block_sampling: Blocks that learn in turn, beside `trainable`, which learns in every step:
            `{"blocks": 2, "every": 20, "order": "random", "keep_state": False, "candidates": ["blocks[2:]"]}`. Not
            together with a schedule, nor with lora.
        seed: Of random draws of blocks, and of the start values of adapters.
        part_learning_rates: Selector -> learning rate: `{"embeddings": 1e-5, "blocks[-1]": 1e-4}`. The last that
            matches a parameter wins; what none names has the phase's rate, or the recipe's or the optimizer's own. An
            adapter answers to the selectors of the matrix that it adapts, and to expressions for its own name.
        frozen_dtype: `auto` for a model that was loaded in 16 bits: what trains becomes fp32, frozen matrices stay as
            they are, and every module computes as if all of it were fp32. `bf16` rounds frozen fp32 matrices while
            training; scores and saved files have their own values. Without it the model's dtypes stay.
        layer_decay: That rate times layer_decay ** (layers up to the head), as in `rates.with_rates`.
        frozen_quantization: `int8` or `nf4`: frozen matrices of the blocks are held in so many bits (by bitsandbytes)
            and widened one at a time for each product. What any phase trains is not. The result belongs on the base as
            it was: it is saved as a delta.

    Returns:
        The plan; `apply_plan` carries it out.

    Raises:
        RecipeError: If a selector matches nothing that can train, contradicts a tie, or nothing is left to train; if a
            phase adds nothing or is wrong in itself; if there are fewer blocks to draw from than are drawn; if a rate
            is wrong, or names nothing that trains.
    """
    if head not in HEAD_CHOICES:
        raise RecipeError(f"head is {head!r}; allowed are {', '.join(HEAD_CHOICES)}.")
    if frozen_dtype not in (None, "auto", "bf16"):
        raise RecipeError(
            f"frozen_dtype is {frozen_dtype!r}; allowed are auto, bf16, and None for the model's own dtypes."
        )
    first = [trainable] if isinstance(trainable, str) else list(trainable)
    if block_sampling and schedule:
        raise RecipeError(f"block_sampling: {NOT_WITH_A_SCHEDULE}")
    if block_sampling and lora:
        raise RecipeError(f"block_sampling: {NOT_WITH_LORA}")
    lora, new_tokens = checked_lora(lora), new_tokens_of(model)
    if lora and new_tokens:
        raise RecipeError(f"lora: {NOT_WITH_NEW_TOKENS}")
    if new_tokens is not None and head == "untied" and new_tokens.in_embedding in first:
        first = list(dict.fromkeys([*first, new_tokens.in_head]))  # `add_tokens` could not know
    additions = additions_of(first, schedule, before_text, trains_from_start=bool(first or lora))
    structure = with_fixed(read_structure(model, head=head), model)
    # `head: untied` describes one tensor more where the model ties them, and the model as it is where it does not.
    unties = head == "untied" and structure.total != read_structure(model).total
    chosen = what_trains(structure, additions, lora is not None) if first or not block_sampling else {}
    selectors = tuple(selector for addition in additions for selector in addition["trainable"])
    adapter = None
    if lora is not None:
        structure, adapter, adapters = with_adapters(model, structure, lora, seed, beside_parts=bool(chosen))
        chosen |= {name: (Chosen(selector), 0) for name, selector in adapters.items()}
        selectors += adapter.selectors
    parameters = tuple(_planned_parameters(structure, additions, chosen))
    if block_sampling:
        rows_of = {name: what.rows for name, (what, _) in chosen.items()}
        sampling, drawn = plan_sampling(structure, block_sampling, rows_of, seed)
        parameters = tuple(in_turn(parameters, sampling, drawn))
        selectors += tuple(dict.fromkeys(drawn.values()))
        phases: tuple[Phase, ...] = (_phase_of([p for p in parameters if p.trainable], 0, structure.block_count),)
    else:
        sampling, phases = None, _phases(structure, additions, chosen)
    plan = FreezePlan(
        model_name=structure.model_name,
        selectors=selectors,
        head="untied" if unties else "tied",
        block_count=structure.block_count,
        parameters=parameters,
        ties=tuple(structure.ties),
        phases=phases,
        adapter=adapter,
        sampling=sampling,
        new_tokens=new_tokens,
        tokenizer_length=None if new_tokens is None else new_tokens.tokenizer_length,
        frozen_dtype=frozen_dtype,
    )
    plan = with_quantization(plan, model, structure, frozen_quantization)
    return with_rates(plan, structure, part_learning_rates, layer_decay)


def _planned_parameters(
    structure: ModelStructure, additions: Sequence[Mapping[str, Any]], chosen: Mapping[str, tuple[Chosen, int]]
) -> Iterator[PlannedParameter]:
    for info in structure.parameters:
        what, number = chosen.get(info.name, (None, None))
        addition = {} if number is None else additions[number]
        yield PlannedParameter(
            name=info.name,
            shape=info.shape,
            numel=info.numel,
            block=info.block,
            component=info.component,
            selector=None if what is None else what.selector,
            from_step=addition.get("from_step"),
            learning_rate=addition.get("learning_rate"),
            fixed=info.name in structure.fixed,
            rows=None if what is None else what.rows,
        )


def _phases(
    structure: ModelStructure, additions: Sequence[Mapping[str, Any]], chosen: Mapping[str, tuple[Chosen, int]]
) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    for number, addition in enumerate(additions):
        names = tuple(i.name for i in structure.parameters if i.name in chosen and chosen[i.name][1] <= number)
        backward_from = structure.first_in_forward_order(names)
        assert backward_from is not None  # every entry adds something: `what_trains` has seen to it
        rank = structure.by_name[backward_from].forward_rank  # 0 before the blocks, 1 + index in a block
        first_block = min(max(rank - 1, 0), structure.block_count)
        if number and not any(addition.get(key) for key in STARTS):  # it begins at 0, as `trainable` before it does
            phases.pop()
        phases.append(Phase(addition.get("from_step"), names, backward_from, first_block, addition.get("from_epoch")))
    return tuple(phases)


def _phase_of(learning: Sequence[PlannedParameter], from_step: int, block_count: int) -> Phase:
    """The phase in which these parameters learn, which are in the order of the plan."""

    def rank(
        parameter: PlannedParameter,
    ) -> int:  # of ParameterInfo.forward_rank: 0 before the blocks, 1 + index in one
        if parameter.block is not None:
            return 1 + parameter.block
        return {"final_norm": 1 + block_count, "head": 2 + block_count}.get(parameter.component, 0)

    first = min(learning, key=rank)
    first_block = min(max(rank(first) - 1, 0), block_count)
    return Phase(from_step, tuple(parameter.name for parameter in learning), first.name, first_block)
