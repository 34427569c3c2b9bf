"""Trainers that do something of their own in a step: with `attach` they end as they would without it."""

import copy
import re

import pytest
from torch.optim import SGD
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import some_windows
from partialtune.engine import row_digests
from partialtune.engine.attach import attach
from partialtune.engine.audited import audited
from partialtune.errors import RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.training.training_data import collate_windows
from test_prefix import build_any, largest_difference, losses, padded


class MeansAllLogits(Trainer):
    """Its loss counts the logits of padding, and is told of no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = output.logits.square().mean()
        return (loss, output) if return_outputs else loss


class AddsAllLogits(Trainer):
    """Its loss counts the logits of padding beside the labels."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs)
        loss = output.loss + output.logits.square().mean()
        return (loss, output) if return_outputs else loss


class OrdersOtherwise(Trainer):
    """Takes the arguments in another order."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class CallsTheModel(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class ExchangesTokens(Trainer):
    """Other tokens in every step, in a tensor of its own."""

    def training_step(self, model, inputs, *args, **kwargs):
        ids = inputs["input_ids"].clone()
        ids[:, 1] = 5 + self.state.global_step
        return super().training_step(model, {**inputs, "input_ids": ids}, *args, **kwargs)


class WritesTokens(Trainer):
    """Other tokens in every step, written into the batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        inputs["input_ids"][:, 1] = 5 + self.state.global_step
        return super().training_step(model, inputs, *args, **kwargs)


class LooksAtLogits(Trainer):
    """Writes what it sees of the logits into its log."""

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        loss, output = self.compute_loss(model, inputs, return_outputs=True)
        self.log({"logits": output.logits.mean().item(), "width": output.logits.shape[-1]})
        self.accelerator.backward(loss)
        return loss.detach()


def made(folder, kind, model, collator=None, callbacks=(), **changes):
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd"}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **changes}
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, **settings)
    data = some_windows(12)
    collator = collator or padded("right")
    return kind(model, args, train_dataset=data, data_collator=collator, callbacks=list(callbacks))


@pytest.mark.parametrize(
    "kind",
    [MeansAllLogits, AddsAllLogits, OrdersOtherwise, CallsTheModel, ExchangesTokens, WritesTokens, LooksAtLogits],
)
def test_a_trainer_of_ones_own_ends_with_the_weights_and_log_that_it_has_without_attach(tmp_path, kind):
    model = build_any("llama")
    plan = plan_freeze(model, ["blocks[-1]"])
    plain = made(tmp_path / "a", kind, copy.deepcopy(model))
    apply_plan(plain.model, plan)
    plain.train()
    trainer = made(tmp_path / "b", kind, model)
    tuning = attach(trainer, plan)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-5)
    assert largest_difference(trainer, plain) < 1e-6
    keys = ("logits", "width")
    seen, expected = ([e[k] for e in t.state.log_history for k in keys if k in e] for t in (trainer, plain))
    assert seen == pytest.approx(expected, abs=1e-5)
    assert tuning.fast.misses >= 12
    if kind is CallsTheModel:  # padding does not count: rows are found again beside others
        assert tuning.fast.hits == 24


