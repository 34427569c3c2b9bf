"""Blocks that learn in turn (LISA, BAdam): drawn alike everywhere, at rest in between, proved, and resumed exactly."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import partialtune as pt
from conftest import some_windows, tiny_gpt2
from partialtune.errors import FreezeViolation, InputError, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.block_sampling import BlockSampling
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.plan_table import plan_table
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.resume_check import check_checkpoint
from partialtune.training.settings import training_arguments
from partialtune.training.training_data import collate_windows
from two_processes import on_two_processes

LISA = {"blocks": 2, "every": 3, "order": "random", "keep_state": False}
STEPS = 12
RATE = 1e-3
OPTIMIZERS = {
    "adamw_torch_fused": lambda groups: torch.optim.AdamW(groups, lr=RATE, fused=True),
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=RATE),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=RATE),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE),
}


def model_of(layers=5, **changes):
    """Without dropout, so that a loop by hand need not know which modules are in eval mode."""
    return tiny_gpt2(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes)


# Of these 5 blocks seed 3 draws 1 and 4, 0 and 1, 1 and 2, 2 and 4: block 1 goes on through three draws, block 4 rests
# in between, and block 3 is never drawn in 12 steps.
def plan_of(model, trainable=("final_norm",), seed=3, **changes):
    return plan_freeze(model, list(trainable), block_sampling={**LISA, **changes}, seed=seed)


def sampling_of(**changes):
    settings = {"blocks": 2, "every": 20, "order": "random", "keep_state": False, "candidates": tuple(range(6))}
    return BlockSampling(**{**settings, "seed": 0, **changes})


def block_of(name):
    return int(name.split(".")[2]) if ".h." in name else None


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_seed_and_number_alone_and_never_on_global_state():
    torch.manual_seed(1)
    drawn = [sampling_of().draw(number) for number in range(8)]
    assert drawn == [sampling_of().draw(number) for number in range(8)]
    assert drawn[::-1] == [sampling_of().draw(number) for number in reversed(range(8))]
    assert drawn != [sampling_of(seed=1).draw(number) for number in range(8)]
    # As they are drawn today: another version that drew otherwise could not go on from a checkpoint, nor verify a run.
    assert drawn[:4] == [(2, 4), (1, 3), (0, 3), (3, 4)]


def test_random_draws_take_each_block_equally_often_and_each_choice_too():
    sampling = sampling_of()
    draws = Counter(sampling.draw(number) for number in range(3000))
    assert len(draws) == 15  # 6 choose 2
    assert all(150 < count < 250 for count in draws.values())
    blocks = Counter(block for number in range(3000) for block in sampling.draw(number))
    assert all(900 < count < 1100 for count in blocks.values())


def test_in_order_each_block_comes_once_before_any_comes_twice():
    up = [sampling_of(order="ascending").draw(number) for number in range(4)]
    down = [sampling_of(order="descending").draw(number) for number in range(4)]
    assert up == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert down == [(4, 5), (2, 3), (0, 1), (4, 5)]
    odd = sampling_of(order="ascending", candidates=(1, 4, 7))
    assert [odd.draw(number) for number in range(4)] == [(1, 4), (1, 7), (4, 7), (1, 4)]


def test_the_draw_of_a_step_begins_every_so_many_steps():
    sampling = sampling_of()
    assert [sampling.number_at(step) for step in (-1, 0, 19, 20, 39, 40)] == [0, 0, 0, 1, 1, 2]
    assert [sampling.draws_of(steps) for steps in (0, 1, 20, 21, 40)] == [0, 1, 1, 2, 2]
    assert BlockSampling.from_json(json.loads(json.dumps(sampling.to_json()))) == sampling


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_a_plan_trains_what_trainable_says_in_every_step_and_drawn_blocks_in_turn():
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model)
    assert plan.sampling.candidates == (0, 1, 2, 3, 4)
    assert plan.always == ["transformer.ln_f.weight", "transformer.ln_f.bias"]  # no embeddings, no head
    assert [block_of(name) for name in plan.trainable] == [block for block in range(5) for _ in range(12)] + [None] * 2
    for step in range(20):
        phase = plan.phase_at(step)
        drawn = plan.sampling.draw(step // 3)
        assert phase is plan.phase_at(step - step % 3)
        assert phase.from_step == step - step % 3
        assert {block_of(name) for name in phase.trainable} == {*drawn, None}
        assert phase.first_block == drawn[0]
        assert phase.backward_from == f"transformer.h.{drawn[0]}.ln_1.weight"
    begins = {p.block: p.from_step for p in plan.parameters if p.in_turn}
    assert all(block in plan.sampling.draw(start // 3) for block, start in begins.items())
    content = plan.to_json({}, {})
    assert content["sampling"] == {**LISA, "candidates": [0, 1, 2, 3, 4], "seed": 3}
    assert "sampling" not in plan_freeze(model, ["final_norm"]).to_json({}, {})


def test_a_block_that_trains_wholly_is_no_candidate_and_a_part_of_one_trains_in_every_step(capsys):
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model, ["blocks[-1]", "norms"])
    assert plan.sampling.candidates == (0, 1, 2, 3)
    assert "no candidates, since they train in every step: block 4" in plan_table(plan)
    always = set(plan.always)
    assert {"transformer.h.0.ln_1.weight", "transformer.h.4.mlp.c_fc.weight"} <= always
    assert all(always < set(plan.phase_at(step).trainable) for step in range(0, 30, 3))
    assert {plan.phase_at(step).first_block for step in range(0, 30, 3)} == {0}


def test_nothing_but_blocks_in_turn_may_train_and_candidates_may_be_named():
    plan = plan_freeze(tiny_gpt2(n_layer=5), [], block_sampling={"blocks": 1, "every": 2, "candidates": "blocks[2:]"})
    assert (plan.always, plan.sampling.candidates, plan.selectors) == ([], (2, 3, 4), ("blocks[2:]",))
    assert (plan.sampling.order, plan.sampling.keep_state) == ("random", False)
    assert plan.phases[0].first_block == 2


def test_the_table_says_what_is_drawn_and_what_several_processes_hold():
    table = plan_table(plan_of(tiny_gpt2(n_layer=5)))
    assert "final_norm, 2 of 5 blocks (0 to 4) in turn, drawn at random from seed 3 every 3 steps" in table
    assert "a block that rests loses its optimizer state" in table
    assert "64 values learn in every step, at most 25,472 at one time" in table
    assert "on several processes (DDP) all candidates keep their gradient buckets: 63,520 values" in table
    assert "runs through at most 5 of 5 blocks" in table


@pytest.mark.parametrize(
    ("trainable", "given", "words"),
    [
        ([], {"every": 3}, "block_sampling: blocks is missing"),
        ([], {"blocks": 1}, "block_sampling: every is missing"),
        ([], {"blocks": 1, "every": 0}, "every: got 0; allowed: a whole number, 1 or more"),
        ([], {"blocks": 1, "every": 2, "order": "randm"}, "Did you mean random?"),
        ([], {"blocks": 1, "evry": 2}, "unknown key evry; .* Did you mean every?"),
        ([], {"blocks": 6, "every": 2}, r"blocks is 6, and GPT2LMHeadModel has 5 candidates to draw from \(0 to 4\)\."),
        (["blocks[1:]"], {"blocks": 2, "every": 2}, r"has 1 candidate to draw from \(0\); blocks 1 to 4 always train"),
        (["all"], {"blocks": 1, "every": 2}, "has 0 candidates to draw from; blocks 0 to 4 always train"),
        ([], {"blocks": 1, "every": 2, "candidates": ["mlp"]}, "no whole blocks, .* drawn as a whole"),
        ([], {"blocks": 1, "every": 2, "candidates": ["embeddings.tokens[:4]"]}, "some rows or experts of .*wte"),
        ([], {"blocks": 1, "every": 2, "candidates": ["blocks[7]"]}, "candidates: .*out of range"),
        ([], [2, 20], "allowed: a mapping"),
    ],
)
def test_block_sampling_that_cannot_be_planned_is_an_error_in_words(trainable, given, words):
    with pytest.raises(RecipeError, match=words):
        plan_freeze(tiny_gpt2(n_layer=5), trainable, block_sampling=given)


def test_a_schedule_beside_it_is_an_error():
    later = [{"from_step": 3, "trainable": ["head"]}]
    with pytest.raises(RecipeError, match="does not go with a schedule, whose phases add"):
        plan_freeze(tiny_gpt2(), ["final_norm"], schedule=later, block_sampling=LISA)


def test_blocks_that_share_their_tensors_cannot_be_drawn():
    from transformers import GPT2LMHeadModel

    class Shared(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.transformer.h[1].mlp = self.transformer.h[0].mlp

    with pytest.raises(RecipeError, match=r"one tensor in several places .*cannot learn one without another"):
        plan_freeze(Shared(tiny_gpt2().config), [], block_sampling={"blocks": 1, "every": 2})


# ---- the reference: a loop by hand ----------------------------------------------------------------------------------


def batches(count=STEPS, rows=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 96, (rows, 12), generator=generator) for _ in range(count)]


def by_hand(model, plan, optim="adamw_torch", steps=STEPS, rows=batches):
    """LISA in plain PyTorch: blocks are drawn, all else is frozen, and what was drawn anew has a new optimizer."""
    sampling, model = plan.sampling, model.train()
    optimizers = {}  # a group of its own for each block, so that its state goes with it
    for step, ids in enumerate(rows()[:steps]):
        if step % sampling.every == 0:
            drawn = sampling.draw(step // sampling.every)
            learning = {}
            for name, parameter in model.named_parameters():
                learns = name in plan.always or block_of(name) in drawn
                parameter.requires_grad_(learns)
                if learns:
                    learning.setdefault(block_of(name), []).append(parameter)
            if not sampling.keep_state:
                optimizers = {block: one for block, one in optimizers.items() if block in learning}
            for block, parameters in learning.items():
                if block not in optimizers:
                    optimizers[block] = OPTIMIZERS[optim](parameters)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for block in learning:
            optimizers[block].step()
        model.zero_grad()
    return model


def a_loop(model, plan, optim="adamw_torch", first_step=0, saved=None, keep=None, steps=STEPS):
    """The same through `audited`. Without fast paths, whose GELU rounds otherwise."""
    optimizer = OPTIMIZERS[optim](model.parameters())
    with pt.audited(model.train(), plan, optimizer, first_step=first_step, fast_paths=()) as tuning:
        if saved is not None:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        for ids in batches()[first_step:steps]:
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if keep is not None:
                keep[tuning.steps] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return tuning


def assert_equal(one, other, apart=0.0):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert float((a - b).detach().abs().max()) <= apart, name


@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize("order", ["random", "descending"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_loop_ends_with_the_bits_of_one_written_by_hand(order, keep_state, optim):
    plan = plan_of(model_of(), order=order, keep_state=keep_state)
    hand = by_hand(model_of(), plan, optim)
    model = model_of()
    tuning = a_loop(model, plan, optim)
    assert tuning.audit.passed
    assert_equal(hand, model)


def trainer_of(folder, model, plan, *callbacks, weight_decay_on="matrices", **changes):
    """A trainer as `partialtune train` makes it."""
    apply_plan(model, plan)
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    trainer = attached_trainer(
        plan=plan,
        delta_steps=100,
        weight_decay_on=weight_decay_on,
        model=model,
        args=training_arguments({**settings, **changes}),
        train_dataset=some_windows(),
        eval_dataset=some_windows(4),
    ).trainer
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


class Watch(TrainerCallback):
    """What holds in each step, just before the optimizer's."""

    def __init__(self):
        self.rows, self.learning, self.in_optimizer, self.with_state, self.weights = [], [], [], [], []
        self.in_train_mode, self.groups = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.learning.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        self.in_optimizer.append({names[id(p)] for group in optimizer.param_groups for p in group["params"]})
        self.with_state.append({names[id(key)] for key in optimizer.state if isinstance(key, torch.Tensor)})
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        self.in_train_mode.append([block.training for block in model.transformer.h])
        self.groups.append(len(optimizer.param_groups))


