"""A model -> its safetensors files, a piece of a tensor at a time: saving takes a few megabytes beside the model.

The files are those of transformers' `save_pretrained`, byte for byte, and so are all others, which it writes itself.
Three things are done otherwise, because it takes whole tensors and the format's own writer whole files:
16-bit values are widened to fp32 as they are written, experts are taken apart one block after another, and of a model
that is sharded over processes one tensor after another is gathered, written by one of them and given up by all.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from partialtune.model.held_narrow import held_state_dict, modules_with_narrow
from partialtune.model.parameters import chunks_of, is_sharded, whole

MAX_SHARD_SIZE = "5GB"  # of a file, as huggingface_hub cuts them; transformers cuts at 50 GB
METADATA = {"format": "pt"}  # what transformers writes into each file, and asks for when it loads one

# torch's dtype -> its name in the files, in the order in which the library puts tensors: the last of these first.
DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file will hold it.

    Attributes:
        shape: Its shape.
        dtype: Its dtype in the file.
        read: Its values, in this dtype or in one that it holds exactly; asked for when they are written.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# ---- one file -------------------------------------------------------------------------------------------------------


def write_tensors(file: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as `safetensors.torch.save_file` does, but for the memory that it takes.

    Its format: 8 bytes with the header's length, the header in JSON, filled up with spaces to 8 bytes, the values.
    https://huggingface.co/docs/safetensors#format

    Args:
        file: Replaced where it exists.
        tensors: By their names in the file. They are read one after another, in the order of the file.
        metadata: Texts for the header.
    """
    names = _in_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].size
        entry = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for name in names:
            for piece in chunks_of(tensors[name].read().detach()):
                values = piece.to("cpu", tensors[name].dtype).resolve_conj().contiguous()
                opened.write(values.view(torch.uint8).numpy().data)


def _in_order(tensors: Mapping[str, Stored]) -> list[str]:
    """Names in the order in which their values follow in a file."""
    return sorted(tensors, key=lambda name: (-ORDER[tensors[name].dtype], name.encode()))


# ---- a model --------------------------------------------------------------------------------------------------------


@contextmanager
def saved_in_pieces(model: torch.nn.Module) -> Iterator[None]:
    """Within it `model.save_pretrained` is `save_pretrained` of this module, for whoever calls it: a Trainer's `_save`.

    Args:
        model: One that is none of transformers' stays as it is.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    # On the instance: a Trainer takes the model's own method, and a class of ours would get its name into config.json.
    model.save_pretrained = partial(save_pretrained, model)
    try:
        yield
    finally:
        del model.save_pretrained


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **others: Any,
) -> None:
    """Save as `model.save_pretrained` does, taking a piece of a tensor at a time.

    Of a sharded model every process has to call this together, and one of them writes. Should it fail, it takes part
    in the gathering to the end all the same: the others would wait for it until `ddp_timeout`.

    Args:
        model: What it holds in 16 bits (`held_narrow`) is widened to fp32.
        save_directory: Made if it is missing.
        is_main_process: Whether this process writes.
        state_dict: The model's, where it had to be gathered from several processes.
        others: Of transformers; with any of them it writes the files itself, from a second copy where it needs one.
    """
    own = partial(type(model).save_pretrained, model, save_directory, is_main_process=is_main_process)
    dtype = torch.float32 if any(True for _ in modules_with_narrow(model)) else None
    tensors = held_state_dict(model) if state_dict is None else dict(state_dict)
    if others or _is_special(model, tensors.values()):
        own(state_dict=state_dict, **others)
        return
    if not any(map(is_sharded, tensors.values())):
        own(state_dict={})  # all but weights: both configs, and code that came with the model
        if is_main_process:
            _write_files(model, Path(save_directory), in_files(model, tensors, dtype))
        return
    stored, take_the_rest = _each_once(in_files(model, tensors, dtype))
    try:
        if is_main_process:
            own(state_dict={})
            _write_files(model, Path(save_directory), stored)
    finally:
        take_the_rest()


def save_all_but_weights(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes beside weights: both configs, and code that came with the model."""
    type(model).save_pretrained(model, folder, state_dict={})


def can_be_gathered_in_pieces(model: torch.nn.Module) -> bool:
    """Whether `save_pretrained` of this module saves a sharded model, or transformers needs all of it at once."""
    return isinstance(model, PreTrainedModel) and not _is_special(model, held_state_dict(model).values())