def test_rows_of_a_trainer_are_digested_by_its_loader_and_nobody_else_sees_them(tmp_path, monkeypatch):
    seen = []

    class Looks(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(sorted(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

    model = build_any("llama")
    trainer = made(tmp_path, Looks, model, collate_windows, num_train_epochs=2)
    tuning = attach(trainer, plan_freeze(model, ["blocks[-1]"]))
    monkeypatch.setattr("partialtune.engine.prefix.rows_of", lambda *_, **__: pytest.fail("digested on the device"))
    trainer.train()
    assert (tuning.fast.hits, tuning.fast.misses) == (12, 12)
    assert seen == [["input_ids", "labels"]] * 6
    assert row_digests.ROWS not in seen[0]


class BreaksOff(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        error, self.error = self.error, None
        if error is not None:
            raise error


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_training_that_is_broken_off_in_a_phase_may_begin_again(tmp_path, error, checkpointing):
    model = build_any("llama")
    plan = plan_freeze(model, ["final_norm"], schedule=[{"from_step": 3, "trainable": ["blocks[-1]"]}])
    trainer = made(tmp_path, Trainer, model, callbacks=[BreaksOff(error())], gradient_checkpointing=checkpointing)
    tuning = attach(trainer, plan)
    with pytest.raises(error):
        trainer.train()
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(plan.trainable)
    trainer.train()
    assert tuning.audit.passed


@pytest.mark.parametrize("of", ["", "lm_head"])
def test_a_forward_hook_on_model_or_head_sees_logits(tmp_path, of):
    model, widths = build_any("llama"), set()
    trainer = made(tmp_path, Trainer, model, max_steps=2)
    tuning = attach(trainer, plan_freeze(model, ["blocks[-1]"]))
    model.get_submodule(of).register_forward_hook(
        lambda _module, _args, output: widths.add(getattr(output, "logits", output).shape[-1])
    )
    trainer.train()
    assert widths == {model.config.vocab_size}
    assert "loss" not in tuning.fast.in_use


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fast_paths": "loss"}, "fast_paths is 'loss'; it takes a list"),
        ({"fast_paths": ["loss", "speed"]}, "fast_paths: speed is none"),
        ({"prefix_cache": True}, "prefix_cache is True; allowed are auto, off, memory"),
        ({"delta_steps": 0}, "delta_steps is 0; allowed is a whole number of steps"),
        ({"delta_steps": "10"}, "delta_steps is '10'"),
        ({"weight_decay_on": "norms"}, "weight_decay_on is 'norms'; allowed are matrices, all"),
    ],
)
def test_a_setting_of_another_kind_is_refused_and_the_model_stays_as_it_was(tmp_path, options, words):
    trainer = made(tmp_path, Trainer, build_any("llama"))
    with pytest.raises(RecipeError, match=re.escape(words)):
        attach(trainer, plan_freeze(trainer.model, ["blocks[-1]"]), **options)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    attach(trainer, plan_freeze(trainer.model, ["blocks[-1]"]))


def test_what_is_no_plan_or_no_model_is_told_what_to_give(tmp_path):
    trainer = made(tmp_path, Trainer, build_any("llama"))
    optimizer = SGD(trainer.model.parameters())
    with pytest.raises(RecipeError, match=r"The plan is of type list\. Give what plan_freeze"):
        attach(trainer, ["blocks[-1]"])
    with pytest.raises(RecipeError, match="The plan is of type SGD"):
        audited(trainer.model, optimizer, plan_freeze(trainer.model, ["blocks[-1]"]))
    with pytest.raises(RecipeError, match=r"the model is of type Trainer\. .* attach"):
        audited(trainer, plan_freeze(trainer.model, ["blocks[-1]"]), optimizer)


def test_a_plan_that_was_made_before_the_vocabulary_grew_is_refused(tmp_path):
    trainer = made(tmp_path, Trainer, build_any("llama"))
    plan = plan_freeze(trainer.model, ["blocks[-1]"])
    trainer.model.resize_token_embeddings(150)
    with pytest.raises(RecipeError, match=r"embed_tokens.weight had the shape \(\d+, \d+\) and has \(150, .*after all"):
        attach(trainer, plan)


def test_reentrant_checkpointing_is_refused(tmp_path):
    """It gives no gradient to a block whose input needs none."""
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = made(tmp_path, Trainer, build_any("llama"), **options)
    attach(trainer, plan_freeze(trainer.model, ["blocks[-1]"]))
    with pytest.raises(RecipeError, match="use_reentrant"):
        trainer.train()
    assert [name for name, module in trainer.model.named_modules() if "forward" in vars(module)] == []
