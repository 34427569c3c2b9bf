"""The frozen prefix computed once: windows -> what the last frozen block gives, kept; training goes on from there.

The model's own forward pass stays in charge. Its first `blocks` decoder blocks are stood in for by ones that hand their
input on, the last of them by one that gives the kept states. So positions, masks, final norm and whatever a model does
between blocks are its own, and no architecture is written a second time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn

from partialtune.errors import ModelError, PartialtuneError, is_ours
from partialtune.fast.shared_memory import of_this_node, shared_tensor
from partialtune.model.dropout import no_layer_drop
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
        self.width = 0  # values of one token's state, known once there is one
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
        """What the last of the blocks gives for `input_ids` (B, T): (B, T, D). Nothing behind it is computed.

        Raises:
            ModelError: If the blocks give anything else, or more, to those behind them.
        """
        with evaluating(self._model):
            output = _output_of(self.blocks[-1], self._model, input_ids)
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
        def forward(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs) if self._given is None else other(*args, **kwargs)

        return forward

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "hidden_states" not in kwargs:
            raise ModelError(f"{type(self._model).__name__}: it does not call its blocks with `hidden_states`.")
        return self._as_block_gives(args[0] if args else kwargs["hidden_states"])

    def _give(self, *args: Any, **kwargs: Any) -> Any:
        return self._as_block_gives(self._given)

    def _as_block_gives(self, states: torch.Tensor) -> Any:
        return states if self._tail is None else (states, *self._tail)


class Trial(NamedTuple):
    """What came of starting one pass from kept states.

    Attributes:
        apart: How far it is from a whole one at the head's input, at most: ||difference|| / ||whole||.
        width: Values of the state of one token.
    """

    apart: float
    width: int


def try_prefix(model: nn.Module, blocks: int, input_ids: torch.Tensor) -> Trial:
    """Compare a pass that starts from kept states with a whole one, in train mode and in eval mode.

    The prefix is in eval mode in both; whole and short pass begin from the same seed. They agree where the frozen
    blocks give all that later ones use and draw nothing at random; the numbers of the later blocks are computed once
    more, by the same operations. Between the two the model sees other tokens, so that nothing fits which it keeps of
    its last pass.

    Args:
        model: A causal language model; it gets every module's mode back.
        blocks: Number of frozen blocks.
        input_ids: int64 (1, T).

    Raises:
        ModelError: If the states cannot be kept, or the model's forward pass fails on one of the ways, in words.
    """
    cache = PrefixCache(model, blocks, torch.float32)
    prefix = [*cache.blocks, *map(model.get_submodule, modules_before_blocks(model, input_ids))]
    states = cache.states_of(input_ids)
    apart = []
    with evaluating(model), no_layer_drop(model), torch.random.fork_rng():
        for training in (True, False):
            model.train(training)
            for module in prefix:
                module.eval()
            whole = _head_input(model, input_ids)
            _head_input(model, input_ids.flip(1))
            cache.states = states
            cache.install()
            try:
                with cache.giving(torch.zeros(1, dtype=torch.long)):
                    short = _head_input(model, input_ids, f"a pass that starts from the states behind {blocks} blocks")
            finally:
                cache.remove()
            alike = short.shape == whole.shape
            apart.append(float((short - whole).norm() / whole.norm()) if alike else math.inf)
    return Trial(max(apart, key=lambda one: math.inf if math.isnan(one) else one), cache.width)


def _head_input(model: nn.Module, input_ids: torch.Tensor, what: str = "its forward pass") -> torch.Tensor:
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__}: it names no head (get_output_embeddings), so nothing can be compared."
        )

    def hook(stop: Callable[[Any], None]) -> Any:
        def before(_head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            stop(args[0] if args else next(iter(kwargs.values())))

        return head.register_forward_pre_hook(before, with_kwargs=True)

    torch.manual_seed(0)
    return _reach(model, input_ids, hook, what)


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


def _reach(
    model: nn.Module,
    input_ids: torch.Tensor,
    hook: Callable[[Callable[[Any], None]], Any],
    what: str = "its forward pass",
) -> Any:
    """What a hook of the model is called with in a forward pass over `input_ids` (B, T), which ends there.

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
        words = " ".join(str(error).split())[:200]
        raise ModelError(f"{type(model).__name__}: {what} fails ({type(error).__name__}: {words}).") from error
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__}: its forward pass calls no module for a block, or none for its head.")
