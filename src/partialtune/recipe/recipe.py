"""A recipe: flat YAML and command-line words -> checked arguments for every stage.

In: a path, or a mapping of values; and words or values that win over it. Out: a `Recipe`, or one RecipeError that lists
every mistake. Mistakes of the file as such (`parsing`) are raised before transformers is imported, those of keys and
values (`checks`) before a model or a text is touched.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from partialtune.net.addresses import sources_without_secrets
from partialtune.recipe.arguments import (
    EvaluationArguments,
    FreezeArguments,
    ModelArguments,
    SpeedArguments,
    TextArguments,
    argument_fields,
)
from partialtune.recipe.checks import RecipeMistakes, checked_values, values_and_problems, with_present_names
from partialtune.recipe.declared_arguments import declared_arguments
from partialtune.recipe.key_rules import LENGTHS, training_defaults
from partialtune.recipe.parsing import (
    ARGUMENT,
    COMMAND_LINE,
    Entry,
    Problem,
    RecipeFile,
    Words,
    group_words,
    read_recipe_file,
    write_recipe_file,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: The YAML file; None for a recipe made from values.
        model, text, freeze, evaluation, speed: Our own keys, by stage, with defaults.
        training: Keywords of `transformers.TrainingArguments` that were given. `bf16` may be "auto".
        resume: "auto", the folder of a checkpoint, or None.
        values: Every value that was given, converted, as one flat mapping; no defaults.
        given: The same as they were given, with where each stands: a mistake that is found later is put there.
    """

    path: Path | None
    model: ModelArguments
    text: TextArguments
    freeze: FreezeArguments
    evaluation: EvaluationArguments
    speed: SpeedArguments
    training: dict[str, Any]
    resume: str | None
    values: dict[str, Any]
    given: Mapping[Any, Entry] = field(default_factory=dict, repr=False, compare=False)

    @property
    def seed(self) -> int:
        """Of Trainer's random numbers and of random draws of blocks."""
        return int(self.training.get("seed", training_defaults()["seed"]))


def read_recipe(path: str | os.PathLike, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe's file; what is given beside it wins over it.

    read_recipe("recipe.yaml", ["--max_steps", "5", "--trainable", "blocks[-2:]", "final_norm"])
    read_recipe("recipe.yaml", {"max_steps": 5, "trainable": ["blocks[-2:]", "final_norm"]})

    Args:
        path: A YAML file.
        overrides: Words of the command line, or keys and values.

    Raises:
        RecipeError: Lists every unknown, doubled, refused, missing, wrong or contradictory value, one a line.
    """
    file = read_recipe_file(Path(path))
    values = {key: Entry(value, file.origin(key)) for key, value in file.values.items()}
    return _checked_recipe(values, overrides, file.problems, str(path), Path(path))


def recipe_from_values(values: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a mapping of keys to values, with the same checks; `overrides` win over it, as in `read_recipe`.

    Raises:
        RecipeError: As `read_recipe`.
    """
    given = {key: Entry(value, "") for key, value in values.items()}
    return _checked_recipe(given, overrides or {}, (), "The recipe", None)


def _checked_recipe(
    given: Mapping[Any, Entry],
    overrides: Sequence[str] | Mapping[str, Any],
    found: Sequence[Problem],
    name: str,
    path: Path | None,
) -> Recipe:
    """Values and what wins over them, checked together; `found` are the problems that reading the file had."""
    merged, problems = _merged(given, overrides, found)
    return _recipe(checked_values(merged, problems, name), merged, path)


def check_words(path: str | os.PathLike | None, overrides: Sequence[str]) -> None:
    """Stop, before torch is imported, where a recipe is missing or a word of the command line is wrong.

    What is wrong with a recipe's file alone waits for the rest, so that `read_recipe` and the look at the model say all
    of it together.

    Args:
        path: The recipe's file; None where its values are not known yet.
        overrides: Words of the command line.

    Raises:
        RecipeError: If the file cannot be read; or lists all that can be known by now, where a word is wrong.
    """
    file = RecipeFile({}, {}, ()) if path is None else read_recipe_file(Path(path))
    declared = declared_arguments()
    if declared is None:  # this transformers keeps them elsewhere
        return
    given = {key: Entry(value, file.origin(key)) for key, value in file.values.items()}
    level = logger.level
    logger.setLevel(logging.ERROR)  # what takes the place of what is said when the recipe is read
    try:
        merged, found = _merged(given, overrides, file.problems)
    finally:
        logger.setLevel(level)
    values, problems = values_and_problems(merged, found, *declared)
    wrong_words = [problem for problem in problems if problem.origin == COMMAND_LINE]
    if wrong_words:
        name = "The command line" if path is None else str(path)
        raise RecipeMistakes(name, wrong_words if path is None else problems, values, merged)


def _merged(
    given: Mapping[Any, Entry], overrides: Sequence[str] | Mapping[str, Any], found: Sequence[Problem]
) -> tuple[dict[Any, Entry], list[Problem]]:
    """Entries by present name, after what wins over them has won, and the problems so far."""
    problems = [*found]
    if isinstance(overrides, Mapping):
        entries = {key: Entry(value, ARGUMENT) for key, value in overrides.items()}
    else:
        words, stray = group_words(overrides)
        problems += stray
        entries = {key: Entry(value, COMMAND_LINE) for key, value in words.items()}
    # each by itself: a former name in one and the present name in the other is an override, no clash
    base = with_present_names({key: entry for key, entry in given.items() if key != "run"}, problems)
    winning = with_present_names(entries, problems)
    return {**_without_other_length(base, winning), **winning}, problems


def _without_other_length(base: dict[Any, Entry], winning: dict[Any, Entry]) -> dict[Any, Entry]:
    """The recipe's entries less its max_steps where what wins counts epochs, and the other way round."""
    for key, other in (LENGTHS, LENGTHS[::-1]):
        if key in winning and winning[key].value not in (-1, Words(("-1",))) and other in base:
            logger.info("%s takes the place of the recipe's %s.", key, other)
            base = {name: entry for name, entry in base.items() if name != other}
    return base


def _recipe(values: dict[str, Any], given: Mapping[Any, Entry], path: Path | None) -> Recipe:
    if values.get("method") == "full":
        freeze = _arguments(FreezeArguments, {**values, "trainable": ["all"]})
    else:
        freeze = _arguments(FreezeArguments, values)
    ours = {*argument_fields(), "resume_from_checkpoint"}
    return Recipe(
        path=path,
        model=_arguments(ModelArguments, values),
        text=_arguments(TextArguments, values),
        freeze=freeze,
        evaluation=_arguments(EvaluationArguments, values),
        speed=_arguments(SpeedArguments, values),
        training={key: value for key, value in values.items() if key not in ours},
        resume=values.get("resume_from_checkpoint"),
        values=values,
        given=given,
    )


def _arguments(cls: type, values: Mapping[str, Any]) -> Any:
    return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})


def write_recipe(path: Path, values: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write a recipe that `read_recipe` accepts, without the secrets in the addresses of its texts.

    Args:
        path: The file; an existing one is replaced as a whole.
        values: Keys as in `Recipe.values`. They are written in the order of the dataclasses.
        run: What the run recorded: strings, numbers, lists and mappings. Stands last, under the key `run`.
    """
    order = {key: place for place, key in enumerate([*argument_fields(), *training_defaults()])}
    known = sorted((key for key in values if key != "run"), key=lambda key: order.get(key, len(order)))
    write_recipe_file(path, sources_without_secrets({key: values[key] for key in known}), run)
