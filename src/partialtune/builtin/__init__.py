"""What ships inside the package: `builtin:lilliput` -> a model's folder, `builtin:quickstart` -> a recipe's file."""

from importlib import resources
from pathlib import Path

from partialtune.errors import ModelError, RecipeError

PREFIX = "builtin:"
MODELS = ("lilliput",)
RECIPES = ("quickstart",)


def builtin_folder(name: str) -> Path:
    """Folder of a bundled model, as `from_pretrained` takes it: weights, configuration, tokenizer, card.

    builtin_folder("builtin:lilliput") -> .../partialtune/builtin/lilliput

    Args:
        name: The model as a recipe names it, with the prefix `builtin:`.

    Raises:
        ModelError: If no bundled model has that name.
    """
    if name.removeprefix(PREFIX) not in MODELS or not name.startswith(PREFIX):
        available = ", ".join(PREFIX + model for model in MODELS)
        raise ModelError(f"{name!r} is not a bundled model. This package bundles: {available}.")
    return Path(str(resources.files("partialtune.builtin"))) / name.removeprefix(PREFIX)


def builtin_recipe(name: str) -> Path:
    """File of a bundled recipe.

    builtin_recipe("builtin:quickstart") -> .../partialtune/builtin/quickstart.yaml

    Raises:
        RecipeError: If no bundled recipe has that name.
    """
    if name.removeprefix(PREFIX) not in RECIPES or not name.startswith(PREFIX):
        available = ", ".join(PREFIX + recipe for recipe in RECIPES)
        raise RecipeError(f"{name!r} is not a bundled recipe. This package bundles: {available}.")
    file = f"{name.removeprefix(PREFIX)}.yaml"
    folder = Path(str(resources.files("partialtune.builtin")))
    in_package, in_checkout = folder / file, folder.parents[2] / "recipes" / file  # a wheel holds a copy of it
    return in_package if in_package.is_file() else in_checkout
