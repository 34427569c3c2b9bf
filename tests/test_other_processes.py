"""A run goes on on another number of processes: the same windows in each step, one history, the same weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from cluster import WarmProcess, small_recipe
from conftest import some_windows, tiny_gpt2
from partialtune import apply_plan, attach, audited, plan_freeze
from partialtune.engine.checkpoint_files import checkpoint_step, checkpoints_in
from partialtune.engine.other_engine import load_gathered_optimizer
from partialtune.engine.sharded_saves import load_beside_base
from partialtune.errors import InputError
from partialtune.training.other_processes import Dealing, EpochOrder, epoch_order, suited_accumulation
from two_processes import on_two_processes

SHARDED = ["fsdp_on_cpu:let_accelerate_shard"]
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 20,
    "learning_rate": 5e-5,
    "save_steps": 6,
    "save_total_limit": 9,
    "delta_steps": 5,
    "dropout": 0.0,
    "block_size": 64,  # few windows: the run passes the end of an epoch, which two processes fill up
    "schedule": [{"from_step": 10, "trainable": ["embeddings"]}],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, warm):
    """A recipe of a run, and `two`: the run of two processes that was left alone."""
    folder = tmp_path_factory.mktemp("other processes")
    small_recipe(folder, **SETTINGS)
    start(warm, folder, folder / "two", 2)
    return SimpleNamespace(folder=folder, warm=warm)


def start(warm: WarmProcess, folder: Path, run: Path, processes: int, *more: str, first=(), code: int = 0) -> str:
    """Run the recipe in `run`, going on from what is there; what it said."""
    before = len(warm.log.read_text())
    words = ["train", str(folder / "recipe.yaml"), "--output_dir", str(run), "--resume_from_checkpoint", "auto", *more]
    warm.start_all(words, processes, first)
    codes = warm.end_all()
    said = warm.log.read_text()[before:]
    assert codes == [code] * processes, said
    return said


def cut_off(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was when it ended after a step's checkpoint."""
    shutil.copytree(run, copy)
    (copy / "exit.json").unlink()
    for checkpoint in checkpoints_in(copy):
        if checkpoint_step(checkpoint) > step:
            shutil.rmtree(checkpoint)
    return copy


def furthest(one: Path, other: Path) -> float:
    """The largest difference of two runs' weights, without the keys' third of biases whose gradient is zero."""
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    largest = 0.0
    for name, weight in weights.items():
        difference = (weight - others[name]).abs()
        if name.endswith("attn.c_attn.bias"):
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        largest = max(largest, float(difference.max()))
    return largest


def history(run: Path) -> tuple[list[tuple[int, float]], list[tuple[int, str]]]:
    """Step and training loss, and step and name of the deltas."""
    entries = json.loads((run / "trainer_state.json").read_text())["log_history"]
    lines = [json.loads(line) for line in (run / "weight_deltas.jsonl").open()]
    losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    return losses, [(line["step"], line["name"]) for line in lines]


def record(run: Path) -> dict:
    return yaml.safe_load((run / "recipe.yaml").read_text())["run"]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_on_one_and_on_two_again_as_if_nothing_had_happened(home, tmp_path):
    whole, run = home.folder / "two", cut_off(home.folder / "two", tmp_path / "run", 6)
    epoch = record(whole)["windows"]["training"]
    assert 6 * 8 < epoch < 20 * 8  # it ends while the run goes on
    assert epoch % 8  # and its last step is filled up
    said = start(home.warm, home.folder, run, 1, "--max_steps", "20")
    assert "per_device_train_batch_size 4 x gradient_accumulation_steps 2 x 1" in said
    assert "checkpoint-6 holds no random state for process 0 of 1: seeded anew from seed, step and rank" in said
    assert (record(run)["processes"], record(run)["accumulation"]) == (1, 2)
    assert furthest(run, whole) < 1e-5
    back = cut_off(run, tmp_path / "back", 12)
    start(home.warm, home.folder, back, 2, "--per_device_train_batch_size", "2")
    assert (record(back)["processes"], record(back)["accumulation"]) == (2, 2)
    assert record(back)["distributed"] == "MULTI_CPU"
    assert furthest(back, whole) < 1e-5
    for later in (run, back):
        losses, deltas = history(later)
        assert [step for step, _ in losses] == list(range(1, 21))
        assert dict(losses) == pytest.approx(dict(history(whole)[0]), abs=1e-5)
        assert deltas == history(whole)[1]
        assert json.loads((later / "audit.json").read_text())["passed"] is True


