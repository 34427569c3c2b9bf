"""What a base model says of itself: a Hub id, folder or bundled name -> language and licence, from its model card.

Apart from `loading`, which brings torch: the page maker, who only asks which fields there are, need not wait for it.
"""

import logging
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import metadata_load

from partialtune.net.hub_client import HUB_ERRORS, in_words

logger = logging.getLogger(__name__)

STATED = ("language", "license", "license_name", "license_link")  # taken over by what is made of the base


def stated_by(name: str, commit: str | None = None) -> dict[str, Any]:
    """The fields of STATED that the base's model card has.

    Args:
        name: The base as a recipe names it.
        commit: Its commit, where it came from the Hub.

    Returns:
        Nothing where there is no card, or none that can be read: training goes on without it.
    """
    try:
        metadata = metadata_load(_card(name, commit)) or {}
    except (EntryNotFoundError, FileNotFoundError):
        metadata = {}
    except (*HUB_ERRORS, yaml.YAMLError) as error:
        logger.warning("The model card of %s cannot be read, so its licence is not known: %s", name, in_words(error))
        return {}
    stated = {key: metadata[key] for key in STATED if _is_plain(metadata.get(key))}
    if "license" not in stated:
        logger.info("No model card of %s says under which licence it is, so that of the run says nothing either.", name)
    return stated


def _card(name: str, commit: str | None) -> Path:
    from partialtune.model.loading import model_location  # here: it brings torch

    location = model_location(name)
    if Path(location).is_dir():
        return Path(location, "README.md")
    return Path(hf_hub_download(location, "README.md", revision=commit))


def _is_plain(value: Any) -> bool:
    """Whether it is a word, or a list of words: all that the Hub takes here."""
    return isinstance(value, str) or (
        isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
    )
