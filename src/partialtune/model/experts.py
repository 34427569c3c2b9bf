"""Single experts of a mixture: `experts[3]` and a model's structure -> its parameters, or their slices.

transformers keeps the experts of a block fused, in tensors of which dimension 0 is the expert: slice 3 of them is
expert 3. Other code has a module for each: `experts.3.w1.weight` is then expert 3's as a whole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from partialtune.errors import RecipeError
from partialtune.grammar.selector_syntax import numbers_of, slice_as_written
from partialtune.model.rows import Rows, as_runs
from partialtune.model.structure import ModelStructure

OF_ONE_EXPERT = re.compile(r"(?P<home>.*\.experts)\.(?P<number>\d+)\..+")


def single_experts(
    structure: ModelStructure, selector: str, indices: Sequence[int | slice], names: Iterable[str]
) -> dict[str, Rows | None]:
    """The parameters of these experts.

    Args:
        structure: The model's parameters.
        selector: As it was written, for messages.
        indices: Of experts, as Python counts.
        names: First names of parameters of experts, among which to choose.

    Returns:
        First name -> which slices along dimension 0; None for a parameter of one expert alone.

    Raises:
        RecipeError: If a number is out of range, a slice holds no expert, or dimension 0 is not the expert.
    """
    counts = _counts(structure)
    chosen: dict[str, Rows | None] = {}
    for name in names:
        home, number = _home(name)
        count = counts.get(home)
        if count is None:
            raise RecipeError(
                f"{selector}: the experts of {structure.model_name} cannot be told apart: {name} has the shape "
                f"{structure.by_name[name].shape}, whose first dimension is not the expert. Choose `experts`, all of "
                f"them."
            )
        numbers = _numbers(structure.model_name, selector, indices, count)
        if number is None:
            chosen[name] = as_runs(numbers)
        elif number in numbers:
            chosen[name] = None
    return chosen


def _home(name: str) -> tuple[str, int | None]:
    """(what holds the experts, number of the expert): the second is None where they are fused."""
    match = OF_ONE_EXPERT.fullmatch(name)
    return (match["home"], int(match["number"])) if match else (name.rpartition(".")[0], None)


def _counts(structure: ModelStructure) -> Mapping[str, int]:
    """Number of experts by what holds them; without those that are fused along another dimension (DBRX)."""
    found: dict[str, list[tuple[str, int | None]]] = {}
    for info in structure.parameters:
        if any(place.mixture == "experts" for place in info.places):
            home, number = _home(info.name)
            found.setdefault(home, []).append((info.name, number))
    counts = {}
    for home, members in found.items():
        shapes = [structure.by_name[name].shape for name, _ in members]
        separate = [number for _, number in members if number is not None]
        if separate:
            counts[home] = max(separate) + 1
        elif any(len(shape) == 3 for shape in shapes):
            counts[home] = min(shape[0] for shape in shapes)  # LongCat's gate has one more, which is no expert
    return counts


def _numbers(model: str, selector: str, indices: Sequence[int | slice], count: int) -> set[int]:
    has = f"{model} has {count} experts in a block, 0 to {count - 1}"

    def empty(chosen: slice) -> str:
        written = slice_as_written(chosen)
        return f"{selector}: the slice {written} holds no expert. {has}, and a slice ends before its second number."

    def beyond(index: int) -> str:
        where = "" if selector == f"experts[{index}]" else f" (in {selector})"
        last = f"The last one is experts[{count - 1}] or experts[-1]."
        return f"experts[{index}]{where} is out of range: {has}. {last}"

    return numbers_of(indices, count, empty, beyond)
