"""Parameter or buffer -> its sha256, which proves that no bit changed, and a quick checksum that shows if one did.

Of a matrix of which some rows train, the other rows have a digest and a checksum of their own.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from partialtune.distributed import is_main
from partialtune.model.packed_weights import PackedWeight
from partialtune.model.parameters import (
    CPU_PIECE,
    Named,
    chunks_of,
    in_threads,
    is_sharded,
    named_weights,
    numbers,
    persistent_buffers,
    piece_size,
    whole,
    whole_on_main,
)
from partialtune.model.row_shards import first_row_of_shard
from partialtune.model.rows import Rows, other_runs, take_other_rows, with_rows

# Beside floats below 64 bits. Whole numbers of 32 bits are not among them: fp32 has 24 bits for its digits.
HELD_BY_FP32 = frozenset({torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16})
INTEGERS = {1: torch.uint8, 2: torch.int16}  # to sum, by bytes of an element; wider ones are read as several int32
ROW = CPU_PIECE  # elements that `bit_sum` weighs by one table
ROWS_AT_ONCE = 2**7  # of them off the CPU, where each costs 2^15 x 8 bytes = 256 kB and a few launches


# ---- sha256 ---------------------------------------------------------------------------------------------------------


def digest(parameter: torch.Tensor) -> str:
    """sha256 over a parameter's values as little-endian fp32 in C order, 64 hex digits.

    Widening bf16 or fp16 to fp32 is exact: a 16-bit base and an fp32 result have equal digests where no value changed.
    So have fp64 values that fp32 holds, each of them. What fp32 cannot hold (other fp64 values, integers of 32 and 64
    bits, complex numbers) is digested over its own bytes, little-endian.

    A packed matrix has the digest of the values that it stands for, as long as its own bytes are those that were made
    of them: their sha256 is taken and compared each time. Else the digest is that of what it holds now.
    """
    return _digest_of_whole(whole(parameter))


def digest_of_other_rows(values: torch.Tensor, rows: Rows) -> str:
    """`digest` of all other rows of a matrix than these, run after run, as if they alone were the matrix."""
    return _digest_of_others(whole(values), rows)


def digest_with_rows(values: torch.Tensor, rows: Rows, new: torch.Tensor) -> str:
    """`digest` of a matrix with `new`, (n, ...), in the place of these rows."""
    pieces = with_rows(whole(values), rows, new)
    return _digest_of_pieces(pieces, fp32_holds(values) and fp32_holds(new))


def _digest_of_whole(values: torch.Tensor) -> str:
    if isinstance(values, PackedWeight):
        return _digest_of_packed(values)
    return _digest_of_pieces([values], fp32_holds(values))


def _digest_of_packed(weight: PackedWeight) -> str:
    now = weight.sha256()
    if now == weight.packed_sha256:
        return weight.base_sha256
    changed = _digest_of_pieces([weight.values()], narrow=True)
    return (
        now if changed == weight.base_sha256 else changed
    )  # other bytes never have the digest of those that were made


def _digest_of_others(values: torch.Tensor, rows: Rows) -> str:
    others = list(take_other_rows(values, rows))
    return _digest_of_pieces(others, all(map(fp32_holds, others)))


def _digest_of_pieces(pieces: Iterable[torch.Tensor], narrow: bool) -> str:
    sha = hashlib.sha256()
    for values in pieces:
        for piece in chunks_of(values):
            array = piece.to("cpu", torch.float32 if narrow else piece.dtype).resolve_conj().contiguous().numpy()
            sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return sha.hexdigest()


def fp32_holds(values: torch.Tensor) -> bool:
    """Whether fp32 tells these values apart from all others of their dtype."""
    if values.dtype != torch.float64:
        return values.dtype in HELD_BY_FP32 or values.is_floating_point()
    return all(same_bits(piece, piece.float().double()).all() for piece in chunks_of(values, piece_size(values.device)))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Which values of two tensors of one shape and dtype are equal in every bit. 0 and -0 differ, a NaN equals itself.

    The result has their shape; of complex values a last dimension of 2 more, for the real and the imaginary part.
    """
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    integers = {**INTEGERS, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(integers) == other.contiguous().view(integers)  # as integers: == takes 0 for -0


def buffer_digest(buffer: torch.Tensor) -> str:
    """sha256 over a buffer's dtype and bytes: buffers may be whole numbers, which fp32 does not hold."""
    values = buffer.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(f"{values.dtype} ".encode() + values.view(torch.uint8).numpy().tobytes()).hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    """`digest` of every parameter by plain name."""
    return digests_of(named_weights(model))


def digests_of(named: Named, left_out: Mapping[str, Rows] | None = None) -> dict[str, str]:
    """`digest` of each tensor by name.

    Args:
        named: The tensors.
        left_out: By name, for what stands for a part of a matrix: rows that are left out, see `digest_of_other_rows`.
    """

    def hashed(name: str, values: torch.Tensor) -> str:
        return _digest_of_others(values, left_out[name]) if left_out and name in left_out else _digest_of_whole(values)

    # Gathered here, one after another, and hashed in threads: collective operations have to be called in one order.
    return in_threads(hashed, ((name, whole(tensor)) for name, tensor in named))


def digests_on_main(named: Named, left_out: Mapping[str, Rows] | None = None) -> dict[str, str]:
    """`digests_of` on the main process, nothing on others, which only take part where a tensor is gathered."""
    gathered = ((name, whole_on_main(tensor)) for name, tensor in named)
    return digests_of(((name, values) for name, values in gathered if values is not None), left_out)


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """sha256 of each persistent buffer by name on the main process, nothing on others."""
    return {name: buffer_digest(buffer) for name, buffer in persistent_buffers(model)} if is_main() else {}


# ---- quick checksums ------------------------------------------------------------------------------------------------


def bit_sum(parameter: torch.Tensor) -> int:
    """Sum of a parameter's bit patterns, each times an odd number of its place: a quick check on its own device.

    It sees every single changed bit, and values that have changed places: rows that were exchanged, too. It is no
    proof, since other changes may cancel, modulo 2^64: that is what the digests at every save and at the end are for.
    """
    return bit_sums([("", parameter)])[""]


def bit_sums(named: Named, left_out: Mapping[str, Rows] | None = None) -> dict[str, int]:
    """`bit_sum` of each tensor by name, with one transfer from a device for all of them.

    Where one is sharded, every process of its mesh has to call this together.

    Args:
        named: The tensors.
        left_out: By name, for what stands for a part of a matrix: rows that are not summed. The others keep the weights
            of their places.
    """
    left_out = left_out or {}
    parts = {name: _local_part(tensor) for name, tensor in named}
    sums = in_threads(lambda name, part: _sum_of(part, left_out.get(name)), parts.items())
    for name, part in parts.items():
        for group in part.groups:
            dist.all_reduce(sums[name], group=group)
    return dict(zip(sums, numbers(sums.values()), strict=True))


class _Part(NamedTuple):
    """What a process sums of a tensor: integers (n,), the place of the first in the whole, and who has the rest.

    `rows` is the length of the tensor, which counts where some rows are left out; the integers are those of its rows
    from `first_row` on, `width` of them for each.
    """

    integers: torch.Tensor
    start: int
    rows: int
    width: int
    first_row: int = 0
    groups: Sequence[dist.ProcessGroup] = ()


def _local_part(tensor: torch.Tensor) -> _Part:
    """A shard's sum is added to the others', so that nothing is gathered; the whole where shards are no rows of it."""
    values, first_row = tensor.detach(), 0
    if isinstance(values, PackedWeight):
        values = values.stored_bytes()
    groups: tuple[dist.ProcessGroup, ...] = ()
    if is_sharded(values):
        found = first_row_of_shard(values)
        if not any(placement.is_shard() for placement in values.placements):  # each process has all of it
            values = values.to_local()
        elif found is not None:
            dimension, first_row = found
            groups = (values.device_mesh.get_group(dimension),)
            values = values.to_local()
        else:
            values = values.full_tensor()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    flat = values.contiguous().reshape(-1)
    integers = flat.view(INTEGERS.get(flat.element_size(), torch.int32))
    integers_a_value = integers.numel() // max(1, values.numel())  # fp64 counts as two
    start = first_row * tensor.shape[1:].numel() * integers_a_value
    rows = len(tensor) if tensor.ndim else 1
    width = integers.numel() // max(1, len(values) if groups else rows)
    return _Part(integers, start, rows, width, first_row, groups)


def _sum_of(part: _Part, left_out: Rows | None) -> torch.Tensor:
    """The sum of all of a part, or, of a matrix, of its other rows than these, each at its place."""
    if left_out is None or not part.integers.numel():
        return _weighted_sum(part.integers, part.start)
    first, last = part.first_row, part.first_row + part.integers.numel() // part.width
    here = ((max(start, first) - first, min(stop, last) - first) for start, stop in other_runs(left_out, part.rows))
    runs = [(start * part.width, stop * part.width) for start, stop in here if start < stop]
    sums = [_weighted_sum(part.integers[start:stop], part.start + start) for start, stop in runs]
    return torch.stack(sums or [_weighted_sum(part.integers[:0], part.start)]).sum()


def _weighted_sum(integers: torch.Tensor, start: int) -> torch.Tensor:
    """Each of `integers` (n,), which begin at place `start` of a tensor, times the weight of its place, summed: ().

    The weight is that of the place in its row times that of the row. It is odd, so that no change of less than 2^64
    is lost; and 32 bits wide numbers that change places do not cancel as they would with weights in even steps.
    """
    device = integers.device
    table, number, column = _row_weights(device), start // ROW, start % ROW
    first = integers[: ROW - column] if column else integers[:0]  # the rest of a row that another process began
    body = integers[len(first) :]
    whole_rows = body[: len(body) // ROW * ROW].view(-1, ROW)
    last = body[whole_rows.numel() :]
    # Results and products lie in rooms of their own. A product made anew for each row, with its result behind it,
    # leaves a hole that is a little too small for the next one: of a matrix of 128,256 x 3,072 malloc held 3 GB so.
    of_rows, at_once = table.new_empty(len(whole_rows)), 1 if device.type == "cpu" else ROWS_AT_ONCE
    room = table.new_empty(min(at_once, len(whole_rows)), ROW)
    for at in range(0, len(whole_rows), at_once):
        rows, results = whole_rows[at : at + at_once], of_rows[at : at + at_once]
        torch.sum(torch.mul(rows, table, out=room[: len(rows)]), 1, out=results)  # int64, (rows,)
    sums = [(first * table[column : column + len(first)]).sum().view(1)] if column else []
    sums += [of_rows, (last * table[: len(last)]).sum().view(1)]
    by_row = torch.cat(sums)
    # Rows are numbered from 2^32 on: a row's weight is then that of no place within a row.
    return (by_row * _odd_numbers(2**32 + number, len(by_row), device)).sum()


@cache
def _row_weights(device: torch.device) -> torch.Tensor:
    return _odd_numbers(0, ROW, device)


def _odd_numbers(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd int64 that look random, one for each number from `first` on, shape (count,); products wrap at 2^64.

    The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    # torch has no unsigned 64-bit arithmetic; the factors are the paper's, as negative int64.
    mixed = (torch.arange(first, first + count, device=device) + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) | 1  # >> of int64 copies the sign, which the paper's does not: harmless for weights