class Rows(TrainerCallback):
    """The rows of each step, as they reach the model."""

    def __init__(self, model):
        self.rows = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if model.training:
            self.rows.append(kwargs["input_ids"].clone())


@pytest.mark.parametrize("keep_state", [False, True])
def test_train_and_attach_end_with_the_bits_of_a_loop_by_hand(tmp_path, keep_state):
    model = model_of()
    plan = plan_of(model, keep_state=keep_state)
    rows = Rows(model)
    trainer = trainer_of(tmp_path / "train", model, plan, weight_decay=0.01, weight_decay_on="all")
    trainer.train()
    hand = by_hand(model_of(), plan, "adamw_torch_fused", rows=lambda: rows.rows)
    assert_equal(hand, model)

    attached = model_of()
    args = TrainingArguments(
        str(tmp_path / "attach"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    plain = Trainer(attached, args, train_dataset=some_windows(), data_collator=collate_windows)
    tuning = pt.attach(plain, plan_of(attached, keep_state=keep_state), weight_decay_on="all", fast_paths=())
    rows = Rows(attached)
    plain.train()
    assert tuning.audit.passed
    assert_equal(by_hand(model_of(), plan, "adamw_torch_fused", rows=lambda: rows.rows), attached)


# ---- what happens in each step --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["state is lost", "state is kept"])
def run(request, tmp_path_factory):
    """A run with dropout, decay and a warm-up, in which every step is saved."""
    folder = tmp_path_factory.mktemp("sampled")
    model = tiny_gpt2(n_layer=5)
    watch = Watch()
    trainer = trainer_of(folder, model, plan_of(model, keep_state=request.param), watch, **SAVED)
    trainer.train()
    return trainer, watch


SAVED = {
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
}


def test_what_has_gradients_and_is_in_the_optimizer_is_what_is_drawn(run):
    trainer, watch = run
    plan = trainer.tuning.plan
    for step in range(STEPS):
        assert watch.learning[step] == watch.in_optimizer[step] == set(plan.phase_at(step).trainable)
        drawn = plan.sampling.draw(step // 3)
        assert watch.in_train_mode[step] == [
            block in drawn for block in range(5)
        ]  # the dropout of those that rest is off
    assert set(watch.groups) == {2}  # with decay and without; a scheduler keeps a rate for each
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(set(rates)) > 6


def test_between_two_draws_only_what_is_drawn_changes_and_decay_moves_nothing_at_rest(run):
    trainer, watch = run
    after = [*watch.weights[1:], dict(trainer.model.named_parameters())]
    for step in range(1, STEPS):  # the rate of step 0 is that of a warm-up: nothing moves
        moved = {name for name, values in watch.weights[step].items() if not torch.equal(values, after[step][name])}
        assert moved == set(trainer.tuning.plan.phase_at(step).trainable)


def test_a_block_that_rests_has_no_state_in_memory_unless_it_is_kept(run):
    trainer, watch = run
    plan = trainer.tuning.plan
    for step in range(STEPS):
        assert watch.with_state[step] <= watch.in_optimizer[step]
    last = torch.load(Path(trainer.args.output_dir) / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    learning = set(plan.phase_at(STEPS - 1).trainable)
    assert {name for group in last["param_groups"] for name in group["params"]} == learning
    resting = last["state"].pop("resting", {})
    assert last["state"].keys() == learning
    reached = {p.name for p in plan.parameters if p.in_turn and p.from_step < STEPS} - learning
    assert resting.keys() == (reached if plan.sampling.keep_state else set())


def test_the_audit_passes_and_a_block_that_was_never_drawn_is_the_base_with_its_reason(tmp_path):
    model = tiny_gpt2(n_layer=5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = plan_of(model)
    trainer = trainer_of(tmp_path, model, plan, max_steps=4)
    trainer.train()
    drawn = {*plan.sampling.draw(0), *plan.sampling.draw(1)}
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["passed"] is True
    assert found["resting"] == {"changed": []}
    never = {name for name in plan.trainable if block_of(name) is not None and block_of(name) not in drawn}
    assert never
    assert {entry["name"] for entry in found["trainable"]["unmoved"]} == never
    assert all("is drawn for the first time" in entry["reason"] for entry in found["trainable"]["unmoved"])
    assert all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in never)


def draws_in(folder):
    return [json.loads(line) for line in (Path(folder) / "block_draws.jsonl").read_text().splitlines()]


def test_the_draws_are_written_a_line_each(run):
    trainer, _ = run
    sampling = trainer.tuning.plan.sampling
    assert draws_in(trainer.args.output_dir) == [
        {"from_step": 3 * number, "blocks": list(sampling.draw(number))} for number in range(4)
    ]


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, STEPS))  # within each draw, and where one ends
def test_a_run_that_goes_on_at_any_step_ends_with_the_same_bits(run, tmp_path, step):
    trainer, _ = run
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    keep_state = trainer.tuning.plan.sampling.keep_state
    check_checkpoint(checkpoint, trainer.tuning.plan)
    model = tiny_gpt2(n_layer=5)
    again = trainer_of(tmp_path, model, plan_of(model, keep_state=keep_state), **{**SAVED, "save_strategy": "no"})
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.tuning.audit.passed
    assert_equal(trainer.model, again.model)
    assert draws_in(tmp_path) == draws_in(trainer.args.output_dir)


@pytest.mark.parametrize(("optim", "keep_state"), [("adamw_torch", True), ("adamw_torch", False), ("adagrad", False)])
def test_a_loop_goes_on_at_any_step_with_the_same_bits(optim, keep_state):
    whole, saved = model_of(), {}
    a_loop(whole, plan_of(whole, keep_state=keep_state), optim, keep=saved)
    for step in (3, 5, 9):
        again = model_of()
        tuning = a_loop(again, plan_of(again, keep_state=keep_state), optim, first_step=step, saved=saved[step])
        assert tuning.audit.passed
        assert_equal(whole, again)


@pytest.mark.parametrize("keep_state", [False, True])
@pytest.mark.parametrize("optim", ["adafactor", "adagrad", "rmsprop", "sgd"])
def test_every_optimizer_draws_and_goes_on_from_a_checkpoint(tmp_path, optim, keep_state):
    changes = {"optim": optim, "max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    ends = []
    for folder, resume in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-3"))):
        model = tiny_gpt2(n_layer=4)
        trainer = trainer_of(tmp_path / folder, model, plan_of(model, keep_state=keep_state), **changes)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.tuning.audit.passed
        ends.append(model)
    assert_equal(*ends)


def test_a_checkpoint_of_other_draws_is_refused(run, tmp_path):
    trainer, _ = run
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-5"
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model, seed=8, keep_state=trainer.tuning.plan.sampling.keep_state)
    assert plan.sampling.draw(1) != trainer.tuning.plan.sampling.draw(1)
    with pytest.raises(InputError, match="its optimizer holds"):
        check_checkpoint(checkpoint, plan)
    with pytest.raises(InputError, match="other blocks rested in it after step 5"):
        trainer_of(tmp_path, model, plan, **SAVED).train(resume_from_checkpoint=str(checkpoint))


def test_a_second_training_of_one_trainer_begins_anew(tmp_path):
    model = model_of()
    trainer = trainer_of(tmp_path, model, plan_of(model, keep_state=True))
    trainer.train()
    reached = {p.name for p in trainer.tuning.plan.parameters if p.trainable and p.from_step < STEPS}
    assert len(trainer.optimizer.state) == len(reached)
    assert all(isinstance(key, torch.Tensor) for key in trainer.optimizer.state)
    assert all(
        parameter.requires_grad == (name in trainer.tuning.plan.trainable)
        for name, parameter in model.named_parameters()
    )


# ---- the proof ------------------------------------------------------------------------------------------------------


class Flips(TrainerCallback):
    """Flips a bit of a parameter when a step has ended."""

    def __init__(self, step, name, back_at=None):
        self.steps, self.name = {step, back_at}, name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            with torch.no_grad():
                dict(model.named_parameters())[self.name].view(-1).view(torch.int32)[0] ^= 1


def resting_in(plan, step):
    """A block that was drawn before this step, rests in it and in the next draw."""
    number = plan.sampling.number_at(step)
    before = {block for earlier in range(number) for block in plan.sampling.draw(earlier)}
    return min(before - {*plan.sampling.draw(number), *plan.sampling.draw(number + 1)})


def test_a_bit_that_changes_in_a_block_at_rest_is_a_violation_at_the_next_draw(tmp_path):
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model)
    name = f"transformer.h.{resting_in(plan, 4)}.mlp.c_fc.weight"
    trainer = trainer_of(tmp_path, model, plan, Flips(4, name))
    with pytest.raises(FreezeViolation, match=rf"step 6: 1 parameters changed while their block rested: {name}"):
        trainer.train()
    found = json.loads((tmp_path / "audit.json").read_text())
    assert (found["passed"], found["resting"], found["frozen"]["changed"]) == (False, {"changed": [name]}, [])
    assert pt_audit(found).changed_at_rest == [name]


def pt_audit(content):
    from partialtune.proof.audit_result import Audit

    return Audit.from_json(content)


def test_a_bit_that_changes_in_the_last_draw_is_a_violation_at_the_end_and_one_of_a_frozen_weight_at_a_draw(tmp_path):
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model)
    name = f"transformer.h.{min(set(range(5)) - set(plan.sampling.draw(3)))}.ln_1.bias"
    with pytest.raises(FreezeViolation, match=rf"step 12: 1 parameters changed while their block rested: {name}"):
        trainer_of(tmp_path / "end", model, plan, Flips(12, name)).train()
    frozen, model = "transformer.wpe.weight", tiny_gpt2(n_layer=5)
    with pytest.raises(FreezeViolation, match=rf"step 3: 1 frozen parameters changed: {frozen}"):
        trainer_of(tmp_path / "frozen", model, plan, Flips(1, frozen)).train()


