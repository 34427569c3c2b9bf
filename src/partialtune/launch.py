"""How the process was started, and what the processes of a run do together.

As many processes as the launcher meant, threads for all cores, one device each, no engine that hides whole parameters.
What is decided, or fails, on one process is decided, or fails, on all.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from partialtune.errors import EndedElsewhere, InputError, PartialtuneError, code_of, disk_words, is_disk_fault

logger = logging.getLogger(__name__)

Decision = TypeVar("Decision")

DDP_TIMEOUT = 1800  # seconds, Trainer's default
# devices on which accelerate carries out FSDP; on others it runs something else without a word
SHARDED_ON = ("cuda", "xpu", "npu", "mlu", "musa", "sdaa", "hpu", "neuron")


def use_all_cores() -> None:
    """Undo `OMP_NUM_THREADS=1` which accelerate sets for one process too: without a GPU it would use one core.

    Processes on one machine share its cores.
    """
    started_by_accelerate = any(key.startswith("ACCELERATE_") for key in os.environ)
    if started_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.accelerator.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def join_processes(said: Mapping[str, Any]) -> None:
    """Let the processes that a launcher started find each other.

    Without a word about CPUs accelerate looks for GPUs alone, and processes that torchrun started on a machine without
    one would each run by themselves.

    Args:
        said: Fields of `TrainingArguments` that the recipe names.

    Raises:
        InputError: If some of them are not there.
    """
    on_cpu = said.get("use_cpu") or not torch.accelerator.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if on_cpu:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        seconds = said.get("ddp_timeout", DDP_TIMEOUT)
        try:
            PartialState(timeout=timedelta(seconds=seconds))
        except dist.DistError as error:
            promised, place = os.environ["WORLD_SIZE"], os.environ.get("MASTER_ADDR")
            raise InputError(
                f"The {promised} processes of this run (WORLD_SIZE) did not find each other within {seconds:g} seconds "
                f"(ddp_timeout): {str(error).splitlines()[0]} Start all of them, with MASTER_ADDR (now {place}) "
                f"naming the machine of the first; or unset WORLD_SIZE for one process."
            ) from error


def check_launcher() -> None:
    """Stop where the launcher says DeepSpeed; asked before anything else, since it need not even be installed.

    Raises:
        InputError: In that case.
    """
    if _said_by_launcher("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "The launcher says DeepSpeed: it partitions parameters, and snapshot, deltas and audit need whole ones. "
            "Take recipes/launch/fsdp2.yaml where one GPU is too small, else recipes/launch/ddp.yaml."
        )


def check_engine(args: TrainingArguments) -> None:
    """Stop where parameters would be flattened so that snapshot, deltas and audit cannot tell them apart.

    Args:
        args: Of the run; what the launcher says is looked up in the environment.

    Raises:
        InputError: For FSDP1, for FSDP that saves shards, and for FSDP without a GPU.
    """
    by_launcher = _said_by_launcher("ACCELERATE_USE_FSDP")
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
    if "FULL_STATE_DICT" not in str(kind):
        raise InputError(
            f"FSDP would save shards (state dict type {kind or 'SHARDED_STATE_DICT, the default'}) and no whole model. "
            f"Set fsdp_state_dict_type: FULL_STATE_DICT, as recipes/launch/fsdp2.yaml does."
        )


def shards_parameters(args: TrainingArguments) -> bool:
    """Whether recipe or launcher ask for FSDP."""
    return bool(args.fsdp) or _said_by_launcher("ACCELERATE_USE_FSDP")


def _said_by_launcher(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


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
    """Let one process of a run do what must be done once, while the others wait: where it fails, all end alike."""

    @functools.wraps(function)
    def on_main_process(*args, **kwargs) -> None:
        decided_by_main(lambda: function(*args, **kwargs))

    return on_main_process


def decided_by_main(decide: Callable[[], Decision]) -> Decision:
    """What `decide` gives on the main process, on every process.

    Several processes that look at one folder while one of them begins to write would not see the same.

    Raises:
        Exception: What `decide` raised, on the main process; whatever it is, the others do not wait for ever.
        EndedElsewhere: On the others, with the exit code that the main process ends with.
    """
    made = _or_error(decide) if PartialState().is_main_process else None
    if not _several():
        return _or_raise(made)
    outcome = [_failure_of(made), None if isinstance(made, _Failed) else made]
    dist.broadcast_object_list(outcome, src=0)
    _end_together(made, outcome[0])
    return outcome[1]


def check_shared(folder: Path, name: str, patience_seconds: float = 30) -> None:
    """Stop where this process does not see a file that the main process has written.

    Args:
        folder: The run's folder.
        name: The file's.
        patience_seconds: How long to wait for it.

    Raises:
        InputError: If it is not there after some time, which network file systems may take.
    """
    PartialState().wait_for_everyone()
    end = time.monotonic() + patience_seconds

    def wait() -> None:
        while not (folder / name).is_file():
            if time.monotonic() > end:
                raise InputError(
                    f"output_dir: {folder.absolute()} is not the same folder on every machine of this run. "
                    f"Name one on a file system that they share."
                )
            time.sleep(0.5)

    done_together(wait)


def first_on_each_node(make: Callable[[], Decision]) -> Decision:
    """What `make` gives, on every process; the first one of each machine goes first, so that others find its files.

    Raises:
        Exception: What any process raised, on all of them; the main process says it.
    """
    state = PartialState()
    if not _several():
        return make()
    made = _or_error(make) if state.is_local_main_process else None
    _end_together(made, _first_failure(made))
    if not state.is_local_main_process:
        made = _or_error(make)
    _end_together(made, _first_failure(made))
    return made


def done_together(make: Callable[[], Decision]) -> Decision:
    """What `make` gives on each process; an error on one of them, a full disk for example, ends all of them alike.

    Every process has to call this together, and `make` may hold no collective operation that a process which failed
    in it would miss.

    Raises:
        Exception: As `first_on_each_node`.
    """
    if not _several():
        return make()
    made = _or_error(make)
    _end_together(made, _first_failure(made))
    return made


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass(frozen=True)
class _Failure:
    """What other processes are told of an error: not the error, which need not survive pickling."""

    words: str
    code: int


def _or_error(make: Callable[[], Decision]) -> Decision | _Failed:
    try:
        return make()
    except Exception as error:  # noqa: BLE001  (raised again, whatever it is, when the others know)
        return _Failed(error)


def _or_raise(made: Any) -> Any:
    if isinstance(made, _Failed):
        raise made.error
    return made


def _failure_of(made: Any) -> _Failure | None:
    if not isinstance(made, _Failed):
        return None
    error = made.error
    if isinstance(error, PartialtuneError):
        return _Failure(str(error), error.exit_code)
    if is_disk_fault(error):
        return _Failure(disk_words(error), code_of(error))
    return _Failure(
        f"Another process of this run failed, and says more: {type(error).__name__}: {error}", code_of(error)
    )


def _first_failure(made: Any) -> _Failure | None:
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, _failure_of(made))
    return next((failure for failure in failures if failure is not None), None)


def _end_together(made: Any, failure: _Failure | None) -> None:
    """Raise on every process what one of them failed with: in words once, on the main process; a bug where it is."""
    if failure is None:
        return
    main_process = PartialState().is_main_process
    cause = made.error if isinstance(made, _Failed) else None
    if cause is not None and (main_process or not (isinstance(cause, PartialtuneError) or is_disk_fault(cause))):
        raise cause
    raise EndedElsewhere(failure.words if main_process else "", failure.code) from cause


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")
# gloo's own waits, the pair that it closes after one of them, those for its store, and NCCL's
STALLED = (
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Timed out after",
    "Socket Timeout",
    "wait timeout after",
    "timed out after",
    "timeout of",
)
GO_ON = "What was saved before is in the run's folder; go on with: --resume_from_checkpoint auto"


@contextmanager
def peers_watched(patience_seconds: float = DDP_TIMEOUT) -> Iterator[None]:
    """Say in words that another process of the run is gone, or does not answer any more.

    Args:
        patience_seconds: The recipe's `ddp_timeout`, which the message names.

    Raises:
        EndedElsewhere: In the place of what torch.distributed raises.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if _several() and any(words in said for words in LOST):
            words = f"Another process of this run ended: it was killed, or says why above. {GO_ON}"
        elif _several() and any(words in said for words in STALLED):
            words = (
                f"Another process of this run did not answer for {patience_seconds:g} seconds (ddp_timeout): it was "
                f"stopped, its machine is out of reach, or it is slower than that. {GO_ON}"
            )
        else:
            raise
        raise EndedElsewhere(words) from error