@pytest.mark.slow
def test_what_two_processes_sharded_goes_on_on_four_in_shards_and_on_one_without_and_back(home, tmp_path):
    sharded = tmp_path / "sharded"
    words = ["--schedule", "[]", "--lr_scheduler_type", "constant", "--max_steps"]
    start(home.warm, home.folder, sharded, 2, *words, "12", first=SHARDED)
    assert record(sharded)["distributed"] == "FSDP"
    assert (sharded / "checkpoint-6" / "optimizer_0" / "__1_0.distcp").is_file()  # put together again
    on_four = cut_off(sharded, tmp_path / "on four", 6)
    start(home.warm, home.folder, on_four, 4, *words, "12", "--per_device_train_batch_size", "2", first=SHARDED)
    assert (record(on_four)["processes"], record(on_four)["distributed"]) == (4, "FSDP")
    alone = cut_off(sharded, tmp_path / "alone", 6)
    start(home.warm, home.folder, alone, 1, *words, "12")
    assert record(alone)["distributed"] == "NO"
    assert furthest(on_four, sharded) < 1e-5
    assert furthest(alone, sharded) < 1e-5
    # What one process has saved goes on in shards, which are gathered for a checkpoint, and that under DDP.
    start(home.warm, home.folder, alone, 2, *words, "18", first=[*SHARDED, "fsdp_on_cpu:save_whole"])
    assert record(alone)["distributed"] == "FSDP"
    assert (alone / "checkpoint-18" / "optimizer.bin").is_file()
    start(home.warm, home.folder, alone, 2, *words, "24")
    assert record(alone)["distributed"] == "MULTI_CPU"
    start(home.warm, home.folder, sharded, 2, *words, "24", first=SHARDED)
    assert furthest(alone, sharded) < 1e-5
    assert dict(history(alone)[0]) == pytest.approx(dict(history(sharded)[0]), abs=1e-5)


@pytest.mark.slow
def test_a_run_that_begins_on_four_processes_goes_on_on_two_and_then_on_one(home, tmp_path):
    four = tmp_path / "four"
    start(home.warm, home.folder, four, 4, "--per_device_train_batch_size", "2")  # 8 windows a step, as on two
    assert (record(four)["processes"], record(four)["distributed"]) == (4, "MULTI_CPU")
    two = cut_off(four, tmp_path / "two", 6)
    said = start(home.warm, home.folder, two, 2)
    assert "the checkpoint is of 4, and now there are 2" in said
    alone = cut_off(two, tmp_path / "alone", 12)
    start(home.warm, home.folder, alone, 1)
    assert [record(run)["processes"] for run in (two, alone)] == [2, 1]
    assert [record(run)["accumulation"] for run in (two, alone)] == [1, 2]
    for run in (two, alone, home.folder / "two"):
        assert furthest(run, four) < 1e-5
        assert dict(history(run)[0]) == pytest.approx(dict(history(four)[0]), abs=1e-5)
    for run in (two, alone):
        assert history(run)[1] == history(four)[1]
        assert json.loads((run / "audit.json").read_text())["passed"] is True