def test_a_violation_in_a_loop_is_raised_at_the_draw():
    model = model_of()
    plan = plan_of(model)
    weight = dict(model.named_parameters())[f"transformer.h.{resting_in(plan, 4)}.mlp.c_fc.weight"]
    steps = []

    def flip(module, *_):
        if not module.training:
            return
        steps.append(len(steps))
        if len(steps) == 5:
            with torch.no_grad():
                weight.view(-1).view(torch.int32)[0] ^= 1

    model.register_forward_pre_hook(flip)
    with pytest.raises(FreezeViolation, match="changed while their block rested"):
        a_loop(model, plan)
    assert len(steps) == 6


def test_a_plan_that_is_not_carried_out_is_found_by_the_callbacks_alone(tmp_path):
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model)
    apply_plan(model, plan)
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", disable_tqdm=True, use_cpu=True)
    windows = some_windows()
    windows = windows.add_column("labels", windows["input_ids"][:])
    callbacks = [pt.FreezeAuditCallback(plan)]
    with pytest.raises(FreezeViolation, match=r"step 3: .* parameters changed while their block rested"):
        Trainer(model, args, train_dataset=windows, data_collator=default_data_collator, callbacks=callbacks).train()


def test_the_best_model_that_is_loaded_at_the_end_is_audited_as_of_its_own_step(tmp_path):
    model = tiny_gpt2(n_layer=5)
    plan = plan_of(model)
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first is the best
        "learning_rate": 1e-2,
    }
    trainer = trainer_of(tmp_path, model, plan, **changes)
    trainer.train()
    assert trainer.state.best_global_step < STEPS
    assert trainer.tuning.audit.passed


