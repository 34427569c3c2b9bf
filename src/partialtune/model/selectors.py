"""Selectors applied: a model's structure and a list like ["blocks[-2:]", "!biases"] -> names of what trains.

What a selector looks like is at the head of grammar/selector_syntax, what a word chooses in grammar/named_selectors. A
tied parameter answers to every one of its names: adding any of them adds it, removing any removes it. What the model's
own code keeps fixed is added by none.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from partialtune.errors import RecipeError
from partialtune.grammar.named_selectors import BLOCK_PARTS, NAMED, WORDS
from partialtune.grammar.selector_syntax import Pattern, Selector, numbers_of, parse_selector, slice_as_written
from partialtune.model.experts import single_experts
from partialtune.model.layout import Place
from partialtune.model.rows import Rows, as_runs, row_numbers
from partialtune.model.structure import ModelStructure

logger = logging.getLogger(__name__)

# Words that ask for a tied tensor by one of its names. `all` or `/regex/` beside `!head` is no contradiction.
ONE_NAME_OF_A_TIE = ("head", "embeddings", "embeddings.tokens")


class Chosen(NamedTuple):
    """What selectors have chosen of one parameter.

    Attributes:
        selector: The first that chose it.
        rows: Which of its rows, None for all of it.
    """

    selector: str
    rows: Rows | None = None


class Matches(NamedTuple):
    """What one selector matches.

    Attributes:
        names: First name of each parameter -> those of its names that the selector matches.
        rows: First name -> which of its rows, absent for all of it.
    """

    names: dict[str, set[str]]
    rows: dict[str, Rows]


def resolve_selectors(structure: ModelStructure, selectors: Sequence[str], allow_empty: bool = False) -> dict[str, str]:
    """As `choose`, without rows: first name of each trainable parameter -> the first selector that chose it.

    resolve_selectors(gpt2, ["final_norm", "!biases"]) -> {"transformer.ln_f.weight": "final_norm"}
    """
    return {name: chosen.selector for name, chosen in choose(structure, selectors, allow_empty).items()}


def choose(structure: ModelStructure, selectors: Sequence[str], allow_empty: bool = False) -> dict[str, Chosen]:
    """Apply selectors in their order: each adds parameters, one with "!" takes away from those before it.

    choose(gpt2, ["final_norm", "!biases"]) -> {"transformer.ln_f.weight": Chosen("final_norm")}
    choose(gpt2, ["head[-2:]"]) -> {"transformer.wte.weight": Chosen("head[-2:]", ((50255, 50257),))}

    Args:
        structure: The model's parameters, from `read_structure`.
        selectors: One string counts as a list of one.
        allow_empty: Whether the list may be empty (a schedule may begin with nothing that trains).

    Returns:
        First name of each trainable parameter -> what was chosen of it, in the structure's order.

    Raises:
        RecipeError: With all problems at once: selectors that cannot be read, are out of range, match no parameter
            or only fixed ones, or contradict each other about a tied one. Also if nothing at all is left to train.
    """
    texts = [selectors] if isinstance(selectors, str) else list(selectors)
    if not texts and not allow_empty:
        raise RecipeError(f"trainable is empty: nothing would train. {_what_it_has(structure)}")
    steps: list[tuple[Selector, Matches]] = []
    problems: list[str] = []
    for text in texts:
        try:
            selector = parse_selector(text)
            steps.append((selector, match(structure, selector)))
        except RecipeError as problem:
            problems.append(str(problem))
    problems += _tie_contradictions(structure, [(selector, matches.names) for selector, matches in steps])
    if problems:
        raise RecipeError("\n".join(problems))
    chosen = _add_and_remove(structure, steps)
    if texts and not chosen:
        raise RecipeError(f"trainable [{', '.join(texts)}] takes away all that it adds: nothing is left to train.")
    return {info.name: chosen[info.name] for info in structure.parameters if info.name in chosen}


def _add_and_remove(structure: ModelStructure, steps: Iterable[tuple[Selector, Matches]]) -> dict[str, Chosen]:
    """First name of each parameter that is left -> what is left of it, and the selector that chose it first."""
    chosen: dict[str, Chosen] = {}
    for selector, matches in steps:
        if selector.removes and not matches.names.keys() & chosen.keys():
            # the order counts: `['!biases', all]` trains the biases
            logger.warning("%s takes nothing away: no selector before it chose what it names", selector.text)
        for name in matches.names:
            before, named = chosen.pop(name, None), matches.rows.get(name)
            length = structure.by_name[name].shape[0] if structure.by_name[name].shape else 0
            if not selector.removes:
                rows = _united(before.rows, named) if before else named
                chosen[name] = Chosen(before.selector if before else selector.text, _all_or(rows, length))
            elif before is not None and named is not None:  # a part is taken away
                rows = _without(before.rows, named, length)
                if rows:
                    chosen[name] = Chosen(before.selector, _all_or(rows, length))
    return chosen


def _united(one: Rows | None, other: Rows | None) -> Rows | None:
    return None if one is None or other is None else as_runs([*row_numbers(one), *row_numbers(other)])


def _without(rows: Rows | None, taken: Rows, length: int) -> Rows:
    numbers = range(length) if rows is None else row_numbers(rows)
    return as_runs(set(numbers).difference(row_numbers(taken)))


def _all_or(rows: Rows | None, length: int) -> Rows | None:
    """Rows that are all of a matrix are the matrix itself."""
    return None if rows == ((0, length),) else rows


def _with_rows(structure: ModelStructure, selector: Selector, names: dict[str, set[str]]) -> Matches:
    """These parameters with the rows of them that a selector names; without those of other experts.

    Raises:
        RecipeError: If a row or an expert is out of range, a slice holds none, or a parameter has no rows.
    """
    if selector.rows is None:
        return Matches(names, {})
    if "experts" in (selector.word, selector.part):
        experts = single_experts(structure, selector.text, selector.rows, names)
        slices = {name: rows for name, rows in experts.items() if rows is not None}
        return Matches({name: names[name] for name in experts}, slices)
    return Matches(names, {name: _rows(structure, selector, name) for name in names})


def _rows(structure: ModelStructure, selector: Selector, name: str) -> Rows:
    shape = structure.by_name[name].shape
    if len(shape) < 2:
        raise RecipeError(
            f"{selector.text}: {name} is a vector of {structure.by_name[name].numel} values and has no rows. "
            f"Take '/{re.escape(name)}/' away before it, or choose {selector.word} as a whole."
        )
    length = shape[0]
    has = f"{name} has {length:,} rows, 0 to {length - 1}"

    def empty(chosen: slice) -> str:
        written = slice_as_written(chosen)
        return f"{selector.text}: the slice {written} holds no row. {has}, and a slice ends before its second number."

    def beyond(index: int) -> str:
        return f"{selector.text}: row {index} is out of range. {has}; the last one is {selector.word}[-1]."

    return as_runs(numbers_of(selector.rows or (), length, empty, beyond))


def match(structure: ModelStructure, selector: Selector) -> Matches:
    """What a selector matches.

    Raises:
        RecipeError: If it is nothing, or only what the model keeps fixed; if blocks or rows are out of range.
    """
    blocks = _numbers_of_blocks(structure, selector)
    matches = {
        info.name: names
        for info in structure.parameters
        if (names := {place.name for place in info.places if _is_match(selector, blocks, place)})
        and not (selector.word == "head" and selector.rows and len(info.shape) < 2)  # its bias, which has no rows
    }
    if not matches:
        raise RecipeError(f"{selector.text} matches no parameter: {_why_no_match(structure, selector, blocks)}")
    if selector.rows is not None and selector.word != "experts" != selector.part:
        # A head's bias has none: the matrix beside it is meant. Of an expert that is a module all is meant.
        matrices = {name: names for name, names in matches.items() if len(structure.by_name[name].shape) > 1}
        matches = matrices or matches
    if selector.removes:  # what is fixed may be named, and is not there to be taken away
        return _with_rows(structure, selector, matches)
    added = {name: names for name, names in matches.items() if name not in structure.fixed}
    if not added:
        first, count = next(iter(matches)), len(matches)
        raise RecipeError(
            f"{selector.text} chooses only what {structure.model_name} keeps fixed itself, "
            f"{first if count == 1 else f'{count} parameters, {first} first'}: its code makes such tables and biases "
            f"without requires_grad, and they never train. Take {selector.text} out."
        )
    return _with_rows(structure, selector, added)


def _is_match(selector: Selector, blocks: set[int], place: Place) -> bool:
    """Whether a selector chooses a parameter by the one of its names that stands at this place."""
    if selector.of_language and place.tower != "language":
        return False
    if selector.pattern is not None:
        return selector.pattern.fullmatch(place.name) is not None
    if selector.word is not None:
        return NAMED[selector.word].chooses(place)
    return place.block in blocks and (selector.part is None or NAMED[selector.part].chooses(place))


def _numbers_of_blocks(structure: ModelStructure, selector: Selector) -> set[int]:
    """Python's own slicing of range(count) decides, so that blocks[-2:] and blocks[::2] mean what they mean there."""
    count = structure.block_count
    has = f"{structure.model_name} has {count} blocks, 0 to {count - 1}"

    def empty(chosen: slice) -> str:
        return (
            f"{selector.text}: the slice {slice_as_written(chosen)} holds no block. {has}, and a slice ends before its "
            f"second number: blocks[0:1] is the first block."
        )

    def beyond(index: int) -> str:
        where = "" if selector.text == f"blocks[{index}]" else f" (in {selector.text})"
        return f"blocks[{index}]{where} is out of range: {has}. The last one is blocks[{count - 1}] or blocks[-1]."

    return numbers_of(selector.indices or (), count, empty, beyond)


