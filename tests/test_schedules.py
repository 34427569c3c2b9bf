"""Gradual unfreezing, from the recipe to the audit of a resumed run; and what activation checkpointing recomputes."""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerCallback,
    modeling_utils,
)

from conftest import some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.engine import phases
from partialtune.engine.phases import hold_back
from partialtune.errors import FreezeViolation, InputError, ModelError, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.plan_table import plan_table
from partialtune.freeze.recipe_plan import in_steps, plan_before_text
from partialtune.model.digests import digests
from partialtune.model.train_mode import check_support
from partialtune.proof.audit_result import KEPT_EVERY_BIT, NEVER_A_GRADIENT
from partialtune.recipe.arguments import FreezeArguments
from partialtune.recipe.recipe import read_recipe, recipe_from_values, write_recipe
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.resume_check import check_checkpoint
from partialtune.training.settings import steps_an_epoch, training_arguments
from partialtune.training.stopping import StopOnSignal
from two_processes import on_two_processes

# Where backward stops at a block, PyTorch says so to the hooks that count.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


# ---- the recipe -----------------------------------------------------------------------------------------------------

BASE = {"model_name_or_path": "builtin:lilliput", "text": "builtin:python-docs", "output_dir": "out"}


def recipe_with(schedule, **changes):
    return recipe_from_values({**BASE, "schedule": schedule, **changes})


def test_a_schedule_is_converted_and_may_stand_without_trainable():
    recipe = recipe_with([{"from_step": "0", "trainable": "final_norm", "learning_rate": "1e-4"}])
    assert recipe.freeze.schedule == [{"from_step": 0, "trainable": ["final_norm"], "learning_rate": 1e-4}]
    assert recipe.freeze.trainable == []


def test_a_schedule_comes_from_a_file_or_the_command_line_and_is_recorded_so_that_it_reads_again(tmp_path):
    file, recorded = tmp_path / "recipe.yaml", tmp_path / "recorded.yaml"
    lines = [*(f"{key}: {value}" for key, value in BASE.items()), "trainable: final_norm"]
    entry = "{from_epoch: 1, trainable: ['blocks[-1]']}"
    file.write_text("\n".join([*lines, "schedule:", f"  - {entry}"]))
    from_file = read_recipe(file)
    file.write_text("\n".join(lines))
    assert read_recipe(file, ["--schedule", f"[{entry}]"]).values == from_file.values
    write_recipe(recorded, from_file.values, {})
    assert read_recipe(recorded).freeze.schedule == [{"from_epoch": 1.0, "trainable": ["blocks[-1]"]}]


FIRST = {"from_step": 0, "trainable": ["final_norm"]}

