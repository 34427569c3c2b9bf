"""Checkpoints in shards under FSDP2: whole or not there, proved, gone on from to the bit; the final model is whole."""

import errno
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster import WarmProcess
from partialtune import attach, plan_freeze
from partialtune.cli import main
from partialtune.engine.checkpoint_files import (
    check_shards_are_here,
    damage_of,
    entries_of_process,
    finish_checkpoint,
    load_weights,
    newest_whole_checkpoint,
)
from partialtune.errors import InputError, ModelError
from partialtune.model.digests import digests, digests_of
from partialtune.model.sharded_files import ShardedFiles, optimizer_parameters, optimizer_state, plain_values
from partialtune.model.weight_files import open_weights, weight_files
from two_processes import on_two_processes

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
BASE = "builtin:lilliput"
TRAINED = ["blocks[-1]", "final_norm"]
RECIPE = {
    "model_name_or_path": BASE,
    "block_size": 32,
    "trainable": TRAINED,
    "max_steps": 4,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,  # with the warm-up: the loss rises from step 2 to 4, the best model is not the last
    "warmup_steps": 4,
    "prompts": [],
    "prefix_cache": "off",
}
SHARDS = ["test_saved_files:draw_no_figures", "fsdp_on_cpu:let_accelerate_shard", "fsdp_on_cpu:save_shards"]
WHOLE = [*SHARDS[:-1], "fsdp_on_cpu:save_whole"]


# ---- what happens to a process that writes shards -------------------------------------------------------------------


def _instead_of_write(third_party) -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    write, calls = FileSystemWriter.write_data, []

    def write_data(self, plan, planner):
        calls.append(plan)
        return third_party(len(calls), lambda: write(self, plan, planner))

    FileSystemWriter.write_data = write_data


def die_in_the_second_save() -> None:
    """Both processes are killed when the shards of the model are on the disk, and their index is not."""

    def killed(call: int, write):
        write().wait() if call == 3 else None  # model and optimizer of the first checkpoint, model of the second
        return os.kill(os.getpid(), signal.SIGKILL) if call == 3 else write()

    _instead_of_write(killed)


