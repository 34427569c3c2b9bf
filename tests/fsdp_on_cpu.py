"""FSDP2 through Trainer on CPUs: accelerate shards on GPUs alone, and is told here that it may on gloo processes too.

Everything behind that switch is what runs on GPUs: `fully_shard`, DTensors, gathered state dicts, accelerate's saves.
"""

import json
import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def launcher_environment(file: Path = REPOSITORY / "recipes" / "launch" / "fsdp2.yaml") -> dict[str, str]:
    """The variables that `accelerate launch --config_file FILE` sets, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    set_by_it = prepare_multi_gpu_env(_validate_launch_command(asked)[0])
    return {key: value for key, value in set_by_it.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def let_accelerate_shard() -> None:
    """Make accelerate shard between the CPU processes of this run, and let the guard that knows it does not know so.

    Where no launcher has set its variables they are those of `recipes/launch/fsdp2.yaml`.

    The type is set in `PartialState` too, which every later `AcceleratorState` copies: without it `is_fsdp2` turns
    False again, Trainer saves DTensors on one rank and gloo aborts. A gathered parameter that was digested stays where
    it is: on a CPU numpy has looked at its very storage, which PyTorch then will not shrink; on GPUs it sees a copy.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    from partialtune.training import launch

    free, plain = _fsdp_param.free_storage, AcceleratorState.__init__

    def free_if_it_can(tensor) -> None:
        if tensor.untyped_storage().resizable():
            free(tensor)

    def with_shards(self, *args, fsdp_plugin=None, **kwargs) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    _fsdp_param.free_storage = free_if_it_can
    if "ACCELERATE_USE_FSDP" not in os.environ:
        os.environ |= launcher_environment()
    AcceleratorState.__init__ = with_shards
    launch.SHARDED_ON = (*launch.SHARDED_ON, "cpu")


def note_weights() -> None:
    """Let each process note on which device it holds weights before it shards them, and of what kind they are then."""
    from partialtune.engine import shard_model

    plain = shard_model.fsdp2_prepare_model

    def noting(accelerator, model):
        before = {parameter.device.type for parameter in model.parameters()}
        model = plain(accelerator, model)
        after = {f"{type(one.data).__name__} on {one.device.type}" for one in model.parameters()}
        file = Path(os.environ["NOTES"]) / str(accelerator.process_index)
        file.write_text(json.dumps([*before, *after]))
        return model

    shard_model.fsdp2_prepare_model = noting


def write_no_pages() -> None:
    """Half of a small run's time."""
    from partialtune.recipe_run import write_results

    write_results.draw_figures = write_results.write_report = lambda folder: None


def save_whole() -> None:
    """Let one process gather and save all."""
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"


def save_shards() -> None:
    """Let each process save its own shards, whatever fsdp2.yaml says. To be called after `let_accelerate_shard`."""
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
