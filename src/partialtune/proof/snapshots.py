"""A model's weights before training: digests of every parameter and buffer, copies of what trains.

Of several processes the main one holds the copies and what it saw counts for all of them: a run starts from one set of
weights, which the others may receive only later, as FSDP does it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from partialtune.distributed import from_main, is_main
from partialtune.freeze.plan import FreezePlan
from partialtune.model.digests import bit_sums, buffer_digests, digests_on_main, whole_on_main
from partialtune.model.parameters import in_threads, is_sharded, named_weights, numbers
from partialtune.proof.copies import room_for_copies
from partialtune.proof.distances import ParameterDelta, change_sums, delta_from_sums, l2_norm, unknown

_TAKEN: "WeakKeyDictionary[nn.Module, Snapshot]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Snapshot:
    """The start of a run: what every later state is compared with.

    Attributes:
        digests: sha256 by parameter name.
        bit_sums: Quick checksum of each parameter, see `weights.bit_sum`.
        buffers: sha256 by name of each persistent buffer, see `weights.buffer_digest`.
        trainable: Names of what trains.
        copies: A real copy of each trainable parameter, on the CPU in its own dtype, in memory or in a file; empty on
            other processes than the main one.
        norms: L2 norm of each copy.
    """

    digests: Mapping[str, str]
    bit_sums: Mapping[str, int]
    buffers: Mapping[str, str]
    trainable: frozenset[str]
    copies: Mapping[str, torch.Tensor]
    norms: Mapping[str, float]


def take_snapshot(model: nn.Module, plan: FreezePlan, folder: Path | None = None) -> Snapshot:
    """The snapshot of `model` as it is now. Callbacks of one run that ask at the same point share one.

    Args:
        model: The plan is applied to it. All processes of a run have to call this together.
        plan: Says what trains.
        folder: On the disk that takes the copies where they are large, see `copies`. None for memory.
    """
    trainable = frozenset(plan.trainable)
    sums = from_main(bit_sums((name, p) for name, p in named_weights(model) if is_main() or is_sharded(p)))
    buffers, known = from_main(buffer_digests(model)), _TAKEN.get(model)
    if known is not None and (known.trainable, known.bit_sums, known.buffers) == (trainable, sums, buffers):
        return known
    copies = _copies(model, trainable, folder)
    _TAKEN[model] = Snapshot(
        digests=from_main(digests_on_main(named_weights(model))),
        bit_sums=sums,
        buffers=buffers,
        trainable=trainable,
        copies=copies,
        norms={name: l2_norm(copies[name]) for name in copies},
    )
    return _TAKEN[model]


def _copies(model: nn.Module, trainable: frozenset[str], folder: Path | None) -> Mapping[str, torch.Tensor]:
    learning = [(name, parameter) for name, parameter in named_weights(model) if name in trainable]
    copies = room_for_copies(sum(p.numel() * p.element_size() for _, p in learning) if is_main() else 0, folder)
    for name, parameter in learning:
        values = whole_on_main(parameter)
        if values is not None:
            copies[name] = values
    return copies


def measure_deltas(model: nn.Module, snapshot: Snapshot) -> Iterator[ParameterDelta]:
    """How far each parameter of `model` is from the snapshot, in the order of `named_parameters()`.

    All processes of a run have to call this together. What trains is measured on the main one and unknown on others.
    So is what the snapshot does not know or knows in another shape; what is no longer there comes last, unknown too.
    """
    named = list(named_weights(model))
    present = bit_sums((name, parameter) for name, parameter in named if name not in snapshot.trainable)
    learning = ((name, whole_on_main(parameter)) for name, parameter in named if name in snapshot.trainable)
    on_main = ((name, v) for name, v in learning if v is not None and _shape_of(snapshot, name) == v.shape)
    changes = in_threads(lambda name, values: change_sums(values, snapshot.copies[name]), on_main)
    measured = dict(zip(changes, numbers(changes.values()), strict=True))
    for name, parameter in named:
        if name in measured:
            yield delta_from_sums(name, *measured[name], snapshot.norms[name])
        elif name in present and present[name] == snapshot.bit_sums.get(name):
            yield ParameterDelta(name, 0.0, 0.0 if parameter.numel() else None, 0.0)
        else:
            yield unknown(name)
    names = {name for name, _ in named}
    yield from (unknown(name) for name in snapshot.bit_sums if name not in names)


def _shape_of(snapshot: Snapshot, name: str) -> torch.Size | None:
    return snapshot.copies[name].shape if name in snapshot.copies else None
