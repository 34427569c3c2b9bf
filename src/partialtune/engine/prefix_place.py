"""`prefix_cache: auto`: where the states of a frozen prefix are kept, in memory or on disk -> the place, and why.

In: how many rows there are, what one takes to compute and to hold, and what room there is. On disk they serve later
runs too, and they need not fit into memory. It is chosen where

- rows come again within the run (in a single epoch nothing is met twice, and whether a later run wants the same states
  nobody knows: `disk` has to be asked for, and costs one writing), and
- to compute them all takes half a minute or more, and to write them a tenth of that at most; where they do not fit
  into memory, which then computes the rest in each epoch, less than to compute them is enough; and
- they fit within the limit of all kept states and take half of what is free on the disk at most.

Where it is known that other runs want the same states, one writing pays as soon as it takes less than to compute them.
"""

import os
import time
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from partialtune.engine.block_output import block_output
from partialtune.engine.broken_off_pass import reach
from partialtune.engine.disk_folders import free_on_disk, limit_bytes, prefix_root
from partialtune.machine import free_memory
from partialtune.model.conformance import probe_windows
from partialtune.model.structure import decoder_blocks
from partialtune.model.train_mode import evaluating
from partialtune.words import gigabytes

# In the environment: 1 where other runs are known to want the same states, as `compare` says to those that it starts.
SHARED_BY_OTHERS = "PARTIALTUNE_PREFIX_SHARED"
SHARE_OF_FREE_MEMORY = 0.5  # what the states of a frozen prefix may take at most
SHARE_OF_FREE_DISK = 0.5
WORTH_SECONDS = 30.0  # of computing: below, a later run has little to gain
SHARE_OF_WRITING = 0.1
MEASURED_TOKENS = 32
WRITTEN_BYTES = 8 * 2**20  # to measure the disk


class Rows(NamedTuple):
    """The rows of a run whose states are kept.

    Attributes:
        number: How many, those of evaluation with them.
        tokens: Of each.
        come_again: Whether those of training are met more than once.
    """

    number: int
    tokens: int
    come_again: bool


class Cost(NamedTuple):
    """What states take: bytes to hold, seconds to compute."""

    size: float
    seconds: float


def rows_of_run(args: TrainingArguments, train: Any, held_out: Any = None) -> Rows | None:
    """The rows of a run by its data sets; None where they do not tell.

    Args:
        args: Of the run.
        train, held_out: Of token ids in rows of equal length: the first one is looked at.
    """
    if not isinstance(train, Dataset) or not len(train) or "input_ids" not in train.column_names:
        return None
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    trained = args.max_steps * step if args.max_steps > 0 else args.num_train_epochs * len(train)
    others = len(held_out) if isinstance(held_out, Dataset) and args.eval_strategy != "no" else 0
    return Rows(len(train) + others, len(train[0]["input_ids"]), trained > len(train))


def choose_place(model: nn.Module, blocks: int, rows: Rows | None, bf16: bool = False) -> str:
    """Why the states belong on disk, in words; empty where they belong in memory.

    Args:
        model: The model itself.
        blocks: Number of frozen blocks, at least 1.
        rows: Of the run, None where they are not known.
        bf16: Whether it computes under bf16 autocast, so that states take 2 bytes a value.
    """
    shared = os.environ.get(SHARED_BY_OTHERS) == "1"
    if rows is None or not (rows.come_again or shared):
        return ""
    of_token = measure(model, blocks, bf16)
    cost = Cost(of_token.size * rows.number * rows.tokens, of_token.seconds * rows.number * rows.tokens)
    memory = SHARE_OF_FREE_MEMORY * free_memory()
    if not shared and cost.seconds < WORTH_SECONDS and cost.size <= memory:
        return ""
    if cost.size > min(limit_bytes(), SHARE_OF_FREE_DISK * free_on_disk()):
        return ""
    rate = writing_rate()
    writing = cost.size / rate if rate else float("inf")
    if cost.size > memory:
        if writing > cost.seconds:
            return ""
        why = f"they do not fit the {gigabytes(memory)} of memory that they may take"
    elif writing > (1.0 if shared else SHARE_OF_WRITING) * cost.seconds:
        return ""
    else:
        why = f"{'others of this comparison' if shared else 'later runs'} start from them, too"
    return f"{why}: about {gigabytes(cost.size)}, {cost.seconds:.0f} s to compute and {max(1, writing):.0f} s to write"


@torch.no_grad()
def measure(model: nn.Module, blocks: int, bf16: bool = False) -> Cost:
    """What the states of one token take, by one pass of a short window through the prefix."""
    last = decoder_blocks(model)[blocks - 1]
    ids = probe_windows(model, MEASURED_TOKENS, [])
    inputs, name = {"input_ids": ids, "use_cache": False}, type(model).__name__
    began = time.perf_counter()
    with evaluating(model), torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        given = reach(model, inputs, lambda stop: last.register_forward_hook(lambda _m, _args, out: stop(out)), name)
        states, form = block_output(model, given, ids)
        states.flatten()[0].item()  # an accelerator has computed it by then
    return Cost(states.shape[-1] * form.kept.itemsize, (time.perf_counter() - began) / ids.numel())


def writing_rate() -> float:
    """Bytes a second that the disk of the cache takes; 0 where it takes none."""
    with suppress(OSError):
        prefix_root().mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=prefix_root()) as file:
            began = time.perf_counter()
            file.write(os.urandom(WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN_BYTES / (time.perf_counter() - began)
    return 0.0
