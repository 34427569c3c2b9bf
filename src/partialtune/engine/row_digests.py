"""What the prefix of a model computes of a row depends on -> a digest: the same row is known again wherever it comes.

In:  what a forward pass is called with, or a batch that will be: input_ids (B, T), mask, positions, whatever else.
Out: a `Row` for each of the B rows: its digest, and where its tokens lie between padding.

Digests are of the tokens without padding, with their positions and the mask between them: the same text padded to
another length, in another batch, of another data set has the same one. Of rows that hold several examples, as packing
and padding-free collators make them, each example is a `Row`, where the model keeps them apart (`packed_rows`): the
same examples hardly ever meet again in one row.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import DataLoader

ROWS = "partialtune_rows"  # the key of a batch under which its rows travel to the model: a list, stays on the host
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")  # (examples + 1,): where packed examples begin, beside their positions
NUMBERS = "seq_idx"  # (B, T): of which example each token is
LONGEST = ("max_length_q", "max_length_k")  # room that attention's kernels take for the longest example

# What a model is called with that cannot change the states behind its first blocks.
WITHOUT_INFLUENCE = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache", ROWS, *LONGEST}
    | {"output_hidden_states", "output_attentions", "output_router_logits"}  # asked for: the pass is not cached at all
)
SCALARS = (bool, int, float, str, type(None))


class Row(NamedTuple):
    """A row of a batch, or one of the examples that are packed in it.

    Attributes:
        digest: 16 bytes.
        start, end: Its tokens are columns `start` to before `end`; what is outside is padding, or other examples.
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


def rows_of(inputs: Mapping[str, Any], with_padding: bool = False) -> list[Row] | None:
    """A `Row` for each row of the batch, or each example that is packed in them, see `joined`.

    None where `input_ids` are not token ids (B, T).

    Args:
        inputs: What a forward pass is called with, or a batch that will be.
        with_padding: Whether padding belongs to its row, whose states are then kept too.
    """
    examples = segments_of(inputs)
    if examples is not None:
        return examples
    tensors = {name: value.detach().cpu() for name, value in influencing(inputs).items()}
    ids = tensors.pop("input_ids", None)
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        return None
    mask, given = tensors.get("attention_mask"), tensors.get("position_ids") is not None
    padded = mask is not None and mask.shape == ids.shape
    if padded:
        del tensors["attention_mask"]
    # Images of a batch: which of them belong to which row only the model knows. Digested once, and not for each row.
    whole = {name: _digest(name, value) for name, value in tensors.items() if not _is_by_row(name, value, ids.shape)}
    rows = []
    for number in range(ids.shape[0]):
        start, end = _bounds(mask[number], with_padding) if padded and mask is not None else (0, ids.shape[1])
        parts = hashlib.blake2b(digest_size=16)
        add_tensor(parts, "input_ids", ids[number, start:end].to(torch.int64))
        if padded and mask is not None:
            inner = mask[number, start:end]
            if not bool((inner == 1).all()) or given:  # under given positions models take no mask for "packed"
                add_tensor(parts, "attention_mask", inner.to(torch.int64))
        if not given:  # models count columns then, those of padding too
            parts.update(b"from %d" % start)
        if whole:  # two rows of one batch may have the same text, and each an image of its own
            parts.update(b"row %d" % number)
        for name in sorted(tensors):
            if name in whole:
                parts.update(whole[name])
            else:
                add_tensor(parts, name, _of_row(tensors[name], number, ids.shape, start, end))
        rows.append(Row(parts.digest(), start, end, number))
    return rows


