"""Under FSDP2: what changes on the way (schedules, blocks in turn), rates of parts, rows; on two processes and on one.

Two processes do everything once, in the fixture; accelerate is told that it may shard on CPUs.
"""

import copy
import json
import os

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import partialtune as pt
from cluster import fingerprint, small_recipe
from conftest import some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.engine import phases
from partialtune.engine.plan_optimizer import RESTING, bare_optimizer
from partialtune.errors import RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.model.parameters import named_learners, named_weights, whole
from two_processes import on_two_processes

STEPS, BATCH = 20, 8
TOKENS = "transformer.wte.weight"
SETTINGS = {
    "max_steps": STEPS,
    "data_seed": 1,
    "learning_rate": 5e-5,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,  # at the first step of a phase, too: the outermost module is left with whole parameters
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
# Step 10 lies within a phase or a draw, and one begins with step 12.
SCHEDULE = [
    {"from_step": 4, "trainable": ["blocks[-1]"]},
    {"from_step": 12, "trainable": ["blocks[0].mlp", "embeddings"], "learning_rate": 1e-4},
]
OWN = [{"from_step": 4, "trainable": ["blocks[-1]"]}, {"from_step": 8, "trainable": ["embeddings"]}]
LATER = [{"from_step": 3, "trainable": ["blocks[0].mlp"]}, {"from_step": 6, "trainable": ["embeddings"]}]
ROWS_LATER = [{"from_step": 4, "trainable": ["embeddings.tokens[-1]"]}]
DRAWS = {"blocks": 1, "every": 4, "order": "random"}
# Name -> the model, what the plan says, and the checkpoint from which a second run goes on.
CASES = {
    "schedule": ("gpt2", {"trainable": ["final_norm"], "schedule": SCHEDULE}, 10),
    "schedule, llama": ("llama", {"trainable": ["head"], "schedule": SCHEDULE}, 12),
    "draws": ("gpt2", {"trainable": ["final_norm"], "block_sampling": {**DRAWS, "keep_state": True}}, 10),
    "draws, llama": ("llama", {"trainable": ["head"], "block_sampling": {**DRAWS, "keep_state": False}}, 12),
    "rates": (
        "gpt2",
        {
            "trainable": ["embeddings", "blocks[1:]", "final_norm"],
            "part_learning_rates": {"embeddings.positions": 1e-4, "blocks[-1].norms": 3e-4},
            "layer_decay": 0.5,
        },
        10,
    ),
    "rows": ("gpt2", {"trainable": ["embeddings.tokens[3,100:128]", "final_norm"]}, 10),
    # One row of two processes: the second one holds nothing of it.
    "rows, llama": ("llama", {"trainable": ["head[-4:]"], "schedule": ROWS_LATER}, 12),
}
PHASES = {"rates": 1, "rows": 1, "rows, llama": 2}  # of others 3
IN_TURN_BESIDE_ROWS = {
    "trainable": ["embeddings.tokens[3,100:128]", "final_norm"],
    "block_sampling": {**DRAWS, "keep_state": False},
    "part_learning_rates": {"blocks[0]": 1e-4},
}


def model_of(kind):
    """Three blocks; GPT-2's head is tied to its embeddings, Llama's is not. No dropout."""
    if kind == "gpt2":
        return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **sizes))