MISTAKES = {
    "both starts": ([{**FIRST, "from_epoch": 1}], {}, ["schedule: entry 1: both from_step and from_epoch"]),
    "no start": ([{"trainable": ["head"]}], {}, ["entry 1: neither from_step nor from_epoch"]),
    "negative": ([{**FIRST, "from_step": -1}], {}, ["entry 1: from_step: got -1; allowed: a whole number, 0 or more"]),
    "no whole step": ([{**FIRST, "from_step": 1.5}], {}, ["entry 1: from_step: got 1.5; allowed: a whole number"]),
    "descending": (
        [{"from_step": 9, "trainable": ["head"]}, {"from_step": 4, "trainable": ["biases"]}],
        {"trainable": ["final_norm"]},
        ["entry 2 begins at from_step 4, not after entry 1 (from_step 9)", "in the order"],
    ),
    "rate of 0": (
        [{**FIRST, "learning_rate": 0}],
        {},
        ["entry 1: learning_rate: got 0; allowed: a number, more than 0"],
    ),
    "rate in words": ([{**FIRST, "learning_rate": "low"}], {}, ["entry 1: learning_rate: got 'low'"]),
    "selector": ([{"from_step": 0, "trainable": ["blocks[1"]}], {}, ["entry 1: trainable, 'blocks[1'"]),
    "nothing added": ([{"from_step": 0, "trainable": []}], {}, ["entry 1: trainable is missing: it adds nothing"]),
    "unknown key": (
        [{"form_step": 0, "trainable": ["head"]}],
        {},
        ["entry 1: unknown key form_step; allowed are from_step, from_epoch", "Did you mean from_step?"],
    ),
    "no list of mappings": (["blocks[-1]"], {}, ["schedule: got 'blocks[-1]' as entry 1; allowed: a list"]),
    "an empty beginning": (
        [{"from_step": 5, "trainable": ["head"]}],
        {},
        ["entry 1 begins at from_step 5, and `trainable` is empty: nothing would train before"],
    ),
    "beside method full": ([FIRST], {"method": "full"}, ["schedule: method full trains everything"]),
    "without find_unused": ([FIRST], {"ddp_find_unused_parameters": False}, ["ddp_find_unused_parameters: false"]),
    "an empty list": ([], {}, ["trainable: missing: nothing would train"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_schedule_is_named_with_its_entry_and_what_to_write(name):
    schedule, changes, words = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        recipe_with(schedule, **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_mistakes_of_a_schedule_are_said_at_once():
    with pytest.raises(RecipeError, match="4 problems"):
        recipe_with([{"from_step": -1, "trainble": ["head"]}, {"from_epoch": "soon", "trainable": ["final_norm"]}])


def test_reentrant_checkpointing_is_refused_since_it_runs_through_frozen_blocks():
    with pytest.raises(RecipeError, match="use_reentrant needs gradients at every block's input"):
        recipe_from_values({**BASE, "trainable": "head", "activation_checkpointing_kwargs": {"use_reentrant": True}})


def test_epochs_become_the_nearest_steps_and_the_other_keys_stay():
    schedule = [
        {"from_epoch": 0.5, "trainable": ["head"], "learning_rate": 1e-5},
        {"from_step": 9, "trainable": ["mlp"]},
    ]
    assert in_steps(schedule, epoch_steps=7, run_steps=20) == [
        {"from_step": 4, "trainable": ["head"], "learning_rate": 1e-5},
        {"from_step": 9, "trainable": ["mlp"]},
    ]


EPOCHS = [
    {"from_epoch": 1, "trainable": ["blocks[1]"], "learning_rate": 1e-4},
    {"from_epoch": 2.5, "trainable": ["embeddings"]},
    {"from_step": 900, "trainable": ["mlp"]},
]


def test_before_the_text_is_read_phases_begin_at_their_epochs():
    plan = plan_before_text(tiny_gpt2(), FreezeArguments(trainable=["blocks[-1]"], schedule=EPOCHS))
    assert [(phase.from_step, phase.from_epoch) for phase in plan.phases] == [
        *((0, None), (None, 1), (None, 2.5), (900, None))
    ]
    in_steps_of_7 = plan_freeze(tiny_gpt2(), ["blocks[-1]"], schedule=in_steps(EPOCHS, 7, 1000))
    assert [phase.trainable for phase in plan.phases] == [phase.trainable for phase in in_steps_of_7.phases]
    assert [row.split()[:2] for row in plan_table(plan).splitlines() if row.startswith(("epoch", "step"))] == [
        *(["step", "0"], ["epoch", "1"], ["epoch", "2.5"], ["step", "900"])
    ]
    assert plan.to_json({}, {})["phases"][2] == {
        "from_step": None,
        "from_epoch": 2.5,
        "backward_from": "transformer.wte.weight",
        "trainable": list(plan.phases[2].trainable),
    }


def test_a_schedule_of_epochs_may_begin_at_the_start_and_its_mistakes_name_the_epoch():
    plan = plan_before_text(tiny_gpt2(), FreezeArguments(schedule=[{"from_epoch": 0, "trainable": ["mlp"]}, EPOCHS[1]]))
    assert [phase.from_epoch for phase in plan.phases] == [0, 2.5]
    wrong = [EPOCHS[0], {"from_epoch": 2, "trainable": ["blocks[1].mlp"]}]
    with pytest.raises(RecipeError, match=r"from epoch 2: \[blocks\[1\].mlp\] adds nothing.* since epoch 1"):
        plan_before_text(tiny_gpt2(), FreezeArguments(trainable=["head"], schedule=wrong))


def test_plan_shows_a_schedule_of_epochs_without_reading_the_text(tmp_path, capsys):
    values = {**BASE, "model_name_or_path": "builtin:lilliput", "text": "/nowhere/text.txt", "block_size": 32}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "trainable": ["final_norm"], "schedule": EPOCHS[:1]}))
    assert main(["plan", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "epoch 1 " in shown
    assert "the last of 2 phases, from epoch 1 on" in shown


def test_a_phase_that_begins_when_the_run_has_ended_is_an_error():
    schedule = [{"from_step": 19, "trainable": ["head"]}, {"from_epoch": 2, "trainable": ["mlp"]}]
    with pytest.raises(
        RecipeError, match=r"entry 2: from_epoch 2, which is from_step 20: the run has 20 steps"
    ) as caught:
        in_steps(schedule, epoch_steps=10, run_steps=20)
    assert "entry 1" not in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 3}, {"dataloader_drop_last": True}])
