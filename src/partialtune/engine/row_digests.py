"""What the prefix of a model computes of a row depends on -> a digest: the same row is known again wherever it comes.

In:  what a forward pass is called with, or a batch that will be: input_ids (B, T), mask, positions, whatever else.
Out: a `Row` for each of the B rows: its digest, and where its tokens lie between padding.

Digests are of the tokens without padding, with their positions and the mask between them: the same text padded to
another length, in another batch, of another data set has the same one. Of several documents that a collator without
padding joins to one row, each has a `Row` of its own: they come again in another order, beside others.
"""

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch

ROWS = (
    "partialtune_rows"  # the key of a batch under which its rows travel to the model: a list, which stays on the host
)

# What a model is called with that cannot change the states behind its first blocks.
WITHOUT_INFLUENCE = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache", ROWS}
    | {"output_hidden_states", "output_attentions", "output_router_logits"}  # asked for: the pass is not cached at all
    | {"max_length_q", "max_length_k"}  # room that attention's kernels take for the longest document
)
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")  # where documents in one row begin and end
NUMBERS = "seq_idx"  # the number of each token's document
SCALARS = (bool, int, float, str, type(None))


class Row(NamedTuple):
    """A row of a batch, or one of the documents in it.

    Attributes:
        digest: 16 bytes.
        start, end: Its tokens are columns `start` to before `end`; what no `Row` holds is padding.
        number: Of the row in the batch.
    """

    digest: bytes
    start: int
    end: int
    number: int = 0


def influencing(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the inputs that the states depend on."""
    return {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name not in WITHOUT_INFLUENCE
    }


def rows_of(inputs: Mapping[str, Any]) -> list[Row] | None:
    """A `Row` for each row of the batch, or document in it; None where `input_ids` are not token ids (B, T)."""
    tensors = {name: value.detach().cpu() for name, value in influencing(inputs).items()}
    ids = tensors.pop("input_ids", None)
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    mask, given = tensors.get("attention_mask"), tensors.get("position_ids") is not None
    padded = mask is not None and mask.shape == ids.shape
    if padded:
        del tensors["attention_mask"]
    starts = None if padded else _documents(tensors, ids)  # under a mask models take no row for several documents
    if starts is not None:
        bounds = [(0, start, end) for start, end in pairwise([*starts, ids.shape[1]])]
    else:
        row_bounds = [_bounds(row) for row in mask] if padded and mask is not None else [(0, ids.shape[1])] * len(ids)
        bounds = [(number, start, end) for number, (start, end) in enumerate(row_bounds)]
    rows = []
    for number, start, end in bounds:
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
        rows.append(Row(parts.digest(), start, end, number))
    return rows


def _documents(tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> list[int] | None:
    """First columns of the documents that are joined to one row (1, N); None where the batch is none such.

    Positions begin anew at each. What else says where they begin must say the same, and is taken out of the tensors:
    it tells of the documents beside one, too.
    """
    positions = tensors.get("position_ids")
    if positions is None or "attention_mask" in tensors or ids.shape[0] != 1 or positions.shape != ids.shape:
        return None
    firsts = positions[0] == 0
    if not bool(firsts[:1].all()) or not bool((firsts[1:] | (positions[0].diff() == 1)).all()):
        return None
    starts = firsts.nonzero().flatten().tolist()
    said = {name: torch.tensor([[*starts, ids.shape[1]]]) for name in BOUNDS} | {NUMBERS: firsts.cumsum(0)[None] - 1}
    present = {name: expected for name, expected in said.items() if name in tensors}
    if any(tensors[name].reshape(1, -1).tolist() != expected.tolist() for name, expected in present.items()):
        return None
    for name in present:
        del tensors[name]
    return starts


def joined(rows: Sequence[Row]) -> list[Row]:
    """The documents of each row of the batch as one `Row`: for a model that does not compute them apart."""
    parts = [list(of_row) for _, of_row in groupby(rows, key=lambda row: row.number)]
    return [
        of_row[0]
        if len(of_row) == 1
        else Row(
            hashlib.blake2b(b"".join(row.digest for row in of_row), digest_size=16).digest(),
            of_row[0].start,
            of_row[-1].end,
            of_row[0].number,
        )
        for of_row in parts
    ]


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
