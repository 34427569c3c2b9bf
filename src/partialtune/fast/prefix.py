"""The frozen prefix computed once: windows -> what the last frozen block gives, kept; training goes on from there.

The model's own forward pass stays in charge. Its first `blocks` decoder blocks are stood in for by ones that hand their
input on, the last of them by one that gives the kept states. So positions, masks, final norm and whatever a model does
between blocks are its own, and no architecture is written a second time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn

from partialtune.errors import ModelError
from partialtune.fast.shared_memory import of_this_node, shared_tensor
from partialtune.model.modes import evaluating
from partialtune.model.structure import read_structure
from partialtune.progress import progress_bar


class _Reached(Exception):
    """The forward pass has come as far as it was wanted to."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model, in their order."""
    return model.get_submodule(read_structure(model).blocks_path)


class PrefixCache:
    """States of windows behind the first `blocks` decoder blocks, (windows, T, D), on the host.

    Args:
        model: The model itself, on its device, not its DDP wrapper.
        blocks: Number of frozen blocks that are computed once, at least 1.
        dtype: In which the states are kept.
    """

    def __init__(self, model: nn.Module, blocks: int, dtype: torch.dtype) -> None:
        self._model = model
        self.blocks = list(decoder_blocks(model)[:blocks])
        self._dtype = dtype
        self._tail: tuple[None, ...] | None = None  # what a block gives beside its states; None where not a tuple
        self._wide: torch.dtype = torch.float32
        self._given: torch.Tensor | None = None
        self.states: torch.Tensor | None = None

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
        rank, processes = of_this_node()
        device = next(self._model.parameters()).device
        rows = [data.with_format("torch", columns=["input_ids"]) for data in windows]
        places = [(data, index) for data in rows for index in range(len(data))]

        def states_at(numbers: Sequence[int]) -> torch.Tensor:
            ids = torch.stack([data[index]["input_ids"] for data, index in map(places.__getitem__, numbers)])
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                return self.states_of(ids.to(device, torch.long))

        self.states = shared_tensor((len(places), *states_at([0]).shape[1:]), self._dtype)
        mine = range(rank, len(places), processes)
        with progress_bar(len(places), f"frozen prefix of {len(self.blocks)} blocks, once", "windows") as bar:
            for at in range(0, len(mine), batch_size):
                numbers = list(mine[at : at + batch_size])
                self.states[torch.tensor(numbers)] = states_at(numbers).to("cpu", self._dtype)
                bar.update(min(len(numbers) * processes, len(places) - bar.n))
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

    @property
    def bytes(self) -> int:
        """Memory that the states take."""
        return self.states.nbytes if self.states is not None else 0

    def install(self) -> None:
        """Let the blocks be stood in for, within `giving`."""
        for block in self.blocks[:-1]:
            block.forward = self._stand_in(block.forward, self._hand_on)
        self.blocks[-1].forward = self._stand_in(self.blocks[-1].forward, self._give)

    def remove(self) -> None:
        """Leave the blocks as they were, and drop the states."""
        for block in self.blocks:
            vars(block).pop("forward", None)
        self.states = None

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
        """What the last of the blocks gives for `input_ids` (B, T): (B, T, D). Nothing behind it is computed."""
        with evaluating(self._model):
            output = _output_of(self.blocks[-1], self._model, input_ids)
        if isinstance(output, tuple):
            if any(part is not None for part in output[1:]):
                raise ModelError(
                    f"{type(self._model).__name__}: its blocks give more than their states to the next one, so that "
                    f"the frozen ones cannot be left out. Say prefix_cache: off."
                )
            self._tail, output = output[1:], output[0]
        self._wide = output.dtype
        return output

    def _stand_in(self, plain: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if self._given is None else other(*args, **kwargs)

        return forward

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._as_block_gives(args[0] if args else kwargs["hidden_states"])

    def _give(self, *args: Any, **kwargs: Any) -> Any:
        return self._as_block_gives(self._given)

    def _as_block_gives(self, states: torch.Tensor) -> Any:
        return states if self._tail is None else (states, *self._tail)


def prefix_disagreement(model: nn.Module, blocks: int, input_ids: torch.Tensor) -> float:
    """How far a pass that starts from kept states is from a whole one, at the head's input: ||difference|| / ||whole||.

    Both run in train mode but for the prefix, from the same seed. It is 0 where the frozen blocks give all that later
    ones use and draw nothing at random; their numbers are computed once more, by the same operations.

    Args:
        model: A causal language model; it gets every module's mode back.
        blocks: Number of frozen blocks.
        input_ids: int64 (1, T).
    """
    cache = PrefixCache(model, blocks, torch.float32)
    early = modules_before_blocks(model, input_ids)
    cache.states = cache.states_of(input_ids)
    with evaluating(model), torch.random.fork_rng():
        model.train()
        for module in [*cache.blocks, *map(model.get_submodule, early)]:
            module.eval()
        whole = _head_input(model, input_ids)
        cache.install()
        try:
            with cache.giving(torch.zeros(1, dtype=torch.long)):
                short = _head_input(model, input_ids)
        finally:
            cache.remove()
    return float((short - whole).norm() / whole.norm())


def _head_input(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    return _reach(model, input_ids, lambda stop: head.register_forward_pre_hook(lambda _head, args: stop(args[0])))


def modules_before_blocks(model: nn.Module, input_ids: torch.Tensor) -> list[str]:
    """Names of the modules without parameters that the forward pass meets before the first block: dropouts, mostly.

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
            _reach(model, input_ids, lambda stop: first.register_forward_pre_hook(lambda *_: stop(None)))
    finally:
        for hook in hooks:
            hook.remove()
    return list(met)


def _output_of(module: nn.Module, model: nn.Module, input_ids: torch.Tensor) -> Any:
    return _reach(model, input_ids, lambda stop: module.register_forward_hook(lambda _module, _args, out: stop(out)))


def _reach(model: nn.Module, input_ids: torch.Tensor, hook: Callable[[Callable[[Any], None]], Any]) -> Any:
    """What a hook of the model is called with in a forward pass over `input_ids` (B, T), which ends there."""
    found: list[Any] = []

    def stop(value: Any) -> None:
        found.append(value)
        raise _Reached

    handle = hook(stop)
    try:
        model(input_ids=input_ids, use_cache=False)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__}: its forward pass calls no module for a block, or none for its head.")
