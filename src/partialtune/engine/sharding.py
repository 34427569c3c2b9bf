"""A model under `fully_shard` whose plan changes on the way: what is reduced in which dtype, and its optimizer's state.

    sum_in_fp32(plugin)                             # before the model is sharded
    fix_dtypes(model)                               # while all that any phase trains requires gradients
    write_states(folder, trainer, plan, plainly)    # the optimizer by name, as on one process; whole or in shards
    load_states(folder, trainer, plan, plainly)

`fully_shard` groups the parameters of a block. The dtypes of a group are fixed once, before the first forward pass, and
of those of its parameters that require gradients then. A group in which nothing does has none: were it thawed later,
gradients of 16 bits would be summed in 16 bits, and not be those of fp32 parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import save_fsdp_model
from torch import nn
from transformers import Trainer
from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from partialtune.distributed import decided_by_main, is_main
from partialtune.engine.checkpoint_files import read_with_care
from partialtune.engine.plan_optimizer import RESTING, bare_optimizer, key_by_name, learners_by_name, saved_groups
from partialtune.engine.sharded_saves import holds_fsdp_files, saves_shards
from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import is_sharded, reshard
from partialtune.model.sharded_files import (
    OF_STATE,
    OPTIMIZER_FOLDER,
    OPTIMIZER_KEY,
    ShardedFiles,
    keys_of,
    plain_values,
    state_of,
)

# ---- the model ------------------------------------------------------------------------------------------------------


def fix_dtypes(model: nn.Module) -> None:
    """Let each group of a model under `fully_shard` know in which dtype it sums gradients, as what learns stands now.

    Called while all that any phase trains requires gradients. Other models stay as they are.

    Args:
        model: The outermost module that is sharded, or what holds it.
    """
    # torch has no public name for this: it does it in the first forward pass, which may be an evaluation in which
    # what later phases train is held already. Should torch rename them, AttributeError is raised; should it change what
    # they do, "is summed in fp32" in tests/test_fsdp_phases.py fails.
    for module in model.modules():  # from the outside: the first one makes itself the root of those in it
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()
            state._lazy_init()
            for group in state._fsdp_param_groups:
                group._init_mp_dtypes()  # again: under an earlier plan, less of it may have required gradients


def sum_in_fp32(plugin: Any) -> bool:
    """Let FSDP sum gradients between processes in fp32, as DDP does, where its mixed precision would sum in 16 bits.

    Args:
        plugin: accelerate's of FSDP2. It takes the recipe's bf16 for the arithmetic and for the sums.

    Returns:
        Whether it has changed.
    """
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is None or policy.reduce_dtype not in (torch.bfloat16, torch.float16):
        return False
    plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
    return True


# ---- the optimizer's state ------------------------------------------------------------------------------------------

# torch's own `get_optimizer_state_dict` and `set_optimizer_state_dict`, which accelerate calls, take one group without
# parameters at most, and no state of what is out of the optimizer. A schedule and rates of parts leave several groups
# empty, and blocks that rest keep their state outside. Rows that train have a name that says which they are.


def has_own_state(plan: FreezePlan) -> bool:
    """Whether torch's functions do not do for the optimizer of a plan: parameters leave it on the way, have groups of
    their own in it, or are rows of a matrix, which have a name of their own."""
    own_groups = plan.names_rates or any(parameter.learning_rate is not None for parameter in plan.parameters)
    return plan.changes_on_the_way or own_groups or bool(plan.rows)


def write_states(folder: str, trainer: Trainer, plan: FreezePlan, plainly: Callable[[str], None]) -> None:
    """Write what a Trainer's checkpoint holds of optimizer and scheduler, and under FSDP of the sharded model.

    All processes call this together.

    Args:
        folder: The checkpoint's.
        trainer: Attached to the plan.
        plan: Decides whether torch's own functions do.
        plainly: The Trainer's own way.
    """
    if not (trainer.is_fsdp_enabled and has_own_state(plan)):
        plainly(folder)
        return
    accelerator, model = trainer.accelerator, trainer.model
    save_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, folder, **get_fsdp_ckpt_kwargs())
    if saves_shards(trainer):
        write_sharded_state(Path(folder), trainer.optimizer, model)
    else:
        write_whole_state(Path(folder) / OPTIMIZER_NAME, trainer.optimizer, model)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_states(folder: str | None, trainer: Trainer, plan: FreezePlan, plainly: Callable[[str | None], None]) -> None:
    """Load what `write_states` wrote, or a run without FSDP. All processes call this together, and the main one reads.

    Raises:
        InputError: If the checkpoint does not hold it, or that of another plan.
    """
    whole = folder is not None and (has_own_state(plan) or not holds_fsdp_files(Path(folder)))
    if folder is None or not (trainer.is_fsdp_enabled and whole):
        plainly(folder)
        return
    if (Path(folder) / OPTIMIZER_FOLDER).is_dir():
        load_sharded_state(Path(folder), trainer.optimizer, trainer.model)
    else:
        load_whole_state(Path(folder) / OPTIMIZER_NAME, trainer.optimizer, trainer.model)
    trainer.lr_scheduler.load_state_dict(_read_by_main(Path(folder) / SCHEDULER_NAME))


class _Later(NamedTuple):
    """Stands for a tensor that follows by itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_whole_state(file: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Write the state of an optimizer of sharded parameters as one process writes it: `key_by_name`, whole tensors.

    All processes call this together, and the main one writes.

    Args:
        file: Is written.
        optimizer: Itself or accelerate's wrapper.
        model: The sharded model.
    """
    reshard(model)
    content = _by_name(optimizer, model)
    for _, state in _states(content):
        for key, value in state.items():
            whole = value.full_tensor() if is_sharded(value) else value
            state[key] = whole.cpu() if is_main() and isinstance(whole, torch.Tensor) else None
    if is_main():
        torch.save(content, file)


def load_whole_state(file: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Load what `write_whole_state` wrote. All processes call this together, and the main one reads.

    Raises:
        InputError: If the file does not hold it, or that of another plan.
    """
    reshard(model)
    learners = learners_by_name(model)
    saved: dict[str, Any] = {}

    def outline() -> dict[str, Any]:
        with read_with_care(file.parent):
            saved.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
            saved_groups(saved)
            content = {**saved, "state": _copied(saved["state"])}
            for name, state in _states(content):
                for key, value in state.items():
                    if _is_of_each_value(value, learners.get(name)):
                        state[key] = _Later(tuple(value.shape), value.dtype)
            return content

    content = decided_by_main(outline)
    theirs = dict(_states(saved)) if is_main() else {}
    for name, state in _states(content):
        for key, value in state.items():
            if isinstance(value, _Later):
                state[key] = _shards_of(theirs[name][key] if is_main() else None, value, learners[name])
    with _named(optimizer, model):
        bare_optimizer(optimizer).load_state_dict(content)


def write_sharded_state(checkpoint: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """As `write_whole_state`, but each process writes its shards, and none holds more than these."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    reshard(model)
    save(keys_of(_by_name(optimizer, model)), storage_writer=FileSystemWriter(checkpoint / OPTIMIZER_FOLDER))


def load_sharded_state(checkpoint: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Load what `write_sharded_state` wrote, on any number of processes: each reads its shards.

    Raises:
        InputError: If the checkpoint does not hold it, or that of another plan.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    reshard(model)
    learners = learners_by_name(model)
    with read_with_care(checkpoint):
        files = ShardedFiles(checkpoint, OPTIMIZER_FOLDER, OPTIMIZER_KEY)
        plain = plain_values(checkpoint / OPTIMIZER_FOLDER)
        values = {}
        for key in files.names:
            found = OF_STATE.fullmatch(key)
            values[OPTIMIZER_KEY + key] = files.room_for(key, learners.get(found[2]) if found else None)
        load(values, storage_reader=FileSystemReader(checkpoint / OPTIMIZER_FOLDER))
        content = state_of({**values, **plain})
    with _named(optimizer, model):
        bare_optimizer(optimizer).load_state_dict(content)


def _read_by_main(file: Path) -> Any:
    """What a small file of torch's holds: the main process reads it, and others get it.

    Raises:
        InputError: If it cannot be read.
    """

    def read() -> Any:
        with read_with_care(file.parent):
            return torch.load(file, map_location="cpu", weights_only=True)

    return decided_by_main(read)


def _by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's `state_dict` by name, each dictionary of states a copy."""
    with _named(optimizer, model):
        content = bare_optimizer(optimizer).state_dict()
    return {**content, "state": _copied(content["state"])}


@contextmanager
def _named(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[None]:
    """Within it the optimizer's state is that of names. Not for longer: torch's own functions look for places."""
    handles = key_by_name(optimizer, model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(states: Mapping[str, Any]) -> dict[str, Any]:
    copied = {name: dict(state) for name, state in states.items()}
    if RESTING in copied:
        copied[RESTING] = {name: dict(state) for name, state in copied[RESTING].items()}
    return copied


def _states(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and state of each parameter, also of those that rest, in an order that is the same on all processes."""
    states = content["state"]
    both = [(name, state) for name, state in states.items() if name != RESTING]
    yield from sorted([*both, *states.get(RESTING, {}).items()], key=lambda pair: pair[0])


def _is_of_each_value(value: Any, parameter: nn.Parameter | None) -> bool:
    """Whether a part of a state is a number for each value of a sharded parameter, and to be sharded as that is."""
    if parameter is None or not is_sharded(parameter) or not isinstance(value, torch.Tensor):
        return False
    return value.ndim > 0 and value.shape == parameter.shape


def _shards_of(values: torch.Tensor | None, later: _Later, parameter: nn.Parameter) -> torch.Tensor:
    """Values that the main process has, sharded as a parameter is."""
    from torch.distributed.tensor import distribute_tensor  # takes 0.4 s, and is there already

    mesh = parameter.device_mesh
    values = torch.empty(later.shape, dtype=later.dtype) if values is None else values
    return distribute_tensor(values.to(mesh.device_type), mesh, parameter.placements).to(parameter.device)