def test_the_steps_of_an_epoch_are_those_that_trainer_takes(tmp_path, changes):
    trainer = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], (), max_steps=-1, num_train_epochs=1, **changes)
    trainer.train()
    assert trainer.state.global_step == steps_an_epoch(trainer.args, windows=len(trainer.train_dataset))


# ---- the plan -------------------------------------------------------------------------------------------------------

PHASES = [
    {"from_step": 3, "trainable": ["blocks[-1]"], "learning_rate": 2e-3},
    {"from_step": 6, "trainable": ["blocks[1].mlp", "!biases"]},
]
LAST_BLOCK = [name for name, _ in tiny_gpt2().named_parameters() if ".h.2." in name]
MATRICES_OF_1 = ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"]
FINAL_NORM = ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_each_phase_of_a_plan_adds_to_what_trains():
    plan = plan_freeze(tiny_gpt2(), ["final_norm"], schedule=PHASES)
    assert [(phase.from_step, phase.backward_from, phase.first_block) for phase in plan.phases] == [
        (0, "transformer.ln_f.weight", 3),
        (3, "transformer.h.2.ln_1.weight", 2),
        (6, "transformer.h.1.mlp.c_fc.weight", 1),
    ]
    assert [list(phase.trainable) for phase in plan.phases] == [
        FINAL_NORM,
        [*LAST_BLOCK, *FINAL_NORM],
        [*MATRICES_OF_1, *LAST_BLOCK, *FINAL_NORM],
    ]
    assert plan.trainable == list(plan.phases[-1].trainable)
    chosen = {p.name: (p.selector, p.from_step, p.learning_rate) for p in plan.parameters if p.trainable}
    assert chosen["transformer.ln_f.bias"] == ("final_norm", 0, None)
    assert chosen["transformer.h.2.ln_1.weight"] == ("blocks[-1]", 3, 2e-3)
    assert chosen[MATRICES_OF_1[0]] == ("blocks[1].mlp", 6, None)
    content = plan.to_json({}, {})
    assert [set(phase) for phase in content["phases"]] == [{"from_step", "backward_from", "trainable"}] * 3
    assert content["backward_from"] == "transformer.h.1.mlp.c_fc.weight"
    assert content["selectors"] == ["final_norm", "blocks[-1]", "blocks[1].mlp", "!biases"]


def test_an_entry_for_step_0_belongs_to_the_first_phase_beside_trainable_or_in_its_place():
    beside = plan_freeze(tiny_gpt2(), ["final_norm"], schedule=[{"from_step": 0, "trainable": ["blocks[-1]"]}])
    alone = plan_freeze(tiny_gpt2(), [], schedule=[{"from_step": 0, "trainable": ["blocks[-1]", "final_norm"]}])
    assert [phase.from_step for phase in beside.phases] == [0]
    assert beside.phases == alone.phases


