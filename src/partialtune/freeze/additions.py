"""What trains from the start and what a schedule adds: selectors -> names, each with the entry that adds it."""

from collections.abc import Mapping, Sequence
from typing import Any

from partialtune.errors import RecipeError
from partialtune.grammar.schedule_syntax import read_schedule
from partialtune.model.selectors import Chosen, choose
from partialtune.model.structure import ModelStructure


def start_words(step: int | None, epoch: float | None) -> str:
    """Where a phase begins: `step 40`, or `epoch 1.5` where it is said in epochs."""
    return f"step {step}" if epoch is None else f"epoch {epoch:g}"


def additions_of(
    first: list[str], schedule: Sequence[Mapping[str, Any]], before_text: bool, trains_from_start: bool
) -> list[dict[str, Any]]:
    """The entries of the schedule, checked, and before them what trains from the start.

    Args:
        first: Selectors of what trains from the start.
        schedule: As for `plan_freeze`.
        before_text: Whether entries may begin at an epoch.
        trains_from_start: Whether something trains before any entry adds to it.

    Raises:
        RecipeError: If an entry is wrong in itself.
    """
    # Checked here as well as in the recipe: a plan is made by who uses the package as a library, too.
    entries, problems = read_schedule(schedule, trains_from_start)
    if not before_text and any("from_epoch" in entry for entry in entries):
        problems.append("from_epoch: how many steps an epoch has is known once the text is read. Say from_step here.")
    if problems:
        raise RecipeError("\n".join(f"schedule, {problem}" for problem in problems))
    return [{"from_step": 0, "trainable": first}, *entries] if trains_from_start or not entries else entries


def what_trains(
    structure: ModelStructure, additions: Sequence[Mapping[str, Any]], allow_empty: bool
) -> dict[str, tuple[Chosen, int]]:
    """Name of each trainable parameter -> what was chosen of it, and which entry is the first that adds it.

    Args:
        structure: The model's parameters.
        additions: Of `additions_of`.
        allow_empty: Whether the first entry may hold nothing, where adapters train from the start.

    Raises:
        RecipeError: If a selector cannot be applied, or an entry adds nothing.
    """
    starts = [start_words(addition.get("from_step"), addition.get("from_epoch")) for addition in additions]
    trains: dict[str, tuple[Chosen, int]] = {}
    for number, addition in enumerate(additions):
        try:
            chosen = choose(structure, addition["trainable"], allow_empty and not number)
            _refuse_other_rows(chosen, trains)
        except RecipeError as problem:
            where = f"schedule, from {starts[number]}: " if number else ""
            raise RecipeError(f"{where}{problem}") from problem
        # What trains already keeps its phase and its rate, though a later entry names it again.
        new = {name: (what, number) for name, what in chosen.items() if name not in trains}
        if not new and addition["trainable"]:
            since = starts[max(trains[name][1] for name in chosen)]
            raise RecipeError(
                f"schedule, from {starts[number]}: [{', '.join(addition['trainable'])}] adds nothing, all of it trains "
                f"already since {since}. Take the entry out."
            )
        trains |= new
    return trains


def _refuse_other_rows(chosen: Mapping[str, Chosen], trains: Mapping[str, tuple[Chosen, int]]) -> None:
    """Raises RecipeError where a later phase chooses other rows of a matrix than train already."""
    for name, what in chosen.items():
        if name in trains and trains[name][0].rows is not None and trains[name][0].rows != what.rows:
            raise RecipeError(
                f"{what.selector} and {trains[name][0].selector} choose different rows of {name}, which begin at "
                f"different steps. All rows of a matrix that train begin at one step: name them in one entry."
            )
