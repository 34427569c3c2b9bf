"""The start of a run, which every later state is compared with: digests of all weights, copies of what trains.

Of several processes the main one holds the copies, and its digests count for all of them: a run starts from one set of
weights, which the others may receive only later, as under FSDP.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainerCallback

from partialtune.distributed import from_main, is_main
from partialtune.freeze.plan import FreezePlan
from partialtune.model.digests import bit_sum, bit_sums, buffer_digests, digests_on_main
from partialtune.model.parameters import (
    in_threads,
    is_sharded,
    named_weights,
    numbers,
    whole_on_main,
    with_other_rows,
)
from partialtune.model.row_parameters import await_shards
from partialtune.model.rows import Rows, other_rows_name, take_rows
from partialtune.proof.distances import ParameterDelta, change_sums, delta_from_sums, l2_norm, unknown
from partialtune.proof.start_copies import room_for_copies

logger = logging.getLogger(__name__)

SHARED_AS = "partialtune_snapshot"  # attribute of a run's TrainerState


# ---- the snapshot ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """The start of a run: what every later state is compared with.

    Attributes:
        digests: sha256 by parameter name; also of the frozen rows of a matrix of which some train, by their name in
            `FreezePlan.frozen_rows`.
        bit_sums: Quick checksum of each of these, see `digests.bit_sum`.
        buffers: sha256 by name of each persistent buffer, see `digests.buffer_digest`.
        trainable: Names of what trains.
        copies: A real copy of each trainable parameter, on the CPU in its own dtype, in memory or in a file; empty on
            other processes than the main one. Of a matrix of which some rows train, of these rows alone.
        norms: L2 norm of each copy.
        rows: Name of each matrix of which some rows train -> which ones.
    """

    digests: Mapping[str, str]
    bit_sums: Mapping[str, int]
    buffers: Mapping[str, str]
    trainable: frozenset[str]
    copies: Mapping[str, torch.Tensor]
    norms: Mapping[str, float]
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def learner_sums(self) -> dict[str, int]:
        """`bit_sum` of each parameter at the start, as an optimizer holds it: of some rows of a matrix these alone."""
        of_rows = {name: bit_sum(self.copies[name]) for name in self.rows if name in self.copies}
        return {**self.bit_sums, **of_rows}


def take_snapshot(
    model: nn.Module, plan: FreezePlan, folder: Path | None = None, known: Snapshot | None = None
) -> Snapshot:
    """The snapshot of `model` as it is now. All processes of a run have to call this together.

    Args:
        model: The plan is applied to it.
        plan: Says what trains.
        folder: On the disk that takes the copies where they are large, see `room_for_copies`. None for memory.
        known: An earlier snapshot, which is returned where it still is the model's and of the same plan.
    """
    trainable = frozenset(plan.trainable)
    parts = list(with_other_rows(named_weights(model), plan.rows))
    sums = from_main(bit_sums(((n, p) for n, p in parts if is_main() or is_sharded(p)), plan.frozen_rows))
    buffers = from_main(buffer_digests(model))
    # the sums tell the rows too: frozen ones are known by a name that says which
    if known is not None and (known.trainable, known.bit_sums, known.buffers) == (trainable, sums, buffers):
        return known
    copies = _copies(model, plan, folder)
    return Snapshot(
        digests=from_main(digests_on_main(parts, plan.frozen_rows)),
        bit_sums=sums,
        buffers=buffers,
        trainable=trainable,
        copies=copies,
        norms={name: l2_norm(copies[name]) for name in copies},
        rows=plan.rows,
    )


def _copies(model: nn.Module, plan: FreezePlan, folder: Path | None) -> Mapping[str, torch.Tensor]:
    values_of = {parameter.name: parameter.learning for parameter in plan.parameters if parameter.trainable}
    learning = [(name, parameter) for name, parameter in named_weights(model) if name in values_of]
    size = sum(values_of[name] * p.element_size() for name, p in learning) if is_main() else 0
    copies = room_for_copies(size, folder)
    for name, parameter in learning:
        values = whole_on_main(parameter)
        if values is not None:
            copies[name] = _learning_part(name, values, plan.rows)
    return copies


def _learning_part(name: str, values: torch.Tensor, rows: Mapping[str, Rows]) -> torch.Tensor:
    """The rows of a matrix that train, (n, ...); all of a parameter that trains as a whole."""
    return take_rows(values, rows[name]) if name in rows else values


def measure_deltas(model: nn.Module, snapshot: Snapshot) -> Iterator[ParameterDelta]:
    """How far each parameter of `model` is from the snapshot, in the order of `named_parameters()`.

    All processes of a run have to call this together. What trains is measured on the main one and unknown on others.
    So is what the snapshot does not know or knows in another shape; what is no longer there comes last, unknown too.

    Of a matrix of which some rows train these are measured: their distance is that of the matrix, since the other rows
    keep every bit, and `relative_delta` is a share of the norm of these rows. Where another row changed, both are
    unknown.
    """
    named = list(named_weights(model))
    left_out = {other_rows_name(name, rows): rows for name, rows in snapshot.rows.items()}
    # What is frozen is not copied: an equal checksum is a distance of 0, another one an unknown distance.
    frozen = ((n, p) for n, p in with_other_rows(named, snapshot.rows) if n not in snapshot.trainable)
    present = bit_sums(frozen, left_out)
    moved = {
        name for name, rows in snapshot.rows.items() if not _is_kept(other_rows_name(name, rows), present, snapshot)
    }
    learning = ((n, whole_on_main(parameter)) for n, parameter in named if n in snapshot.trainable and n not in moved)
    parts = ((name, _learning_part(name, v, snapshot.rows)) for name, v in learning if v is not None)
    on_main = ((name, values) for name, values in parts if _shape_of(snapshot, name) == values.shape)
    changes = in_threads(lambda name, values: change_sums(values, snapshot.copies[name]), on_main)
    measured = dict(zip(changes, numbers(changes.values()), strict=True))
    for name, parameter in named:
        if name in measured:
            square_sum, largest = measured[name]
            yield delta_from_sums(name, square_sum, largest, snapshot.norms[name])
        elif _is_kept(name, present, snapshot):
            yield ParameterDelta(name, 0.0, 0.0 if parameter.numel() else None, 0.0)
        else:
            yield unknown(name)
    names = {name for name, _ in named}.union(left_out)
    yield from (unknown(name) for name in snapshot.bit_sums if name not in names)


def _is_kept(name: str, present: Mapping[str, int], snapshot: Snapshot) -> bool:
    """Whether a frozen parameter, or the frozen rows of a matrix, has the checksum that it had at the start."""
    return name in present and present[name] == snapshot.bit_sums.get(name)


def _shape_of(snapshot: Snapshot, name: str) -> torch.Size | None:
    return snapshot.copies[name].shape if name in snapshot.copies else None


# ---- what the callbacks share ---------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds spent inside `with stopwatch:`.

    Attributes:
        seconds: So far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def __enter__(self) -> "Stopwatch":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *failure) -> None:
        self.seconds += time.perf_counter() - self._started


class SnapshotCallback(TrainerCallback):
    """Takes a snapshot before the first step, one for all callbacks of a run, and counts the seconds that it costs.

    Args:
        plan: The plan that was applied to the model.
        output_dir: Folder of what is written, `args.output_dir` where absent.

    Attributes:
        snapshot: The start of the run; None before the Trainer is made.
        seconds: Time spent in snapshot and measurements so far.
    """

    def __init__(self, plan: FreezePlan, output_dir: str | os.PathLike | None = None) -> None:
        self.plan = plan
        self.output_dir = output_dir
        self.snapshot: Snapshot | None = None
        self._watch = Stopwatch()
        self._log: Callable[[dict[str, float]], None] | None = None

    def attach(self, trainer: Trainer) -> None:
        """Send what it logs through Trainer's `log`, so that trackers get it too.

        What is logged at the end of training reaches those that are called after this callback: trackers close then.
        """
        # Of the class, not the trainer's own: that of a subclass may add what it has gathered since its last entry and
        # begin anew, as TRL's does, and its own averages would come out of fewer steps.
        self._log = partial(Trainer.log, trainer)

    def log(self, values: dict[str, float], state) -> None:
        """Put values into the log of the run; trackers get them where `attach` was called."""
        if self._log is not None:
            self._log(values)
        else:  # callbacks get no trainer, and those of a user are called after the trackers
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})

    @property
    def seconds(self) -> float:
        return self._watch.seconds

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if PartialState().distributed_type == DistributedType.FSDP:  # what is asked for may be another one on CPUs
            await_shards(model)
        self.take_snapshot(args, state, model)  # the only hook before a checkpoint is loaded: the start is the base

    def take_snapshot(self, args, state, model: nn.Module) -> None:
        """Take the snapshot, or that of another callback of this run if nothing has changed since.

        Trainer hands its callbacks neither itself nor each other. What they have in common is the `TrainerState`,
        which is a new one for each training; only its declared fields are saved. On the model, the copies would be
        copied and pickled with it.
        """
        with self._watch:
            known = getattr(state, SHARED_AS, None)
            self.snapshot = take_snapshot(model, self.plan, self.folder(args), known)
            setattr(state, SHARED_AS, self.snapshot)

    def folder(self, args) -> Path | None:
        """Where the callback writes, None for nowhere."""
        folder = self.output_dir or args.output_dir
        return Path(folder) if folder else None
