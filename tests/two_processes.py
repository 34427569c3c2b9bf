"""A function run by two gloo processes on this machine, forked from one that has done the imports."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

PRELOADED = ["transformers.trainer", "torch.distributed.fsdp", "partialtune.proof.audit", "partialtune.proof.deltas"]


def on_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in two processes of one gloo group.

    Args:
        function: Of a module's top level; finds the group in the environment, as under a launcher.
        arguments: Pickled.

    Returns:
        What each of them returned, by rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(as_rank, rank, 2, port, function, arguments) for rank in range(2)]
        return [future.result(timeout=300) for future in futures]


def free_port() -> int:
    """A port at which nobody listens yet, where the processes of a run find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_rank(rank: int, processes: int, port: int, function: Callable[..., Any], arguments: tuple) -> Any:
    """Call a function in this process as one of several of a run, on one thread."""
    import torch

    gc.freeze()  # what was imported before is not searched for garbage in each run
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    try:
        return function(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
