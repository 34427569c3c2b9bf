"""The words of `partialtune compare` -> checked options, policies (recipes to compare), and the jobs that run them."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from partialtune.builtin import builtin_recipe
from partialtune.errors import InputError, RecipeError
from partialtune.freeze.recipe_mistakes import read_with_model
from partialtune.grammar.values import MORE_THAN_ZERO, convert_value
from partialtune.recipe.key_rules import LENGTHS, SEED
from partialtune.recipe.parsing import group_words
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values

OURS = {
    "resume_from_checkpoint": "a comparison always goes on by itself",
    "push_to_hub": "a comparison pushes nothing; push a run of it with `partialtune push RUN`",
}


# --- options: all that is wrong with them in one message


@dataclass(frozen=True)
class Options:
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


def read_options(known: Namespace, words: Sequence[str]) -> Options:
    """Check the options of the command.

    Raises:
        InputError: Lists everything that is wrong.
    """
    problems: list[str] = []
    seeds = _numbers("--seeds", known.seeds, int, SEED.holds, SEED.words, problems)
    rates = _numbers("--learning_rates", known.learning_rates, float, MORE_THAN_ZERO.holds, "more than 0", problems)
    steps = [known.trial_steps] if known.trial_steps is not None else None
    steps = _numbers("--trial_steps", steps, int, lambda value: value >= 1, "1 or more", problems)
    given, _ = group_words(words)
    clashes = {**OURS, **({"seed": "--seeds says it"} if seeds else {})}
    clashes |= {"learning_rate": "--learning_rates says it"} if rates else {}
    problems += [f"--{key}: {clashes[key]}. Take it out." for key in clashes if key in given]
    if steps and len(rates) < 2:
        problems.append("--trial_steps: there is nothing to try. Give two or more --learning_rates.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("started by a launcher: each run is a process of its own. Start `partialtune compare` itself.")
    if problems:
        raise InputError("\n".join(["compare:", *(f"  {problem}" for problem in problems)]))
    return Options(Path(known.output_dir), seeds, rates, steps[0] if steps else None, tuple(words))


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


def are_runs(names: Sequence[str], options: Options) -> bool:
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
    for_recipes = {"--seeds": options.seeds, "--learning_rates": options.learning_rates, "recipe keys": options.words}
    useless = [name for name, given in for_recipes.items() if given]
    if useless:
        raise InputError(f"{', '.join(useless)}: for recipes; the runs named here have ended. Take that out.")
    return True


# --- policies


@dataclass(frozen=True)
class Policy:
    """One way to fine-tune: a recipe under a name of its own.

    Attributes:
        name: The recipe's file name without its ending; with its folder where two recipes have the same.
        path: The recipe's file.
        words: Command-line words that every run of it gets.
        recipe: Recipe and words, checked.
    """

    name: str
    path: Path
    words: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Job:
    """One run of a policy, in a process of its own.

    Attributes:
        policy: What runs.
        title: What progress and messages call it.
        folder: The run's folder.
        changes: Recipe values that this run changes, `output_dir` among them.
        log: What the process prints goes there.
        shares_prefix: Whether others want the states of its frozen prefix, too.
    """

    policy: Policy
    title: str
    folder: Path
    changes: Mapping[str, Any]
    log: Path
    shares_prefix: bool = False

    @cached_property
    def values(self) -> dict[str, Any]:
        """The recipe of this run as `train` will see it."""
        return changed_values(self.policy.recipe.values, self.changes)

    @property
    def command(self) -> list[str]:
        """The process that runs it."""
        recipe = [str(self.policy.path), *changed_words(self.policy.words, self.changes)]
        return [sys.executable, "-m", "partialtune", "train", *recipe]


def read_policies(recipes: Sequence[str], words: Sequence[str] = ()) -> list[Policy]:
    """Read and check the recipes to compare.

    Args:
        recipes: YAML files, or `builtin:quickstart`; at least one.
        words: `--key value` for every recipe.

    Raises:
        RecipeError: If one is wrong, or is named twice.
    """
    paths = [builtin_recipe(name) if name.startswith("builtin:") else Path(name) for name in recipes]
    twice = sorted({str(path) for path in paths if sum(path.resolve() == other.resolve() for other in paths) > 1})
    if twice:
        raise RecipeError(f"Named more than once: {', '.join(twice)}. Name each recipe once; --seeds repeats runs.")
    stems = [path.stem for path in paths]
    names = [
        path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}-{path.stem}" for path in paths
    ]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise RecipeError(f"Several recipes would be called {', '.join(doubled)}. Rename all but one of the files.")
    read = [read_with_model(partial(read_recipe, path, words), reads_text=True) for path in paths]
    return [Policy(name, path, tuple(words), one) for name, path, one in zip(names, paths, read, strict=True)]


def changed_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with changes, checked as a whole."""
    return recipe_from_values({**without_other_length(values, changes), **changes}).values


def changed_words(words: Sequence[str], changes: Mapping[str, Any]) -> list[str]:
    """Command-line words with changes: a value that both say is that of the changes.

    changed_words(["--seed", "1"], {"seed": 2, "text": ["a", "b"]}) -> ["--seed=2", "--text", "a", "b"]
    """
    given, _ = group_words(words)
    kept = {key: list(own) for key, own in without_other_length(given, changes).items()}
    line: list[str] = []
    for key, own in {**kept, **{key: value_words(value) for key, value in changes.items()}}.items():
        # with `=`, so that a value that begins with dashes is not taken for a key
        line += [f"--{key}={own[0]}"] if len(own) == 1 else [f"--{key}", *own]
    return line


def without_other_length(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`given` less its epochs where `changes` counts steps: a recipe has one length."""
    steps, epochs = LENGTHS
    return {key: value for key, value in given.items() if not (key == epochs and steps in changes)}


def value_words(value: Any) -> list[str]:
    """A recipe's value as words of a command line.

    value_words(True) -> ["true"]; value_words(["a", "b"]) -> ["a", "b"]; value_words({}) -> ["{}"]
    """
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list) and value:
        return [str(entry) for entry in value]
    return [str(value)]
