"""Learning rates of parts, in a plan: selectors with rates of their own, and rates that fall with the depth.

    part_learning_rates: {embeddings: 1.0e-5, 'blocks[-1]': 1.0e-4}
    layer_decay: 0.9

Which rate a parameter has, from what is said of it most exactly to what holds for all:

1. the rate of the last selector of `part_learning_rates` that matches it. It is the rate, and no decay changes it;
2. else the `learning_rate` of the phase that adds it, or where that says none, the recipe's or the optimizer's own,
   times layer_decay ** (layers between the parameter and the head).

A schedule of rates (warm-up, decay) multiplies all of them alike.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from partialtune.errors import RecipeError
from partialtune.grammar.rate_syntax import read_layer_decay, read_part_rates
from partialtune.grammar.selector_syntax import parse_selector
from partialtune.grammar.values import nearest
from partialtune.model.rows import row_numbers
from partialtune.model.selectors import ONE_NAME_OF_A_TIE, Matches, match
from partialtune.model.structure import ModelStructure, ParameterInfo

if TYPE_CHECKING:
    from partialtune.freeze.plan import FreezePlan, PlannedParameter  # which is made with what stands here

logger = logging.getLogger(__name__)

Parameters = tuple["PlannedParameter", ...]


def with_rates(
    plan: "FreezePlan",
    structure: ModelStructure,
    part_learning_rates: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
) -> "FreezePlan":
    """A plan with the learning rates of its parts.

    The depth is counted over the whole stack: the embeddings are layer 0, block i is layer i + 1, final norm and head
    are the layer above the last block and have the factor 1. So it is in ELECTRA's fine-tuning (Clark et al. 2020,
    https://arxiv.org/abs/2003.10555, `layerwise_lr_decay`) and in BEiT's (Bao et al. 2021,
    https://arxiv.org/abs/2106.08254). A head that is tied to the token embeddings is one tensor with them, and has
    their rate.

    Args:
        plan: Without such rates: a parameter's `learning_rate` is that of the phase.
        structure: Of the model that the plan is for.
        part_learning_rates: Selector -> rate, more than 0.
        layer_decay: Above 0 and at most 1; None for none.

    Raises:
        RecipeError: If a rate is no such number, or a selector names nothing that trains, gives a tied tensor two
            rates, or names only some of the rows that train.
    """
    rates, wrong = read_part_rates(part_learning_rates)
    decay, wrong_decay = read_layer_decay(layer_decay)
    problems = [f"part_learning_rates, {problem}" for problem in wrong]
    problems += [f"layer_decay: {problem}" for problem in wrong_decay]
    if problems:
        raise RecipeError("\n".join(problems))
    if not rates and decay is None:
        return plan
    parameters = plan.parameters
    named = _named_parts(parameters, structure, rates)
    by_layer = [parameter for parameter in parameters if parameter.trainable and parameter.name not in named]
    layers = {parameter.name: _layer(structure.by_name[parameter.name], structure) for parameter in by_layer}
    if decay is not None and not by_layer:
        logger.warning("layer_decay changes nothing: part_learning_rates names all that trains")
    names = _names(by_layer, layers, structure.block_count, in_layers=decay is not None)
    rated = []
    for parameter in parameters:
        if parameter.name in named:
            part = named[parameter.name]
            parameter = replace(parameter, learning_rate=rates[part], rate_name=rate_name(part))
        elif parameter.trainable:
            factor = 1.0 if decay is None else decay ** (structure.block_count + 1 - layers[parameter.name])
            parameter = replace(parameter, rate_factor=factor, rate_name=names[parameter.name])
        rated.append(parameter)
    return replace(plan, parameters=tuple(rated), part_learning_rates=tuple(rates.items()), layer_decay=decay)


def rates_to_json(plan: "FreezePlan") -> dict[str, Any]:
    """What `freeze_plan.json` says of them; nothing where the plan has none."""
    rates = {"part_learning_rates": dict(plan.part_learning_rates)} if plan.part_learning_rates else {}
    return rates | ({} if plan.layer_decay is None else {"layer_decay": plan.layer_decay})


def rates_in_words(plan: "FreezePlan") -> dict[str, str]:
    """The same in words that are equal where the rates are: `embeddings 1e-05, blocks[-1] 0.0001`, every digit."""
    parts = ", ".join(f"{selector} {rate!r}" for selector, rate in plan.part_learning_rates)
    words = {"part_learning_rates": parts, "layer_decay": "" if plan.layer_decay is None else repr(plan.layer_decay)}
    return {key: value for key, value in words.items() if value}


def rate_to_json(plan: "FreezePlan", parameter: "PlannedParameter") -> dict[str, Any]:
    """What it says of one parameter: the rate, null where the recipe's holds, and its factor; null where it is frozen.

    Nothing where the plan has no rates of parts, so that its file is what it was before there were such rates.
    """
    if not plan.names_rates:
        return {}
    factor = parameter.rate_factor if parameter.trainable else None
    return {"learning_rate": parameter.learning_rate, "rate_factor": factor}


def _layer(info: ParameterInfo, structure: ModelStructure) -> int:
    """0 before the blocks, 1 + index in a block, one more above them. A tied tensor's is the lowest of its places."""
    return min(info.forward_rank, structure.block_count + 1)


