"""FSDP2 through Trainer on CPUs: accelerate shards on GPUs alone, and is told here that it may on gloo processes too.

Everything behind that switch is what runs on GPUs: `fully_shard`, DTensors, gathered state dicts, accelerate's saves.
"""

import os
from pathlib import Path

import yaml

from conftest import REPOSITORY


def launcher_environment(file: Path = REPOSITORY / "recipes" / "launch" / "fsdp2.yaml") -> dict[str, str]:
    """The variables that `accelerate launch --config_file FILE` sets for FSDP."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true", **{key.upper(): str(value) for key, value in settings.items()}}


def let_accelerate_shard() -> None:
    """Make accelerate shard between the CPU processes of this run, and let the guard that knows it does not know so.

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

    _fsdp_param.free_storage = free_if_it_can
    os.environ |= launcher_environment()
    AcceleratorState.__init__ = with_shards
    launch.SHARDED_ON = (*launch.SHARDED_ON, "cpu")
