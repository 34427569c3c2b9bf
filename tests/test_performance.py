"""What a step costs is timed by part, and set against what the plan needs and the machine can do."""

import copy
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import some_windows, tiny_gpt2
from partialtune.cost.flops import FORMULAS
from partialtune.cost.forecast import needed_products, utilisation
from partialtune.engine.trainer_overrides import TunedTrainer
from partialtune.freeze.plan import plan_freeze
from partialtune.training import performance as performance_module
from partialtune.training.performance import PARTS, ProductCount, StepTimer
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.settings import training_arguments
from partialtune.training.stopping import BatchWatch
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


def stock_trainer(folder, model, *callbacks, collate=collate_windows, steps=3, **changes):
    said = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": BATCH, "use_cpu": True}
    return Trainer(
        model=model,
        args=TrainingArguments(**{**said, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **changes}),
        train_dataset=some_windows(),
        eval_dataset=some_windows(),
        data_collator=collate,
        callbacks=list(callbacks),
    )


def test_a_stock_trainer_is_timed_between_the_first_callback_and_the_last(tmp_path):
    class SlowModel(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
            model.transformer.ln_f.weight.register_hook(lambda gradient: time.sleep(0.07))
            optimizer.optimizer.register_step_pre_hook(lambda *_: time.sleep(0.09))

        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(0.5)

    timer = StepTimer()
    callbacks = [timer, SlowModel(), SlowCallback(), timer.last]
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    model = tiny_gpt2(vocab_size=160)
    trainer = stock_trainer(
        tmp_path, model, *callbacks, collate=slow_collate, gradient_accumulation_steps=2, **evaluated
    )
    trainer.train()
    assert len(timer.parts) == 3
    for step in timer.parts:
        floors = {"data": 0.04, "forward": 0.10, "backward": 0.14, "optimizer": 0.09, "callbacks": 0.06}
        assert all(step[part] >= floor for part, floor in floors.items()), step
        assert sum(step.values()) < sum(floors.values()) + 0.4  # what evaluation took is in no part
    assert not timer.running


def test_the_hook_on_the_model_is_there_while_it_trains_and_copies_of_it_have_none(tmp_path):
    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.hooks = len(model._forward_hooks)
            self.copy, self.pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))

    timer, copies, model = StepTimer(), Copies(), tiny_gpt2(vocab_size=160)
    stock_trainer(tmp_path, model, timer, BatchWatch(None), copies, timer.last, steps=1).train()
    assert copies.hooks == 2
    assert not model._forward_hooks
    timer.begin()
    ids = torch.zeros((1, LENGTH), dtype=torch.long)
    for other in (copies.copy, copies.pickled):
        other.train()(input_ids=ids)
    timer.end()
    assert timer.parts[-1]["forward"] == 0


def test_the_hook_adds_no_graph_to_a_compiled_model():
    def graphs_of(*callbacks):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        model = tiny_gpt2(vocab_size=160).train()
        for callback in callbacks:
            callback.on_train_begin(None, None, None, model=model)
        ids = torch.zeros((2, LENGTH), dtype=torch.long)
        for _ in range(2):
            torch.compile(model, backend=backend)(input_ids=ids).logits.sum().backward()  # its loss breaks the graph
        return len(graphs)

    timer = StepTimer()
    timer.begin()
    assert graphs_of() == graphs_of(timer, BatchWatch(None)) == 1
    assert [part for part, _ in timer._moments] == ["", "forward", "forward"]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_products_of_the_first_batch_are_counted_and_those_of_evaluation_and_later_steps_are_not(
    accumulation, tmp_path
):
    count, model = ProductCount(), tiny_gpt2(vocab_size=160)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = stock_trainer(tmp_path, model, count, gradient_accumulation_steps=accumulation, **evaluated)
    with count:
        trainer.train()
    batch = collate_windows([some_windows()[row] for row in range(BATCH)])
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model.train()(**batch).loss.backward()
    assert count.flops_per_step == counter.get_total_flops() * accumulation > 0


def test_an_error_in_the_first_batch_leaves_no_counter_on_and_a_compiled_model_is_not_counted(tmp_path):
    class Failing(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_hook(self.fail)

        def fail(self, *_):
            raise ValueError("no memory")

    count = ProductCount()
    with pytest.raises(ValueError, match="no memory"), count:
        stock_trainer(tmp_path, tiny_gpt2(vocab_size=160), count, Failing()).train()
    assert count.flops_per_step is None
    assert _get_current_dispatch_mode() is None
    wrapped = torch.compile(tiny_gpt2(vocab_size=160), backend="eager")
    count.on_step_begin(SimpleNamespace(torch_compile=False), None, None, model=wrapped)
    count.on_step_begin(SimpleNamespace(torch_compile=True), None, None, model=wrapped._orig_mod)
    assert _get_current_dispatch_mode() is None


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
