"""Gradients of frozen parameters do not travel: bytes that two processes send in each step, and what each computes."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import partialtune as pt
from conftest import some_windows, tiny_gpt2
from fsdp_on_cpu import let_accelerate_shard
from partialtune.engine import gradient_reduction
from sent_bytes import SentBytes
from two_processes import on_two_processes

pytestmark = pytest.mark.slow

WINDOWS, BATCH, EPOCHS = 24, 4, 2  # 2 x 4 a step: 3 steps an epoch


class CountEachStep(TrainerCallback):
    """What is sent from the beginning of each step to its end."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.steps.append(SentBytes().__enter__())

    def on_step_end(self, *args, **kwargs):
        self.steps[-1].__exit__(None, None, None)


def train(folder, trainable, schedule=(), prefix_cache="off", **changes):
    """Train on this process and the others -> bytes sent, what learnt in each step, and the weights."""
    model = tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    plan = pt.plan_freeze(model, trainable, schedule=schedule, **changes)
    settings = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": 5e-5}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    counting = CountEachStep()
    data = some_windows(WINDOWS).map(lambda row: {"labels": row["input_ids"]})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[counting],
    )
    tuning = pt.attach(trainer, plan, prefix_cache=prefix_cache)
    with SentBytes() as whole:
        trainer.train()
    sizes = {parameter.name: parameter.numel for parameter in plan.parameters}
    learning = [sum(sizes[name] for name in plan.phase_at(step).trainable) for step in range(len(counting.steps))]
    wrapped = trainer.model_wrapped
    return {
        "is DDP": isinstance(wrapped, DistributedDataParallel),
        "is FSDP2": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "a step": [step.by_kind() for step in counting.steps],
        "whole": whole.by_kind(),
        "other": [[call for call in step.calls if call[2] != "float32"] for step in counting.steps],
        "learning": [4 * count for count in learning],
        "passed": tuning.audit.passed,
        "plan": (4 * plan.trainable_parameters, 4 * plan.total_parameters),
        "rows": (tuning.fast.hits, tuning.fast.misses),
        "weights": [_whole(parameter).tolist() for parameter in model.parameters()],
    }


def _whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def under_ddp(folder):
    return train(folder / "run", ["blocks[-1]", "final_norm"], prefix_cache="memory")


def in_phases(folder):
    schedule = [{"from_step": 2, "trainable": ["blocks[-1]"]}, {"from_step": 4, "trainable": ["embeddings"]}]
    left_out = train(folder / "run", ["final_norm"], schedule)
    sent_by_loop = own_loop(schedule)
    gradient_reduction.DistributedDataParallel = type(None)  # as if the model were not wrapped: DDP by itself
    return left_out, sent_by_loop, train(folder / "run", ["final_norm"], schedule)


def own_loop(schedule):
    model = tiny_gpt2()
    plan = pt.plan_freeze(model, ["final_norm"], schedule=schedule)
    pt.apply_plan(model, plan)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-5)
    ids = torch.tensor(some_windows(4)["input_ids"])
    sent = []
    with pt.audited(wrapped, plan, optimizer, prefix_cache="off") as tuning:
        for _ in range(6):
            with SentBytes() as step:
                wrapped(input_ids=ids, labels=ids).loss.backward()
            sent.append(step.by_kind())
            optimizer.step()
            optimizer.zero_grad()
    return sent, tuning.audit.passed


def in_turn(folder):
    return train(folder / "run", ["final_norm"], block_sampling={"blocks": 1, "every": 2})


def under_fsdp2(folder):
    let_accelerate_shard()
    return train(folder / "run", ["blocks[-1]", "final_norm"])


def test_under_ddp_gradients_of_what_trains_travel_and_nothing_else_does(tmp_path):
    for rank in on_two_processes(under_ddp, tmp_path):
        assert rank["is DDP"]
        assert rank["passed"]
        trainable, total = rank["plan"]
        assert trainable == 51_072 < total == 177_280
        assert rank["a step"] == [{"all-reduce": trainable}] * 6
        # Nothing beside them in each step: nobody looks for parameters that were not used. Once: which parameter is in
        # which of the buckets, in the order of their gradients (14 numbers and their count, the buckets' sizes), and
        # the whole model.
        assert rank["other"] == [[], [("broadcast", 4 * 15, "int32"), ("broadcast", 4, "int32")], [], [], [], []]
        assert rank["whole"]["broadcast"] == total
        # Of 24 rows each process computed the prefix of its 12. In the second epoch they are dealt out otherwise, and
        # none is computed again: those that the other one has computed are found.
        assert rank["rows"] == (12, 12)


def test_what_learns_in_a_later_phase_is_not_sent_before_it(tmp_path):
    for left_out, of_own_loop, by_itself in on_two_processes(in_phases, tmp_path):
        assert left_out["is DDP"]
        assert by_itself["is DDP"]
        assert left_out["learning"] == [256, 256, 51_072, 51_072, 75_648, 75_648]
        assert left_out["a step"] == [{"all-reduce": size} for size in left_out["learning"]]
        assert of_own_loop == (left_out["a step"], True)
        assert by_itself["a step"] == [{"all-reduce": 75_648}] * 6  # zeros, of all that any phase trains
        assert left_out["weights"] == by_itself["weights"]
        assert left_out["passed"]


def test_blocks_that_rest_are_not_sent(tmp_path):
    for rank in on_two_processes(in_turn, tmp_path):
        assert rank["is DDP"]
        block = 4 * 12_704
        assert rank["learning"] == [block + 256] * 6
        assert rank["a step"] == [{"all-reduce": block + 256}] * 6
        assert rank["passed"]


def test_under_fsdp2_gradients_of_what_trains_are_reduced_and_all_weights_are_gathered(tmp_path):
    for rank in on_two_processes(under_fsdp2, tmp_path):
        assert rank["is FSDP2"]
        assert rank["passed"]
        trainable, total = rank["plan"]
        block = 4 * 12_704
        # All once in the forward pass. In the backward pass the block that trains, and that before it, which is frozen:
        # FSDP2 gathers one block ahead of the one that it is in. The other frozen block is not gathered again.
        assert rank["a step"] == [{"all-gather": total + 2 * block, "reduce-scatter": trainable}] * 6
        # Once, from the first process, which alone needs to have loaded it: every tensor, a tied one under both names,
        # by accelerate, and then by DTensor, which deals it out.
        tied = 4 * 128 * 32
        assert rank["whole"]["broadcast"] == 2 * rank["whole"]["scatter"] == total + tied