@pytest.mark.slow
def test_what_ddp_saved_in_a_schedule_goes_on_in_shards_and_these_go_on_under_ddp(home, tmp_path):
    whole, sharded = home.folder / "two", cut_off(home.folder / "two", tmp_path / "sharded", 6)
    assert record(whole)["distributed"] == "MULTI_CPU"
    start(home.warm, home.folder, sharded, 2, first=SHARDED)
    assert record(sharded)["distributed"] == "FSDP"
    assert not (sharded / "checkpoint-6" / "optimizer_0").exists()  # what it went on from
    back = cut_off(sharded, tmp_path / "back", 12)
    assert (back / "checkpoint-12" / "optimizer_0" / "__1_0.distcp").is_file()
    start(home.warm, home.folder, back, 2)
    assert record(back)["distributed"] == "MULTI_CPU"
    for later in (sharded, back):
        assert furthest(later, whole) < 1e-5
        assert dict(history(later)[0]) == pytest.approx(dict(history(whole)[0]), abs=1e-5)
        assert json.loads((later / "audit.json").read_text())["passed"] is True


def test_adapters_of_a_run_without_shards_are_not_put_into_shards(tmp_path):
    with pytest.raises(InputError, match=r"without FSDP, and this one has it\. It holds adapters"):
        load_beside_base(SimpleNamespace(is_fsdp_enabled=True), None, tmp_path)


def test_an_optimizer_of_a_run_that_did_not_shard_is_loaded_by_trainer_itself(tmp_path):
    (tmp_path / "optimizer.pt").touch()
    assert not load_gathered_optimizer(SimpleNamespace(is_fsdp_enabled=False), tmp_path)


# ---- attach and audited ---------------------------------------------------------------------------------------------


def attached(folder: Path, max_steps: int, accumulation: int = 1, resume: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a Trainer of one's own after these steps."""
    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    windows = some_windows()
    trainer = Trainer(model, args, train_dataset=windows.add_column("labels", windows["input_ids"]))
    attach(trainer, plan_freeze(model, ["blocks[-1]"]))
    trainer.train(resume_from_checkpoint=resume)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def looped(state: Path, load: bool) -> None:
    """A loop of one's own, which keeps its optimizer's state, or goes on from it."""
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1]"])
    apply_plan(model, plan)
    several = torch.distributed.is_initialized()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if several else model
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-5)
    ids = torch.tensor(some_windows(2)["input_ids"])
    with audited(wrapped, plan, optimizer, first_step=int(load)):
        if load:
            optimizer.load_state_dict(torch.load(state, weights_only=True))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if not load:
            torch.save(optimizer.state_dict(), state)


def both_doors(folder: Path) -> dict[str, torch.Tensor]:
    PartialState(cpu=True)
    looped(folder / f"state of {torch.distributed.get_rank()}", load=False)
    return attached(folder / "trainer", 6)


@pytest.mark.slow
def test_attach_refuses_other_processes_that_make_another_step_and_audited_says_what_to_keep(tmp_path, caplog):
    whole, _ = on_two_processes(both_doors, tmp_path)
    run = tmp_path / "trainer"
    shutil.rmtree(run / "checkpoint-6")
    assert (run / "checkpoint-3" / "rng_state_1.pth").is_file()
    with pytest.raises(InputError) as refused:
        attached(run, 6, resume=True)
    assert "checkpoint-3 was written by 2 processes, and there is 1. A step had 4 windows, and would have 2." in str(
        refused.value
    )
    assert "Set gradient_accumulation_steps=2, or start it on 2 processes." in str(refused.value)
    alone = attached(run, 6, accumulation=2, resume=True)
    assert "A step keeps its 4 windows, in the same order" in caplog.text
    for name, weight in whole.items():
        difference = (weight - alone[name]).abs()
        if name.endswith("attn.c_attn.bias"):
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        assert float(difference.max()) < 1e-5, name
    assert any(not torch.equal(whole[name], start) for name, start in tiny_gpt2().named_parameters())
    arguments_file = run / "checkpoint-6" / "training_args.bin"
    shutil.copy(run / "checkpoint-3" / "rng_state_1.pth", run / "checkpoint-6" / "rng_state_0.pth")
    shutil.copy(run / "checkpoint-3" / "rng_state_1.pth", run / "checkpoint-6" / "rng_state_1.pth")
    for spoil in (lambda: arguments_file.write_bytes(b"no pickle"), arguments_file.unlink):
        spoil()
        with pytest.raises(InputError, match=r"\(training_args.bin\).*Start it on 2 processes"):
            attached(run, 8, accumulation=2, resume=True)
    caplog.clear()
    looped(tmp_path / "state of 0", load=True)
    assert "the optimizer's state was saved by 2 processes and is loaded by 1 process." in caplog.text
    looped(tmp_path / "own state", load=False)
    caplog.clear()
    looped(tmp_path / "own state", load=True)
    assert "processes" not in caplog.text
    assert torch.load(tmp_path / "own state", weights_only=True).keys() == {"state", "param_groups"}


