"""In which bits a run holds what is frozen, known before there are weights: recipe + base -> a 16-bit dtype, or none.

The dtype of a base is that of its files: of a folder, and of a Hub id whose files are in the cache, it stands in their
headers; of another Hub id the Hub tells it. Where neither says anything it is that of `config.json`.

Of a base of several dtypes a run holds each tensor in its own; the forecast takes all to be in the one that most have.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import PretrainedConfig

from partialtune import __version__
from partialtune.distributed import launcher_says
from partialtune.model.loading import model_location
from partialtune.model.model_checks import dtypes_in
from partialtune.net.hub_client import HUB_ERRORS
from partialtune.recipe.recipe import Recipe

NARROW_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors writes them
ANSWER_SECONDS = 10.0  # for the Hub to say in which dtypes a base lies there


class HeldDtype(NamedTuple):
    """How frozen matrices are held.

    Attributes:
        dtype: One of 16 bits, or None for fp32.
        reason: In words, to stand behind it: `the base's files hold BF16`.
    """

    dtype: torch.dtype | None
    reason: str


def held_dtype(recipe: Recipe, config: PretrainedConfig) -> HeldDtype:
    """As `training.load_base` will hold the frozen matrices of a recipe's base. No weights are fetched.

    Args:
        recipe: Its model, `frozen_dtype`, method, FSDP and torch_compile count.
        config: Of the base, by `load_config`.
    """
    if recipe.freeze.frozen_dtype == "float32":
        return HeldDtype(None, "frozen_dtype: float32")
    if recipe.freeze.method == "full":
        return HeldDtype(None, "nothing is frozen")
    if recipe.training.get("fsdp") or launcher_says("ACCELERATE_USE_FSDP"):
        return HeldDtype(None, "FSDP shards parameters of one dtype")
    if recipe.training.get("torch_compile"):
        return HeldDtype(None, "torch_compile would keep the wide copy of each matrix")
    dtypes, source = _dtypes_of_base(recipe, config)
    name = dtypes.most_common(1)[0][0]
    mostly = "mostly " if len(dtypes) > 1 else ""
    return HeldDtype(NARROW_NAMES.get(name), f"{source} {mostly}{name}")


def _dtypes_of_base(recipe: Recipe, config: PretrainedConfig) -> tuple[Counter[str], str]:
    """The dtypes of a base, as safetensors writes them, with how much has them, and what said so."""
    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    location = model_location(name)
    folder = Path(location)
    if not folder.is_dir():
        file = try_to_load_from_cache(location, "config.json", revision=revision)
        folder = Path(file).parent if isinstance(file, str) else folder
    try:
        in_files = Counter(dtypes_in(folder).values()) if folder.is_dir() else Counter[str]()
    except FileNotFoundError:  # the cache has the index of the files and not all of them
        in_files = Counter()
    if in_files:
        return in_files, "the base's files hold"
    if not Path(location).is_dir() and (on_hub := _on_hub(location, revision)):
        return on_hub, "the Hub says that the base's files hold"
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    names = {dtype: name for name, dtype in NARROW_NAMES.items()}
    return Counter([names.get(own, "F32")]), "no file could be asked, and config.json says"


def _on_hub(location: str, revision: str) -> Counter[str]:
    """What the Hub says of the safetensors files of a base; nothing where it does not answer, or knows none."""
    try:
        api = HfApi(library_name="partialtune", library_version=__version__)
        answer = api.model_info(location, revision=revision, expand=["safetensors"], timeout=ANSWER_SECONDS)
    except HUB_ERRORS:  # without it the forecast is by config.json, and says so
        return Counter()
    return Counter(answer.safetensors.parameters) if answer.safetensors else Counter()
