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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(_as_rank, rank, port, function, arguments) for rank in range(2)]
        return [future.result(timeout=300) for future in futures]


def _as_rank(rank: int, port: int, function: Callable[..., Any], arguments: tuple) -> Any:
    import torch

    gc.freeze()  # what was imported before is not searched for garbage in each run
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    try:
        return function(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
