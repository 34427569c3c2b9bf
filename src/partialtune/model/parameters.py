"""A model's parameters and buffers under plain dotted names, and their whole values, a piece and a thread at a time."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from partialtune.distributed import is_main
from partialtune.model.row_parameters import rows_by_matrix, write_rows
from partialtune.model.rows import Rows, other_rows_name
from partialtune.model.trained_rows import TrainedRows

Named = Iterable[tuple[str, torch.Tensor]]
Result = TypeVar("Result")

IN_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch's names for what it has wrapped
INSIDE_PEFT = re.compile(r"\.base_layer(?=\.)|(?<=\.lora_[AB])\.default(?=\.)")
CHUNK = 4 * 2**20  # elements handled at once, 16 MB in fp32: keeps temporaries small beside any model
# Elements widened or written at once, 1 MB in fp32. Pieces of 16 MB, made and freed in several threads, leave hundreds
# of MB in malloc's arenas where a model in 16 bits is digested.
PIECE = 2**18
# Elements reduced at once. On a CPU temporaries of 2^15 x 4 bytes = 128 kB stay in its cache and below what malloc maps
# afresh, and each operation in its own thread: four to ten times faster than in pieces of 16 MB, and nothing waits for
# other threads on a busy machine. Elsewhere each piece costs a few launches, so pieces are large: 64 MB in fp32.
CPU_PIECE, DEVICE_PIECE = 2**15, 2**24


# ---- names ----------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """The name of a parameter without what torch.compile, DDP, FSDP's activation checkpointing and peft put into it.

    plain_name("_orig_mod.transformer.wte.weight") -> "transformer.wte.weight"
    plain_name("base_model.model.h.0.c_fc.base_layer.weight") -> "h.0.c_fc.weight"
    plain_name("base_model.model.h.0.c_fc.lora_A.default.weight") -> "h.0.c_fc.lora_A.weight"
    """
    for wrapper in IN_WRAPPERS:
        if wrapper in name:  # anywhere in the name: a block may be compiled by itself
            name = name.replace(wrapper, "")
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    return INSIDE_PEFT.sub("", name)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped; a model that is not wrapped as it is."""
    return getattr(model, "_orig_mod", model)  # torch's name for it


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of `model` once, under its plain name, in the order of `named_parameters()`.

    A matrix of which some rows train is one of them, with their newest values; the parameter of these rows is not.

    Of a model under `fully_shard` they are its shards, in the dtype that they are trained in. Not to be called in the
    middle of a pass.
    """
    reshard(model)
    write_rows(model)
    of_rows = {id(trained.parameter) for trained in rows_by_matrix(model).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_rows:
            yield plain_name(name), parameter


def reshard(model: nn.Module) -> None:
    """Let a model under `fully_shard` hold its shards, which are what the optimizer holds. Others stay as they are.

    After a forward pass without backward, as in an evaluation, its outermost modules have whole copies in their places:
    rounded ones where FSDP computes in 16 bits.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDPModule, whose import takes 0.4 s where nothing is sharded
            module.reshard()


def named_learners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `named_weights`, but of a matrix of which some rows train the parameter of these, as an optimizer holds it."""
    rows = rows_by_matrix(model)
    for name, parameter in named_weights(model):
        trained = rows.get(id(parameter))
        yield name, parameter if trained is None else trained.parameter


def with_other_rows(named: Named, rows: Mapping[str, Rows]) -> Iterator[tuple[str, torch.Tensor]]:
    """Beside each matrix of which some rows train the same matrix under the name of its other rows.

    Args:
        named: Whole matrices.
        rows: By name of the matrix, which of its rows train.
    """
    for name, values in named:
        yield name, values
        if name in rows:
            yield other_rows_name(name, rows[name]), values


def rows_by_name(model: nn.Module) -> dict[str, TrainedRows]:
    """Name of each matrix of which some rows train -> these rows."""
    rows = rows_by_matrix(model)
    return {name: rows[id(parameter)] for name, parameter in named_weights(model) if id(parameter) in rows}


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer that `state_dict()` holds, under its plain name: running statistics, stored tables, router biases.

    Buffers that a model computes for itself, such as masks and rotary tables, are not persistent and not among them.
    """
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            # torch has no public way to ask which buffers are persistent but `state_dict()`, which would run the
            # model's own hooks and, sharded, gather every weight. Should torch rename the set, this raises
            # AttributeError; should it change its meaning, test_audit's "table that the model computes" fails.
            if name not in module._non_persistent_buffers_set:
                yield plain_name(f"{path}.{name}" if path else name), buffer


