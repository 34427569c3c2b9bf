"""What the prefix of a model computes of a row depends on -> a digest: the same row is known again wherever it comes.

In:  what a forward pass is called with, or a batch that will be: input_ids (B, T), mask, positions, whatever else.
Out: a `Row` for each of the B rows: its digest, and where its tokens lie between padding.

Digests are of the tokens without padding, with their positions and the mask between them: the same text padded to
another length, in another batch, of another data set has the same one.
"""

import hashlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch

ROWS = (
    "partialtune_rows"  # the key of a batch under which its rows travel to the model: a list, which stays on the host
)

# What a model is called with that cannot change the states behind its first blocks.
WITHOUT_INFLUENCE = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache", ROWS}
    | {"output_hidden_states", "output_attentions", "output_router_logits"}  # asked for: the pass is not cached at all
)
SCALARS = (bool, int, float, str, type(None))


class Row(NamedTuple):
    """A row of a batch.

    Attributes:
        digest: 16 bytes.
        start, end: Its tokens are columns `start` to before `end`; what is outside is padding.
    """

    digest: bytes
    start: int
    end: int


def influencing(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the inputs that the states depend on."""
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name not in WITHOUT_INFLUENCE
    }


def rows_of(inputs: Mapping[str, Any]) -> list[Row] | None:
    """A `Row` for each row of the batch; None where `input_ids` are not token ids (B, T)."""
    tensors = {name: value.detach().cpu() for name, value in influencing(inputs).items()}
    ids = tensors.pop("input_ids", None)
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    mask, given = tensors.get("attention_mask"), tensors.get("position_ids") is not None
    padded = mask is not None and mask.shape == ids.shape
    if padded:
        del tensors["attention_mask"]
    rows = []
    for number in range(ids.shape[0]):
        start, end = _bounds(mask[number]) if padded and mask is not None else (0, ids.shape[1])
        parts = hashlib.blake2b(digest_size=16)
        _add(parts, "input_ids", ids[number, start:end].to(torch.int64))
        if padded and mask is not None:
            inner = mask[number, start:end]
            if not bool(inner.all()) or given:  # under given positions models take no mask for "packed"
                _add(parts, "attention_mask", inner.to(torch.int64))
        if not given:  # models count columns then, those of padding too
            parts.update(b"from %d" % start)
        for name in sorted(tensors):
            _add(parts, name, _of_row(tensors[name], number, ids.shape, start, end))
        rows.append(Row(parts.digest(), start, end))
    return rows


def words_of(inputs: Mapping[str, Any]) -> str | None:
    """What else than tensors a pass is called with, in words; None where something has no words."""
    others = {
        name: value
        for name, value in inputs.items()
        if not isinstance(value, torch.Tensor) and name not in WITHOUT_INFLUENCE and value is not None
    }
    if not all(isinstance(value, SCALARS) for value in others.values()):
        return None
    return repr(sorted(others.items()))


def _bounds(mask: torch.Tensor) -> tuple[int, int]:
    """First column of a mask (T,) that is not 0, and the one after the last."""
    places = mask.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _of_row(value: torch.Tensor, number: int, shape: torch.Size, start: int, end: int) -> torch.Tensor:
    """What of a tensor belongs to a row: (B, T, ...) its tokens, (B, ...) its own, anything else the whole."""
    if value.dim() and value.shape[0] == shape[0]:
        row = value[number]
        return row[start:end] if row.dim() and row.shape[0] == shape[1] else row
    if value.dim() == 2 and value.shape == (1, shape[1]):  # positions, the same for all rows
        return value[0, start:end]
    return value


def _add(parts: Any, name: str, value: torch.Tensor) -> None:
    """Add a tensor to a digest: its name, dtype, shape and bytes."""
    parts.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    flat = value.contiguous().reshape(-1)
    parts.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


class DigestingCollator:
    """A collator that adds the rows of each batch under `ROWS`, before it goes to the device, in the loader's workers.

    Args:
        collator: Anybody's. A batch without token ids stays as it is.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, features: Any) -> Any:
        batch = self.collator(features)
        if isinstance(batch, MutableMapping):
            rows = rows_of(batch)
            if rows is not None:
                batch[ROWS] = [tuple(row) for row in rows]
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # asked for by pickle, before it is there
            raise AttributeError(name)
        return getattr(self.collator, name)
