"""Replay: windows of a second text in each optimizer step, in an order that depends on nothing but seed and step.

    order = ReplayOrder(texts=100, replayed=30, batch=8, drawn=2, seed=42)      # 6 windows of the text, 2 replayed ones
    list(order)                       # numbers below 100 are windows of the text, 100 to 129 replayed ones

The global batch, the windows of one optimizer step on all processes together, is a run of `batch` numbers in this
order: accelerate deals an order out to processes batch by batch, and Trainer accumulates what comes next. So one
process and several see the same steps, and a run that goes on from a checkpoint sees those that it has not seen yet.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainingArguments

from partialtune.errors import RecipeError
from partialtune.text.reading import SourceText
from partialtune.training.settings import data_seed, windows_a_step

TEXT, REPLAY = 0, 1  # streams of random numbers, apart from each other


@dataclass(frozen=True)
class Replay:
    """The second text.

    Attributes:
        sources: As they were read.
        windows: `input_ids` (block_size,), cut as those of the run's text.
    """

    sources: list[SourceText]
    windows: Dataset


class ReplayOrder(Sampler[int]):
    """The order of an epoch: numbers of windows, the replayed ones counted on after those of the text.

    An epoch is one pass over the text. Its last step is filled up from the beginning of the epoch, so that every step
    has the same number of windows of each kind; with `drop_last` it is left out. The replayed text goes round: where
    it ends it begins again in a new order, and an epoch goes on where the one before has stopped.

    Args:
        texts: Windows of the text.
        replayed: Windows of the replayed text.
        batch: Windows of a step.
        drawn: Replayed ones among them, 1 to batch - 1.
        seed: Decides the order.
        shuffled: Whether the orders are random, or those of the texts.
        drop_last: Whether windows of the text that fill no step are left out.

    Attributes:
        steps: Of an epoch.
        epoch: Which one comes next.
    """

    def __init__(
        self,
        *,
        texts: int,
        replayed: int,
        batch: int,
        drawn: int,
        seed: int,
        shuffled: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.texts, self.replayed, self.batch, self.drawn = texts, replayed, batch, drawn
        self.seed, self.shuffled = seed, shuffled
        steps = texts / (batch - drawn)
        self.steps = math.floor(steps) if drop_last else math.ceil(steps)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.batch

    def __iter__(self) -> Iterator[int]:
        own, epoch = self._order(TEXT, self.epoch, self.texts), self.epoch
        new = self.batch - self.drawn
        turn, replayed = -1, own  # the replayed text's present pass, and its order
        for step in range(self.steps):
            yield from own.take(np.arange(step * new, (step + 1) * new), mode="wrap").tolist()
            first = (epoch * self.steps + step) * self.drawn
            for place in range(first, first + self.drawn):
                if place // self.replayed != turn:
                    turn = place // self.replayed
                    replayed = self._order(REPLAY, turn, self.replayed)
                yield self.texts + int(replayed[place % self.replayed])

    def _order(self, stream: int, number: int, count: int) -> np.ndarray:
        if not self.shuffled:
            return np.arange(count)
        return np.random.default_rng([self.seed, stream, number]).permutation(count)


def replayed_a_step(share: float, args: TrainingArguments) -> int:
    """Replayed windows of an optimizer step: round(share x its windows), and at least 1.

    Raises:
        RecipeError: If no window of the run's own text is left.
    """
    batch = windows_a_step(args)
    drawn = max(1, round(share * batch))
    if drawn >= batch:
        raise RecipeError(
            f"replay: share {share:g} of a step's {batch} windows is {drawn}, and none of the text is left. A step has "
            f"per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x {args.world_size} processes. Raise one of the two, or lower share."
        )
    return drawn


def replay_order(texts: int, replayed: int, share: float, args: TrainingArguments) -> ReplayOrder:
    """The order of a run.

    Args:
        texts, replayed: Windows of the text and of the replayed one.
        share: The recipe's.
        args: Of the run, on all its processes.

    Raises:
        RecipeError: If a step, or an epoch, would be without windows of the text.
    """
    order = ReplayOrder(
        texts=texts,
        replayed=replayed,
        batch=windows_a_step(args),
        drawn=replayed_a_step(share, args),
        seed=data_seed(args),
        shuffled=args.train_sampling_strategy != "sequential",
        drop_last=args.dataloader_drop_last,
    )
    if not order.steps:
        raise RecipeError(
            f"dataloader_drop_last: {texts} windows fill no step of {order.batch - order.drawn} beside "
            f"{order.drawn} replayed ones, so that nothing would train. Lower per_device_train_batch_size."
        )
    return order
