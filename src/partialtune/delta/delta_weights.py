"""A delta checkpoint -> its weights by parameter name: what it stores over what its base holds."""

from collections.abc import Mapping
from pathlib import Path

import torch

from partialtune.delta.checkpoint import Delta, check_base, read_delta
from partialtune.errors import ModelError
from partialtune.model.checkpoint_folder import checkpoint_folder
from partialtune.model.digests import digests_of
from partialtune.model.loading import empty_model, load_config
from partialtune.model.structure import read_structure
from partialtune.model.weight_files import Weights, open_weights


def open_delta(folder: Path, name: str, at_hand: Weights | None = None) -> Weights:
    """The weights of the model that a delta stands for, streamed where its base is.

    Args:
        folder: Holds the delta.
        name: What messages call it.
        at_hand: A model that is open already. Where it is the delta's base, nothing is looked for.

    Raises:
        ModelError: If the delta is damaged, or neither `at_hand` nor what the delta names is its base.
    """
    delta = read_delta(folder, name)
    base = at_hand if at_hand is not None and _digests(delta, at_hand) == delta.before else _named_base(delta)
    config = load_config(str(folder))
    structure = read_structure(empty_model(config))
    structure_of = structure.by_name

    def read(wanted: str) -> torch.Tensor:
        others = [place.name for place in structure_of[wanted].places] if wanted in structure_of else []
        stored = next((one for one in (wanted, *others) if one in delta.stored), None)
        return base.read(wanted) if stored is None else delta.read(stored)

    return Weights(folder, name, config, structure, base.buffers, base.unused, streamed=base.streamed, read=read)


def _named_base(delta: Delta) -> Weights:
    try:
        base = open_weights(*checkpoint_folder(delta.base.location))
    except ModelError as error:
        raise ModelError(f"{delta.name} is a delta of {delta.base}, which cannot be had: {error}") from error
    check_base(delta, base.name, _digests(delta, base))
    return base


def _digests(delta: Delta, base: Weights) -> Mapping[str, str]:
    """Of the base's parameters under the delta's names; a name that the base lacks has none."""
    known = [name for name in delta.before if name in base.structure.by_name]
    return digests_of((name, base.read(name)) for name in known)
