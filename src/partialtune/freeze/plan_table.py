"""A freeze plan in words and columns: text for the terminal, HTML for notebooks, both of the same rows."""

from typing import TYPE_CHECKING

from markupsafe import Markup

from partialtune.model.new_tokens import words_on
from partialtune.tables import draw_table, html_table

if TYPE_CHECKING:
    from partialtune.freeze.plan import FreezePlan  # for its type alone: a plan shows itself by what stands here

Rows = list[tuple[str, ...]]


def plan_summary(plan: "FreezePlan") -> str:
    """One line: `trainable 39,385,344 of 124,439,808 (31.7%): embeddings, final_norm, head`."""
    percent = 100 * plan.trainable_parameters / plan.total_parameters
    share = f"{percent:.1f}" if percent >= 0.1 else f"{percent:.2g}"
    return (
        f"trainable {plan.trainable_parameters:,} of {plan.total_parameters:,} ({share}%): {', '.join(plan.selectors)}"
    )


def plan_table(plan: "FreezePlan") -> str:
    """What trains by selector and by place, the ties, what the model keeps fixed, and where backward stops."""
    title = f"{plan.model_name}: {plan_summary(plan)}"
    return "\n\n".join([title, *map(draw_table, _tables(plan)), "\n".join(_closing_lines(plan))])


def plan_html(plan: "FreezePlan") -> Markup:
    """The same as HTML, for a notebook."""
    title = Markup("<b>{}</b>: {}").format(plan.model_name, plan_summary(plan))
    lines = Markup("<br>").join(_closing_lines(plan))  # escapes each of them
    return Markup("<div>{}{}{}</div>").format(title, Markup("").join(map(html_table, _tables(plan))), lines)


def _tables(plan: "FreezePlan") -> list[Rows]:
    """The rows of each table, titles first: by selector, by place and, where there is a schedule, by phase."""
    phases = [_phase_rows(plan)] if len(plan.phases) > 1 else []
    return [_selector_rows(plan), _place_rows(plan), *phases]


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


def _place_rows(plan: "FreezePlan") -> Rows:
    rows: Rows = [("place", "parameters", "trainable")]
    runs: list[tuple[str, str, int, int]] = []  # label of the first, label of the last, parameters, trainable
    for label, members in _places(plan):
        total = sum(member.numel for member in members)
        trainable = sum(member.learning for member in members)
        if runs and "block" in label and "block" in runs[-1][0] and runs[-1][2:] == (total, trainable):
            runs[-1] = (runs[-1][0], label, total, trainable)
        else:
            runs.append((label, label, total, trainable))
    for first, last, total, trainable in runs:
        label = first if first == last else f"{first} to {last.removeprefix('block ')}, each"
        rows.append((label, f"{total:,}", f"{trainable:,}" if trainable else "frozen"))
    return rows


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
    return [*_tie_and_fixed_lines(plan), _backward_line(plan)]


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


def _backward_line(plan: "FreezePlan") -> str:
    passed, frozen = len(plan.blocks_passed), len(plan.frozen_blocks_passed)
    held = f", {frozen} of them frozen" if frozen else ""
    return f"backward reaches {plan.backward_from} and runs through {passed} of {plan.block_count} blocks{held}"


def padded_matrices(plan: "FreezePlan") -> dict[str, int]:
    """Name -> rows of each matrix of which some train, where their number is not that of the tokenizer's tokens."""
    tokens = plan.tokenizer_length
    return {
        parameter.name: parameter.shape[0]
        for parameter in plan.parameters
        if parameter.rows and parameter.component in ("embeddings.tokens", "head")
        if tokens not in (None, parameter.shape[0])
    }
