"""An optimizer that exists already, suited to a plan: what leaves it, what is held, what is refused."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor

from conftest import some_windows, tiny_gpt2
from partialtune.engine.attach import attach
from partialtune.engine.fast_paths import FastPaths
from partialtune.engine.phases import Phases
from partialtune.engine.plan_optimizer import apply_beside_optimizer, bare_optimizer, key_by_name, suit_optimizer
from partialtune.errors import FreezeViolation, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.training.training_data import collate_windows

SCHEDULE = [{"from_step": 2, "trainable": ["blocks[-1].mlp"]}]
WITH_RATE = [{"from_step": 2, "trainable": ["blocks[-1].mlp"], "learning_rate": 1e-3}]
FINAL_NORM = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
MLP = [name for name, _ in tiny_gpt2().named_parameters() if ".h.2.mlp." in name]

OPTIMIZERS = {
    "AdamW over all": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "AdamW with names": lambda model: torch.optim.AdamW(model.named_parameters(), lr=1e-2),
    "AdamW with a rate as tensor": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2)),
    "SGD with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-2),
    "Adafactor": lambda model: Adafactor(model.parameters(), lr=1e-2, relative_step=False),
    "decay groups": lambda model: torch.optim.AdamW(decay_groups(model), lr=1e-2),
}


def decay_groups(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def planned(trainable=("final_norm",), schedule=SCHEDULE, head="tied"):
    model = tiny_gpt2()
    return model, plan_freeze(model, list(trainable), schedule=schedule, head=head)


def names_by_group(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def in_optimizer(model, optimizer):
    return sorted(name for names in names_by_group(model, optimizer) for name in names)


def no_fast_paths(model):
    return FastPaths(model, (), ())


def a_step(model, optimizer):
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_leave_the_optimizer_and_later_ones_come_in_with_their_phase(name):
    model, plan = planned()
    optimizer = OPTIMIZERS[name](model)
    a_step(model, optimizer)  # every parameter has state
    groups = len(optimizer.param_groups)
    assert apply_beside_optimizer(model, plan, optimizer) == []
    assert in_optimizer(model, optimizer) == sorted(FINAL_NORM + MLP)
    phases = Phases(plan, model, optimizer, no_fast_paths(model))
    phases.start(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(4):
        phases.step_begins(step)
        expected = FINAL_NORM + MLP * (step >= 2)
        assert in_optimizer(model, optimizer) == sorted(expected)
        assert {id(parameter) for parameter in optimizer.state} == {id(model.get_parameter(name)) for name in expected}
        a_step(model, optimizer)
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == set(expected)
    assert len(optimizer.param_groups) == groups
    phases.end()


def test_members_of_a_group_keep_their_names_in_an_optimizer_of_named_parameters():
    model, plan = planned(schedule=WITH_RATE)
    optimizer = OPTIMIZERS["AdamW with names"](model)
    apply_beside_optimizer(model, plan, optimizer)
    assert [group["param_names"] for group in optimizer.param_groups] == [FINAL_NORM, MLP]
    assert names_by_group(model, optimizer) == [FINAL_NORM, MLP]


def test_what_was_held_is_in_the_optimizer_again_when_a_training_ends_early_so_that_another_can_begin():
    model, plan = planned()
    optimizer = OPTIMIZERS["Adagrad"](model)
    apply_beside_optimizer(model, plan, optimizer)
    for _ in range(2):
        phases = Phases(plan, model, optimizer, no_fast_paths(model))
        phases.start(0)
        assert names_by_group(model, optimizer) == [FINAL_NORM]
        phases.end()
        assert sorted(names_by_group(model, optimizer)[0]) == sorted(FINAL_NORM + MLP)
        assert len(optimizer.state) == 6


def test_a_rate_of_its_own_gets_a_group_with_the_other_settings_and_suiting_again_changes_nothing():
    model, plan = planned(schedule=WITH_RATE)
    optimizer = OPTIMIZERS["decay groups"](model)
    apply_beside_optimizer(model, plan, optimizer)
    matrices, others = [n for n in MLP if n.endswith("weight")], [n for n in MLP if n.endswith("bias")]
    for _ in range(2):
        assert names_by_group(model, optimizer) == [matrices, [*FINAL_NORM], others]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2, 1e-3]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
        suit_optimizer(optimizer, model, plan)
    LambdaLR(optimizer, lambda step: 0.5**step)  # made after: it keeps a rate for each group
    suit_optimizer(optimizer, model, plan)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2, 1e-3]


def test_a_rate_as_tensor_stays_a_tensor_of_its_own():
    model, plan = planned(schedule=WITH_RATE)
    optimizer = OPTIMIZERS["AdamW with a rate as tensor"](model)
    apply_beside_optimizer(model, plan, optimizer)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert (first.item(), second.item()) == (pytest.approx(1e-2), pytest.approx(1e-3))


def test_a_scheduler_that_exists_goes_on_though_a_group_is_empty():
    model, plan = planned()
    optimizer = OPTIMIZERS["decay groups"](model)
    scheduler = LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.1**step])
    apply_beside_optimizer(model, plan, optimizer)
    phases = Phases(plan, model, optimizer, no_fast_paths(model))
    phases.start(0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    for step in range(3):
        phases.step_begins(step)
        a_step(model, optimizer)
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-2 / 8), pytest.approx(1e-5)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]


def test_a_rate_of_its_own_is_refused_where_a_scheduler_exists_and_the_optimizer_stays_as_it_was():
    model, plan = planned(schedule=WITH_RATE)
    optimizer = OPTIMIZERS["AdamW over all"](model)
    LambdaLR(optimizer, lambda step: 1.0)
    before = names_by_group(model, optimizer)
    with pytest.raises(RecipeError, match=r"\(0\.001\).*scheduler already.*Make the scheduler after attach"):
        apply_beside_optimizer(model, plan, optimizer)
    assert names_by_group(model, optimizer) == before


def test_a_rate_of_its_own_is_refused_where_adafactor_chooses_rates_itself():
    model, plan = planned(schedule=WITH_RATE)
    with pytest.raises(RecipeError, match=r"relative_step chooses its rates itself\. Say relative_step=False"):
        apply_beside_optimizer(model, plan, Adafactor(model.parameters()))


def test_what_trains_and_is_missing_is_named_and_not_added():
    model, plan = planned()
    optimizer = torch.optim.SGD([model.transformer.ln_f.weight], lr=1e-2)
    assert apply_beside_optimizer(model, plan, optimizer) == [
        "transformer.h.2.mlp.c_fc.weight",
        *MLP[1:],
        FINAL_NORM[1],
    ]
    assert names_by_group(model, optimizer) == [FINAL_NORM[:1]]


def test_parameters_of_another_model_are_refused_and_frozen_ones_of_it_leave_in_silence():
    model, plan = planned()
    foreign = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.AdamW([*model.parameters(), foreign], lr=1e-2)
    with pytest.raises(RecipeError, match=r"1 parameters that are not the model's, the first of shape \(3, 5\)"):
        apply_beside_optimizer(model, plan, optimizer)
    assert model.transformer.wte.weight.requires_grad  # the model was not touched
    foreign.requires_grad_(False)
    apply_beside_optimizer(model, plan, optimizer)
    assert in_optimizer(model, optimizer) == sorted(FINAL_NORM + MLP)


def test_an_optimizer_made_before_the_head_is_untied_is_refused_before_and_after_the_plan_is_applied():
    model, plan = planned(["head"], (), head="untied")
    optimizer = OPTIMIZERS["AdamW over all"](model)
    with pytest.raises(RecipeError, match=r"lm_head\.weight, and the optimizer was made before. Call apply_plan"):
        apply_beside_optimizer(model, plan, optimizer)
    assert model.lm_head.weight is model.transformer.wte.weight
    apply_plan(model, plan)
    with pytest.raises(RecipeError, match=r"not lm_head\.weight: it was made before\. Make the optimizer after"):
        apply_beside_optimizer(model, plan, optimizer)
    assert apply_beside_optimizer(model, plan, OPTIMIZERS["AdamW over all"](model)) == []


def test_what_is_no_optimizer_or_packs_its_state_is_refused_in_words():
    model, plan = planned()
    with pytest.raises(RecipeError, match=r"is a object, which is no torch\.optim\.Optimizer"):
        apply_beside_optimizer(model, plan, object())
    with pytest.raises(RecipeError, match=r"LBFGS keeps values of many parameters together \(in `_params`\)"):
        apply_beside_optimizer(model, plan, torch.optim.LBFGS(model.parameters()))
    flat = OPTIMIZERS["AdamW over all"](model)
    flat.param_groups[0]["flat_exp_avg"] = torch.zeros(10)
    with pytest.raises(RecipeError, match="in `flat_exp_avg`"):
        apply_beside_optimizer(model, plan, flat)
    other = OPTIMIZERS["AdamW over all"](model)
    other.state["all"] = {"step": 0}
    with pytest.raises(RecipeError, match="under keys that are none of its parameters"):
        apply_beside_optimizer(model, plan, other)


def test_state_is_kept_by_name_until_the_hooks_are_taken_off():
    model, plan = planned()
    optimizer = OPTIMIZERS["SGD with momentum"](model)
    apply_beside_optimizer(model, plan, optimizer)
    a_step(model, optimizer)
    handles = key_by_name(optimizer, model)
    saved = optimizer.state_dict()
    assert set(saved["state"]) == set(FINAL_NORM + MLP)
    optimizer.load_state_dict(saved)
    for handle in handles:
        handle.remove()
    assert set(optimizer.state_dict()["state"]) == set(range(6))


def test_wrappers_of_accelerate_and_lightning_are_looked_through():
    accelerate, lightning = pytest.importorskip("accelerate"), pytest.importorskip("lightning.pytorch.core.optimizer")
    optimizer = OPTIMIZERS["AdamW over all"](tiny_gpt2())
    assert bare_optimizer(accelerate.Accelerator(cpu=True).prepare(optimizer)) is optimizer
    assert bare_optimizer(lightning.LightningOptimizer(optimizer)) is optimizer
    assert bare_optimizer(optimizer) is optimizer


# ---- a user's own optimizer in an attached Trainer ------------------------------------------------------------------


class Groups(TrainerCallback):
    """What the optimizer holds in each step."""

    def __init__(self):
        self.held = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.held.append(in_optimizer(model, optimizer))


@pytest.mark.parametrize("name", ["AdamW over all", "decay groups"])
def test_a_users_own_optimizer_and_scheduler_carry_the_phases_of_an_attached_trainer(name, tmp_path):
    model, plan = planned()
    optimizer, groups = OPTIMIZERS[name](model), Groups()
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, save_strategy="no", report_to="none")
    data = {"train_dataset": some_windows(), "data_collator": collate_windows}
    trainer = Trainer(model, args, optimizers=(optimizer, scheduler), callbacks=[groups], **data)
    tuning = attach(trainer, plan)
    for _ in range(2):  # a second training begins anew
        trainer.train()
        assert tuning.audit.passed
        assert groups.held == [sorted(FINAL_NORM + MLP * (step >= 2)) for step in range(4)]
        assert not optimizer._optimizer_state_dict_post_hooks
        groups.held.clear()


def test_what_a_users_own_optimizer_lacks_of_a_later_phase_stops_an_attached_trainer_before_its_first_step(tmp_path):
    model, plan = planned()
    optimizer = torch.optim.AdamW(model.transformer.ln_f.parameters(), lr=1e-2)
    args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, save_strategy="no", report_to="none")
    data = {"train_dataset": some_windows(), "data_collator": collate_windows}
    trainer = Trainer(model, args, optimizers=(optimizer, None), **data)
    attach(trainer, plan)
    with pytest.raises(FreezeViolation, match=r"step 0: 4 .* missing from the optimizer: transformer\.h\.2\.mlp"):
        trainer.train()
