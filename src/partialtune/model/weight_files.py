"""A model's folder -> its weights by parameter name, one tensor at a time where its files allow that.

Names in files are not parameter names: GPT-2's file on the Hub leaves out `transformer.`, a Mixtral's holds each expert
by itself where the model fuses them. Names are mapped and tensors are fused by transformers' own rules, parameter by
parameter. Where a parameter has no tensor of its own even so, transformers loads the whole model.
"""

import copy
import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from partialtune.errors import ModelError
from partialtune.model.loading import empty_model, load_config, load_model
from partialtune.model.sharded_files import MODEL_FOLDER, ShardedFiles, is_sharded_checkpoint
from partialtune.model.structure import ModelStructure, read_structure

logger = logging.getLogger(__name__)

# dtypes as safetensors writes them
READ_AS_THEY_ARE = ("F32", "BF16", "F16", "F64")  # one value of the file is one of the parameter
LOADED_IN_FP32 = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I16", "U16", "I8", "U8", "BOOL")


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


@dataclass
class Conversion:
    """Tensors of a file that make up other tensors of the model: experts to be fused, a matrix to be split.

    Attributes:
        target: What transformers calls the group: the first of the tensors that it makes.
        converter: Its rule.
        sources: Names in the file, each with the pattern of the rule that it matches.
    """

    target: str
    converter: WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)

    def make(self, model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the model by name, as loading makes them."""
        converter = copy.deepcopy(self.converter)  # it keeps the tensors that are added to it
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, read(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


@dataclass(frozen=True)
class NameMap:
    """What transformers makes of the names in a file.

    Attributes:
        in_file: Parameter or buffer -> its name in the file, where nothing has to be done but rename it.
        converted: Parameter or buffer -> what it is made by; empty where that cannot be told without loading.
        unused: Names in the file that the model has no use for.
        clear: Whether each tensor of the model is accounted for by at most one of these.
    """

    in_file: dict[str, str]
    converted: dict[str, Conversion]
    unused: tuple[str, ...]
    clear: bool


class TensorFiles:
    """The tensors of a model's safetensors files by their names there, read on demand without mapping files to memory.

    A mapped file would count as memory of this process as far as it was read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of: dict[str, safe_open] = {}
        for file in files:
            opened = safe_open(file, framework="pt", backend="pread")  # not the default, which maps
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

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same values, as the names of a tie have."""
        return torch.equal(self.read(one), self.read(other))


def open_weights(folder: Path, name: str, trust_remote_code: bool = False) -> Weights:
    """The weights of the model in a folder.

    Args:
        folder: Holds config.json and safetensors files, one or many, or the shards of several processes.
        name: What messages call it.
        trust_remote_code: Whether the model's code may come from the folder.

    Raises:
        ModelError: If the files are damaged, lack a parameter, do not fit config.json or are quantised.
    """
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantised: its values stand for others, so no bits of weights can be compared.")
    model = empty_model(config, trust_remote_code)
    model.config.name_or_path = name
    structure = read_structure(model)
    with _reading(name):
        files = tensor_files(folder, config)
        names = _own_names(model, files) if isinstance(files, ShardedFiles) else map_names(model, files)
        _check_shapes(name, structure, names, files)
        if _can_stream(structure, names, files):
            return _stream(folder, name, model.config, model, structure, names, files)
        if isinstance(files, ShardedFiles):
            raise ModelError(
                f"{name} holds shards ({MODEL_FOLDER}) that are not the parameters of its config.json, each in one "
                f"floating-point type. Take the folder of its run, where the whole model is once the run has ended."
            )
        exact = all(files.dtype(in_file) in LOADED_IN_FP32 for in_file in files.names)  # no value is rounded
    return _load_whole(folder, name, config, trust_remote_code, names, torch.float32 if exact else torch.float64)


def tensor_files(folder: Path, config: PretrainedConfig | None = None) -> TensorFiles | ShardedFiles:
    """The tensors of a model's files: of safetensors files where there are any, else of the shards of processes."""
    files = weight_files(folder, config)
    return ShardedFiles(folder) if not files and is_sharded_checkpoint(folder) else TensorFiles(files)


def weight_files(folder: Path, config: PretrainedConfig | None = None) -> Sequence[Path]:
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


def _own_names(model: PreTrainedModel, files: ShardedFiles) -> NameMap:
    """Of shards, which hold the tensors of the model as it has them: nothing was renamed or taken apart to save it."""
    expected = model.state_dict()
    unused = tuple(name for name in files.names if name not in expected)
    return NameMap({name: name for name in files.names if name in expected}, {}, unused, clear=True)


def map_names(model: PreTrainedModel, files: TensorFiles) -> NameMap:
    """Map the tensors in a model's files to its parameters and buffers, as loading it would.

    gpt2, ["wte.weight", "h.0.attn.bias"] -> in_file {"transformer.wte.weight": "wte.weight"}, unused ["h.0.attn.bias"]

    Args:
        model: On the meta device is enough.
        files: Of the model.
    """
    # transformers' own rules and the function that applies them: what it exports for loading, with no promise that they
    # stay. test_verify (the Hub's names of GPT-2, a Mixtral's experts) and test_architectures fail where they change.
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    rule_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    in_file: dict[str, str] = {}
    groups: dict[str, Conversion] = {}
    unused, clear = [], True
    for name in sorted(files.names, key=dot_natural_key):  # expert 2 before expert 10, as loading takes them
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:  # renamed without need; loading takes such a name as it is
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is not None:
            groups.setdefault(target, Conversion(target, rule_of[pattern])).sources.append((name, pattern))
        elif target not in expected:
            unused.append(name)
        else:
            clear = clear and target not in in_file  # two tensors for one parameter: which of them is loaded?
            in_file[target] = name
    converted = _made_by(groups.values(), model, files)
    clear = clear and converted is not None and not (converted.keys() & in_file.keys())
    return NameMap(in_file, converted or {}, tuple(unused), clear)


def _made_by(
    conversions: Iterable[Conversion], model: PreTrainedModel, files: TensorFiles
) -> dict[str, Conversion] | None:
    """Name of a parameter or buffer -> what makes it, tried on tensors without values; None where that fails."""
    expected, made_by = model.state_dict(), {}
    for conversion in conversions:
        try:
            made = conversion.make(model, lambda name: torch.empty(files.shape(name), device="meta"))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
            # A rule that reads values fails on the meta device. Nothing is lost: the whole model is loaded then.
            logger.debug("%s: %s", conversion.target, error)
            return None
        for name, values in made.items():
            if name not in expected or name in made_by or values.shape != expected[name].shape:
                return None
            made_by[name] = conversion
    return made_by


def _check_shapes(name: str, structure: ModelStructure, names: NameMap, files: TensorFiles | ShardedFiles) -> None:
    for parameter, info in structure.by_name.items():
        in_file = names.in_file.get(parameter)
        if names.clear and in_file is not None and files.shape(in_file) != info.shape:
            raise ModelError(
                f"{name}: {parameter} is {files.shape(in_file)} in the weight file and {info.shape} by config.json. "
                f"The two do not belong together."
            )


def _can_stream(structure: ModelStructure, names: NameMap, files: TensorFiles | ShardedFiles) -> bool:
    """Whether every parameter has a tensor of its own in the files, in a dtype to take as it is, or is made of some.

    A file may hold several names of a tie. Where their values differ, loading makes two parameters of them.
    """
    for info in structure.parameters:
        places = [place.name for place in info.places]
        present = [names.in_file[place] for place in places if place in names.in_file]
        sources = [name for place in places if place in names.converted for name, _ in names.converted[place].sources]
        if not (present or sources) or any(files.dtype(name) not in READ_AS_THEY_ARE for name in present + sources):
            return False
        if len(present) > 1 and not all(files.are_equal(present[0], name) for name in present[1:]):
            return False
        if sources and (present or sum(place in names.converted for place in places) > 1):
            return False
    return names.clear


def _stream(
    folder: Path,
    name: str,
    config: PretrainedConfig,
    model: PreTrainedModel,
    structure: ModelStructure,
    names: NameMap,
    files: TensorFiles | ShardedFiles,
) -> Weights:
    def read(wanted: str) -> torch.Tensor:
        # A tied parameter may lie in the file under any of its names; a buffer has its own only.
        others = [place.name for place in structure.by_name[wanted].places] if wanted in structure.by_name else []
        present = next(one for one in (wanted, *others) if one in names.in_file or one in names.converted)
        with _reading(name):
            if present in names.in_file:
                return files.read(names.in_file[present])
            return names.converted[present].make(model, lambda source: _widened(files.read(source)))[present]

    buffers = frozenset((names.in_file.keys() | names.converted.keys()) - structure.by_name.keys())
    return Weights(folder, name, config, structure, buffers, names.unused, streamed=True, read=read)


def _load_whole(
    folder: Path, name: str, config: PretrainedConfig, remote_code: bool, names: NameMap, dtype: torch.dtype
) -> Weights:
    logger.info("%s: its files hold other tensors than the model has parameters. Loading all of it.", name)
    model = load_model(str(folder), config, trust_remote_code=remote_code, dtype=dtype)
    model.config.name_or_path = name
    config, tensors, structure = model.config, model.state_dict(), read_structure(model)
    buffers = frozenset(tensors.keys() - structure.by_name.keys())
    return Weights(
        folder, name, model.config, structure, buffers, names.unused, streamed=False, read=tensors.__getitem__
    )


def _widened(values: torch.Tensor) -> torch.Tensor:
    """16 bits as fp32, which is how a model is loaded to train; wider ones as they are."""
    return values.float() if values.element_size() < 4 else values


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say in one sentence why a weight file cannot be read."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"{name}: a weight file is damaged ({error}). Fetch the model again.") from error
    except OSError as error:
        raise ModelError(f"{name}: a weight file cannot be read ({error}).") from error