def find_the_disk_full() -> None:
    """The second process finds it so."""

    def full(call: int, write):
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")
        return write()

    _instead_of_write(full)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs, and the exit codes of their processes."""
    folder, codes = tmp_path_factory.mktemp("runs"), {}
    (folder / "text.txt").write_text("".join(f"{number} {TEXT}" for number in range(60)))

    def words(name: str, *more: str) -> list[str]:
        values = {**RECIPE, "text": str(folder / "text.txt"), "output_dir": str(folder / name)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return ["train", str(folder / f"{name}.yaml"), *more]

    with WarmProcess(folder / "log") as warm:
        for name, first in {
            "whole": WHOLE,
            "shards": SHARDS,
            "killed": [*SHARDS, "test_sharded_checkpoints:die_in_the_second_save"],
            "full": [*SHARDS, "test_sharded_checkpoints:find_the_disk_full"],
        }.items():
            warm.start_all(words(name), 2, first)
            codes[name] = warm.end_all()
        shutil.copytree(folder / "killed", folder / "resumed", symlinks=True)
        warm.start_all(words("resumed", "--resume_from_checkpoint", "auto"), 2, SHARDS)
        codes["resumed"] = warm.end_all()
    return folder, codes


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = ShardedFiles(checkpoint)
    return {name: files.read(name) for name in files.names}


@pytest.mark.slow
def test_each_process_saves_its_shards_and_nobody_the_whole_model(runs):
    folder, codes = runs
    assert codes["shards"] == codes["whole"] == [0, 0], (folder / "log").read_text()[-3000:]
    assert yaml.safe_load((folder / "shards" / "recipe.yaml").read_text())["run"]["processes"] == 2
    checkpoint = folder / "shards" / "checkpoint-4"
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {
        *(f"{kind}/{file}" for kind in ("pytorch_model_fsdp_0", "optimizer_0") for file in (".metadata", *SHARD_FILES)),
        *("complete.json", "config.json", "generation_config.json", "origin.json", "scheduler.pt"),
        *("rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"),
    }
    sizes = [(checkpoint / "pytorch_model_fsdp_0" / file).stat().st_size for file in SHARD_FILES]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sum(sizes)  # each has its half
    assert set(read(checkpoint, "complete.json")["files"]) == files - {"complete.json"}
    assert damage_of(checkpoint) == []


SHARD_FILES = ("__0_0.distcp", "__1_0.distcp")


@pytest.mark.slow
def test_shards_hold_what_a_checkpoint_in_whole_tensors_holds(runs):
    folder, _ = runs
    for step in (2, 4):
        whole = load_file(folder / "whole" / f"checkpoint-{step}" / "model.safetensors")
        shards = tensors_in(folder / "shards" / f"checkpoint-{step}")
        assert torch.equal(shards.pop("lm_head.weight"), shards["transformer.wte.weight"])  # each name of a tie
        assert shards.keys() == whole.keys()
        assert all(torch.equal(shards[name], whole[name]) for name in whole)
    files = ShardedFiles(folder / "shards" / "checkpoint-4")  # two pieces of each tensor
    assert files.are_equal("lm_head.weight", "transformer.wte.weight")
    assert not files.are_equal("transformer.ln_f.weight", "transformer.h.0.ln_1.weight")
    base = AutoModelForCausalLM.from_pretrained(Path(__file__).parents[1] / "src/partialtune/builtin/lilliput")
    trained = optimizer_parameters(folder / "shards" / "checkpoint-4")
    moved = {name for name, values in base.named_parameters() if not torch.equal(values, whole[name])}
    assert moved == trained  # what is frozen has every bit of the base
    assert len(trained) == 14


@pytest.mark.slow
def test_the_final_model_is_that_of_the_best_checkpoint_in_the_bytes_that_transformers_writes(runs, tmp_path):
    folder, _ = runs
    saved = {name: (folder / name / "model.safetensors").read_bytes() for name in ("whole", "shards")}
    assert saved["whole"] == saved["shards"]
    model = AutoModelForCausalLM.from_pretrained(folder / "shards")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == saved["shards"]
    for name in ("config.json", "generation_config.json"):
        assert (folder / "shards" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert read(folder / "shards", "trainer_state.json")["best_global_step"] == 2
    best, last = (tensors_in(folder / "shards" / f"checkpoint-{step}") for step in (2, 4))
    assert all(torch.equal(values, best[name]) for name, values in model.named_parameters())
    assert not torch.equal(best["transformer.ln_f.weight"], last["transformer.ln_f.weight"])


@pytest.mark.slow
def test_the_shards_are_read_back_and_proved(runs):
    folder, _ = runs
    audit = read(folder / "shards", "audit.json")
    assert audit["passed"] is True
    assert audit["saved_files"] == {"read_back": True, "different": []}
    assert main(["verify", BASE, str(folder / "shards" / "checkpoint-4"), "--trainable", *TRAINED]) == 0
    assert main(["verify", BASE, str(folder / "shards" / "checkpoint-4"), "--trainable", "final_norm"]) == 3


@pytest.mark.slow
def test_a_run_that_was_killed_in_a_save_goes_on_from_the_whole_checkpoint_before_to_the_same_bits(runs):
    folder, codes = runs
    assert codes["killed"] == [-signal.SIGKILL, -signal.SIGKILL]
    assert {path.name for path in (folder / "killed").glob("checkpoint-*")} == {"checkpoint-2"}
    half = folder / "killed" / ".unfinished" / "checkpoint-4" / "pytorch_model_fsdp_0"
    assert {path.name for path in half.iterdir()} == set(SHARD_FILES)  # no index: nothing could be loaded
    assert newest_whole_checkpoint(folder / "killed") == folder / "killed" / "checkpoint-2"
    assert codes["resumed"] == [0, 0], (folder / "log").read_text()[-3000:]
    assert not (folder / "resumed" / ".unfinished").exists()
    then, now = (tensors_in(folder / name / "checkpoint-4") for name in ("shards", "resumed"))
    assert all(torch.equal(then[name], now[name]) for name in then)
    for name in ("model.safetensors", "weight_deltas.jsonl"):
        assert (folder / "shards" / name).read_bytes() == (folder / "resumed" / name).read_bytes(), name


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_all_in_words(runs):
    folder, codes = runs
    assert codes["full"] == [2, 2]
    assert "checkpoint-2 could not be saved" in (folder / "log").read_text()
    assert "No space left on device. There is no complete checkpoint yet." in (folder / "log").read_text()
    assert not list((folder / "full").glob("checkpoint-*"))
    assert not (folder / "full" / ".unfinished").exists()


@pytest.mark.slow
def test_a_flipped_byte_in_a_shard_is_found_and_refused_in_words(runs, tmp_path, capfd):
    folder, _ = runs
    shutil.copytree(folder / "shards", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    shard = checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert damage_of(checkpoint) == ["pytorch_model_fsdp_0/__1_0.distcp has another content"]
    assert newest_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    words = ["train", str(folder / "shards.yaml"), "--output_dir", str(tmp_path / "new")]
    assert main([*words, "--resume_from_checkpoint", str(checkpoint)]) == 2
    assert "pytorch_model_fsdp_0/__1_0.distcp has another content" in capfd.readouterr().err
    shard.unlink()
    assert damage_of(checkpoint, read=False) == ["pytorch_model_fsdp_0/__1_0.distcp is missing"]


@pytest.mark.slow
def test_one_process_puts_the_shards_of_two_together(runs):
    folder, _ = runs
    checkpoint = folder / "shards" / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(folder / "shards")
    load_weights(checkpoint, model)
    whole = AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoint-4")
    assert digests(model) == digests(whole)
    gathered = torch.load(folder / "whole" / "checkpoint-4" / "optimizer.bin", weights_only=True)
    state = optimizer_state(checkpoint)
    assert state["param_groups"] == gathered["param_groups"]
    assert state["state"].keys() == gathered["state"].keys()
    for name, kept in gathered["state"].items():
        assert kept.keys() == state["state"][name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state["state"][name][key], values) for key, values in kept.items()), name


# ---- another door ---------------------------------------------------------------------------------------------------


def save_by_attach(folder: Path) -> tuple:
    """A Trainer of transformers, attached: its own checkpoints, in shards, and a model that the caller saves."""
    from torch.distributed.tensor import DTensor
    from transformers import Trainer, TrainingArguments

    import fsdp_on_cpu
    from conftest import tiny_gpt2

    fsdp_on_cpu.let_accelerate_shard()
    fsdp_on_cpu.save_shards()
    torch.manual_seed(0)
    model = tiny_gpt2()
    words = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2}
    args = TrainingArguments(str(folder / "run"), max_steps=2, save_steps=1, learning_rate=1e-3, **words)
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)]
    trainer = Trainer(model, args, train_dataset=rows)
    tuning = attach(trainer, plan_freeze(model, ["blocks[-1]"]), whole_checkpoints=True)
    trainer.train()
    kind = str(trainer.accelerator.distributed_type)
    sharded = all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    trainer.save_model(str(folder / "model"))  # of shards Trainer itself would save nothing
    return kind, sharded, tuning.audit.passed, tuning.audit_callback.digests_after


@pytest.mark.slow
def test_an_attached_trainer_saves_shards_on_the_way_and_a_whole_model_where_it_is_told_to(tmp_path):
    (*first, audited), (*second, _) = on_two_processes(save_by_attach, tmp_path)
    assert first == second == ["DistributedType.FSDP", True, True]
    assert newest_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert digests(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == audited
    weights = open_weights(tmp_path / "run" / "checkpoint-2", "checkpoint-2")
    assert digests_of((name, weights.read(name)) for name in audited) == audited


# ---- without runs ---------------------------------------------------------------------------------------------------


def in_shards(checkpoint: Path, model: dict, optimizer: dict) -> None:
    """Save as accelerate does, of one process."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    for folder, values in (("pytorch_model_fsdp_0", {"model": model}), ("optimizer_0", {"optimizer": optimizer})):
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            save(values, storage_writer=FileSystemWriter(checkpoint / folder), no_dist=True)