@pytest.mark.parametrize(
    ("trainable", "schedule", "words"),
    [
        (
            ["blocks[1:]"],
            PHASES[:1],
            r"from step 3: \[blocks\[-1\]\] adds nothing, all of it trains already since step 0",
        ),
        (["final_norm"], [PHASES[0], {"from_step": 5, "trainable": "/.*h.2.*/"}], "adds nothing, .* since step 3"),
        (["final_norm"], [{"from_step": 3, "trainable": ["blocks[7]"]}], r"from step 3: blocks\[7\] is out of range"),
        (["final_norm"], [{"from_epoch": 1, "trainable": ["head"]}], "known once the text is read. Say from_step"),
        (["final_norm"], [{"from_step": 3, "trainable": ["!head"]}], "from step 3: .* nothing is left"),
        ([], PHASES, "nothing would train before"),
        ([], [], "trainable is empty"),
    ],
)
def test_a_schedule_that_cannot_be_planned_is_an_error_that_names_the_phase(trainable, schedule, words):
    with pytest.raises(RecipeError, match=words):
        plan_freeze(tiny_gpt2(), trainable, schedule=schedule)


# ---- training -------------------------------------------------------------------------------------------------------


def trainer_of(folder, model, trainable, schedule, *callbacks, **changes):
    """A trainer of 9 steps at 1e-2, as `partialtune train` makes it."""
    plan = plan_freeze(model, trainable, schedule=schedule)
    apply_plan(model, plan)
    settings = {
        "output_dir": str(folder),
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = attached_trainer(
        plan=plan,
        delta_steps=100,
        model=model,
        args=training_arguments({**settings, **changes}),
        train_dataset=some_windows(),
        eval_dataset=some_windows(4),
    ).trainer
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def callback_of(trainer, kind):
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, kind))


class Watch(TrainerCallback):
    """What holds in each step, just before the optimizer's."""

    def __init__(self):
        self.learning, self.in_optimizer, self.in_train_mode, self.rates, self.weights = [], [], [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.learning.append([name for name, parameter in model.named_parameters() if parameter.grad is not None])
        groups = [(group, [names[id(parameter)] for parameter in group["params"]]) for group in optimizer.param_groups]
        self.in_optimizer.append({name: group["weight_decay"] for group, members in groups for name in members})
        self.rates.append({name: group["lr"] for group, members in groups for name in members})
        self.in_train_mode.append([name for name, module in model.named_modules() if module.training])
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    """A scheduled run in which every step is saved."""
    folder = tmp_path_factory.mktemp("scheduled")
    changes = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    watch = Watch()
    trainer = trainer_of(folder, tiny_gpt2(), ["final_norm"], PHASES, watch, **changes)
    trainer.train()
    return trainer, watch


def test_what_learns_and_is_in_the_optimizer_is_in_every_step_what_the_plan_says(scheduled):
    trainer, watch = scheduled
    for step in range(9):
        assert watch.learning[step] == list(trainer.tuning.plan.phase_at(step).trainable)
        assert watch.in_optimizer[step].keys() == set(watch.learning[step])


def test_a_parameter_moves_in_every_step_from_its_phase_on_and_in_none_before(scheduled):
    trainer, watch = scheduled
    after = dict(trainer.model.named_parameters())
    for planned in trainer.tuning.plan.parameters:
        values = [weights[planned.name] for weights in watch.weights] + [after[planned.name]]
        moved = [step for step in range(9) if not torch.equal(values[step], values[step + 1])]
        assert moved == (list(range(planned.from_step, 9)) if planned.trainable else []), planned.name


def test_modules_are_in_eval_mode_until_their_phase_begins(scheduled):
    _, watch = scheduled
    assert ["transformer.h.2.attn.attn_dropout" in names for names in watch.in_train_mode] == [False] * 3 + [True] * 6
    assert ["transformer.h.1.mlp.dropout" in names for names in watch.in_train_mode] == [False] * 6 + [True] * 3
    assert not any("transformer.h.1.attn" in names or "transformer.h.0" in names for names in watch.in_train_mode)


def test_rates_are_those_of_the_phases_and_follow_the_course_of_the_whole_run(scheduled):
    _, watch = scheduled
    for step, rates in enumerate(watch.rates):
        left = (9 - step) / 9  # linear decay over 9 steps
        assert rates["transformer.ln_f.weight"] == pytest.approx(1e-2 * left)
        assert rates.get(LAST_BLOCK[0]) == (pytest.approx(2e-3 * left) if step >= 3 else None)
        assert rates.get(MATRICES_OF_1[0]) == (pytest.approx(1e-2 * left) if step >= 6 else None)


def test_weight_decay_acts_on_the_matrices_of_every_phase_and_on_no_norm_or_bias(scheduled):
    _, watch = scheduled
    for name, decay in watch.in_optimizer[-1].items():
        assert decay == (0.0 if ".ln_" in name or name.endswith(".bias") else 0.1), name


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_phases_begin_at_their_optimizer_step_under_accumulation_and_other_schedulers(tmp_path, changes):
    watch = Watch()
    if "lr_scheduler_type" in changes:
        changes |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], PHASES, watch, max_steps=7, **changes)
    trainer.train()
    assert watch.learning == [list(trainer.tuning.plan.phase_at(step).trainable) for step in range(7)]
    assert trainer.tuning.audit.passed