# ---- which selector names what --------------------------------------------------------------------------------------


def _named_parts(parameters: Parameters, structure: ModelStructure, rates: Mapping[str, float]) -> dict[str, str]:
    """Name of each parameter that trains and that a selector names -> the last such selector."""
    trains = {parameter.name: parameter for parameter in parameters if parameter.trainable}
    named: dict[str, str] = {}
    matches: dict[str, Matches] = {}
    problems: list[str] = []
    for text in rates:
        try:
            matches[text] = match(structure, parse_selector(text))
        except RecipeError as problem:
            problems.append(f"part_learning_rates, {problem}")
            continue
        found = [name for name in matches[text].names if name in trains]
        if not found:
            problems.append(_names_nothing(text, [parameter.selector or "" for parameter in trains.values()]))
        problems += [_some_rows(text, name) for name in found if _leaves_rows(matches[text], trains[name], name)]
        named |= dict.fromkeys(found, text)
    problems += _two_rates_of_a_tie(structure, matches, rates)
    if problems:
        raise RecipeError("\n".join(problems))
    for text in rates:
        if text not in named.values():
            logger.warning("part_learning_rates, %s: later selectors name all that it names, and their rates win", text)
    return named


def _names_nothing(text: str, training: Sequence[str]) -> str:
    selectors = list(dict.fromkeys(training))
    near = nearest(text, selectors)
    return (
        f"part_learning_rates, {text}: nothing that it names trains. What trains is what {', '.join(selectors)} chose."
        f"{f' Did you mean {near}?' if near else ' Add it to trainable, or take its rate out.'}"
    )


def _leaves_rows(matches: Matches, parameter: "PlannedParameter", name: str) -> bool:
    """Whether a selector names some of the rows of a matrix, and others of it train too."""
    if name not in matches.rows:
        return False
    numbers = range(parameter.shape[0]) if parameter.rows is None else row_numbers(parameter.rows)
    return not set(numbers) <= set(row_numbers(matches.rows[name]))


def _some_rows(text: str, name: str) -> str:
    return (
        f"part_learning_rates, {text}: more rows of {name} train than these, and all of them learn at one rate. "
        f"Write {text.partition('[')[0]}."
    )


def _two_rates_of_a_tie(
    structure: ModelStructure, matches: Mapping[str, Matches], rates: Mapping[str, float]
) -> Iterator[str]:
    """Where two names of a tied tensor are each given a rate by itself."""
    for name in dict.fromkeys(name for name, _ in structure.ties):
        about_it = [
            (text, found.names[name])
            for text, found in matches.items()
            if name in found.names and parse_selector(text).word in ONE_NAME_OF_A_TIE
        ]
        for (one, names), (other, others) in combinations(about_it, 2):
            if not names & others and rates[one] != rates[other]:
                yield (
                    f"part_learning_rates: {one} {rates[one]:g} and {other} {rates[other]:g} are two rates of one "
                    f"tensor: {', '.join(sorted(names))} and {', '.join(sorted(others))} are tied. Set `head: untied` "
                    f"to make it two, or leave out one of the two selectors."
                )


# ---- names in the log -----------------------------------------------------------------------------------------------


def rate_name(selector: str) -> str:
    """A selector as a part of a name in the log: MLflow takes no `//`, which the slashes of an expression make."""
    return selector.strip("/")


def _names(
    by_layer: Sequence["PlannedParameter"], layers: Mapping[str, int], block_count: int, in_layers: bool
) -> dict[str, str]:
    """Name of each of these parameters -> that of its rate: `from_step_40/block_03`, empty for the recipe's own.

    Layers outside the blocks are called by what learns in them: `embeddings`, `final_norm_and_head`.
    """
    width = max(2, len(str(block_count - 1)))  # digits as in `FreezePlan.groups`, so that the names sort as text
    phases = {
        parameter.name: "" if parameter.learning_rate is None else f"from_step_{parameter.from_step}"
        for parameter in by_layer
    }
    if not in_layers:
        return phases
    outside: dict[tuple[str, int], list[str]] = {}
    for parameter in by_layer:
        outside.setdefault((phases[parameter.name], layers[parameter.name]), []).append(
            f"block_{parameter.block:0{width}d}" if parameter.block is not None else parameter.component.split(".")[0]
        )
    return {
        parameter.name: "/".join(filter(None, (phase, "_and_".join(dict.fromkeys(outside[phase, layer])))))
        for parameter in by_layer
        for phase, layer in [(phases[parameter.name], layers[parameter.name])]
    }