def test_a_run_that_a_callback_ends_early_has_the_draws_of_its_steps(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    model = tiny_gpt2(n_layer=5)
    trainer = trainer_of(tmp_path, model, plan_of(model), Stop())
    trainer.train()
    assert [draw["from_step"] for draw in draws_in(tmp_path)] == [0, 3]
    assert trainer.tuning.audit.passed


# ---- memory ---------------------------------------------------------------------------------------------------------


def flat(value):
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in flat(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def size(tensors):
    """Bytes of tensors; what is a single number (the steps) does not count."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.ndim)


AT_ONE_TIME = 2 * 12_704 + 64  # values of two blocks and the final norm


@pytest.mark.parametrize("keep_state", [False, True])
def test_a_loops_memory_is_flat_over_200_steps_unless_state_is_kept(keep_state):
    model = model_of()
    plan = plan_of(model, every=20, keep_state=keep_state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    states, gradients = [], []
    with pt.audited(model.train(), plan, optimizer, delta_steps=1000):
        for ids in batches(200, rows=1):
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append(size([p.grad for p in model.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
            states.append(size(flat(dict(optimizer.state))))
    assert set(gradients) == {4 * AT_ONE_TIME}
    assert states[0] == 2 * 4 * AT_ONE_TIME  # AdamW keeps two numbers a value
    if keep_state:
        assert states[-1] == 2 * 4 * (5 * 12_704 + 64)
    else:
        # When a draw has ended, those that come next have no state yet: never is there that of both.
        assert max(states) == states[0]
        assert {step for step, state in enumerate(states, start=1) if state < states[0]} <= set(range(20, 201, 20))


def test_a_trainers_memory_is_that_of_one_draw(tmp_path):
    class Bytes(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            states.append(size(flat(dict(optimizer.state))))
            gradients.append(size([p.grad for p in model.parameters() if p.grad is not None]))

    model, states, gradients = tiny_gpt2(n_layer=5), [], []
    trainer_of(tmp_path, model, plan_of(model), Bytes()).train()
    assert set(states) == {2 * 4 * AT_ONE_TIME}
    assert set(gradients) == {4 * AT_ONE_TIME}


# ---- two processes --------------------------------------------------------------------------------------------------


def as_one_of_two(folder, keep_state):
    model = model_of()
    watch = Watch()
    plan = plan_of(model, keep_state=keep_state)
    trainer = trainer_of(folder, model, plan, watch, per_device_train_batch_size=2, save_strategy="steps", save_steps=6)
    trainer.train()
    everybody = [None, None]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dist.all_gather_object(everybody, {name: values.tolist() for name, values in weights.items()})
    model_again = model_of()
    again = trainer_of(
        folder / "again", model_again, plan_of(model_again, keep_state=keep_state), per_device_train_batch_size=2
    )
    again.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "alike": everybody[0] == everybody[1],
        "drawn": all(watch.learning[step] == set(plan.phase_at(step).trainable) for step in range(STEPS)),
        "passed": trainer.tuning.audit.passed and again.tuning.audit.passed,
        "weights": {name: values.clone() for name, values in weights.items()},
        "again": all(torch.equal(dict(model_again.named_parameters())[name], weights[name]) for name in weights),
    }


@pytest.mark.slow
@pytest.mark.parametrize("keep_state", [False, True])
def test_two_processes_draw_alike_and_end_as_one_with_the_same_global_batch(tmp_path, keep_state):
    found = on_two_processes(as_one_of_two, tmp_path / "two", keep_state)
    model = model_of()
    alone = trainer_of(tmp_path / "one", model, plan_of(model, keep_state=keep_state))
    alone.train()
    for one in found:
        assert one["wrapped"] == "DistributedDataParallel"
        assert (one["alike"], one["drawn"], one["passed"], one["again"]) == (True, True, True, True)
        for name, parameter in model.named_parameters():
            assert float((one["weights"][name] - parameter.detach()).abs().max()) < 1e-5, name
    assert draws_in(tmp_path / "two") == draws_in(tmp_path / "one")


def a_loop_of_two(wrapped):
    dist.init_process_group("gloo")
    model = model_of()
    plan = plan_of(model)
    apply_plan(model, plan)
    given = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rank = dist.get_rank()
    try:
        with pt.audited(given.train(), plan, optimizer) as tuning:
            for ids in batches():
                mine = ids[2 * rank : 2 * rank + 2]
                given(input_ids=mine, labels=mine).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    except RecipeError as error:
        return str(error)
    return tuning.audit.passed, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_a_loop_on_two_processes_ends_as_one_by_hand_and_has_to_be_wrapped_before():
    plan = plan_of(model_of())
    hand = by_hand(model_of(), plan)
    for passed, weights in on_two_processes(a_loop_of_two, True):
        assert passed
        for name, parameter in hand.named_parameters():
            assert float((weights[name] - parameter.detach()).abs().max()) < 1e-5, name
    assert (
        "block_sampling: DDP synchronises only what learns when it wraps" in on_two_processes(a_loop_of_two, False)[0]
    )