def _tie_contradictions(structure: ModelStructure, steps: Sequence[tuple[Selector, dict[str, set[str]]]]) -> list[str]:
    """Where one name of a tied parameter is asked for by itself and only another name is taken away."""
    problems = []
    for name in dict.fromkeys(name for name, _ in structure.ties):
        about_it = [(selector, matches[name]) for selector, matches in steps if name in matches]
        asked = [(s.text, names) for s, names in about_it if s.word in ONE_NAME_OF_A_TIE and not s.removes]
        taken = [(s.text, names) for s, names in about_it if s.removes]
        problems += [
            f"{add} and {remove} contradict each other: in {structure.model_name} {', '.join(sorted(added))} and "
            f"{', '.join(sorted(removed))} are one tied tensor of {structure.by_name[name].numel:,} parameters, which "
            f"trains or does not. Set `head: untied` to make it two, or leave out one of the two selectors."
            for add, added in asked
            for remove, removed in taken
            if not added & removed
        ]
    return problems


def _why_no_match(structure: ModelStructure, selector: Selector, blocks: set[int]) -> str:
    if selector.pattern is not None:
        return _nearest_names(structure, selector.pattern)
    has_towers = any(place.tower for info in structure.parameters for place in info.places)
    if selector.of_language and not has_towers:
        lacks = NAMED["language"].in_words
        return f"{structure.model_name} has no {lacks}. {_what_it_has(structure)}"
    if selector.word is not None:
        lacks = NAMED[selector.word].in_words or selector.word
        return f"{structure.model_name} has no {lacks}. {_what_it_has(structure)}"
    if selector.part is None:
        return f"{_ranges(blocks)} of {structure.model_name} hold none."
    places = [place for info in structure.parameters for place in info.places if place.block is not None]
    parts = [part for part in BLOCK_PARTS if any(NAMED[part].chooses(p) and p.block in blocks for p in places)]
    holders = {p.block for p in places if p.block is not None and NAMED[selector.part].chooses(p)}
    has = f"{_ranges(blocks)} of {structure.model_name} {'has' if len(blocks) == 1 else 'have'} {', '.join(parts)}"
    return f"{has}; {selector.part} is in {_ranges(holders) if holders else 'none of its blocks'}."