# ---- whole values ---------------------------------------------------------------------------------------------------


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this process holds a part only, as under `fully_shard`."""
    return hasattr(parameter, "full_tensor")  # of DTensor, whose import takes 0.4 s where nothing is sharded


def exact_values_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """The values that a frozen parameter stands for, where it holds their rounding to 16 bits; else None.

    They are the values that are digested, scored and saved. They lie on the CPU.
    """
    return getattr(parameter, "exact_values", None)


def _is_rounding_of(parameter: torch.Tensor, exact: torch.Tensor) -> bool:
    pairs = zip(chunks_of(parameter.detach()), chunks_of(exact), strict=True)
    return all(torch.equal(held.cpu().view(torch.int16), e.to(held.dtype).view(torch.int16)) for held, e in pairs)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All values of a parameter, shape as declared, without gradient.

    Of one that holds the rounding of others these others; where it holds something else by now, what it holds.

    A parameter sharded by `fully_shard` is gathered, so that a shard is never taken for the whole: every process of
    its mesh has to call this together.
    """
    exact = exact_values_of(parameter)
    if exact is not None and _is_rounding_of(parameter, exact):
        return exact
    values = parameter.detach()
    return values.full_tensor() if is_sharded(values) else values


def whole_on_main(parameter: torch.Tensor) -> torch.Tensor | None:
    """All values of a parameter on the main process, None on others, which only take part where it is gathered."""
    values = whole(parameter) if is_main() or is_sharded(parameter) else None
    return values if is_main() else None


# ---- a piece and a thread at a time ---------------------------------------------------------------------------------


def chunks_of(values: torch.Tensor, size: int = PIECE) -> Iterator[torch.Tensor]:
    """Consecutive flat pieces of at most `size` elements, in C order."""
    yield from values.reshape(-1).split(size) if values.numel() else ()


def piece_size(device: torch.device) -> int:
    """Elements to reduce at once on a device."""
    return CPU_PIECE if device.type == "cpu" else DEVICE_PIECE


def in_threads(work: Callable[[str, torch.Tensor], Result], named: Named) -> dict[str, Result]:
    """`work(name, tensor)` by name, as many at once as torch has threads; hashing and torch release Python's lock.

    Tensors are taken one after another, in the order given, and no more of them are kept than are being worked on:
    `ThreadPoolExecutor.map` would take all of them first, and gather a sharded model whole.
    """
    threads, found = torch.get_num_threads(), {}
    if threads <= 1:
        return {name: work(name, tensor) for name, tensor in named}
    at_work: deque[tuple[str, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for name, tensor in named:
            at_work.append((name, pool.submit(work, name, tensor)))
            if len(at_work) > threads:
                done, future = at_work.popleft()
                found[done] = future.result()
        return found | {name: future.result() for name, future in at_work}


def numbers(scalars: Iterable[torch.Tensor]) -> list:
    """Tensors of one shape and dtype -> what their `tolist()` gives, waiting for each device once."""
    scalars = list(scalars)
    by_device: dict[torch.device, list[int]] = {}
    for index, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(index)
    found: dict[int, Any] = {}
    for indices in by_device.values():
        found |= zip(indices, torch.stack([scalars[index] for index in indices]).tolist(), strict=True)
    return [found[index] for index in range(len(scalars))]
