"""Rows that train, of a matrix that FSDP2 shards: their parameter is sharded like any other, and in other places.

    matrix (V, D)    process 0 holds rows 0 to V/2, process 1 the others
    rows   (n, D)    process 0 holds rows 0 to n/2 of these, wherever they stand in the matrix

After each step of the optimizer the processes send each other the n rows, and each writes those into its shard of the
matrix that lie in it. So a shard always holds the newest values: what FSDP gathers for a forward pass, or once more for
a backward pass, what is digested and what is saved needs nothing else.
"""

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from partialtune.errors import ModelError
from partialtune.model.rows import Rows

MARK = "partialtune_trained_rows"  # of a sharded parameter: the `TrainedRows` whose values it is


def first_row_of_shard(tensor: Any) -> tuple[int, int] | None:
    """Where the shard of this process begins in a tensor that is sharded by its rows.

    Args:
        tensor: A DTensor.

    Returns:
        The dimension of the mesh, and the number of the first row; None where shards are no rows of it.
    """
    from torch.distributed.tensor import Shard  # takes 0.4 s, and is there already where something is sharded

    sharded = [(number, placement) for number, placement in enumerate(tensor.placements) if placement.is_shard()]
    # `type is`, not isinstance: the rows of torch's _StridedShard lie apart
    if len(sharded) != 1 or type(sharded[0][1]) is not Shard or sharded[0][1].dim != 0:
        return None
    dimension, mesh = sharded[0][0], tensor.device_mesh
    rows = -(-tensor.shape[0] // mesh.size(dimension))  # of each process but the last ones, as torch.chunk does it
    return dimension, min(rows * mesh.get_local_rank(dimension), tensor.shape[0])


@torch.no_grad()
def put_into_shard(tensor: Any, rows: Rows, values: torch.Tensor) -> None:
    """Write those of `values` (n, ...), which are these rows of a sharded tensor, that this process holds.

    Raises:
        ModelError: If it is sharded otherwise than by rows.
    """
    found = first_row_of_shard(tensor)
    if found is None:
        raise ModelError(
            f"Rows of a matrix train, and its shards are no rows of it ({tensor.placements}): shard its dimension 0, "
            f"as fully_shard does unless it is told otherwise, or train the whole matrix."
        )
    local, first = tensor.to_local(), found[1]
    last, at = first + len(local), 0
    for start, stop in rows:
        low, high = max(start, first), min(stop, last)
        if low < high:
            local[low - first : high - first] = values[at + low - start : at + high - start]
        at += stop - start


def write_after_steps(parameter: torch.Tensor, trained: Any) -> None:
    """Let the matrix' shards get the values of a sharded parameter of rows after each step of its optimizer.

    Args:
        parameter: What an optimizer will hold.
        trained: `TrainedRows`, whose `write_into_shards` all processes call together.
    """
    # For all optimizers, once a process: whoever makes the one that will hold the parameter need not know of it.
    # Without, passes would read, and files hold, rows as they were before the step.
    global _is_hooked
    if not _is_hooked:
        register_optimizer_step_post_hook(_write_into_shards)
        _is_hooked = True
    setattr(parameter, MARK, trained)


_is_hooked = False


def _write_into_shards(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for group in optimizer.param_groups:  # in the same order on all processes
        for parameter in group["params"]:
            if hasattr(parameter, MARK):
                getattr(parameter, MARK).write_into_shards()
