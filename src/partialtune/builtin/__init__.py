"""The models that ship inside the package: a name such as `builtin:lilliput` -> its folder."""

from importlib import resources
from pathlib import Path

from partialtune.errors import ModelError

PREFIX = "builtin:"
MODELS = ("lilliput",)


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
