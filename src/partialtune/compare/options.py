"""The words of `partialtune compare` -> checked choices: all that is wrong with them in one message."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialtune.errors import InputError
from partialtune.grammar.values import MORE_THAN_ZERO, convert_value
from partialtune.recipe.key_rules import SEED
from partialtune.recipe.parsing import group_words

OURS = {
    "resume_from_checkpoint": "a comparison always goes on by itself",
    "push_to_hub": "a comparison pushes nothing; push a run of it with `partialtune push RUN`",
}


@dataclass(frozen=True)
class Choices:
    """What the command line says about a comparison.

    Attributes:
        output_dir: Folder of the comparison.
        seeds: Each policy runs once with each; empty for the recipes' own.
        learning_rates: Tried for each policy; empty for the recipes' own rates.
        trial_steps: Optimizer steps of a trial, None for as many as a run has.
        words: `--key value` for every recipe.
    """

    output_dir: Path
    seeds: Sequence[int] = ()
    learning_rates: Sequence[float] = ()
    trial_steps: int | None = None
    words: Sequence[str] = ()


def read_choices(known: Namespace, words: Sequence[str]) -> Choices:
    """Check the options of the command.

    Raises:
        InputError: Lists everything that is wrong.
    """
    problems: list[str] = []
    seeds = _numbers("--seeds", known.seeds, int, SEED.holds, SEED.words, problems)
    rates = _numbers("--learning_rates", known.learning_rates, float, MORE_THAN_ZERO.holds, "more than 0", problems)
    steps = [known.trial_steps] if known.trial_steps is not None else None
    steps = _numbers("--trial_steps", steps, int, lambda value: value >= 1, "1 or more", problems)
    said, _ = group_words(words)
    clashes = {**OURS, **({"seed": "--seeds says it"} if seeds else {})}
    clashes |= {"learning_rate": "--learning_rates says it"} if rates else {}
    problems += [f"--{key}: {clashes[key]}. Take it out." for key in clashes if key in said]
    if steps and len(rates) < 2:
        problems.append("--trial_steps: there is nothing to try. Give two or more --learning_rates.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("started by a launcher: each run is a process of its own. Start `partialtune compare` itself.")
    if problems:
        raise InputError("\n".join(["compare:", *(f"  {problem}" for problem in problems)]))
    return Choices(Path(known.output_dir), seeds, rates, steps[0] if steps else None, tuple(words))


def _numbers(
    option: str,
    words: Sequence[str] | None,
    kind: type,
    holds: Callable[[Any], bool],
    bound: str,
    problems: list[str],
) -> list[Any]:
    """The values of an option; what is wrong with them goes to `problems`."""
    values = []
    for word in words or []:
        try:
            value = convert_value(word, kind)
        except ValueError:
            value = None
        if value is None or not holds(value):
            problems.append(
                f"{option}: got {word!r}; allowed: {'whole numbers' if kind is int else 'numbers'}, {bound}."
            )
        elif value in values:
            problems.append(f"{option}: {word} is said twice. Keep one.")
        else:
            values.append(value)
    return values


def are_runs(names: Sequence[str], choices: Choices) -> bool:
    """Whether folders of finished runs were named, and not recipes.

    Raises:
        InputError: If both were, or options for recipes came with runs.
    """
    folders = [name for name in names if Path(name).is_dir()]
    if not folders:
        return False
    if len(folders) < len(names):
        files = [name for name in names if name not in folders]
        raise InputError(f"{files[0]} is no folder and {folders[0]} is one: name recipes (files) or runs (folders).")
    options = {"--seeds": choices.seeds, "--learning_rates": choices.learning_rates, "recipe keys": choices.words}
    useless = [name for name, said in options.items() if said]
    if useless:
        raise InputError(f"{', '.join(useless)}: for recipes; the runs named here have ended. Take that out.")
    return True
