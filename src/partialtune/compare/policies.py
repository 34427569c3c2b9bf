"""Recipes -> policies to compare: each with its name, its checked values, and the jobs that run it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from partialtune.builtin import builtin_recipe
from partialtune.errors import RecipeError
from partialtune.recipe.key_rules import LENGTHS
from partialtune.recipe.parsing import group_words
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values


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
    """

    policy: Policy
    title: str
    folder: Path
    changes: Mapping[str, Any]
    log: Path

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
    return [Policy(name, path, tuple(words), read_recipe(path, words)) for name, path in zip(names, paths, strict=True)]


def changed_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with changes, checked as a whole."""
    return recipe_from_values({**without_other_length(values, changes), **changes}).values


def changed_words(words: Sequence[str], changes: Mapping[str, Any]) -> list[str]:
    """Command-line words with changes: a value that both say is that of the changes.

    changed_words(["--seed", "1"], {"seed": 2, "text": ["a", "b"]}) -> ["--seed=2", "--text", "a", "b"]
    """
    said, _ = group_words(words)
    kept = {key: list(own) for key, own in without_other_length(said, changes).items()}
    line: list[str] = []
    for key, own in {**kept, **{key: value_words(value) for key, value in changes.items()}}.items():
        line += [f"--{key}={own[0]}"] if len(own) == 1 else [f"--{key}", *own]
    return line


def without_other_length(said: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`said` less its epochs where `changes` counts steps: a recipe has one length."""
    steps, epochs = LENGTHS
    return {key: value for key, value in said.items() if not (key == epochs and steps in changes)}


def value_words(value: Any) -> list[str]:
    """A recipe's value as words of a command line.

    value_words(True) -> ["true"]; value_words(["a", "b"]) -> ["a", "b"]; value_words({}) -> ["{}"]
    """
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list) and value:
        return [str(entry) for entry in value]
    return [str(value)]
