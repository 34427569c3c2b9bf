"""Deltas are distances from a real copy of the start, for every parameter and part, in anybody's Trainer."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import some_windows, tiny_gpt2
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.proof.distances import change_sums
from partialtune.proof.snapshot import Snapshot, measure_deltas, take_snapshot
from partialtune.training.training_data import collate_windows


def make_trainer(tmp_path, model, callbacks, **changes):
    settings = {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**settings, **changes},
    )
    return Trainer(
        model=model, args=args, train_dataset=some_windows(), data_collator=collate_windows, callbacks=callbacks
    )


def read_lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "weight_deltas.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five steps of a plain Trainer with the callback: folder, model, plan, weights before."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1].mlp", "final_norm"])
    apply_plan(model, plan)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback = WeightDeltaCallback(plan, delta_steps=2)
    trainer = make_trainer(folder, model, [callback])
    trainer.train()
    return folder, model, plan, before, trainer


def test_a_report_every_delta_steps_and_at_the_end_has_a_line_for_every_parameter(trained):
    folder, model, *_ = trained
    steps = [line["step"] for line in read_lines(folder)]
    assert sorted(set(steps)) == [2, 4, 5]
    assert len(steps) == 3 * len(list(model.parameters()))


def test_the_deltas_are_the_distances_from_the_weights_before(trained):
    folder, model, _, before, _ = trained
    last = {line["name"]: line for line in read_lines(folder) if line["step"] == 5}
    for name, parameter in model.named_parameters():
        change = (parameter.detach().double() - before[name].double()).flatten()
        assert last[name]["l2_delta"] == pytest.approx(float(change.norm()), rel=1e-12)
        assert last[name]["max_abs_delta"] == float(change.abs().max())
        norm = float(before[name].double().norm())
        assert last[name]["relative_delta"] == (
            pytest.approx(float(change.norm()) / norm, rel=1e-12) if norm else None
        ) or (last[name]["l2_delta"] == 0.0)


def test_frozen_parameters_moved_by_exactly_zero_and_trainable_ones_moved(trained):
    folder, _, plan, _, _ = trained
    for line in read_lines(folder):
        assert line["trainable"] == (line["name"] in plan.trainable)
        assert (line["l2_delta"] > 0) == line["trainable"], line["name"]


def test_groups_are_in_the_log_under_stable_names(trained):
    *_, trainer = trained
    logged = [entry for entry in trainer.state.log_history if "delta/frozen_l2" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    assert logged[-1]["delta/frozen_l2"] == 0.0
    assert logged[-1]["delta/trainable_l2"] > logged[-1]["delta/final_norm"] > 0.0
    assert logged[-1]["delta/block_02/mlp"] > 0.0
    assert logged[-1]["delta/block_00/attention"] == 0.0


def test_the_trainable_distance_is_the_root_of_the_summed_squares(trained):
    folder, _, _, _, trainer = trained
    moved = [line["l2_delta"] for line in read_lines(folder) if line["step"] == 5 and line["trainable"]]
    logged = [entry for entry in trainer.state.log_history if "delta/frozen_l2" in entry][-1]
    assert logged["delta/trainable_l2"] == pytest.approx(sum(value**2 for value in moved) ** 0.5)


def test_a_snapshot_is_a_copy_and_not_the_live_tensor():
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    snapshot = take_snapshot(model, plan)
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(1.0)
    moved = {delta.name: delta for delta in measure_deltas(model, snapshot)}
    assert moved["transformer.ln_f.weight"].l2_delta == pytest.approx(32**0.5)
    assert moved["transformer.ln_f.weight"].max_abs_delta == 1.0
    assert moved["transformer.ln_f.weight"].relative_delta == pytest.approx(1.0)
    assert moved["transformer.ln_f.bias"].relative_delta is None  # its norm before is 0


def test_two_callbacks_share_one_snapshot_and_a_later_training_takes_a_new_one():
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    first = take_snapshot(model, plan)
    assert take_snapshot(model, plan, known=first) is first
    with torch.no_grad():
        model.transformer.ln_f.weight.add_(1.0)
    assert take_snapshot(model, plan, known=first) is not first


@pytest.mark.parametrize("later", [False, True])
def test_the_callbacks_of_one_trainer_hold_the_same_snapshot_and_the_model_and_the_saved_state_hold_none(
    tmp_path, later
):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    callbacks = [WeightDeltaCallback(plan), FreezeAuditCallback(plan)]
    trainer = make_trainer(tmp_path, model, [] if later else callbacks, max_steps=1)
    for callback in callbacks if later else ():
        trainer.add_callback(callback)
    trainer.train()
    deltas, audit = callbacks
    assert deltas.snapshot is audit.snapshot is not None
    assert not any(isinstance(value, Snapshot) for value in vars(model).values())
    trainer.save_state()
    assert "snapshot" not in (tmp_path / "trainer_state.json").read_text()
    trainer = make_trainer(tmp_path, model, [second := FreezeAuditCallback(plan)], max_steps=1)
    assert second.snapshot is not audit.snapshot  # the model has been trained since


def exchange_rows(model):
    with torch.no_grad():
        for weight in (model.transformer.wte.weight, model.transformer.ln_f.weight):
            weight[[3, 7]] = weight[[7, 3]]


def model_of_random_numbers():
    model = tiny_gpt2()
    torch.nn.init.normal_(model.transformer.ln_f.weight)
    return model


def test_a_second_trainer_after_rows_were_exchanged_measures_from_what_is_there(tmp_path):
    model = model_of_random_numbers()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    for number, rate in enumerate((0.0, 1e-6)):  # after the first nothing but the exchange tells the two starts apart
        deltas, audit = WeightDeltaCallback(plan, delta_steps=1), FreezeAuditCallback(plan)
        make_trainer(tmp_path / str(number), model, [deltas, audit], max_steps=1, learning_rate=rate).train()
        assert audit.result.passed
        assert max(line["max_abs_delta"] for line in read_lines(tmp_path / str(number))) < 1e-5
        exchange_rows(model)


def test_exchanged_rows_of_a_frozen_parameter_have_an_unknown_distance_and_are_no_zero():
    model = model_of_random_numbers()
    snapshot = take_snapshot(model, plan_freeze(model, ["final_norm"]))
    exchange_rows(model)
    moved = {delta.name: delta for delta in measure_deltas(model, snapshot)}
    assert moved["transformer.wte.weight"].l2_delta is None
    assert moved["transformer.ln_f.weight"].l2_delta > 0


def test_a_parameter_that_went_came_or_has_another_shape_has_an_unknown_distance():
    model = tiny_gpt2()
    snapshot = take_snapshot(model, plan_freeze(model, ["final_norm"]))
    model.transformer.ln_f.weight = torch.nn.Parameter(torch.ones(5))
    del model.transformer.ln_f.bias, model.transformer.wpe
    model.extra = torch.nn.Linear(2, 2, bias=False)
    moved = {delta.name: delta.l2_delta for delta in measure_deltas(model, snapshot)}
    others = {"extra.weight", *(f"transformer.{name}" for name in ("ln_f.weight", "ln_f.bias", "wpe.weight"))}
    assert {name for name, distance in moved.items() if distance is None} == others
    assert {distance for name, distance in moved.items() if name not in others} == {0.0}


@pytest.mark.parametrize(
    ("before", "now", "distance"),
    [
        (torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([1 + 1e-9, 3.0], dtype=torch.float64), 1e-9),
        (torch.tensor([1 + 1j, 2]), torch.tensor([1 + 4j, 6]), 5.0),
        (torch.tensor([1 + 1e-9j], dtype=torch.complex128), torch.tensor([1 + 3e-9j], dtype=torch.complex128), 2e-9),
        (torch.tensor([2**62, 5]), torch.tensor([2**62 + 1, 5]), 1.0),
        (torch.tensor([1, 5], dtype=torch.uint8), torch.tensor([0, 5], dtype=torch.uint8), 1.0),
    ],
)
def test_distances_of_values_that_fp32_cannot_hold(before, now, distance):
    assert float(change_sums(now, before)[0]) ** 0.5 == pytest.approx(distance, rel=1e-6)


def test_a_frozen_parameter_that_changed_has_an_unknown_distance_and_is_no_zero():
    model = tiny_gpt2()
    snapshot = take_snapshot(model, plan_freeze(model, ["final_norm"]))
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] += 1e-3
    moved = {delta.name: delta for delta in measure_deltas(model, snapshot)}
    assert moved["transformer.wpe.weight"].l2_delta is None


def test_a_weight_that_is_not_finite_gives_no_nan_in_the_file(tmp_path):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    snapshot = take_snapshot(model, plan)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    moved = {delta.name: delta for delta in measure_deltas(model, snapshot)}
    assert moved["transformer.ln_f.weight"].l2_delta is None


def test_an_attached_callback_sends_its_values_through_the_trainers_log(tmp_path):
    from transformers import TrainerCallback

    class Tracker(TrainerCallback):
        seen: list = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(logs)

    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    callback, tracker = WeightDeltaCallback(plan, delta_steps=5), Tracker()
    trainer = make_trainer(tmp_path, model, [tracker, callback])
    callback.attach(trainer)
    trainer.train()
    assert any("delta/trainable_l2" in logs for logs in tracker.seen)


def test_names_are_plain_under_torch_compile_wrapping():
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    wrapped = torch.compile(model, backend="eager")
    snapshot = take_snapshot(wrapped, plan)
    assert snapshot.copies.keys() == set(plan.trainable)


def test_a_report_does_not_swallow_the_trainers_own_log_of_that_step(tmp_path):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["final_norm"])
    apply_plan(model, plan)
    callback = WeightDeltaCallback(plan, delta_steps=2)
    trainer = make_trainer(tmp_path, model, [callback], logging_steps=1)
    callback.attach(trainer)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