def may_be_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether the rows may hold several examples, by the names and shapes of a batch alone."""
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
        return False
    if ids.dim() != 2 or ids.shape != positions.shape or not ids.numel():
        return False
    if ids.is_floating_point() or positions.is_floating_point() or positions.dtype == torch.bool:
        return False
    return influencing(inputs).keys() <= {"input_ids", "position_ids", *BOUNDS, NUMBERS}


def segments_of(inputs: Mapping[str, Any]) -> list[Row] | None:
    """A `Row` for each example of packed rows; None where rows are not packed, or their lengths contradict each other.

    An example ends where a position is not the one before plus 1, which is how transformers tells. `cu_seq_lens_q` and
    `_k` and `seq_idx` say the same again, and are left out of the digest.
    """
    if not may_be_packed(inputs):
        return None
    ids = inputs["input_ids"].detach().cpu().to(torch.int64)
    positions = inputs["position_ids"].detach().cpu().to(torch.int64)
    begins = torch.ones(ids.shape, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=1) != 1
    anew = positions[begins]  # a jump to anywhere else is no beginning that a collator makes
    if not bool(((anew == 0) | (anew == positions[0, 0])).all()):
        return None
    bounds = [*begins.flatten().nonzero().flatten().tolist(), ids.numel()]  # columns, as if all rows were one
    if not _say_the_same(inputs, begins, bounds):
        return None
    width, rows = ids.shape[1], []
    for first, end in pairwise(bounds):
        number, start = divmod(first, width)
        columns = slice(start, start + end - first)
        parts = hashlib.blake2b(digest_size=16)
        add_tensor(parts, "input_ids", ids[number, columns])
        add_tensor(parts, "position_ids", positions[number, columns])
        rows.append(Row(parts.digest(), columns.start, columns.stop, number))
    return rows


def _say_the_same(inputs: Mapping[str, Any], begins: torch.Tensor, bounds: list[int]) -> bool:
    """Whether all that tells where examples end tells the same: flash attention goes by lengths, not by positions."""
    index = inputs.get(NUMBERS)
    if isinstance(index, torch.Tensor):
        index = index.detach().cpu()
        if index.shape != begins.shape or not torch.equal(index.diff(dim=1) != 0, begins[:, 1:]):
            return False
    given = [inputs[name] for name in BOUNDS if isinstance(inputs.get(name), torch.Tensor)]
    return all(value.flatten().tolist() == bounds for value in given)


def joined(rows: Sequence[Row]) -> list[Row]:
    """The examples of each row of the batch as one `Row`: for a model that does not keep them apart."""
    whole = []
    for _, examples in groupby(rows, key=lambda row: row.number):
        first, *others = examples
        if others:
            parts = hashlib.blake2b(b"".join(row.digest for row in (first, *others)), digest_size=16)
            first = Row(parts.digest(), first.start, others[-1].end, first.number)
        whole.append(first)
    return whole


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


def _bounds(mask: torch.Tensor, with_padding: bool) -> tuple[int, int]:
    """First column of a row by its mask (T,), and the one after its last."""
    # Padding on the left belongs to the row: recurrent blocks carry it on, and the first token is predicted from it.
    places = mask.nonzero()
    return 0, len(mask) if with_padding else int(places[-1]) + 1 if len(places) else 0


def _is_by_row(name: str, value: torch.Tensor, shape: torch.Size) -> bool:
    """Whether it can be told what of a tensor belongs to a row: of (B, T, ...), and of positions (1, T) for all rows.

    A first dimension of B alone says nothing: `cu_seq_lens` of B - 1 examples and the positions (3, B, T) of a model
    of images have one at times, and of two images both may belong to the first of two rows. The whole is always right,
    if less often met again.
    """
    return value.shape[:2] == shape or (name == "position_ids" and value.shape == (1, shape[1]))


def _of_row(value: torch.Tensor, number: int, shape: torch.Size, start: int, end: int) -> torch.Tensor:
    """What of a tensor that `_is_by_row` belongs to a row."""
    return value[number, start:end] if value.shape[:2] == shape else value[0, start:end]


def _digest(name: str, value: torch.Tensor) -> bytes:
    parts = hashlib.blake2b(digest_size=16)
    add_tensor(parts, name, value)
    return parts.digest()


def add_tensor(parts: Any, name: str, value: torch.Tensor) -> None:
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
                batch = copy.copy(batch)  # it may be the data set's own
                batch[ROWS] = [tuple(row) for row in rows]
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # asked for by pickle, before it is there
            raise AttributeError(name)
        return getattr(self.collator, name)


@contextmanager
def digesting(loader: Any) -> Iterator[Callable[[], None]]:
    """Let a loader digest its rows in the passes over it that begin inside.

    Args:
        loader: Anything. Where it is none of torch's, or no batch can carry rows, nothing is done.

    Yields:
        Ends it. To be called when the pass has begun: whoever else asks the same loader for batches, as a callback that
        calls `model(**batch)`, gets them as they are.
    """
    # accelerate's loader reads from one that it holds, whose collator it is that counts. Any other that gives batches
    # in a way of its own may give others than the collator made.
    of_accelerate = type(loader).__module__.startswith("accelerate.")
    inner = loader.base_dataloader if of_accelerate and hasattr(loader, "base_dataloader") else loader
    # Where one process reads for all, accelerate cuts batches up, and knows no way to cut anything but tensors. Workers
    # that stay keep their collator, for the passes of others too.
    plain = isinstance(inner, DataLoader) and type(inner).__iter__ is DataLoader.__iter__
    if not plain or isinstance(loader, DataLoaderDispatcher) or inner.persistent_workers:
        yield lambda: None
        return
    ours = DigestingCollator(inner.collate_fn)

    def end() -> None:
        if inner.collate_fn is ours:
            inner.collate_fn = ours.collator

    inner.collate_fn = ours
    try:
        yield end
    finally:
        end()
