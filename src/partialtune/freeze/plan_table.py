"""A freeze plan in words and columns: text for the terminal, HTML for notebooks, both of the same rows."""

from typing import TYPE_CHECKING

from markupsafe import Markup

from partialtune.freeze.block_sampling import blocks_words
from partialtune.freeze.quantization import quantization_line
from partialtune.freeze.rates import rate_name
from partialtune.model.new_tokens import words_on
from partialtune.tables import draw_table, html_table

if TYPE_CHECKING:  # for its types alone: a plan shows itself by what stands here
    from partialtune.freeze.plan import FreezePlan
    from partialtune.freeze.planned import PlannedParameter

Rows = list[tuple[str, ...]]


def plan_summary(plan: "FreezePlan") -> str:
    """One line: `trainable 39,385,344 of 124,439,808 (31.7%): embeddings, final_norm, head`."""
    percent = 100 * plan.trainable_parameters / plan.total_parameters
    share = f"{percent:.1f}" if percent >= 0.1 else f"{percent:.2g}"
    chosen = plan.selectors
    if plan.sampling is not None:
        in_turn = {parameter.selector for parameter in plan.parameters if parameter.in_turn}
        chosen = (*(one for one in chosen if one not in in_turn), plan.sampling.words())
    return f"trainable {plan.trainable_parameters:,} of {plan.total_parameters:,} ({share}%): {', '.join(chosen)}"


def plan_table(plan: "FreezePlan", learning_rate: float | None = None) -> str:
    """What trains by selector and by place, the ties, what the model keeps fixed, and where backward stops.

    Args:
        plan: What to show.
        learning_rate: The recipe's, for the rates that a plan with several has as multiples of it.
    """
    title = f"{plan.model_name}: {plan_summary(plan)}"
    return "\n\n".join([title, *map(draw_table, _tables(plan, learning_rate)), "\n".join(_closing_lines(plan))])


def plan_html(plan: "FreezePlan") -> Markup:
    """The same as HTML, for a notebook."""
    title = Markup("<b>{}</b>: {}").format(plan.model_name, plan_summary(plan))
    lines = Markup("<br>").join(_closing_lines(plan))  # escapes each of them
    return Markup("<div>{}{}{}</div>").format(title, Markup("").join(map(html_table, _tables(plan))), lines)


def _tables(plan: "FreezePlan", learning_rate: float | None = None) -> list[Rows]:
    """The rows of each table, titles first: by selector, by place and, where there is a schedule, by phase."""
    phases = [_phase_rows(plan)] if len(plan.phases) > 1 else []
    return [_selector_rows(plan), _place_rows(plan, learning_rate), *phases]


def _selector_rows(plan: "FreezePlan") -> Rows:
    chosen: dict[str, int] = {}
    for parameter in plan.parameters:
        if parameter.selector is not None:
            chosen[parameter.selector] = chosen.get(parameter.selector, 0) + parameter.learning
    rows = [
        (selector, f"{chosen[selector]:,}" if selector in chosen else _unused(selector)) for selector in plan.selectors
    ]
    return [("selector", "chose"), *rows]


def _unused(selector: str) -> str:
    return "taken away" if selector.startswith("!") else "(chosen already)"


def _place_rows(plan: "FreezePlan", learning_rate: float | None) -> Rows:
    several = len({(p.learning_rate, p.rate_factor) for p in plan.parameters if p.trainable}) > 1 or plan.names_rates
    rows: Rows = [("place", "parameters", "trainable", *["learning rate"][:several])]
    runs: list[tuple[str, str, int, int, str]] = []  # label of the first, of the last, parameters, trainable, rates
    for label, members in _places(plan):
        total = sum(member.numel for member in members)
        trainable = sum(member.learning for member in members)
        rates = ", ".join(dict.fromkeys(_rate_words(m, learning_rate) for m in members if m.trainable))
        if runs and "block" in label and "block" in runs[-1][0] and runs[-1][2:] == (total, trainable, rates):
            runs[-1] = (runs[-1][0], label, total, trainable, rates)
        else:
            runs.append((label, label, total, trainable, rates))
    for first, last, total, trainable, rates in runs:
        label = first if first == last else f"{first} to {last.removeprefix('block ')}, each"
        rows.append((label, f"{total:,}", f"{trainable:,}" if trainable else "frozen", *[rates][:several]))
    return rows


def _rate_words(parameter: "PlannedParameter", learning_rate: float | None) -> str:
    """`1e-05`, or `0.81 x learning_rate` where the recipe's is not known."""
    own = learning_rate if parameter.learning_rate is None else parameter.learning_rate
    if own is not None:
        return f"{own * parameter.rate_factor:.4g}"
    return "learning_rate" if parameter.rate_factor == 1 else f"{parameter.rate_factor:.4g} x learning_rate"


def _places(plan: "FreezePlan"):
    """Components outside the blocks in their place, a block as a whole between them."""
    grouped: dict[str, list] = {}
    for parameter in plan.parameters:
        label = parameter.component if parameter.block is None else f"block {parameter.block}"
        grouped.setdefault(label, []).append(parameter)
    return grouped.items()


