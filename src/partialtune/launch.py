"""How the process was started: as many processes as the launcher meant, threads for all cores, one device each."""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from partialtune.errors import InputError, PartialtuneError

logger = logging.getLogger(__name__)

Decision = TypeVar("Decision")


def use_all_cores() -> None:
    """Undo `OMP_NUM_THREADS=1` which accelerate sets for one process too: without a GPU it would use one core.

    Processes on one machine share its cores.
    """
    started_by_accelerate = any(key.startswith("ACCELERATE_") for key in os.environ)
    if started_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_processes(args: TrainingArguments) -> None:
    """Stop where the launcher started several processes and each would train alone.

    Raises:
        InputError: If WORLD_SIZE of the environment is not the number of processes that found each other.
    """
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if promised != args.world_size:
        raise InputError(
            f"The launcher started {promised} processes, but each runs alone (world size {args.world_size}). "
            f"On CPUs set ACCELERATE_USE_CPU=true or use_cpu: true."
        )


def one_device_a_process(args: TrainingArguments) -> None:
    """Keep Trainer from DataParallel, which it takes where one process sees several GPUs: slow, and no one asked."""
    args.device  # noqa: B018  (the first access counts the devices)
    if args.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible and one is used. For all: accelerate launch --config_file accelerate_config.yaml "
            "--multi_gpu --num_processes %d -m partialtune train RECIPE",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1


def check_precision(said: Mapping[str, Any]) -> None:
    """Stop where the launcher's mixed precision contradicts the recipe's: the launcher's would win without a word.

    Args:
        said: Fields of `TrainingArguments` that the recipe names.

    Raises:
        InputError: If they differ.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    recipe = "bf16" if said.get("bf16") else "fp16" if said.get("fp16") else "no"
    if launcher not in ("no", recipe):
        raise InputError(
            f"The launcher says mixed precision {launcher}, the recipe {recipe}. "
            f"Say it in the recipe alone (bf16: true) and leave --mixed_precision off."
        )


def main_process_only(function: Callable[..., None]) -> Callable[..., None]:
    """Let one process of a run do what must be done once; the others pass by."""

    @functools.wraps(function)
    def on_main_process(*args, **kwargs) -> None:
        if PartialState().is_main_process:
            function(*args, **kwargs)

    return on_main_process


def decided_by_main(decide: Callable[[], Decision]) -> Decision:
    """What `decide` gives on the main process, on every process; likewise the error that it raises there.

    Several processes that look at one folder while one of them begins to write would not see the same.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [decide(), None]
        except PartialtuneError as error:
            outcome = [None, error]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