# ---- the order of an epoch ------------------------------------------------------------------------------------------


def accelerates_order(windows: int, batch: int, processes: int, seed: int, epoch: int, drop_last: bool) -> list[int]:
    """What accelerate deals out, put together again."""
    from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
    from torch.utils.data import BatchSampler

    shards = []
    for rank in range(processes):
        sampler = SeedableRandomSampler(range(windows), data_seed=seed)
        sampler.set_epoch(epoch)
        batches = BatchSampler(sampler, batch, drop_last)
        shards.append(list(BatchSamplerShard(batches, processes, rank) if processes > 1 else batches))
    return [number for batches in zip(*shards, strict=True) for batch in batches for number in batch]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("windows", [3, 32, 37, 45])
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_is_the_one_that_accelerate_dealt_out_to_the_processes_that_the_run_began_with(
    processes, windows, drop_last
):
    for epoch in (0, 3):
        order = EpochOrder(windows, Dealing(processes, 4 * processes), 7, shuffled=True, drop_last=drop_last)
        order.set_epoch(epoch)
        assert list(order) == accelerates_order(windows, 4, processes, 7, epoch, drop_last)
        assert len(list(order)) == len(order)


def arguments(**changes) -> SimpleNamespace:
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "world_size": 2, "max_steps": 20}
    kept = {"seed": 7, "data_seed": None, "train_sampling_strategy": "random", "dataloader_drop_last": False}
    return SimpleNamespace(**{**given, **kept, **changes})


@pytest.mark.parametrize(
    ("windows", "max_steps", "advice"),
    [(38, 20, "Set --per_device_train_batch_size 1"), (37, 20, "on another number of processes: 1"), (38, 4, None)],
)
def test_the_short_last_step_that_one_process_takes_is_refused_on_two_where_it_does_not_come_out_even(
    windows, max_steps, advice, tmp_path
):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    args, dealing = arguments(max_steps=max_steps), Dealing(processes=1, at_once=8)
    if advice is None:  # the run ends before the epoch does
        assert len(epoch_order(args, windows, dealing, tmp_path)) == windows
        return
    with pytest.raises(InputError, match=advice) as refused:
        epoch_order(args, windows, dealing, tmp_path)
    assert f"last step of an epoch of this run has {windows - 32} windows" in str(refused.value)
    alone = arguments(world_size=1, gradient_accumulation_steps=2)
    assert len(epoch_order(alone, windows, dealing, tmp_path)) == windows


def test_accumulation_makes_up_for_other_processes_and_where_it_cannot_the_batch_that_does_is_named(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"train_batch_size": 4}))
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    assert suited_accumulation(arguments(), tmp_path, 8, None) == (None, 1)  # as many as before: nothing to do
    began = Dealing(processes=2, at_once=8)
    assert suited_accumulation(arguments(world_size=1), tmp_path, 8, None) == (began, 2)
    assert suited_accumulation(arguments(), tmp_path, 16, Dealing(1, 16)) == (
        Dealing(1, 16),
        2,
    )  # it has changed before
    with pytest.raises(InputError, match=r"batch_size 4 on 4 processes takes 16 at once.*batch_size 2"):
        suited_accumulation(arguments(world_size=4), tmp_path, 8, None)
    with pytest.raises(InputError, match="Start it on another number of processes: 1, 2, 4, 8"):
        suited_accumulation(arguments(world_size=3), tmp_path, 8, None)
    with pytest.raises(InputError, match="group_by_length orders windows by the number of processes"):
        suited_accumulation(arguments(world_size=1, train_sampling_strategy="group_by_length"), tmp_path, 8, None)