@pytest.fixture
def checkpoint(tmp_path):
    in_shards(
        tmp_path / "checkpoint-1",
        {"model.norm.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)},
        {"state": {"a": {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.5, "params": ["a"]}, {"params": []}]},
    )
    return tmp_path / "checkpoint-1"


def test_tensors_of_shards_are_read_one_by_one_under_the_names_of_the_model(checkpoint):
    files = ShardedFiles(checkpoint)
    assert set(files.names) == {"model.norm.weight", "count"}
    assert (files.shape("model.norm.weight"), files.dtype("model.norm.weight")) == ((2, 3), "F32")
    assert torch.equal(files.read("model.norm.weight"), torch.arange(6.0).view(2, 3))
    assert torch.equal(files.read("count"), torch.tensor(7))
    assert files.are_equal("count", "count")
    assert not files.are_equal("count", "model.norm.weight")
    assert optimizer_parameters(checkpoint) == {"a"}
    state = {
        "state": {"a": {"step": torch.tensor(1.0)}},
        "param_groups": [{"lr": 0.5, "params": ["a"]}, {"params": []}],
    }
    assert optimizer_state(checkpoint) == state


class Planted:
    """An object whose pickle opens a file for writing when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_the_pickles_among_shards_is_never_run(checkpoint, tmp_path):
    in_shards(tmp_path / "other", {}, {"param_groups": [{"lr": Planted(tmp_path / "planted")}]})
    with pytest.raises(pickle.UnpicklingError):
        plain_values(tmp_path / "other" / "optimizer_0")
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    shutil.copy(Path(__file__).parents[1] / "src/partialtune/builtin/lilliput/config.json", checkpoint)
    with pytest.raises(pickle.UnpicklingError, match=r"names .*open, which no checkpoint needs"):
        ShardedFiles(checkpoint)
    with pytest.raises(ModelError, match="checkpoint-1: a weight file is damaged"):
        open_weights(checkpoint, "checkpoint-1")
    assert not (tmp_path / "planted").exists()


def test_the_marker_takes_the_digest_of_a_shard_from_the_process_that_wrote_it(checkpoint, monkeypatch):
    of_rank = entries_of_process(checkpoint, 0)
    assert of_rank.keys() == {"pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"}
    assert entries_of_process(checkpoint, 1) == {}
    aside = checkpoint.parent / ".unfinished" / "checkpoint-1"
    aside.parent.mkdir()
    checkpoint.rename(aside)
    from partialtune.engine import checkpoint_files

    digest, digested = checkpoint_files._sha256, []
    monkeypatch.setattr(checkpoint_files, "_sha256", lambda file: digested.append(file.name) or digest(file))
    finish_checkpoint(aside, checkpoint, of_rank)
    assert digested == [".metadata", ".metadata"]  # the main process's own
    assert damage_of(checkpoint) == []


def test_shards_on_a_disk_that_the_main_process_does_not_see_are_refused_in_words(checkpoint):
    entries = {"optimizer_0/__1_0.distcp": {"bytes": 4, "sha256": "0" * 64}}
    with pytest.raises(InputError, match="Let output_dir lie on a disk that all nodes share, or set fsdp_state_dict"):
        check_shards_are_here(checkpoint, entries)


def test_a_checkpoint_in_shards_has_no_files_for_from_pretrained(checkpoint):
    assert weight_files(checkpoint) == []
