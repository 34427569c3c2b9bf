"""How the process was started: what a launcher may have set up otherwise than the run needs it.

As many processes as the launcher meant, threads for all cores, one device each, no engine that hides whole parameters.
"""

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from partialtune.distributed import DDP_TIMEOUT, DEEPSPEED, launcher_says, shards_parameters
from partialtune.errors import InputError

logger = logging.getLogger(__name__)


# devices on which accelerate carries out FSDP; on others it silently runs something else
SHARDED_ON = ("cuda", "xpu", "npu", "mlu", "musa", "sdaa", "hpu", "neuron")
STATE_DICT_TYPES = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")  # the first is accelerate's default under FSDP2


def use_all_cores() -> None:
    """Undo `OMP_NUM_THREADS=1` which accelerate sets for one process too: without a GPU it would use one core.

    Processes on one machine share its cores.
    """
    started_by_accelerate = any(key.startswith("ACCELERATE_") for key in os.environ)
    if started_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes(given: Mapping[str, Any]) -> None:
    """Let the processes that a launcher started find each other.

    Unless it is told of CPUs, accelerate looks for GPUs alone, and processes that torchrun started on a machine without
    one would each run by themselves.

    Args:
        given: Fields of `TrainingArguments` that the recipe names.

    Raises:
        InputError: If some of them are not there, or find what processes before them left.
    """
    on_cpu = given.get("use_cpu") or not torch.accelerator.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        seconds = given.get("ddp_timeout", DDP_TIMEOUT)
        try:
            PartialState(timeout=timedelta(seconds=seconds), **store_after_restart(seconds))
        except dist.DistError as error:
            promised, place = os.environ["WORLD_SIZE"], os.environ.get("MASTER_ADDR")
            raise InputError(
                f"The {promised} processes of this run (WORLD_SIZE) did not find each other within {seconds:g} seconds "
                f"(ddp_timeout): {str(error).splitlines()[0]} Start all of them, with MASTER_ADDR (now {place}) "
                f"naming the machine of the first; or unset WORLD_SIZE for one process."
            ) from error


def store_after_restart(seconds: float) -> dict[str, Any]:
    """Where processes that torch's agent has started again find each other: a part of its store that is still empty.

    The agent keeps one store for all of its starts. In it stand the addresses of the processes that were killed, and
    those that come after would read them: gloo ends with `connectFullMesh failed`.

    Args:
        seconds: How long one of them waits for what another one has to say.

    Returns:
        Arguments of torch's `init_process_group`; none where the store is a new one anyway.

    Raises:
        InputError: Where several agents have begun again, which count their starts each for itself.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        raise InputError(
            "The launcher has started the processes of several machines again, and left them the addresses of those "
            "that are gone. Launch with torchrun --rdzv_backend c10d, on all machines with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. What was saved before is in the run's folder."
        )
    processes, address = int(os.environ["WORLD_SIZE"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    # not the master: that is the agent
    store = dist.TCPStore(*address, processes, is_master=False, timeout=timedelta(seconds=seconds))
    own = dist.PrefixStore(f"start {start}", store)
    return {"store": own, "rank": int(os.environ["RANK"]), "world_size": processes}


def check_launcher() -> None:
    """Stop where the launcher asks for DeepSpeed; checked before anything else, since it need not be installed.

    Raises:
        InputError: In that case.
    """
    if launcher_says("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(f"The launcher says DeepSpeed. {DEEPSPEED}")


def check_engine(args: TrainingArguments) -> None:
    """Stop where parameters would be flattened so that snapshot, deltas and audit cannot tell them apart.

    Args:
        args: Of the run; what the launcher asks for is looked up in the environment.

    Raises:
        InputError: For FSDP1, for FSDP that saves flat parameters, and for FSDP without a GPU.
    """
    by_launcher = launcher_says("ACCELERATE_USE_FSDP")
    if not shards_parameters(args):
        return
    version = os.environ.get("FSDP_VERSION", "1") if by_launcher else args.fsdp_plugin_args["fsdp_version"]
    if str(version) != "2":
        raise InputError(
            f"FSDP version {version} flattens parameters, and frozen ones cannot be told from trainable ones. "
            f"Set fsdp_version: 2, as recipes/launch/fsdp2.yaml does."
        )
    if args.device.type not in SHARDED_ON:
        raise InputError(
            "FSDP needs GPUs: on CPUs accelerate runs DDP in its place without a word. "
            "Take recipes/launch/cpu_two_processes.yaml."
        )
    kind = os.environ.get("FSDP_STATE_DICT_TYPE") if by_launcher else args.fsdp_plugin_args.get("state_dict_type")
    if kind is not None and not any(allowed in str(kind) for allowed in STATE_DICT_TYPES):
        raise InputError(
            f"fsdp_state_dict_type is {kind}. Allowed are {' and '.join(STATE_DICT_TYPES)}: each process saves its own "
            f"shards, or one gathers and saves all. recipes/launch/fsdp2.yaml says when to take which."
        )


def check_processes(args: TrainingArguments) -> None:
    """Stop where the launcher started several processes and each would train alone.

    Raises:
        InputError: If WORLD_SIZE of the environment is not the number of processes that found each other.
    """
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if promised != args.world_size:
        raise InputError(
            f"The launcher started {promised} processes, but each runs alone (world size {args.world_size}). "
            f"On CPUs set ACCELERATE_USE_CPU=true."
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
        args._n_gpu = 1  # what `args.n_gpu` gives, by which Trainer decides; it has no setter


def check_precision(given: Mapping[str, Any]) -> None:
    """Stop where the launcher's mixed precision contradicts the recipe's: the launcher's would win silently.

    Args:
        given: Fields of `TrainingArguments` that the recipe names.

    Raises:
        InputError: If they differ.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    recipe = "bf16" if given.get("bf16") else "fp16" if given.get("fp16") else "no"
    if launcher not in ("no", recipe):
        raise InputError(
            f"The launcher says mixed precision {launcher}, the recipe {recipe}. "
            f"Say it in the recipe alone (bf16: true) and leave --mixed_precision off."
        )
