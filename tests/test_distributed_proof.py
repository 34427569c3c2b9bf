"""On two processes, replicated (DDP) or sharded (fully_shard), digests, deltas and audit are those of one process."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState

import partialtune
from conftest import some_windows, tiny_gpt2
from partialtune.delta_checkpoint import Base, write_delta
from partialtune.errors import FreezeViolation
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.model.digests import bit_sums, digests, digests_on_main
from partialtune.model.parameters import is_sharded, named_weights
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.deltas import WeightDeltaCallback
from test_deltas import make_trainer, read_lines
from two_processes import on_two_processes

SELECTORS = ["blocks[-1]", "final_norm"]
FROZEN = "transformer.h.0.mlp.c_fc.weight"
STEPS = 3
SAVED = ("delta", "whole")


def planned_model():
    model = tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    plan = plan_freeze(model, SELECTORS)
    apply_plan(model, plan)
    return model, plan


def flip_a_bit(values):
    values.view(-1).view(torch.int32)[0] ^= 1


def summary(deltas, audit):
    return {
        "passed": audit.result.passed,
        "changed": audit.result.changed,
        "l2_delta": audit.result.trainable_l2_delta,
        "copies": len(deltas.snapshot.copies),
        "before": dict(audit.digests_before),
        "after": dict(audit.digests_after),
    }


# --- DDP, in a plain Trainer


class EditOnRankOne(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if dist.get_rank() == 1 and state.global_step == 2:
            with torch.no_grad():
                flip_a_bit(dict(model.named_parameters())[FROZEN])


def train_with_ddp(folder, batch, with_fault):
    model, plan = planned_model()
    deltas, audit = WeightDeltaCallback(plan, delta_steps=1), FreezeAuditCallback(plan)
    faults = [EditOnRankOne()] if with_fault else []
    trainer = make_trainer(
        folder,
        model,
        [*faults, deltas, audit],
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
        learning_rate=1e-3,
    )
    try:
        trainer.train()
        violation = None
    except FreezeViolation as error:
        violation = str(error)
    replicated = isinstance(trainer.model_wrapped, DistributedDataParallel) and dist.get_world_size() == 2
    return {"replicated": replicated, "violation": violation, **summary(deltas, audit)}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """One process with batch 4, two with batch 2 each: their summaries and folders."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    return train_with_ddp(one, 4, False), on_two_processes(train_with_ddp, two, 2, False), one, two


@pytest.mark.slow
def test_under_ddp_digests_deltas_and_audit_are_those_of_one_process(ddp):
    single, (main, other), one, two = ddp
    assert (single["replicated"], main["replicated"], other["replicated"]) == (False, True, True)
    assert main["before"] == other["before"] == single["before"]
    assert main["after"] == other["after"]
    assert main["passed"] is other["passed"] is True
    assert main["l2_delta"] == other["l2_delta"] == pytest.approx(single["l2_delta"], rel=1e-3)
    lines = [{(line["step"], line["name"]): line["l2_delta"] for line in read_lines(folder)} for folder in (one, two)]
    assert lines[0].keys() == lines[1].keys()  # nothing is written twice
    assert lines[0] == pytest.approx(lines[1], rel=1e-2, abs=1e-7)


@pytest.mark.slow
def test_under_ddp_one_process_holds_the_copies(ddp):
    single, (main, other), *_ = ddp
    assert (main["copies"], other["copies"]) == (single["copies"], 0)
    assert single["copies"] > 0


@pytest.mark.slow
def test_under_ddp_an_edit_on_one_process_ends_all_of_them_with_its_name(tmp_path):
    found = on_two_processes(train_with_ddp, tmp_path, 2, True)
    assert all(one["replicated"] for one in found)
    assert all(FROZEN in one["violation"] for one in found)
    assert json.loads((tmp_path / "audit.json").read_text())["frozen"]["changed"] == [FROZEN]


# --- fully_shard, in a loop of its own: Trainer shards on GPUs only


def batches():
    ids = torch.tensor(some_windows(count=4 * STEPS)["input_ids"])
    return ids.view(STEPS, 4, -1)


