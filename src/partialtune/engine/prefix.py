"""The frozen prefix computed once: windows -> what the last frozen block gives, kept; training goes on from there.

In:  input_ids (windows, T), the model, and how many of its first blocks are frozen.
Out: states (windows, T, D) on the host, which a forward pass over these windows starts from.

The model's own forward pass stays in charge. Its first `blocks` decoder blocks are stood in for by ones that hand their
input on, the last of them by one that gives the kept states. So positions, masks, final norm and whatever a model does
between blocks are its own, and no architecture is written a second time.

    whole pass:   embeddings -> block 0 -> block 1 -> block 2 -> block 3 -> norm, head     (blocks = 3)
    from states:  embeddings -> hand on -> hand on -> give    -> block 3 -> norm, head
"""

import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn

from partialtune.errors import ModelError, PartialtuneError, in_one_line, is_ours
from partialtune.model.structure import decoder_blocks, read_structure
from partialtune.model.train_mode import evaluating
from partialtune.progress import progress_bar

IN_MEMORY = Path("/dev/shm")  # Linux; elsewhere, or where it is full, a file that the system keeps cached


class PrefixCache:
    """States of windows behind the first `blocks` decoder blocks, (windows, T, D), on the host.

    They take windows x T x D x 4 bytes in fp32: of GPT-2 (D = 768) and 600 windows of 256 tokens 472 MB, half in bf16.

    Args:
        model: The model itself, on its device, not its DDP wrapper.
        blocks: Number of frozen blocks that are computed once, at least 1.
        dtype: In which the states are kept.

    Attributes:
        blocks: The modules of these blocks.
        states: (windows, T, D), empty before `fill`.
        width: D, values of one token's state, known once there is one.
    """

    def __init__(self, model: nn.Module, blocks: int, dtype: torch.dtype) -> None:
        self._model = model
        self.blocks = list(decoder_blocks(model)[:blocks])
        self._dtype = dtype
        self._tail: tuple[None, ...] | None = None  # what a block gives beside its states; None where not a tuple
        self._wide: torch.dtype = torch.float32  # of what the blocks give themselves
        self._given: torch.Tensor | None = None  # states of the batch that is in the model, within `giving`
        self.width = 0
        self.states = torch.empty(0)

    def fill(self, windows: Sequence[Dataset], batch_size: int, autocast_dtype: torch.dtype | None = None) -> None:
        """Compute the states of all windows. Of several processes each does its share; all have to call this.

        Args:
            windows: Data sets with `input_ids` (T,). Windows are numbered through: those of the second data set go on
                where the first one ends.
            batch_size: Windows of one forward pass.
            autocast_dtype: That of the training which follows, None for none.

        Raises:
            ModelError: If the blocks give more than their states to those behind them.
        """
        rank, processes = _of_this_node()
        device = next(self._model.parameters()).device
        rows = [data.with_format("torch", columns=["input_ids"]) for data in windows]
        places = [(data, index) for data in rows for index in range(len(data))]  # by the window's number

        def states_at(numbers: Sequence[int]) -> torch.Tensor:
            ids = torch.stack([data[index]["input_ids"] for data, index in map(places.__getitem__, numbers)])  # (B, T)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                return self.states_of(ids.to(device, torch.long))

        self.states = _shared_tensor((len(places), *states_at([0]).shape[1:]), self._dtype)
        mine = range(rank, len(places), processes)
        with progress_bar(len(places), f"frozen prefix of {len(self.blocks)} blocks, once", "windows") as bar:
            for at in range(0, len(mine), batch_size):
                numbers = list(mine[at : at + batch_size])
                self.states[torch.tensor(numbers)] = states_at(numbers).to("cpu", self._dtype)
                bar.update(min(len(numbers) * processes, len(places) - bar.n))
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # the others' share is in the same memory, and has to be there before it is read

    @property
    def bytes(self) -> int:
        """Memory that the states take."""
        return self.states.nbytes

    def install(self) -> None:
        """Let the blocks be stood in for, within `giving`."""
        for block in self.blocks[:-1]:
            block.forward = self._stand_in(block.forward, self._hand_on)
        self.blocks[-1].forward = self._stand_in(self.blocks[-1].forward, self._give)

    def remove(self) -> None:
        """Leave the blocks as they were, and drop the states."""
        for block in self.blocks:
            vars(block).pop("forward", None)  # the class' own method is found again
        self.states = torch.empty(0)

    @contextmanager
    def giving(self, numbers: torch.Tensor) -> Iterator[None]:
        """Within it a forward pass over these windows starts from their states.

        Args:
            numbers: int64 (B,), of the windows in the batch.
        """
        device = next(self._model.parameters()).device
        self._given = self.states[numbers.cpu()].to(device, self._wide)  # (B, T, D)
        try:
            yield
        finally:
            self._given = None

    def states_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What the last of the blocks gives for `input_ids` (B, T): (B, T, D). Nothing behind it is computed.

        Raises:
            ModelError: If the blocks give anything else, or more, to those behind them.
        """
        last = self.blocks[-1]
        with evaluating(self._model):  # dropout would give every window the states of one draw, in every epoch
            output = reach(
                self._model, input_ids, lambda stop: last.register_forward_hook(lambda _module, _args, out: stop(out))
            )
        if isinstance(output, tuple):
            if any(part is not None for part in output[1:]):
                raise ModelError(
                    f"{type(self._model).__name__}: its blocks give more than their states to the next one, so that "
                    f"the frozen ones cannot be left out. Say prefix_cache: off."
                )
            self._tail, output = output[1:], output[0]
        self._wide, self.width = self._checked(output, input_ids).dtype, output.shape[-1]
        return output

    def _checked(self, output: Any, input_ids: torch.Tensor) -> torch.Tensor:
        """Gemma 3n's blocks give (4, B, T, D): four streams of which the windows of a batch are not the first axis."""
        name, wanted = type(self._model).__name__, f"({', '.join(map(str, input_ids.shape))}, width)"
        if not isinstance(output, torch.Tensor):
            raise ModelError(f"{name}: its blocks give a {type(output).__name__}, where states {wanted} are kept.")
        if output.dim() != 3 or output.shape[:2] != input_ids.shape or not output.is_floating_point():
            kind = str(output.dtype).removeprefix("torch.")
            raise ModelError(f"{name}: its blocks give {kind} {tuple(output.shape)}, where states {wanted} are kept.")
        return output

    def _stand_in(self, plain: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
        """The block's own forward outside `giving`, for windows that are not kept; `other` within it."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if self._given is None else other(*args, **kwargs)

        return forward

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a block before the last: its output has no meaning, but needs the shape of one."""
        if not args and "hidden_states" not in kwargs:
            raise ModelError(f"{type(self._model).__name__}: it does not call its blocks with `hidden_states`.")
        return self._as_block_gives(args[0] if args else kwargs["hidden_states"])

    def _give(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the last block."""
        return self._as_block_gives(self._given)

    def _as_block_gives(self, states: torch.Tensor) -> Any:
        """Blocks give a tensor, or a tuple that begins with it: the model unpacks what it is used to."""
        return states if self._tail is None else (states, *self._tail)


# ---- forward passes that end on the way ------------------------------------------------------------------------------


class _Reached(Exception):
    """The forward pass has come as far as it was wanted to."""


def reach(
    model: nn.Module,
    input_ids: torch.Tensor,
    hook: Callable[[Callable[[Any], None]], Any],
    what: str = "its forward pass",
) -> Any:
    """A value inside a forward pass over `input_ids` (B, T), which ends as soon as it is there.

    reach(model, ids, lambda stop: block.register_forward_hook(lambda _module, _args, out: stop(out))) -> block's output

    Args:
        model: A causal language model.
        input_ids: int64 (B, T).
        hook: Registers a hook that calls `stop(value)`, and returns its handle.
        what: The pass, in an error.

    Returns:
        The first value that `stop` is called with.

    Raises:
        ModelError: If the model raises anything in it, or calls the hook's module never. Errors of this package's own
            code, which runs inside the pass, are raised as they are.
    """
    found: list[Any] = []

    def stop(value: Any) -> None:
        found.append(value)
        raise _Reached

    handle = hook(stop)
    try:
        model(input_ids=input_ids, use_cache=False)
    except _Reached:
        return found[0]
    except PartialtuneError:
        raise
    except Exception as error:  # a model may raise anything: KeyError, RuntimeError, an assertion
        if is_ours(error):
            raise
        words = in_one_line(error)
        raise ModelError(f"{type(model).__name__}: {what} fails ({type(error).__name__}: {words}).") from error
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__}: its forward pass calls no module for a block, or none for its head.")


def modules_before_blocks(model: nn.Module, input_ids: torch.Tensor) -> list[str]:
    """Names of the modules without parameters that the forward pass meets before the first block: dropouts, mostly.

    They belong to the frozen prefix. A module without parameters follows its parent's mode: in train mode, GPT-2's
    dropout of the embeddings would make other states in every pass.

    Args:
        model: A causal language model.
        input_ids: int64 (B, T), any.
    """
    path = read_structure(model).blocks_path
    met: dict[str, None] = {}  # in the order of their calls
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: met.update({name: None}))
        for name, module in model.named_modules()
        if not name.startswith(f"{path}.") and name != path and next(module.parameters(), None) is None
    ]
    try:
        first = model.get_submodule(f"{path}.0")
        with evaluating(model):
            reach(model, input_ids, lambda stop: first.register_forward_pre_hook(lambda *_: stop(None)))
    finally:
        for hook in hooks:
            hook.remove()
    return list(met)


# ---- one tensor for all processes of a node --------------------------------------------------------------------------


def _of_this_node() -> tuple[int, int]:
    """Number of this process among those of its node, and how many they are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # not every launcher says it: each is then by itself
    return (int(os.environ.get("LOCAL_RANK", "0")) if processes > 1 else 0), processes


def _shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU, its values unset. Every process of a run has to call this together.

    Several processes of a node get the same memory: each writes its share, all read everything, and memory holds it
    once. It is a file that is unlinked as soon as all have it, so that nothing is left behind, however the run ends.
    """
    rank, processes = _of_this_node()
    if processes == 1:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape)
    path = _new_file(size * dtype.itemsize) if rank == 0 else None
    paths: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(paths, (socket.gethostname(), path))  # of several nodes each has a file of its own
    here = next(path for host, path in paths if host == socket.gethostname() and path)
    tensor = torch.from_file(here, shared=True, size=size, dtype=dtype).view(shape)
    dist.barrier()  # all have mapped it: its name can go, the memory stays as long as one of them lives
    if rank == 0:
        os.unlink(here)
    return tensor


def _new_file(size: int) -> str:
    room = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > size
    descriptor, path = tempfile.mkstemp(prefix="partialtune-prefix-", dir=IN_MEMORY if room else None)
    os.truncate(descriptor, size)
    os.close(descriptor)
    return path