def _what_it_has(structure: ModelStructure) -> str:
    """It has embeddings.tokens, ..., head, blocks[0] to blocks[11]."""
    places = [place for info in structure.parameters for place in info.places]
    shown = [word for word in WORDS if word not in ("embeddings", "all")]  # their parts are listed, or are everything
    words = [word for word in shown if any(NAMED[word].chooses(place) for place in places)]
    return f"It has {', '.join(words)} and blocks[0] to blocks[{structure.block_count - 1}]."


def _nearest_names(structure: ModelStructure, pattern: Pattern) -> str:
    """Why a regular expression matches nothing: mostly it fits a part of names, and has to fit a whole one."""
    inside = [name for name in structure.by_name if pattern.search(name)]
    if inside:  # who writes /ln_1/ thinks of re.search; a part of a name would match h.1 in h.10
        return (
            f"it has to match a full name and fits only a part of {len(inside)} names, such as {inside[0]}: "
            f"/.*{pattern.pattern}.*/ would take them."
        )
    plain = re.sub(r"\\(.)", r"\1", pattern.pattern)  # without its backslashes it looks like the names
    nearest = difflib.get_close_matches(plain, structure.by_name, n=3, cutoff=0) or list(structure.by_name)[:3]
    return f"the nearest names in {structure.model_name} are {', '.join(nearest)}."


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> "blocks 0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{'block' if len(numbers) == 1 else 'blocks'} {', '.join(spans)}"