# ---- checkpoints and resuming ---------------------------------------------------------------------------------------


def equal(a, b):
    return all(torch.equal(left, right) for left, right in zip(a.parameters(), b.parameters(), strict=True))


def test_a_checkpoint_keeps_optimizer_state_by_parameter_name(scheduled):
    trainer, watch = scheduled
    for step in (2, 3, 4, 9):
        saved = torch.load(Path(trainer.args.output_dir) / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        held = [name for group in saved["param_groups"] for name in group["params"]]
        assert sorted(held) == sorted(watch.learning[step - 1])
        assert saved["state"].keys() == set(held)
        assert saved["state"][held[0]]["exp_avg"].shape == dict(trainer.model.named_parameters())[held[0]].shape


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])  # in each phase, and where one ends
def test_a_run_that_goes_on_in_any_phase_ends_with_the_same_bits(scheduled, tmp_path, step):
    trainer, _ = scheduled
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    check_checkpoint(checkpoint, trainer.tuning.plan)
    resumed = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], PHASES, weight_decay=0.1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 9
    assert resumed.tuning.audit.passed
    assert equal(resumed.model, trainer.model)


def test_a_signal_is_saved_also_where_only_the_best_model_would_be(tmp_path):
    trainer = trainer_of(
        *(tmp_path, tiny_gpt2(), ["final_norm"], ()),
        Fault(3, lambda *_: setattr(callback_of(trainer, StopOnSignal), "received", signal.SIGTERM)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that nothing is better than the first
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_a_resumed_run_knows_which_parameters_had_a_gradient_before(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path / "first", tiny_gpt2(), ["final_norm"], (), **changes).train()
    model = tiny_gpt2()
    bias, at_start = model.transformer.ln_f.bias, model.transformer.ln_f.bias.detach().clone()
    back = Fault(2, lambda *_: bias.copy_(at_start))  # it learnt nothing in the end
    again = trainer_of(tmp_path / "again", model, ["final_norm"], (), back, **changes)
    bias.register_hook(torch.zeros_like)  # nor would a run that began here say that it ever could have
    with pytest.raises(FreezeViolation, match=r"ln_f\.bias"):
        again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    unmoved = json.loads((tmp_path / "again" / "audit.json").read_text())["trainable"]["unmoved"]
    assert unmoved == [{"name": "transformer.ln_f.bias", "reason": KEPT_EVERY_BIT}]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"])
def test_every_optimizer_takes_in_later_phases_and_goes_on_from_a_checkpoint(tmp_path, optim):
    changes = {"optim": optim, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    schedule = [{"from_step": 1, "trainable": ["blocks[-1].mlp"]}, {"from_step": 3, "trainable": ["blocks[-1].norms"]}]
    whole = trainer_of(tmp_path / "whole", tiny_gpt2(), ["final_norm"], schedule, **changes)
    whole.train()
    again = trainer_of(tmp_path / "again", tiny_gpt2(), ["final_norm"], schedule, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.tuning.audit.passed
    assert equal(whole.model, again.model)


def test_state_that_an_optimizer_is_made_with_enters_with_its_parameters(tmp_path):
    class States(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            found[state.global_step] = {names[id(parameter)] for parameter in optimizer.state}

    changes = {"optim": "adagrad", "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    for resume in (None, str(tmp_path / "checkpoint-2")):
        found = {}
        trainer = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], PHASES, States(), **changes)
        trainer.train(resume_from_checkpoint=resume)
        plan = trainer.tuning.plan
        assert found == {step: set(plan.phase_at(step).trainable) for step in range(2 if resume else 0, 8)}


def test_a_trainer_leaves_its_callers_arguments_as_they_were(tmp_path):
    args = training_arguments({"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"})
    before, model = dict(vars(args)), tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"], schedule=PHASES)
    apply_plan(model, plan)
    trainer = attached_trainer(plan=plan, model=model, args=args, train_dataset=some_windows()).trainer
    assert trainer.args.ddp_find_unused_parameters is True
    assert vars(args) == before


def test_a_checkpoint_of_another_layer_of_the_same_shape_is_refused(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path / "first", tiny_gpt2(), ["blocks[0]"], (), **changes).train()
    checkpoint = tmp_path / "first" / "checkpoint-1"
    other = trainer_of(tmp_path / "other", tiny_gpt2(), ["blocks[1]"], (), **changes)
    with pytest.raises(InputError, match=r"12 not in the plan, as transformer\.h\.0\..*12 not in the checkpoint"):
        check_checkpoint(checkpoint, other.tuning.plan)
    with pytest.raises(InputError, match="other groups of parameters"):  # nor does the optimizer take it
        other.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_keyed_by_place_or_with_a_file_missing_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], (), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    file, marker = checkpoint / "optimizer.pt", checkpoint / "complete.json"
    saved = torch.load(file, weights_only=True)
    saved["param_groups"][1]["params"] = [0, 1]  # as PyTorch does it
    torch.save(saved, file)
    files = json.loads(marker.read_text())["files"]
    files[file.name] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    marker.write_text(json.dumps({"files": files}))
    with pytest.raises(
        InputError, match=r"2 not in the plan, as 0; 2 not in the checkpoint, as transformer\.ln_f\.bias"
    ):
        check_checkpoint(checkpoint, trainer.tuning.plan)
    file.unlink()
    with pytest.raises(InputError, match=r"no whole checkpoint of partialtune: optimizer\.pt is missing"):
        check_checkpoint(checkpoint, trainer.tuning.plan)


# ---- the audit ------------------------------------------------------------------------------------------------------


class Fault(TrainerCallback):
    """Does something when a step has ended."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.do(model, control)


def test_a_thawed_layer_that_is_missing_from_the_optimizer_stops_the_run_when_its_phase_begins(tmp_path, monkeypatch):
    def forget(*args):
        return [held for held in hold_back(*args) if held.member.parameter.ndim > 1]

    monkeypatch.setattr(phases, "hold_back", forget)
    trainer = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], PHASES)
    with pytest.raises(FreezeViolation, match=r"step 3: 8 trainable .* missing from the optimizer: transformer\.h\.2"):
        trainer.train()
    assert trainer.state.global_step == 3
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["trainable"]["not_in_optimizer"] == [n for n in LAST_BLOCK if ".ln_" in n or n.endswith(".bias")]


def test_a_parameter_that_changes_before_its_phase_is_a_violation(tmp_path):
    fault = Fault(1, lambda model, _: model.transformer.h[2].ln_1.bias.add_(1e-3))
    with pytest.raises(FreezeViolation, match=r"step 3: 1 frozen parameters changed: transformer\.h\.2\.ln_1\.bias"):
        trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], PHASES, fault).train()


def test_parameters_whose_phase_was_not_reached_are_untouched_and_say_so(tmp_path):
    def stop(_, control):
        control.should_training_stop = True

    trainer = trainer_of(tmp_path, tiny_gpt2(), ["final_norm"], PHASES, Fault(5, stop))
    trainer.train()
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["passed"] is True
    assert found["trainable"]["unmoved"] == [
        {"name": name, "reason": "the run ended before step 6, from which its phase trains it"}
        for name in MATRICES_OF_1
    ]


def test_a_phase_without_gradients_is_untouched_with_its_reason(tmp_path):
    model = tiny_gpt2()
    model.transformer.h[2].mlp.c_fc.weight.register_hook(torch.zeros_like)
    trainer = trainer_of(tmp_path, model, ["final_norm"], [{"from_step": 2, "trainable": ["/.*h.2.mlp.c_fc.weight/"]}])
    trainer.train()
    unmoved = json.loads((tmp_path / "audit.json").read_text())["trainable"]["unmoved"]
    assert unmoved == [{"name": "transformer.h.2.mlp.c_fc.weight", "reason": NEVER_A_GRADIENT}]


# ---- activation checkpointing ---------------------------------------------------------------------------------------


class Passes(TrainerCallback):
    """Counts how often each block's forward and backward run, step by step."""

    def __init__(self, blocks):
        self.blocks = len(blocks)
        self.forward, self.backward, self.steps = [0] * self.blocks, [0] * self.blocks, []
        for number, block in enumerate(blocks):
            next(block.children()).register_forward_hook(self.counter(self.forward, number))
            block.register_full_backward_hook(self.counter(self.backward, number))

    @staticmethod
    def counter(counts, number):
        def count(*_):
            counts[number] += 1

        return count

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((tuple(self.forward), tuple(self.backward)))
        self.forward[:] = self.backward[:] = [0] * self.blocks


def tiny_llama():
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))


def tiny_opt():  # its blocks apply dropout themselves
    shape = {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=32, max_position_embeddings=64))