def _each_once(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], Callable[[], None]]:
    """The same tensors, and what reads those that have not been read yet, in the order in which they are written.

    Each read gathers, so all processes have to read all tensors in one order.
    """
    files = _cut_into_files(tensors).filename_to_tensors.values()
    left = [name for names in files for name in _in_order({name: tensors[name] for name in names})]

    def read(name: str) -> torch.Tensor:
        left.remove(name)  # first: what failed is not tried again
        return tensors[name].read()

    def take_the_rest() -> None:
        while left:
            read(left[0])

    return {name: replace(stored, read=partial(read, name)) for name, stored in tensors.items()}, take_the_rest


def _is_special(model: PreTrainedModel, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether transformers, or a class of its own, saves something else than these tensors, or has to fetch them."""
    ways = ("hf_quantizer", "_hf_peft_config_loaded", "_tp_size", "hf_device_map")
    of_a_class = type(model).save_pretrained is not PreTrainedModel.save_pretrained
    return (
        of_a_class
        or any(getattr(model, way, None) for way in ways)
        or any(not isinstance(one, torch.Tensor) or one.is_meta or one.dtype not in DTYPES for one in tensors)
    )


def _stored_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    narrow = dtype is not None and tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize
    return dtype if narrow and dtype is not None else tensor.dtype


def in_files(
    model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, Stored]:
    """Name in the files -> the tensor there, in the order in which files are filled.

    {"model.layers.0.mlp.experts.gate_up_proj": ...} -> {"model.layers.0.block_sparse_moe.experts.0.w1.weight": ...}

    Args:
        model: Says which names are ties, which are left out, and what loading has renamed, fused or split.
        state_dict: Its own. Ties are known by their common storage; where some of it is sharded, by the model.
        dtype: What all floats narrower than it are widened to; None to take them as they are.
    """
    left_out = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor.detach() for name, tensor in state_dict.items() if name not in left_out}
    if any(map(is_sharded, kept.values())):  # the storages of empty shards are alike, whatever they are a part of
        shapes = remove_tied_weights_from_state_dict(_without_values(kept), model)
    else:
        shapes = _without_values(remove_tied_weights_from_state_dict(kept, model))
    reverted = revert_weight_conversion(model, dict(shapes))
    group_of = _sources(model, shapes, reverted)
    uses = Counter(group_of.values())
    made: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    left: Counter[tuple[str, ...]] = Counter()

    def read(name: str) -> torch.Tensor:
        # Names of one group stand close together in a file. It is made once and kept until the last of them is read.
        group = group_of[name]
        if group not in made:
            made[group] = revert_weight_conversion(model, {source: whole(kept[source]) for source in group})
            left[group] = uses[group]
        left[group] -= 1
        return made[group][name] if left[group] else made.pop(group)[name]

    return {
        name: Stored(tuple(values.shape), _stored_dtype(values, dtype), partial(read, name))
        for name, values in reverted.items()
    }


def _without_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()}


def _sources(
    model: PreTrainedModel, shapes: Mapping[str, torch.Tensor], reverted: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, ...]]:
    """Name in the files -> the names in the model that it is made of together, as few as do.

    transformers reverts all of a model at once. What is made of one tensor of the model, or of those of one block, is
    found by trying on tensors without values whether the parts give what the whole gives.
    """
    expected = {name: values.shape for name, values in reverted.items()}
    blocks: dict[str, list[str]] = {}
    for name in shapes:
        numbers = [place for place, part in enumerate(name.split(".")) if part.isdigit()]
        blocks.setdefault(".".join(name.split(".")[: numbers[0] + 1]) if numbers else "", []).append(name)
    for groups in ([[name] for name in shapes], list(blocks.values())):
        found: dict[str, tuple[str, ...]] = {}
        made: dict[str, torch.Size] = {}
        try:
            for group in groups:
                parts = revert_weight_conversion(model, {name: shapes[name] for name in group})
                found |= dict.fromkeys(parts, tuple(group))
                made |= {name: values.shape for name, values in parts.items()}
        except (RuntimeError, ValueError, TypeError, LookupError):  # it takes more tensors than these
            continue
        if made == expected:
            return {name: found[name] for name in reverted}
    return dict.fromkeys(reverted, tuple(sorted(shapes, key=dot_natural_key)))


def _cut_into_files(tensors: Mapping[str, Stored]) -> StateDictSplit:
    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda stored: stored.size,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=MAX_SHARD_SIZE,
    )


def _write_files(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Stored]) -> None:
    shards = _cut_into_files(tensors)
    for file, names in shards.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, METADATA)
    if shards.is_sharded:
        sizes = {"total_parameters": model.num_parameters(), **shards.metadata}
        index = {"metadata": sizes, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