def _phase_rows(plan: "FreezePlan") -> Rows:
    sizes = {parameter.name: parameter.learning for parameter in plan.parameters}
    rows: Rows = [("from", "trainable", "blocks that backward passes")]
    for phase in plan.phases:
        trainable = sum(sizes[name] for name in phase.trainable)
        rows.append((phase.start, f"{trainable:,}", str(plan.block_count - phase.first_block)))
    return rows


def _closing_lines(plan: "FreezePlan") -> list[str]:
    held = quantization_line(plan)
    return [
        *_tie_and_fixed_lines(plan),
        *([held] if held else []),
        *_sampling_lines(plan),
        *_rate_lines(plan),
        _backward_line(plan),
    ]


def _tie_and_fixed_lines(plan: "FreezePlan") -> list[str]:
    lines = [f"tied: {first} is {second}, one tensor" for first, second in plan.ties]
    if plan.head == "untied":
        lines.append("untied: the head gets a matrix of its own, a copy of the token embedding")
    if plan.new_tokens is not None:
        lines.append(words_on(plan.new_tokens).removesuffix("."))
    tokens = f"{plan.tokenizer_length:,} tokens" if plan.tokenizer_length else ""
    lines += [f"{name} has {rows:,} rows, the tokenizer {tokens}" for name, rows in padded_matrices(plan).items()]
    fixed = [parameter for parameter in plan.parameters if parameter.fixed]
    if fixed:
        names = fixed[0].name if len(fixed) == 1 else f"{len(fixed)} parameters, {fixed[0].name} first"
        values = sum(parameter.numel for parameter in fixed)
        lines.append(f"fixed by the model's own code, frozen under any selector: {names} ({values:,} values)")
    return lines


def _sampling_lines(plan: "FreezePlan") -> list[str]:
    """Which blocks learn in turn, what learns at one time, and what several processes hold for those that rest."""
    if plan.sampling is None:
        return []
    sampling = plan.sampling
    sizes = {parameter.name: parameter.learning for parameter in plan.parameters}
    always = sum(sizes[name] for name in plan.always)
    in_turn: dict[int, int] = {}
    for parameter in plan.parameters:
        if parameter.in_turn and parameter.block is not None:
            in_turn[parameter.block] = in_turn.get(parameter.block, 0) + parameter.learning
    largest = always + sum(sorted(in_turn.values())[-sampling.blocks :])
    wholly = {p.block for p in plan.parameters if p.block is not None}
    wholly -= {p.block for p in plan.parameters if p.in_turn or not p.trainable}
    rests = "keeps" if sampling.keep_state else "loses"
    lines = [
        f"{sampling.words()}; a block that rests {rests} its optimizer state",
        f"{always:,} values learn in every step, at most {largest:,} at one time",
    ]
    if wholly:
        lines.append(f"no candidates, since they train in every step: {blocks_words(wholly)}")
    if len(in_turn) > sampling.blocks:
        lines.append(
            f"on several processes (DDP) all candidates keep their gradient buckets: {sum(in_turn.values()):,} values "
            f"of 4 bytes on each"
        )
    return lines


def _rate_lines(plan: "FreezePlan") -> list[str]:
    lines = []
    for selector, rate in plan.part_learning_rates:
        values = sum(p.learning for p in plan.parameters if p.trainable and p.rate_name == rate_name(selector))
        gets = f"{values:,} values" if values else "nothing, later selectors name all of it"
        lines.append(f"part_learning_rates, {selector}: {rate:g} for {gets}")
    if plan.layer_decay is not None:
        layers = f"embeddings layer 0, block i layer i + 1, final norm and head layer {plan.block_count + 1}"
        lines.append(f"layer_decay: learning_rate x {plan.layer_decay:g} ** ({plan.block_count + 1} - layer); {layers}")
        if any(parameter.component == "embeddings.tokens" for parameter in _tied_with_head(plan)):
            lines.append("layer_decay: the head is one tensor with the token embeddings, and has their rate")
    return lines


def _tied_with_head(plan: "FreezePlan") -> list["PlannedParameter"]:
    tied = {name for name, _ in plan.ties}
    return [parameter for parameter in plan.parameters if parameter.trainable and parameter.name in tied]


def _backward_line(plan: "FreezePlan") -> str:
    passed, frozen = len(plan.blocks_passed), len(plan.frozen_blocks_passed)
    held = f", {frozen} of them frozen" if frozen else ""
    at_most = " at most" if plan.sampling else ""
    return (
        f"backward reaches {plan.backward_from} and runs through{at_most} {passed} of {plan.block_count} blocks{held}"
    )


def padded_matrices(plan: "FreezePlan") -> dict[str, int]:
    """Name -> rows of each matrix of which some train, where their number is not that of the tokenizer's tokens."""
    tokens = plan.tokenizer_length
    return {
        parameter.name: parameter.shape[0]
        for parameter in plan.parameters
        if parameter.rows and parameter.component in ("embeddings.tokens", "head")
        if tokens not in (None, parameter.shape[0])
    }
