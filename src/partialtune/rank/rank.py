"""`partialtune rank`: recipe -> base and text -> probe -> ranking."""

import os
from pathlib import Path

import torch
from transformers import set_seed

from partialtune.errors import RecipeError
from partialtune.model.conformance import check_conformance
from partialtune.model.loading import load_config, load_model, load_tokenizer
from partialtune.model.model_checks import check_finite, check_fit, check_ids
from partialtune.rank.probe import draw_windows, probe
from partialtune.rank.ranking import Ranking, rank
from partialtune.recipe.reading import Recipe
from partialtune.training.run_data import prepare_data

BATCHES = 4
WINDOWS_A_BATCH = 8  # Trainer's default


def rank_recipe(recipe: Recipe, batches: int = BATCHES, top: int | None = None) -> Ranking:
    """Rank the blocks and parts of a recipe's base by their gradients on a few batches of its training text.

    Args:
        recipe: Its `trainable`, `schedule` and `method` do not matter.
        batches: Of `per_device_train_batch_size` windows each, drawn from the training windows by the recipe's seed.
        top: How many blocks to choose, see `rank`.

    Raises:
        InputError: If model or text cannot be read.
    """
    base, said = recipe.model, recipe.training
    batch_size, seed = said.get("per_device_train_batch_size", WINDOWS_A_BATCH), said.get("seed", 42)
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code)
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    check_fit(base.model_name_or_path, config, recipe.text.block_size, vocabulary=len(tokenizer))
    data = prepare_data(recipe.text, {}, tokenizer, said.get("data_seed", seed))
    check_ids(base.model_name_or_path, config, data.largest_ids)
    windows = draw_windows(data.train, batches * batch_size, seed)
    model = load_model(base.model_name_or_path, config, base.model_revision, base.trust_remote_code)
    check_finite(base.model_name_or_path, model)
    check_conformance(model, recipe.text.block_size)
    set_seed(seed)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return rank(probe(model, windows, batch_size, recipe.freeze.head), top)


def check_new(file: Path) -> None:
    """Stop before any work where a file would be overwritten or cannot be written.

    Raises:
        RecipeError: In either case.
    """
    if file.exists():
        raise RecipeError(f"{file} exists already. Name a file that does not.")
    if not file.parent.is_dir():
        raise RecipeError(f"{file}: there is no folder {file.parent}. Make it, or name another file.")
    if not os.access(file.parent, os.W_OK):
        raise RecipeError(f"{file}: {file.parent} is not writable. Name a file in a folder that is.")