def collated(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def plan_of(model, given):
    return plan_freeze(model, **given, seed=3)


class Watch(TrainerCallback):
    """Notes which parameters require gradients, are in the optimizer and still as they were, after each step."""

    def __init__(self, model):
        self.start = {name: values.detach().clone() for name, values in named_weights(model)}
        self.in_optimizer, self.as_at_start = [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = {id(one) for group in bare_optimizer(optimizer).param_groups for one in group["params"]}
        named = dict(named_learners(model))
        self.in_optimizer.append({name for name, one in named.items() if id(one) in held})
        assert self.in_optimizer[-1] == {name for name, one in named.items() if one.grad is not None}
        assert self.in_optimizer[-1] == {name for name, one in named.items() if one.requires_grad}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 4 == 0:  # phases and draws begin after these steps
            self.as_at_start[state.global_step] = {
                n for n, one in named_weights(model) if torch.equal(whole(one), self.start[n])
            }


def trained(folder, case, checkpoint=None, before=lambda trainer: None, **changes):
    """A Trainer under a plan, on this process or on all: what came of it, by name and in whole tensors."""
    kind, given, save_steps = CASES[case]
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # the group begins with the arguments
    model = model_of(kind)
    batch = {"per_device_train_batch_size": BATCH // processes, "per_device_eval_batch_size": BATCH // processes}
    args = TrainingArguments(output_dir=str(folder), **{**SETTINGS, "save_steps": save_steps, **batch, **changes})
    windows = {"train_dataset": some_windows(64), "eval_dataset": some_windows(8, seed=1)}
    watch = Watch(model)
    trainer = Trainer(model=model, args=args, data_collator=collated, callbacks=[watch], **windows)
    before(trainer)
    plan = plan_of(model, given)
    tuning = pt.attach(trainer, plan, whole_checkpoints=True)
    trainer.train(resume_from_checkpoint=checkpoint and str(folder / f"checkpoint-{checkpoint}"))
    state = bare_optimizer(trainer.optimizer).state
    states = {name: state[one] for name, one in named_learners(trainer.model) if one in state}
    states |= state.get(RESTING, {})
    return {
        "sharded": {name for name, one in named_weights(trainer.model) if isinstance(one, DTensor)},
        "learners": {name for name, one in named_learners(trainer.model) if isinstance(one, DTensor)},
        "type": str(trainer.accelerator.distributed_type),
        "weights": {name: whole(one).clone() for name, one in named_weights(trainer.model)},
        "states": {name: {key: whole(value).clone() for key, value in one.items()} for name, one in states.items()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rates": [{k: v for k, v in e.items() if k.startswith("learning_rate")} for e in trainer.state.log_history],
        "passed": tuning.audit.passed,
        "planned": [set(plan.phase_at(step).trainable) for step in range(STEPS)],
        "in_optimizer": watch.in_optimizer,
        "as_at_start": watch.as_at_start,
    }


def trained_with_callbacks_alone(folder, case):
    """As `trained`, but without `attach`: what learns, and whether the audit passed."""
    begun_anew()
    model = model_of(CASES[case][0])
    batch = {"per_device_train_batch_size": BATCH // 2, "per_device_eval_batch_size": BATCH // 2}
    args = TrainingArguments(output_dir=str(folder), **{**SETTINGS, "save_strategy": "no", **batch})
    plan = plan_of(model, CASES[case][1])
    pt.apply_plan(model, plan)
    audit = pt.FreezeAuditCallback(plan)
    windows = {"train_dataset": some_windows(64), "eval_dataset": some_windows(8, seed=1)}
    trainer = Trainer(model=model, args=args, data_collator=collated, callbacks=[audit], **windows)
    trainer.train()
    return {name: whole(one).clone() for name, one in named_weights(trainer.model)}, audit.result.passed


# ---- what the two processes do --------------------------------------------------------------------------------------


def begun_anew():
    AcceleratorState._reset_state(reset_partial_state=True)


def everything(folder):
    """In one pair of processes: what they import is most of a run's time."""
    from fsdp_on_cpu import let_accelerate_shard

    let_accelerate_shard()
    found = {}
    for case, (_, _, checkpoint) in CASES.items():
        begun_anew()
        found[case] = trained(folder / case, case)
        begun_anew()
        found[f"{case}, resumed"] = trained(folder / case, case, checkpoint, save_strategy="no")
    found["callbacks alone"] = trained_with_callbacks_alone(folder / "callbacks alone", "rows")
    found["own loop"] = own_loop()
    found["own loop, in turn beside rows"] = stopped_and_resumed(lambda: sharded(IN_TURN_BESIDE_ROWS))
    found["sums"] = sums(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "fix_dtypes", lambda model: None)
        found["sums of torch alone"] = sums(folder)
    found["exit codes"] = recipe_runs(folder)
    return found


def sums(folder):
    """dtype and size of each tensor that is summed between processes in each step of a schedule in bf16, and the error
    that ended it."""
    begun_anew()
    plain, found = dist.reduce_scatter_single, [[]]

    def watched(output, input, **options):
        found[-1].append((str(input.dtype), input.numel()))
        return plain(output=output, input=input, **options)

    class NextStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append([])

    def in_bf16(trainer):
        trainer.add_callback(NextStep())
        trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")  # as accelerate does on GPUs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "reduce_scatter_single", watched)
        try:
            trained(folder, "schedule", before=in_bf16, max_steps=14, bf16=True, save_strategy="no", eval_on_start=True)
        except RuntimeError as raised:
            return found, str(raised)
    return found, ""


def recipe_runs(folder):
    """A recipe with a schedule and a layer decay from the base, and from its checkpoint in the middle of a phase."""
    from partialtune.recipe_run import write_results as results

    results.draw_figures = results.write_report = lambda *_: None  # most of a run's time
    results.needed_products = lambda *_, **__: None
    begun_anew()
    first = main(["train", str(folder / "recipe.yaml")])
    begun_anew()
    checkpoint = ["--resume_from_checkpoint", str(folder / "run" / "checkpoint-4")]
    return first, main(["train", str(folder / "recipe.yaml"), "--output_dir", str(folder / "resumed"), *checkpoint])


def own_loop():
    """Through all steps, and again from the states that were saved after 6, within a phase, and 8, where one begins."""
    model, _, optimizer = sharded()
    kept = pt.plan_freeze(model, ["final_norm"], block_sampling={**DRAWS, "keep_state": True})
    with pytest.raises(RecipeError, match=r"state of blocks that rest is out of the optimizer.*Say keep_state: false"):
        pt.audited(model, kept, optimizer)
    in_part = model_of("gpt2")
    fully_shard(in_part.transformer.h[2], mesh=init_device_mesh("cpu", (2,)))
    plan = pt.plan_freeze(in_part, ["final_norm"], schedule=OWN)
    with pytest.raises(RecipeError, match=r"transformer\.wte\.weight trains and is not sharded"):
        pt.audited(in_part, plan, torch.optim.AdamW(in_part.parameters()))
    unapplied, _, optimizer = sharded()
    with pytest.raises(
        RecipeError, match=r"and the model is sharded already.*Call apply_plan\(model, plan\) before ful"
    ):
        pt.audited(unapplied, pt.plan_freeze(unapplied, ["embeddings.tokens[-4:]"]), optimizer)
    return stopped_and_resumed(sharded)


def stopped_and_resumed(make):
    saved = {}
    found = [looped(*make(), save=saved)]
    return found + [looped(*make(), first_step=step, saved=saved[step]) for step in (6, 8)]


def sharded(given=None):
    model = model_of("gpt2")
    plan = pt.plan_freeze(model, **given) if given else pt.plan_freeze(model, ["final_norm"], schedule=OWN)
    if given:
        pt.apply_plan(model, plan)  # before: rows have a parameter of their own, to be sharded like all others
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.train(), plan, torch.optim.AdamW(model.parameters(), lr=5e-5)


def looped(model, plan, optimizer, first_step=0, saved=None, save=None):
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole_states = StateDictOptions(full_state_dict=True, strict=False)
    start = {name: whole(one).clone() for name, one in named_weights(model)}
    with pt.audited(model, plan, optimizer, first_step=first_step) as tuning:
        if saved is not None:
            set_model_state_dict(model, saved["model"], options=whole_states)
            set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=whole_states)
        for step in range(first_step, 12):
            ids = torch.tensor(some_windows(BATCH, seed=step)["input_ids"])[rank::processes]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if save is not None and step + 1 in (6, 8):
                parts = {"model": get_model_state_dict(model, options=whole_states)}
                parts["optimizer"] = get_optimizer_state_dict(model, optimizer, options=whole_states)
                save[step + 1] = copy.deepcopy(parts)
    states = {name: optimizer.state[one] for name, one in named_learners(model) if one in optimizer.state}
    return {
        "weights": {name: whole(one).clone() for name, one in named_weights(model)},
        "moved": {n for n, one in named_weights(model) if not torch.equal(whole(one), start[n])},
        "steps": {name: float(state["step"]) for name, state in states.items()},
        "passed": (tuning.steps, tuning.audit.passed),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    small_recipe(folder, max_steps=8, save_steps=4, layer_decay=0.9, schedule=LATER, prompts=[], eval_strategy="no")
    return folder


@pytest.fixture(scope="module")
def on_two(runs):
    first, second = on_two_processes(everything, runs)
    for case in CASES:
        assert first[case]["weights"].keys() == second[case]["weights"].keys()
        assert all(torch.equal(one, second[case]["weights"][name]) for name, one in first[case]["weights"].items())
    return first


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {case: trained(folder / case, case) for case in CASES}


def farthest(one, other):
    """The largest distance of two models, without the key third of GPT-2's biases, whose true gradient is 0."""
    found = {}
    for name, values in one.items():
        apart = (values - other[name]).abs()
        if name.endswith("c_attn.bias"):
            width = len(values) // 3
            apart = torch.cat([apart[:width], apart[2 * width :]])
        found[name] = float(apart.max())
    return max(found.values())


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_shard_end_with_the_weights_and_the_optimizer_of_one(on_two, on_one, case):
    two, one = on_two[case], on_one[case]
    assert (two["type"], one["type"]) == ("DistributedType.FSDP", "DistributedType.NO")
    assert two["sharded"] == two["learners"] == set(two["weights"])
    assert two["passed"]
    assert one["passed"]
    assert farthest(two["weights"], one["weights"]) < 1e-5
    assert two["in_optimizer"] == one["in_optimizer"] == two["planned"]
    assert len({frozenset(names) for names in two["planned"]}) == PHASES.get(case, 3)
    assert two["rates"] == one["rates"]
    assert {name: float(state["step"]) for name, state in two["states"].items()} == {
        name: float(state["step"]) for name, state in one["states"].items()
    }


@pytest.mark.parametrize("case", CASES)
def test_what_waits_for_its_phase_keeps_every_bit(on_two, case):
    two = on_two[case]
    assert list(two["as_at_start"]) == [4, 8, 12, 16, 20]
    for step, kept in two["as_at_start"].items():
        assert kept == set(two["weights"]).difference(*two["in_optimizer"][:step])


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(on_two, case):
    whole_run, resumed = on_two[case], on_two[f"{case}, resumed"]
    assert resumed["passed"]
    assert len(resumed["in_optimizer"]) == STEPS - CASES[case][2]
    for key in ("weights", "states"):
        assert whole_run[key].keys() == resumed[key].keys()
    assert all(torch.equal(values, resumed["weights"][name]) for name, values in whole_run["weights"].items())
    for name, state in whole_run["states"].items():
        assert all(torch.equal(value, resumed["states"][name][key]) for key, value in state.items()), name
    assert whole_run["losses"] == resumed["losses"]


def test_rows_are_sharded_where_a_trainer_has_the_callbacks_alone(on_two):
    weights, passed = on_two["callbacks alone"]
    assert passed
    assert farthest(weights, on_two["rows"]["weights"]) < 1e-7  # without attach


# ---- what is summed between processes -------------------------------------------------------------------------------


def test_what_is_thawed_under_bf16_is_summed_in_fp32_and_what_is_held_does_not_travel(on_two):
    found, error = on_two["sums"]
    assert error == ""
    assert {dtype for step in found for dtype, _ in step} == {"torch.float32"}
    model = model_of("gpt2")
    plan, sizes = plan_of(model, CASES["schedule"][1]), {name: one.numel() for name, one in named_weights(model)}
    summed = [sum(size for _, size in step) for step in found[:14]]
    assert summed == [sum(sizes[name] for name in plan.phase_at(step).trainable) for step in range(14)]


def test_torch_alone_would_sum_in_bf16_what_was_held_when_the_model_first_ran(on_two):
    found, error = on_two["sums of torch alone"]
    assert {dtype for step in found[:4] for dtype, _ in step} == {"torch.float32"}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):  # fixes them by itself; `fix_dtypes` is for 2.13
        assert {dtype for dtype, _ in found[4]} == {"torch.float32"}
        return
    assert "torch.bfloat16" in {dtype for dtype, _ in found[4]}  # of what the phase of step 4 thaws
    assert "assign a gradient with dtype 'c10::BFloat16'" in error  # torch 2.13 says so, since the weights are in fp32


# ---- a loop of one's own --------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_that_shards_thaws_and_goes_on_as_one_process_does(on_two):
    whole_run, *resumed = on_two["own loop"]
    model = model_of("gpt2")
    plan = pt.plan_freeze(model, ["final_norm"], schedule=OWN)
    one = looped(model.train(), plan, torch.optim.AdamW(model.parameters(), lr=5e-5))
    assert whole_run["passed"] == one["passed"] == (12, True)
    assert whole_run["steps"] == one["steps"]
    assert set(whole_run["steps"].values()) == {12.0, 8.0, 4.0}
    assert farthest(whole_run["weights"], one["weights"]) < 1e-5
    for other in resumed:
        assert (other["passed"], other["steps"]) == (whole_run["passed"], whole_run["steps"])
        assert all(torch.equal(values, other["weights"][name]) for name, values in whole_run["weights"].items())


def test_blocks_that_learn_in_turn_at_a_rate_of_their_own_beside_rows_are_audited_in_a_loop_that_shards(on_two):
    whole_run, *resumed = on_two["own loop, in turn beside rows"]
    model = model_of("gpt2")
    plan = pt.plan_freeze(model, **IN_TURN_BESIDE_ROWS)
    pt.apply_plan(model, plan)
    one = looped(model.train(), plan, torch.optim.AdamW(model.parameters(), lr=5e-5))
    assert whole_run["passed"] == one["passed"] == (12, True)
    assert whole_run["steps"] == one["steps"]
    assert farthest(whole_run["weights"], one["weights"]) < 1e-5
    start, rows = dict(named_weights(model_of("gpt2"))), [3, *range(100, 128)]
    moved = (whole_run["weights"][TOKENS] != start[TOKENS]).any(dim=1).nonzero().flatten().tolist()
    assert moved == rows
    drawn = {plan.sampling.draw(number)[0] for number in range(3)}
    learnt = {int(name.split(".")[2]) for name in plan.trainable if ".h." in name and name in whole_run["moved"]}
    assert learnt == drawn
    for other in resumed:
        assert (other["passed"], other["steps"]) == (whole_run["passed"], whole_run["steps"])
        assert all(torch.equal(values, other["weights"][name]) for name, values in whole_run["weights"].items())


# ---- a recipe -------------------------------------------------------------------------------------------------------


def test_a_recipe_with_a_schedule_and_rates_is_sharded_and_goes_on_with_the_same_bits(on_two, runs):
    assert on_two["exit codes"] == (0, 0)
    assert yaml.safe_load((runs / "run" / "recipe.yaml").read_text())["run"]["processes"] == 2
    assert (runs / "run" / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()  # of a sharded model alone
    assert json.loads((runs / "resumed" / "audit.json").read_text())["passed"]
    assert fingerprint(runs / "run") == fingerprint(runs / "resumed")
    logs = [json.loads((runs / name / "trainer_state.json").read_text())["log_history"] for name in ("run", "resumed")]
    rates = [[entry["learning_rate/block_00"] for entry in log if "learning_rate/block_00" in entry] for log in logs]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8
    plan = json.loads((runs / "run" / "freeze_plan.json").read_text())
    assert [phase["from_step"] for phase in plan["phases"]] == [0, 3, 6]
