"""Where other processes go on from a checkpoint: how many wrote it, and what it lacks: random states, an optimizer.

A step of theirs has to have as many windows: `check_step_is_kept` asks a Trainer that `attach` was given,
`compare_processes` warns a loop of one's own, and partialtune.training.other_processes lets a recipe's run adapt.
"""

import io
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.constants import OPTIMIZER_NAME as FSDP_OPTIMIZER
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from partialtune.distributed import decided_by_main, is_main, rank_and_processes
from partialtune.engine.checkpoint_files import UNREADABLE_TO_LIBRARIES, read_with_care
from partialtune.errors import InputError

logger = logging.getLogger(__name__)


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each of several leaves its random state."""
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1


def in_words(processes: int) -> str:
    """`1 process`, `2 processes`."""
    return f"{processes} process{'' if processes == 1 else 'es'}"


def check_step_is_kept(trainer: Trainer, given: str | bool | None) -> str | bool | None:
    """Stop where a Trainer goes on on another number of processes, and a step would have another number of windows.

    Trainer itself goes on without a word, at another place of the data. A recipe's run has seen to it before.

    Args:
        trainer: With the arguments of the present run.
        given: As for `Trainer.train`: the checkpoint, True for the last one of `output_dir`, or none.

    Returns:
        What was given.

    Raises:
        InputError: Says the `gradient_accumulation_steps` that keep the step, or on how many processes to start.
    """
    args = trainer.args
    last = given is True and Path(str(args.output_dir)).is_dir()
    checkpoint = get_last_checkpoint(str(args.output_dir)) if last else given
    if isinstance(checkpoint, str) and not args.save_on_each_node:  # else a node holds the traces of its own alone
        decided_by_main(lambda: _check_step(args, Path(checkpoint)))
    return given


def _check_step(args: TrainingArguments, checkpoint: Path) -> None:
    if (checkpoint / "origin.json").is_file() or not any(checkpoint.glob("rng_state*.pth")):  # a recipe's, or unknown
        return
    before, now = processes_of(checkpoint), args.world_size
    if before == now:
        return
    there = f"{checkpoint} was written by {in_words(before)}, and there {'is' if now == 1 else 'are'} {now}."
    with read_with_care(checkpoint):
        batch = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).train_batch_size
        accumulation = _accumulation_of(checkpoint)
    if accumulation is None or not isinstance(batch, int):
        raise InputError(
            f"{there} How many batches made a step is not in it ({TRAINING_ARGS_NAME}), so that a step may have other "
            f"windows. Start it on {in_words(before)}."
        )
    step, at_once = batch * accumulation * before, args.train_batch_size * now
    if step != at_once * args.gradient_accumulation_steps:
        fits = step % at_once == 0
        change = f"gradient_accumulation_steps={step // at_once}" if fits else f"a batch size that divides {step}"
        raise InputError(
            f"{there} A step had {step} windows, and would have {at_once * args.gradient_accumulation_steps}. "
            f"Set {change}, or start it on {in_words(before)}."
        )
    logger.warning(
        "Processes: the checkpoint is of %d, and now there are %d. A step keeps its %d windows, in the same order, but "
        "for the end of an epoch: several processes fill it up with its first windows.",
        before,
        now,
        step,
    )


def compare_processes(optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Let the state of a loop's optimizer say how many processes saved it, and warn where another number loads it.

    Not an error: how many batches make a step is the loop's own, and it may have seen to it.

    Returns:
        What takes it back: `handle.remove()` of each.
    """
    now = rank_and_processes()[1]

    def say(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "processes": now} if now > 1 else state_dict

    def compare(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("processes", 1)
        if before != now and is_main():
            logger.warning(
                "audited: the optimizer's state was saved by %s and is loaded by %s. Keep batch x accumulation x "
                "processes as it was: else a step has other windows, and the loop goes on elsewhere in the data.",
                in_words(before),
                in_words(now),
            )

    # before and after those that name parameters, which know no other key
    first = optimizer.register_load_state_dict_pre_hook(compare, prepend=True)
    return [first, optimizer.register_state_dict_post_hook(say)]


class _Inert:
    """Stands for whatever a pickle names: nothing of it is imported or called."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key: Any, value: Any) -> None:
        """Of a dictionary of some class."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert


def _accumulation_of(checkpoint: Path) -> int | None:
    """`gradient_accumulation_steps` of the run that wrote a checkpoint, None where it does not say."""
    try:
        with zipfile.ZipFile(checkpoint / TRAINING_ARGS_NAME) as archive:  # as torch.save writes it
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            saved = _InertUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError, EOFError, *UNREADABLE_TO_LIBRARIES):
        return None  # of shards there is none; and a pickle may hold anything
    accumulation = getattr(saved, "gradient_accumulation_steps", None)
    return accumulation if isinstance(accumulation, int) else None


def load_gathered_optimizer(trainer: Trainer, checkpoint: Path) -> bool:
    """Load the optimizer of processes that sharded, and gathered it, into one that is not sharded.

    Trainer looks for a file of its own kind, finds none, and would go on with a fresh optimizer in silence.

    Returns:
        Whether it was one; else nothing was loaded.
    """
    gathered = checkpoint / f"{FSDP_OPTIMIZER}.bin"
    if trainer.is_fsdp_enabled or (checkpoint / OPTIMIZER_NAME).is_file() or not gathered.is_file():
        return False
    trainer.optimizer.load_state_dict(torch.load(gathered, map_location="cpu", weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
    return True


def seed_missing_ranks(trainer: Trainer, checkpoint: Path) -> None:
    """Seed this process anew, from seed, step and rank, where a checkpoint holds no random state for it.

    Without, it would go on with the random numbers of the first step. The main process says which ones are.
    """
    args = trainer.args
    several = args.world_size > 1
    names = [f"rng_state_{rank}.pth" for rank in range(args.world_size)] if several else ["rng_state.pth"]
    missing = [rank for rank, name in enumerate(names) if not (checkpoint / name).is_file()]
    if missing:
        logger.warning(
            "%s holds no random state for process %s of %d: seeded anew from seed, step and rank.",
            checkpoint.name,
            ", ".join(map(str, missing)),
            args.world_size,
        )
    if args.process_index in missing:
        mixed = np.random.SeedSequence([args.seed, trainer.state.global_step, args.process_index])
        set_seed(int(mixed.generate_state(1)[0]))
