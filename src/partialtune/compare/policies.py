"""Recipes -> policies to compare: each with its name, its checked values, and the jobs that run it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from partialtune.builtin import builtin_recipe
from partialtune.errors import RecipeError
from partialtune.recipe.command_words import group_words
from partialtune.recipe.reading import Recipe, read_recipe, recipe_from_values
from partialtune.recipe.rules import LENGTHS


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
        said = {**without_other_length(self.policy.recipe.values, self.changes), **self.changes}
        return recipe_from_values(said).values

    @property
    def command(self) -> list[str]:
        """Words after `partialtune`. A value that the policy's own words say is replaced by the run's."""
        said, _ = group_words(self.policy.words)
        kept = {key: list(words) for key, words in without_other_length(said, self.changes).items()}
        changed = {key: value_words(value) for key, value in self.changes.items()}
        return ["train", str(self.policy.path), *as_command_line({**kept, **changed})]


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


def as_command_line(said: Mapping[str, Sequence[str]]) -> list[str]:
    """{"seed": ["1"], "text": ["a", "b"]} -> ["--seed=1", "--text", "a", "b"]."""
    line: list[str] = []
    for key, words in said.items():
        line += [f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words]
    return line