def tiny_bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=3, n_head=2, hidden_dropout=0.1))


MODELS = {
    "gpt2": (tiny_gpt2, "transformer.h"),
    "gpt2-without-dropout": (lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "transformer.h"),
    "llama": (tiny_llama, "model.layers"),
    "opt": (tiny_opt, "model.decoder.layers"),
    "bloom": (tiny_bloom, "transformer.h"),
}


def checkpointed_run(folder, name, trainable, schedule=(), **changes):
    """Losses, final model and passes by step of a run of 4 steps."""
    make, blocks = MODELS[name]
    model = make()
    passes = Passes(model.get_submodule(blocks))
    changes = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, **changes}
    trainer = trainer_of(folder, model, trainable, schedule, passes, **changes)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model, passes.steps


@pytest.mark.parametrize(
    ("trainable", "forward", "backward"),
    [
        (["final_norm"], (1, 1, 1), (0, 0, 0)),
        (["blocks[-1]"], (1, 1, 2), (0, 0, 1)),
        (["blocks[1].norms"], (1, 2, 2), (0, 1, 1)),  # block 2 is frozen, in eval mode, and passed
        (["embeddings"], (2, 2, 2), (1, 1, 1)),  # so are all three here
    ],
)
def test_exactly_the_blocks_that_backward_passes_are_recomputed(tmp_path, monkeypatch, trainable, forward, backward):
    calls, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **kw: calls.append(1) or checkpoint(*a, **kw))
    _, _, steps = checkpointed_run(tmp_path, "gpt2", trainable, activation_checkpointing=True)
    assert steps == [(forward, backward)] * 4
    assert len(calls) == 4 * sum(backward)  # the others are not so much as asked to
    plain = checkpointed_run(tmp_path, "gpt2", trainable)
    assert plain[2] == [((1, 1, 1), backward)] * 4


