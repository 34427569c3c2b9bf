"""A model that FSDP2 shards -> its files, and back: what a Trainer does otherwise where no process holds all of it.

    save_sharded_model      the files of `from_pretrained`, one tensor after another gathered, written and given up
    shards_by_process       digests of a checkpoint in shards, each file read by the process that wrote it
    as_it_was_saved         a checkpoint in shards or in whole tensors is loaded as what it is

A checkpoint in shards is PyTorch's distributed checkpoint, written by accelerate: `pytorch_model_fsdp_0/` and
`optimizer_0/`. The pieces of a tensor are put together again by any number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.delta_checkpoint import put_stored, read_delta, write_delta_of_state
from partialtune.distributed import decided_by_main, done_together, from_all, is_main, rank_and_processes
from partialtune.engine.checkpoint_files import Entries, check_shards_are_here, disk_errors, entries_of_process
from partialtune.engine.plan_optimizer import saved_groups
from partialtune.engine.tuning import Tuning
from partialtune.errors import InputError
from partialtune.freeze.lora import load_adapters, save_adapters
from partialtune.freeze.plan import FreezePlan
from partialtune.model.held_narrow import held_state_dict
from partialtune.model.parameters import uncompiled, whole_on_main
from partialtune.model.saving import can_be_gathered_in_pieces, save_all_but_weights, save_pretrained
from partialtune.model.sharded_files import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    failures_unwrapped,
    is_sharded_checkpoint,
    optimizer_parameters,
    optimizer_state,
    plain_values,
)
from partialtune.model.weight_files import weight_files


def saves_shards(trainer: Trainer) -> bool:
    """Whether checkpoints are saved in shards, each process its own (`fsdp_state_dict_type`)."""
    return trainer.is_fsdp_enabled and "SHARDED" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)


def save_sharded_model(trainer: Trainer, tuning: Tuning, folder: Path, what: str, in_checkpoint: bool) -> None:
    """The files of a whole model, of which no process holds more than a tensor at once, or the experts of a block.

    Every process calls this together; the main one writes.

    Args:
        trainer: Of the model. Its `_save` writes, so that a class of the user's can add to it.
        tuning: Of the model.
        folder: Where to.
        what: Is saved, for messages.
        in_checkpoint: Whether it is saved with an optimizer. Where that is done in shards, the weights are among them,
            and only what belongs to these is written here, and adapters and deltas, which are small.

    Raises:
        DiskError: If it cannot be written, on every process.
    """

    def save() -> None:
        with disk_errors(what, Path(trainer.args.output_dir)):
            _save(trainer, tuning, folder, in_checkpoint and saves_shards(trainer))

    with disk_errors(what, Path(trainer.args.output_dir)):
        decided_by_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    done_together(save)


def _save(trainer: Trainer, tuning: Tuning, folder: Path, kept_with_optimizer: bool) -> None:
    plan, model = tuning.plan, uncompiled(trainer.model)
    if plan.leaves_base_out and plan.parts:
        with tuning.as_loaded():
            write_delta_of_state(folder, model, plan, tuning.audit_callback.digests_before)
    elif plan.leaves_base_out:
        adapters = {name: values for name, values in held_state_dict(model).items() if ".lora_" in name}
        gathered = {name: whole_on_main(values) for name, values in adapters.items()}
        if is_main():
            save_adapters(model, folder, {name: values for name, values in gathered.items() if values is not None})
    elif kept_with_optimizer:
        if is_main() and isinstance(model, PreTrainedModel):
            with tuning.as_loaded():
                save_all_but_weights(model, folder)
    elif not can_be_gathered_in_pieces(model):
        trainer._save(str(folder), trainer.accelerator.get_state_dict(trainer.model))  # whole, on the main process
    elif is_main():
        trainer._save(str(folder))
    else:
        save_pretrained(model, folder, is_main_process=False)


def shards_by_process(aside: Path) -> Entries:
    """What the marker of a checkpoint says of its shards, each digested by the process that wrote it.

    Raises:
        InputError: If the main process does not see all of them.
    """
    of_all = from_all(done_together(lambda: entries_of_process(aside, rank_and_processes()[0])))
    entries = {name: entry for entries in of_all for name, entry in entries.items()}
    decided_by_main(lambda: check_shards_are_here(aside, entries))
    return entries


def holds_fsdp_files(checkpoint: Path) -> bool:
    """Whether accelerate has saved a model under FSDP in a checkpoint, in shards or whole."""
    return is_sharded_checkpoint(checkpoint) or (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file()


def is_loaded_here(trainer: Trainer, checkpoint: str | None) -> bool:
    """Whether a checkpoint holds weights of transformers' own model that are not loaded by accelerate."""
    folder = Path(checkpoint or "")
    elsewhere = trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and holds_fsdp_files(folder))
    known = bool(weight_files(folder)) or is_sharded_checkpoint(folder)
    return isinstance(trainer.model, PreTrainedModel) and not elsewhere and known


def load_beside_base(trainer: Trainer, plan: FreezePlan, checkpoint: Path) -> None:
    """Load adapters, and a delta of what trained beside them: of such a run a checkpoint does not hold the base.

    Raises:
        InputError: If the model is sharded, and was not in the run that wrote the checkpoint.
    """
    if trainer.is_fsdp_enabled:
        raise InputError(
            f"{checkpoint} is of a run without FSDP, and this one has it. It holds adapters, or what trained as a "
            f"delta, which are put into whole models alone, not into shards. Go on without FSDP, on any number of "
            f"processes, or start in a new output_dir."
        )
    if plan.parts:
        put_stored(read_delta(checkpoint, checkpoint.name), trainer.model)
    if plan.adapter is not None:
        load_adapters(trainer.model, load_file(checkpoint / ADAPTER_SAFE_WEIGHTS_NAME))


def parameters_of_optimizer(checkpoint: Path) -> set[str] | None:
    """Names of the parameters that a checkpoint's optimizer holds, in shards or not; None where neither is there."""
    file, held = checkpoint / OPTIMIZER_NAME, optimizer_parameters(checkpoint)
    if held is not None or not file.is_file():
        return held
    groups = saved_groups(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return {str(name) for group in groups for name in group["params"]}


def put_optimizer_together(trainer: Trainer, checkpoint: Path) -> bool:
    """Load the optimizer of processes that sharded it where none does now; whether there is one."""
    if trainer.is_fsdp_enabled or not (checkpoint / OPTIMIZER_FOLDER).is_dir():
        return False
    trainer.optimizer.load_state_dict(optimizer_state(checkpoint))
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
    return True


@contextmanager
def as_it_was_saved(trainer: Trainer, checkpoint: Path) -> Iterator[None]:
    """Within it accelerate loads the kind of files that a checkpoint has, which may be another than is saved now.

    PyTorch opens the pickles among shards without a look at what they hold, so they are looked at before.
    """
    sharded = is_sharded_checkpoint(checkpoint)
    if not trainer.is_fsdp_enabled or not holds_fsdp_files(checkpoint):
        yield
        return
    for folder in (checkpoint / MODEL_FOLDER, checkpoint / OPTIMIZER_FOLDER):
        if folder.is_dir():
            plain_values(folder)
    plugin = trainer.accelerator.state.fsdp_plugin
    kept = (plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config)
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the other kind do not go with it
    plugin.set_state_dict_type("SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT")
    try:
        with failures_unwrapped():
            yield
    finally:
        plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config = kept
