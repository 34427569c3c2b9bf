"""A run that goes on on another number of processes: the same windows in each optimizer step, in the same order.

    2 processes with batch 4        step 1: windows 7 3 0 9 | 4 1 8 2        a run of 8 in the order of the epoch
    1 process, accumulating twice   step 1: windows 7 3 0 9 , 4 1 8 2        the same, dealt out otherwise

accelerate deals an order out to processes batch by batch, and Trainer accumulates what comes next: so a step is a run
of (batch x accumulation x processes) windows, whatever the three are. What differs is the end of an epoch, which
several processes fill up with its first windows and one does not. `EpochOrder` ends each epoch as the run began it.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from partialtune.engine.checkpoint_files import read_with_care
from partialtune.engine.other_engine import in_words, processes_of
from partialtune.errors import InputError
from partialtune.training.settings import data_seed, run_length, windows_a_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dealing:
    """How a run that has changed its number of processes dealt its windows out when it began.

    Attributes:
        processes: How many.
        at_once: Windows of one forward pass on all of them together.
    """

    processes: int
    at_once: int


class EpochOrder(Sampler[int]):
    """The order of an epoch as accelerate's own sampler gives it, with the end that the run began with.

    Args:
        windows: Of the training set.
        dealing: How the run began.
        seed: Decides the order, with the epoch.
        shuffled: Whether it is random, or that of the text.
        drop_last: Whether windows that fill no batch on all processes are left out.

    Attributes:
        texts: `windows`, as in `ReplayOrder`: none of them is a replayed one.
        epoch: Which one comes next.
    """

    def __init__(self, windows: int, dealing: Dealing, seed: int, shuffled: bool, drop_last: bool) -> None:
        self.texts, self.seed, self.shuffled = windows, seed, shuffled
        batches = windows / dealing.at_once
        if drop_last:
            self._length = math.floor(batches) * dealing.at_once
        elif dealing.processes == 1:
            self._length = windows
        else:
            self._length = math.ceil(batches) * dealing.at_once  # filled up from the beginning of the epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        # as accelerate.data_loader.SeedableRandomSampler, by which the run's first processes drew
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.texts, generator=generator) if self.shuffled else torch.arange(self.texts)
        yield from (int(order[place % self.texts]) for place in range(self._length))


def suited_accumulation(
    args: TrainingArguments, checkpoint: Path, step: Any, dealt: Dealing | None
) -> tuple[Dealing | None, int]:
    """The accumulation that makes up for another number of processes, so that a step keeps its windows.

    Args:
        args: Of the run on the present processes.
        checkpoint: Where it goes on from.
        step: Windows of an optimizer step, as its `origin.json` has them.
        dealt: As there.

    Returns:
        How the run began, where its number of processes has changed since, else None; and the run's
        `gradient_accumulation_steps` from here on.

    Raises:
        InputError: If no accumulation gives the step of the run; says which batch would.
    """
    before = processes_of(checkpoint)
    if not isinstance(step, int) or (before == args.world_size and dealt is None):
        return None, args.gradient_accumulation_steps
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise InputError(
            f"train_sampling_strategy {args.train_sampling_strategy} orders windows by the number of processes: "
            f"{checkpoint} goes on on {in_words(before)} alone, and there are {args.world_size}."
        )
    dealing = dealt or Dealing(before, before * _state(checkpoint).train_batch_size)
    at_once = args.per_device_train_batch_size * args.world_size
    if step % at_once:
        raise InputError(
            f"A step of this run has {step} windows, and per_device_train_batch_size "
            f"{args.per_device_train_batch_size} on {in_words(args.world_size)} takes {at_once} "
            f"at once: no gradient_accumulation_steps makes {step} of them. {_advice(args, step)}"
        )
    logger.warning(
        "Processes: the checkpoint is of %d, and now there are %d. A step keeps its %d windows, in the same order: "
        "per_device_train_batch_size %d x gradient_accumulation_steps %d x %d. Dropout, if any, draws other masks.",
        before,
        args.world_size,
        step,
        args.per_device_train_batch_size,
        step // at_once,
        args.world_size,
    )
    return dealing, step // at_once


def epoch_order(args: TrainingArguments, windows: int, dealing: Dealing, checkpoint: Path) -> EpochOrder:
    """The order of windows of a run that has changed its number of processes.

    Args:
        args: Of the run, with `suited_accumulation`.
        windows: Of the training set.
        dealing: How the run began.
        checkpoint: Where it goes on from.

    Raises:
        InputError: If the last step of an epoch, which may be shorter, does not come out even on these processes.
    """
    shuffled = args.train_sampling_strategy != "sequential"
    order = EpochOrder(windows, dealing, data_seed(args), shuffled, args.dataloader_drop_last)
    step, at_once = windows_a_step(args), args.per_device_train_batch_size * args.world_size
    even = len(order) % at_once == 0
    if not even and (args.dataloader_drop_last or args.world_size > 1):  # one alone may have a smaller last batch
        steps = math.ceil(len(order) / step)
        ends = run_length(args, len(order)) // steps > _state(checkpoint).global_step // steps
        if ends or args.dataloader_drop_last:
            raise InputError(
                f"The last step of an epoch of this run has {len(order) % step or step} windows, which do not come out "
                f"even in {at_once} at once (per_device_train_batch_size {args.per_device_train_batch_size} x "
                f"{in_words(args.world_size)}). {_advice(args, math.gcd(step, len(order)))}"
            )
    return order


def _state(checkpoint: Path) -> TrainerState:
    with read_with_care(checkpoint):
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _advice(args: TrainingArguments, common: int) -> str:
    """Which setting would do, where windows have to come in a divisor of `common` at once."""
    if common % args.world_size:
        numbers = [str(number) for number in range(1, common + 1) if common % number == 0]
        return f"Start it on another number of processes: {', '.join(numbers)}."
    most = common // args.world_size
    fits = [size for size in range(1, most + 1) if most % size == 0]
    asked = args.per_device_train_batch_size
    batch = max((size for size in fits if size <= asked), default=fits[0])
    return f"Set --per_device_train_batch_size {batch}."
