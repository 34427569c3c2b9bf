"""What a step costs is timed by part, and set against what the plan needs and the machine can do."""

import time

import pytest
from transformers import Trainer, TrainerCallback

from conftest import some_windows, tiny_gpt2
from partialtune.cost.forecast import needed_products, utilisation
from partialtune.engine.trainer_overrides import TunedTrainer
from partialtune.freeze.plan import plan_freeze
from partialtune.training import performance as performance_module
from partialtune.training.performance import PARTS, StepTimer
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.settings import training_arguments
from partialtune.training.training_data import collate_windows

BATCH, LENGTH = 4, 16


class SlowCallback(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.02)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(0.02)

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.02)


def slow_collate(rows):
    time.sleep(0.04)
    return collate_windows(rows)


def train(folder, collate=collate_windows, callbacks=(), steps=5, **changes):
    model = tiny_gpt2(vocab_size=160)
    plan = plan_freeze(model, ["blocks[-1]"])
    said = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": BATCH, "use_cpu": True}
    args = training_arguments({**said, "save_strategy": "no", "disable_tqdm": True, **changes})
    run = attached_trainer(
        plan=plan,
        delta_steps=2,
        model=model,
        args=args,
        train_dataset=some_windows(),
        eval_dataset=some_windows(),
        data_collator=collate,
    )
    for callback in callbacks:
        run.trainer.add_callback(callback)
    run.train()
    return run.timer


def test_each_part_of_a_step_is_timed_and_callbacks_are_no_part_of_its_seconds(tmp_path):
    timer = train(tmp_path, slow_collate, [SlowCallback()], max_grad_norm=1.0)
    assert len(timer.parts) == 5
    for step, seconds in zip(timer.parts, timer.seconds, strict=True):
        assert set(step) == set(PARTS)
        assert all(part > 0 for part in step.values())
        assert step["callbacks"] >= 0.06
        assert step["data"] >= 0.04
        assert seconds == pytest.approx(sum(step.values()) - step["callbacks"])
    shares = timer.shares()
    assert sum(shares.values()) == pytest.approx(1)


def test_evaluation_and_saves_between_two_steps_belong_to_none(tmp_path, monkeypatch):
    timed = []

    def note(trainer, *args, **kwargs):
        timed.append(trainer.callback_handler.callbacks[0].running)  # the clock comes first
        return {}

    monkeypatch.setattr(TunedTrainer, "_save_checkpoint", note)
    monkeypatch.setattr(Trainer, "evaluate", note)
    train(tmp_path, steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    assert len(timed) >= 6  # three of each
    assert not any(timed)


def test_accumulated_passes_add_up_to_one_step(tmp_path):
    timer = train(tmp_path, slow_collate, gradient_accumulation_steps=3)
    assert len(timer.parts) == 5
    assert all(step["data"] >= 0.08 for step in timer.parts)  # the last step of an epoch has two passes left


def test_the_first_step_warms_up_and_counts_only_where_it_is_alone():
    timer = StepTimer()
    assert timer.median() is None
    assert timer.shares() is None
    timer.parts = [{**dict.fromkeys(PARTS, 0.0), "forward": 9.0}]
    assert timer.median() == 9.0
    timer.parts += [{**dict.fromkeys(PARTS, 0.0), "forward": 1.0, "backward": 2.0, "callbacks": 1.0}] * 3
    assert timer.median() == 3.0
    assert timer.shares() == {"data": 0, "forward": 0.25, "backward": 0.5, "optimizer": 0, "callbacks": 0.25}


def test_on_cuda_the_moments_are_events_that_nothing_waits_for_before_the_step_ends(monkeypatch):
    waited = []

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 1e3
            self.at = Event.now

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, later):
            return later.at - self.at  # ms

    monkeypatch.setattr(performance_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(performance_module.torch.cuda, "Event", Event)
    timer = StepTimer()
    timer.begin()
    for part in ("data", "callbacks", "forward", "backward", "optimizer"):
        timer.mark(part)
    assert not waited
    timer.end()
    assert timer.parts == [{"data": 1.0, "forward": 1.0, "backward": 1.0, "optimizer": 1.0, "callbacks": 2.0}]


def test_a_mark_outside_a_step_is_ignored():
    timer = StepTimer()
    timer.mark("forward")
    timer.end()
    assert timer.parts == []


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_cached_prefix_saves_the_forward_products_of_the_blocks_below_what_trains(accumulation):
    model = tiny_gpt2(vocab_size=160)
    plan = plan_freeze(model, ["blocks[-1]", "final_norm"])
    batch = (BATCH, LENGTH, accumulation)
    whole = needed_products(model, plan, *batch)
    above = needed_products(model, plan, *batch, prefix_cached=True)
    matrices = sum(p.numel for p in plan.parameters if p.block in (0, 1) and len(p.shape) == 2)
    assert whole - above == accumulation * 2 * BATCH * LENGTH * matrices


def test_without_a_frozen_block_below_nothing_is_saved_and_with_the_head_alone_all_blocks_are():
    model = tiny_gpt2(vocab_size=160)
    embeddings = plan_freeze(model, ["embeddings", "final_norm", "head"])
    assert needed_products(model, embeddings, BATCH, LENGTH) == needed_products(
        model, embeddings, BATCH, LENGTH, prefix_cached=True
    )
    head = plan_freeze(model, ["final_norm", "head"], head="untied")
    product = 2 * BATCH * LENGTH * model.lm_head.weight.numel()  # forward, for activations, for weights
    assert needed_products(model, head, BATCH, LENGTH, prefix_cached=True) == 3 * product


def test_what_a_schedule_needs_changes_on_the_way_and_is_not_said():
    model = tiny_gpt2(vocab_size=160)
    plan = plan_freeze(model, ["final_norm"], schedule=[{"from_step": 2, "trainable": ["blocks[-1]"]}])
    assert needed_products(model, plan, BATCH, LENGTH) is None


def test_a_plan_for_another_model_has_no_known_need():
    assert (
        needed_products(
            tiny_gpt2(n_layer=2, vocab_size=160), plan_freeze(tiny_gpt2(vocab_size=160), ["all"]), BATCH, LENGTH
        )
        is None
    )


def test_utilisation_is_needed_products_by_time_and_rate():
    assert utilisation(needed=2_000, step_seconds=4.0, rate=1_000.0) == 0.5
    assert utilisation(needed=None, step_seconds=4.0, rate=1_000.0) is None
    assert utilisation(needed=2_000, step_seconds=None, rate=1_000.0) is None