def train_by_hand(model, plan, folder, rows, shard_fault=False, lost=None):
    """The hooks that Trainer calls, around a plain loop. `rows` of each batch belong to this process.

    Every update of the trainable parameter `lost` is taken back.
    """
    deltas, audit = WeightDeltaCallback(plan, delta_steps=1), FreezeAuditCallback(plan)
    args, state, control = SimpleNamespace(output_dir=str(folder)), TrainerState(), TrainerControl()
    state.is_world_process_zero = not dist.is_initialized() or dist.get_rank() == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    around = {"model": model, "optimizer": optimizer}
    for callback in (deltas, audit):
        callback.on_init_end(args, state, control, **around)
        callback.on_train_begin(args, state, control, **around)
    for batch in batches():
        model(batch[rows], labels=batch[rows]).loss.backward()
        audit.on_pre_optimizer_step(args, state, control, **around)
        values = dict(named_weights(model)).get(lost)
        start = None if values is None else values.detach().clone()
        optimizer.step()
        if values is not None:
            with torch.no_grad():
                values.copy_(start)
        optimizer.zero_grad()
        state.global_step += 1
        deltas.on_step_end(args, state, control, **around)
        if shard_fault and dist.get_rank() == 1:
            with torch.no_grad():
                flip_a_bit(dict(named_weights(model))[FROZEN].to_local())
        audit.on_save(args, state, control, **around)
    for callback in (deltas, audit):
        callback.on_train_end(args, state, control, **around)
    return deltas, audit


def train_sharded(folder, shard_fault, lost=None):
    dist.init_process_group("gloo")
    model, plan = planned_model()
    expected_digests, expected_sums = digests(model), bit_sums(named_weights(model))
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = dict(named_weights(model))
    rank = dist.get_rank()
    facts = {
        "sharded": all(isinstance(p, DTensor) and is_sharded(p) for p in parameters.values()),
        "part": sum(p.to_local().numel() for p in parameters.values()) / sum(p.numel() for p in parameters.values()),
        "mixed": {p.requires_grad for p in parameters.values()},
        "digests_agree": digests_on_main(parameters.items()) == (expected_digests if rank == 0 else {}),
        "sums_agree": bit_sums(parameters.items()) == expected_sums,
    }
    try:
        deltas, audit = train_by_hand(model, plan, folder, slice(2 * rank, 2 * rank + 2), shard_fault, lost)
    except FreezeViolation as error:
        return {**facts, "violation": str(error)}
    write_delta(folder / "delta", model, plan, audit.digests_before, audit.digests_after, Base(str(folder / "base")))
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder / "whole", state_dict=gathered)
    dist.barrier()
    return {**facts, **summary(deltas, audit)}


@pytest.mark.slow
def test_sharded_weights_are_measured_and_saved_whole(tmp_path):
    reference = summary(*train_by_hand(*planned_model(), tmp_path / "one", slice(0, 4)))
    planned_model()[0].save_pretrained(tmp_path / "two" / "base")
    (tmp_path / "two" / "delta").mkdir()
    main, other = on_two_processes(train_sharded, tmp_path / "two", False)
    for process in (main, other):
        assert process["sharded"]
        assert process["part"] == pytest.approx(0.5, abs=0.1)
        assert process["mixed"] == {True, False}
        assert process["digests_agree"]
        assert process["sums_agree"]
        assert process["passed"] is True
        assert process["before"] == reference["before"]
        assert process["l2_delta"] == pytest.approx(reference["l2_delta"], rel=1e-3)
    assert main["after"] == other["after"]
    plan = planned_model()[1]
    assert {name: main["after"][name] for name in plan.frozen} == {n: reference["before"][n] for n in plan.frozen}
    lines = [
        {(line["step"], line["name"]): line["l2_delta"] for line in read_lines(tmp_path / name)}
        for name in ("one", "two")
    ]
    assert lines[0] == pytest.approx(lines[1], rel=1e-2, abs=1e-6)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "whole")
    assert digests(saved) == main["after"] == digests(partialtune.load(tmp_path / "two" / "delta"))
    architectures = [json.loads((tmp_path / "two" / n / "config.json").read_text())["architectures"] for n in SAVED]
    assert architectures == [["GPT2LMHeadModel"]] * 2


@pytest.mark.slow
def test_a_bit_flipped_in_one_shard_ends_all_processes_with_the_name_of_its_parameter(tmp_path):
    for process in on_two_processes(train_sharded, tmp_path, True):
        assert process["sharded"]
        assert FROZEN in process["violation"]


@pytest.mark.slow
def test_updates_of_a_sharded_parameter_that_were_due_and_got_lost_end_all_processes_with_its_name(tmp_path):
    for process in on_two_processes(train_sharded, tmp_path, False, "transformer.h.2.mlp.c_fc.weight"):
        assert process["sharded"]
        assert "yet kept every bit: transformer.h.2.mlp.c_fc.weight." in process["violation"]