def test_what_is_recomputed_changes_with_the_phase(tmp_path):
    schedule = [{"from_step": 1, "trainable": ["blocks[-1]"]}, {"from_step": 3, "trainable": ["embeddings"]}]
    _, model, steps = checkpointed_run(tmp_path, "gpt2", ["final_norm"], schedule, activation_checkpointing=True)
    assert steps == [((1, 1, 1), (0, 0, 0)), *[((1, 1, 2), (0, 0, 1))] * 2, ((2, 2, 2), (1, 1, 1))]
    assert not any("forward" in vars(block) for block in model.transformer.h)  # training leaves nothing behind


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trainable", [["blocks[1].norms"], ["embeddings", "blocks[0]", "blocks[2]"]])
def test_losses_and_weights_are_those_without_checkpointing(tmp_path, name, trainable):
    losses, model, steps = checkpointed_run(tmp_path, name, trainable)
    again = checkpointed_run(tmp_path, name, trainable, activation_checkpointing=True)
    assert again[2] != steps
    assert again[0] == losses
    assert equal(again[1], model)


def test_frozen_blocks_stay_in_eval_mode_where_they_are_recomputed(tmp_path):
    watch = Watch()
    trainer = trainer_of(tmp_path, tiny_gpt2(), ["embeddings"], (), watch, max_steps=1, activation_checkpointing=True)
    trainer.train()
    assert not any(name.startswith("transformer.h.") for name in watch.in_train_mode[0])


