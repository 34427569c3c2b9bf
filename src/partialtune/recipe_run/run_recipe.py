"""`partialtune.train`: a recipe from Python, in a script, a notebook or a thread, run as the command line runs it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partialtune.builtin import builtin_recipe
from partialtune.distributed import DDP_TIMEOUT, decided_by_main, peers_watched, several_nodes
from partialtune.errors import RecipeError
from partialtune.launcher_environment import check_launched
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values
from partialtune.recipe_run.finished_run import FinishedRun, open_run
from partialtune.training.launch import check_launcher, join_processes, use_all_cores
from partialtune.training.stopping import ended_by_signals


def train(recipe: str | os.PathLike | Mapping[str, Any] | Recipe, /, **overrides: Any) -> FinishedRun:
    """Run a recipe from its text to its report.

    ::

        partialtune.train("recipe.yaml", max_steps=20)
        partialtune.train({"model_name_or_path": "builtin:lilliput", "text": "book.txt", "trainable": ["blocks[-1]"],
                           "output_dir": "outputs/book"})

    A run that is finished already is opened. In a thread that is not the main one, signals stay with the program that
    started it. One run at a time in a process: the random numbers are the process's own.

    Args:
        recipe: A YAML file, `builtin:quickstart`, a mapping of a recipe's keys, or what `read_recipe` gave.
        overrides: Keys of the recipe, which win over what it says.

    Returns:
        What the run has found; the same as `open_run` makes of its folder.

    Raises:
        RecipeError: If the recipe cannot be used. It lists all that is wrong, and nothing was loaded or written.
        FreezeViolation: If the freeze audit failed. The run's files are written; `open_run` reads them.
        PartialtuneError: Any other that the command line turns into an exit code.
    """
    check_launched()
    use_all_cores()
    check_launcher()
    with ended_by_signals():
        from partialtune.freeze.recipe_mistakes import read_with_model

        folder = run_recipe(read_with_model(lambda: _checked(recipe, overrides), reads_text=True))
        # On several nodes the folder may be on the main process's disk alone.
        return decided_by_main(lambda: open_run(folder)) if several_nodes() else open_run(folder)


def run_recipe(recipe: Recipe) -> Path:
    """Let the processes of a run find each other, and carry out a recipe.

    Returns:
        The run's folder.
    """
    from partialtune.recipe_run.train import train as train_whole  # four seconds, for which no mistake has to wait

    with peers_watched(recipe.training.get("ddp_timeout", DDP_TIMEOUT)):
        join_processes(recipe.training)
        return train_whole(recipe)


def _checked(recipe: Any, overrides: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        recipe = recipe.values
    if isinstance(recipe, Mapping):
        return recipe_from_values(recipe, overrides)
    if not isinstance(recipe, str | os.PathLike):
        raise RecipeError(
            f"The recipe is of type {type(recipe).__name__}; allowed: a YAML file, builtin:quickstart, or a mapping of "
            f"keys to values, such as {{'model_name_or_path': 'builtin:lilliput', ...}}."
        )
    name = os.fspath(recipe)
    return read_recipe(builtin_recipe(name) if name.startswith("builtin:") else name, overrides)
