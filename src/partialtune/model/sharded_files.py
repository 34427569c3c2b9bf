"""A folder of PyTorch's distributed checkpoint -> its tensors by name, one at a time, read by one process.

    pytorch_model_fsdp_0/.metadata         which piece of which tensor lies where
    pytorch_model_fsdp_0/__1_0.distcp      the pieces that process 1 wrote

`.metadata` is a pickle, and so are the values beside tensors, and PyTorch opens both without a look at what they hold.
Here, nothing is made of a pickle but what a checkpoint needs: what else it names is refused, and not run.
"""

import io
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from partialtune.model.parameters import plain_name
from partialtune.model.saving import DTYPES

MODEL_FOLDER = "pytorch_model_fsdp_0"  # accelerate's names, and in each folder the one key of what it saves
OPTIMIZER_FOLDER = "optimizer_0"
MODEL_KEY, OPTIMIZER_KEY = "model.", "optimizer."
WRITTEN_BY = re.compile(r"__(\d+)_\d+\.distcp")  # PyTorch's name of a file: the process that wrote it, and a number

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    [
        *((_METADATA, name) for name in ("Metadata", "StorageMeta", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
        *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
        (_METADATA, "TensorProperties"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
        *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),  # Python 3.13's name for them
        ("collections", "OrderedDict"),
    ]
)


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint holds its model in shards, one or more files of each process that saved it."""
    return (folder / MODEL_FOLDER).is_dir()


class _Unpickler(pickle.Unpickler):
    """Makes the classes of a `.metadata` file, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and "." not in name and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which no checkpoint needs")


def _read_metadata(folder: Path) -> Any:
    """The index of a folder: torch's `Metadata`.

    Raises:
        ValueError: If it holds something else, or names a file outside the folder.
        pickle.UnpicklingError: If it names what no index needs.
    """
    from torch.distributed.checkpoint.metadata import Metadata  # takes 0.4 s, where there are no shards for nothing

    with (folder / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{folder.name}/.metadata is no index of a checkpoint")  # noqa: TRY004  (a fault of the file)
    outside = [info.relative_path for info in metadata.storage_data.values() if "/" in str(info.relative_path)]
    if outside:
        raise ValueError(f"{folder.name}/.metadata names {outside[0]}, which lies outside of its folder")
    return metadata


def plain_values(folder: Path) -> dict[str, Any]:
    """Name -> value of all in a folder that is no tensor: settings of an optimizer's groups, for example.

    Raises:
        pickle.UnpicklingError: If one of them is more than plain values: opened by PyTorch, it would run.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = _read_metadata(folder)
    values = {}
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            values[index.fqn] = _stored_value(folder, info)
    return values


def _stored_value(folder: Path, info: Any) -> Any:
    """What lies at one place of a folder's files: a plain value, or a piece of a tensor.

    Raises:
        pickle.UnpicklingError: If it is more than that: opened by PyTorch, it would run.
    """
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        content = io.BytesIO(file.read(info.length))
    return torch.load(content, map_location="cpu", weights_only=True)


class ShardedFiles:
    """The tensors of a folder by name, with the methods of `weight_files.TensorFiles`.

    Args:
        checkpoint: Holds the folder.
        kind: The folder. Of a model the names are those that the model has for its tensors.
        key: What stands before each name in the folder.
    """

    def __init__(self, checkpoint: Path, kind: str = MODEL_FOLDER, key: str = MODEL_KEY) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = _read_metadata(checkpoint / kind)

        class Reader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:  # asked for with each tensor: read once
                return metadata

        self._reader, self._key = Reader(checkpoint / kind), key
        self._folder, self._stored = checkpoint / kind, metadata.storage_data
        self._tensors = {
            name.removeprefix(key): entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> str:
        """As safetensors writes it: F32, BF16, ..."""
        return DTYPES[self._tensors[name].properties.dtype]

    def room_for(self, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor to load one into: sharded as `like` is where that has its shape, else whole."""
        entry = self._tensors[name]
        if like is not None and like.shape == entry.size:
            return torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
        return torch.empty(entry.size, dtype=entry.properties.dtype)

    def read(self, name: str) -> torch.Tensor:
        """All of a tensor, put together of its pieces, however many processes wrote them."""
        from torch.distributed.checkpoint import DefaultLoadPlanner, load

        values = self.room_for(name)
        with warnings.catch_warnings(), failures_unwrapped():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # this process reads alone
            planner = DefaultLoadPlanner()
            load({self._key + name: values}, storage_reader=self._reader, planner=planner, no_dist=True)
        return values

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same values, as the names of a tie have, by one piece of each after another."""
        pieces, others = (
            {tuple(piece.offsets): tuple(piece.sizes) for piece in self._tensors[name].chunks} for name in (one, other)
        )
        if pieces != others:
            return torch.equal(self.read(one), self.read(other))
        return all(torch.equal(self._piece(one, place), self._piece(other, place)) for place in pieces)

    def _piece(self, name: str, place: tuple[int, ...]) -> torch.Tensor:
        """What one process wrote of a tensor: the piece that begins at a place of it."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        return _stored_value(self._folder, self._stored[MetadataIndex(self._key + name, place)])


# ---- an optimizer ---------------------------------------------------------------------------------------------------

GROUPS = OPTIMIZER_KEY + "groups"  # of a state that this package writes: all groups, as they are
OF_GROUP = re.compile(re.escape(OPTIMIZER_KEY) + r"param_groups\.(\d+)\.(\w+)")
OF_STATE = re.compile(r"(state|resting)\.(.+)\.(\w+)")  # the name of a parameter, and of what is kept of it


def optimizer_parameters(checkpoint: Path) -> set[str] | None:
    """Names of the parameters that the optimizer of a checkpoint holds; None where it is not saved in shards."""
    if not (checkpoint / OPTIMIZER_FOLDER).is_dir():
        return None
    return {name for group in _groups(checkpoint) for name in group["params"]}


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """What the optimizer of a sharded checkpoint holds, whole and by name, for an optimizer whose state is keyed by it.

    {"state": {name: {"exp_avg": ...}}, "param_groups": [{"lr": ..., "params": [name, ...]}]}
    """
    files = ShardedFiles(checkpoint, OPTIMIZER_FOLDER, OPTIMIZER_KEY)
    plain = plain_values(checkpoint / OPTIMIZER_FOLDER)
    return state_of({**{OPTIMIZER_KEY + key: files.read(key) for key in files.names}, **plain})


def state_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of all that a folder holds by its keys."""
    state: dict[str, dict[str, Any]] = {}
    resting: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if found := OF_STATE.fullmatch(key.removeprefix(OPTIMIZER_KEY)):
            kind = resting if found[1] == "resting" else state
            kind.setdefault(plain_name(found[2]), {})[found[3]] = value
    return {"state": {**state, **({"resting": resting} if resting else {})}, "param_groups": _groups_of(values)}


def keys_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `state_of` makes this state of.

    {"optimizer.state.NAME.exp_avg": ..., "optimizer.resting.NAME.exp_avg": ..., "optimizer.groups": (group, ...)}
    """
    states = {**state["state"]}
    kinds = {"resting": states.pop("resting", {}), "state": states}
    keys = {
        f"{OPTIMIZER_KEY}{kind}.{name}.{key}": value
        for kind, of_kind in kinds.items()
        for name, kept in of_kind.items()
        for key, value in kept.items()
    }
    return {**keys, GROUPS: tuple(state["param_groups"])}  # PyTorch takes lists apart, and tuples as they are


def _groups(checkpoint: Path) -> list[dict[str, Any]]:
    return _groups_of(plain_values(checkpoint / OPTIMIZER_FOLDER))


def _groups_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    if GROUPS in values:
        return [dict(group) for group in values[GROUPS]]
    groups: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        if found := OF_GROUP.fullmatch(key):
            names = found[2] == "params"
            groups.setdefault(int(found[1]), {})[found[2]] = [*map(plain_name, value)] if names else value
    return [{"params": [], **groups[number]} for number in sorted(groups)]


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@contextmanager
def failures_unwrapped() -> Iterator[None]:
    """Raise what went wrong in a distributed save or load, on every process, as what it is on the first that failed.

    PyTorch wraps it in an exception of its own that is no `Exception`, and that nothing catches which catches errors.
    """
    try:
        yield
    except BaseException as error:
        failures = getattr(error, "failures", None)
        if type(error).__name__ != "CheckpointException" or not failures:
            raise
        raise failures[min(failures)][0] from error