def test_every_nth_block_is_recomputed_where_the_recipe_says_so(tmp_path):
    changes = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    assert checkpointed_run(tmp_path, "gpt2", ["embeddings"], **changes)[2] == [((2, 1, 2), (1, 1, 1))] * 4


def test_a_model_without_checkpointing_is_refused_in_words(tmp_path):
    model = tiny_gpt2()
    model.supports_gradient_checkpointing = False
    args = training_arguments({"output_dir": str(tmp_path), "activation_checkpointing": True})
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no activation checkpointing"):
        check_support(args, model)


# ---- two processes --------------------------------------------------------------------------------------------------


class Compare(TrainerCallback):
    """After each step: whether both processes hold the same weights, and their digests."""

    def __init__(self):
        self.rows = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        both = [None, None]
        dist.all_gather_object(both, digests(model))
        self.rows.append([both[0] == both[1], both[0]])


def train_as_one_of_two(folder, how):
    compare = Compare()
    changes = {"activation_checkpointing": how == "checkpointing", "per_device_train_batch_size": 2}
    changes |= {"gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = trainer_of(folder, tiny_gpt2(), ["final_norm"], PHASES, compare, **changes)
    trainer.train()
    wrapped = trainer.model_wrapped
    return {
        "world_size": dist.get_world_size(),
        "wrapped": type(wrapped).__name__,
        "finds_unused": wrapped.find_unused_parameters,
        "equal": [same for same, _ in compare.rows],
        "digests": [found for _, found in compare.rows],
        "passed": trainer.tuning.audit.passed,
    }


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "checkpointing"])
def test_two_processes_hold_equal_weights_after_every_step_of_every_phase(tmp_path, how):
    found, _ = on_two_processes(train_as_one_of_two, tmp_path, how)
    assert (found["world_size"], found["wrapped"], found["finds_unused"]) == (2, "DistributedDataParallel", True)
    assert found["equal"] == [True] * 9
    assert found["passed"] is True
    plan = plan_freeze(tiny_gpt2(), ["final_norm"], schedule=PHASES)
    for name in plan.trainable:
        values = [step[name] for step in found["digests"]]
        began = next(parameter.from_step for parameter in plan.parameters if parameter.name == name)
        assert len(set(values[:began])) <= 1, f"{name} moved before its phase"
        assert len(set(values[began:])) == 9 - began, f"{name} stood still"
