"""A model's folder -> its weights by parameter name, one tensor at a time where its files allow that.

Names in files are not parameter names: GPT-2's file on the Hub leaves out `transformer.`, a Mixtral's holds each expert
by itself where the model fuses them. Names are mapped by transformers' own rules. Where these only rename, tensors
are read from the files one by one; where they also split, fuse or permute, transformers loads the whole model.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from partialtune.errors import ModelError
from partialtune.model.loading import empty_model, load_config, load_model
from partialtune.model.structure import ModelStructure, read_structure

logger = logging.getLogger(__name__)

READ_AS_THEY_ARE = ("F32", "BF16", "F16", "F64")  # one value of the file is one of the parameter
HELD_BY_FP32 = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I16", "U16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Weights:
    """The weights of one model.

    Attributes:
        folder: Where the files are.
        name: What messages call the model.
        config: The model's.
        structure: Its parameters, as `from_pretrained` gives them.
        buffers: Names of the buffers that its files hold.
        unused: Tensors in its files that are neither parameter nor buffer of the model.
        streamed: Whether each read goes to the files; otherwise the model is in memory, in fp32 or fp64.
        read: Any name of a parameter or buffer -> its values, on the CPU, in a dtype that holds them exactly.
    """

    folder: Path
    name: str
    config: PretrainedConfig
    structure: ModelStructure
    buffers: frozenset[str]
    unused: tuple[str, ...]
    streamed: bool
    read: Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class NameMap:
    """What transformers makes of the names in a file: parameter or buffer -> its name in the file."""

    in_file: dict[str, str]
    unused: tuple[str, ...]
    renames_only: bool


class TensorFiles:
    """The tensors of a model's safetensors files by their names there, read on demand without mapping files to memory.

    A mapped file would count as memory of this process as far as it was read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of = {}
        for file in files:
            opened = safe_open(file, framework="pt", backend="pread")
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors writes it: F32, BF16, ..."""
        return self._file_of[name].get_slice(name).get_dtype()

    def read(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def open_weights(folder: Path, name: str) -> Weights:
    """The weights of the model in a folder.

    Args:
        folder: Holds config.json and safetensors files, one or many.
        name: What messages call it.

    Raises:
        ModelError: If the files are damaged, lack a parameter, do not fit config.json or are quantised.
    """
    config = load_config(str(folder))
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantised: its values stand for others, so no bits of weights can be compared.")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name} holds an adapter, not a whole model. Merge it into its base and save that.")
    model = empty_model(config)
    model.config.name_or_path = name
    structure = read_structure(model)
    with _reading(name):
        files = TensorFiles(_weight_files(folder, config))
        names = map_names(model, files.names)
        _check_shapes(name, structure, names, files)
        if _can_stream(structure, names, files):
            return _stream(folder, name, config, structure, names, files)
        exact = all(files.dtype(in_file) in HELD_BY_FP32 for in_file in names.in_file.values())
    return _load_whole(folder, name, config, names, torch.float32 if exact else torch.float64)


def _weight_files(folder: Path, config: PretrainedConfig) -> Sequence[Path]:
    """The files that transformers would take: the single one before the shards. None where it takes something else."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if getattr(config, "transformers_weights", None):  # a file name of the config's own choice
        return []
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not index.is_file():
        return []
    try:
        return [folder / shard for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} is damaged: it does not say which file holds which tensor. Fetch it again."
        ) from error


def map_names(model: PreTrainedModel, names_in_file: Sequence[str]) -> NameMap:
    """Map the names in a model's files to those of its parameters and buffers, as loading it would.

    map_names(gpt2, ["wte.weight", "h.0.attn.bias"]) -> in_file {"transformer.wte.weight": "wte.weight"}, unused [...]

    Args:
        model: On the meta device is enough.
        names_in_file: All of them.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    in_file, unused, renames_only = {}, [], True
    for name in names_in_file:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:  # renamed without need; loading takes such a name as it is
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected and pattern is None:
            unused.append(name)
            continue
        renames_only = renames_only and pattern is None and target not in in_file
        in_file[target] = name
    return NameMap(in_file, tuple(unused), renames_only)


def _check_shapes(name: str, structure: ModelStructure, names: NameMap, files: TensorFiles) -> None:
    for parameter, info in structure.by_name.items():
        in_file = names.in_file.get(parameter)
        if names.renames_only and in_file is not None and files.shape(in_file) != info.shape:
            raise ModelError(
                f"{name}: {parameter} is {files.shape(in_file)} in the weight file and {info.shape} by config.json. "
                f"The two do not belong together."
            )


def _can_stream(structure: ModelStructure, names: NameMap, files: TensorFiles) -> bool:
    """Whether every parameter has a tensor of its own in the files, in a dtype to take as it is.

    A file may hold several names of a tie. Where their values differ, loading makes two parameters of them.
    """
    for info in structure.parameters:
        present = [names.in_file[place.name] for place in info.places if place.name in names.in_file]
        if not present or any(files.dtype(name) not in READ_AS_THEY_ARE for name in present):
            return False
        if len(present) > 1 and not all(torch.equal(files.read(present[0]), files.read(name)) for name in present[1:]):
            return False
    return names.renames_only


def _stream(
    folder: Path, name: str, config: PretrainedConfig, structure: ModelStructure, names: NameMap, files: TensorFiles
) -> Weights:
    def read(wanted: str) -> torch.Tensor:
        others = [place.name for place in structure.by_name[wanted].places] if wanted in structure.by_name else []
        in_file = next(names.in_file[one] for one in (wanted, *others) if one in names.in_file)
        with _reading(name):
            return files.read(in_file)

    buffers = frozenset(names.in_file.keys() - structure.by_name.keys())
    return Weights(folder, name, config, structure, buffers, names.unused, streamed=True, read=read)


def _load_whole(folder: Path, name: str, config: PretrainedConfig, names: NameMap, dtype: torch.dtype) -> Weights:
    logger.info("%s: its files hold other tensors than the model has parameters. Loading all of it.", name)
    model = load_model(str(folder), config, dtype=dtype)
    model.config.name_or_path = name
    tensors, structure = model.state_dict(), read_structure(model)
    buffers = frozenset(tensors.keys() - structure.by_name.keys())
    return Weights(folder, name, config, structure, buffers, names.unused, streamed=False, read=tensors.__getitem__)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say in one sentence why a weight file cannot be read."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"{name}: a weight file is damaged ({error}). Fetch the model again.") from error
    except OSError as error:
        raise ModelError(f"{name}: a weight file cannot be read ({error}).") from error
