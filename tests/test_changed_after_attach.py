"""What a Trainer or a model becomes after `attach`, or is in train mode alone: computed as without it, or refused."""

import copy
import functools
import types

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_pt_utils import LabelSmoother

import partialtune as pt
from conftest import tiny_gpt2
from partialtune.engine import prefix
from partialtune.engine.forward_stack import computes_otherwise
from partialtune.engine.trainer_overrides import TunedTrainer
from partialtune.errors import FreezeViolation, InputError, RecipeError

LAST = ["blocks[-1]", "final_norm"]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 2}


def trainer_of(folder, model, callbacks=(), kind=Trainer, **settings):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 90, (12,), generator=draw) for _ in range(8)]
    known = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    windows = [{"input_ids": row, "labels": row.clone()} for row in rows]
    return kind(
        model,
        TrainingArguments(str(folder), remove_unused_columns=False, **{**known, **quiet, **settings}),
        train_dataset=windows,
        eval_dataset=windows,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_dropout():
    return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def with_a_term_of_logits(trainer):
    """As z-loss: of the logits, and in training alone."""
    forward = trainer.model.forward

    def patched(*args, **kwargs):
        out = forward(*args, **kwargs)
        if trainer.model.training and out.loss is not None:
            out.loss = out.loss + 0.1 * out.logits.logsumexp(-1).pow(2).mean()
        return out

    trainer.model.forward = patched


def with_a_loss_of_its_own(trainer):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten() % logits.shape[-1])

    trainer.compute_loss_func = loss


def with_smoothed_labels(trainer):
    trainer.label_smoother = LabelSmoother(0.1)


def with_noise_on_embeddings(trainer):
    class Noise(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.get_input_embeddings().register_forward_hook(
                lambda module, args, out: (
                    out + 0.5 * torch.randn_like(out) if module.training or model.training else out
                )
            )

    trainer.add_callback(Noise())


def with_another_forward_of_the_embeddings(trainer):
    embeddings = trainer.model.get_input_embeddings()
    forward = embeddings.forward
    embeddings.forward = lambda ids: forward(ids) + 0.5 * torch.randn(*ids.shape, embeddings.embedding_dim)


def with_neftune(trainer):
    trainer.neftune_noise_alpha = trainer.args.neftune_noise_alpha = 5.0


def with_a_term_of_logits_as_training_begins(trainer):
    class Late(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with_a_term_of_logits(trainer)

    trainer.add_callback(Late())


def with_another_forward_of_a_frozen_block(trainer):
    mlp = trainer.model.transformer.h[0].mlp
    forward = mlp.forward
    mlp.forward = functools.wraps(forward)(lambda states: forward(states) + 0.5 * torch.randn_like(states))


def with_a_hook_on_an_activation(trainer):
    trainer.model.transformer.h[-1].mlp.act.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = [
    with_a_term_of_logits,
    with_a_term_of_logits_as_training_begins,
    with_another_forward_of_a_frozen_block,
    with_a_hook_on_an_activation,
    with_a_loss_of_its_own,
    with_smoothed_labels,
    with_noise_on_embeddings,
    with_another_forward_of_the_embeddings,
    with_neftune,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_set_after_attach_trains_as_in_the_plain_trainer(tmp_path, change):
    model = without_dropout()
    plan = pt.plan_freeze(model, LAST)
    plain = trainer_of(tmp_path / "plain", copy.deepcopy(model))
    pt.apply_plan(plain.model, plan)
    change(plain)
    plain.train()
    attached = trainer_of(tmp_path / "attached", model)
    tuning = pt.attach(attached, plan)
    change(attached)
    attached.train()
    assert losses(attached) == pytest.approx(losses(plain), abs=1e-5)
    assert tuning.audit.passed


def test_a_callback_that_writes_frozen_weights_when_training_ends_fails_the_audit(tmp_path):
    class Averages(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.transformer.h[0].mlp.c_fc.weight.add_(1.0)

    trainer = trainer_of(tmp_path, tiny_gpt2(), [Averages()])
    tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    with pytest.raises(FreezeViolation, match=r"h\.0\.mlp\.c_fc\.weight"):
        trainer.train()
    assert not tuning.audit.passed


def test_a_lowest_rate_for_all_parts_is_refused(tmp_path):
    led = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, tiny_gpt2(), lr_scheduler_kwargs={"min_lr": 5e-5}, **led)
    plan = pt.plan_freeze(trainer.model, LAST, part_learning_rates={"final_norm": 1e-4})
    with pytest.raises(RecipeError, match="min_lr"):
        pt.attach(trainer, plan)


def test_a_checkpoint_without_optimizer_is_told_of(tmp_path, caplog):
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_of(tmp_path, tiny_gpt2(), save_only_model=True, **EVERY_STEP)
        pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
        caplog.clear()
        trainer.train(resume_from_checkpoint=resume)
        assert ("checkpoint-2 holds no optimizer state" in caplog.text) == (resume is not None)


def test_a_checkpoint_that_was_saved_without_attach_is_refused_in_words(tmp_path):
    plain = trainer_of(tmp_path, tiny_gpt2(), **EVERY_STEP)
    pt.apply_plan(plain.model, pt.plan_freeze(plain.model, LAST))
    plain.train()
    trainer = trainer_of(tmp_path, tiny_gpt2(), **EVERY_STEP)
    pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    with pytest.raises(InputError, match="saved without attach"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_a_callback_gets_batches_as_the_collator_made_them(tmp_path, workers):
    keys = set()

    class Scores(TrainerCallback):
        def look(self, args, state, control, model=None, train_dataloader=None, eval_dataloader=None, **kwargs):
            for loader in (train_dataloader, eval_dataloader):
                for batch in loader or ():
                    model(**batch)
                    keys.update(batch)

        on_step_begin = on_prediction_step = on_evaluate = on_train_end = look

    settings = {"eval_strategy": "steps", "eval_steps": 3, **workers}
    trainer = trainer_of(tmp_path, without_dropout(), [Scores()], **settings)
    pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    trainer.train()
    for batch in trainer.get_train_dataloader():
        trainer.model(**batch)
        keys.update(batch)
    assert keys == {"input_ids", "labels"}


def test_rows_of_training_and_evaluation_come_with_their_batches(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, without_dropout(), eval_strategy="steps", eval_steps=3)
    tuning = pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    digested = []
    monkeypatch.setattr(prefix, "rows_of", lambda *args: digested.append(args))
    trainer.train()
    assert not digested
    assert tuning.fast.hits == (6 * 4 + 2 * 8) - 8


def of_both(folder, kind, **settings):
    """A plain Trainer of this class and an attached one, both trained."""
    model = without_dropout()
    plan = pt.plan_freeze(model, LAST)
    plain = trainer_of(folder / "plain", copy.deepcopy(model), kind=kind, **settings)
    pt.apply_plan(plain.model, plan)
    attached = trainer_of(folder / "attached", model, kind=kind, **settings)
    pt.attach(attached, plan)
    plain.train()
    attached.train()
    return plain, attached


class ChangesBatches(Trainer):
    met = 0

    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.met += 1
            batch["input_ids"] = (batch["input_ids"] + self.met) % 90
        return batches, items


class ChangesWhatItsLoaderGives(Trainer):
    def get_train_dataloader(self):
        return Shifted(super().get_train_dataloader())


class Shifted:
    def __init__(self, loader):
        self.loader, self.met = loader, 0

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for batch in self.loader:
            self.met += 1
            yield {**batch, "input_ids": (batch["input_ids"] + self.met) % 90}


class LooksAtPredictions(Trainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, _ = super().prediction_step(model, inputs, False, ignore_keys)
        self.seen = [*getattr(self, "seen", []), logits]
        return loss, None, None


class GivesNoOptimizerBack(Trainer):
    def create_optimizer(self, *args):
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("kind", [ChangesBatches, ChangesWhatItsLoaderGives, GivesNoOptimizerBack])
def test_a_trainer_with_methods_of_its_own_trains_as_without_attach(tmp_path, kind):
    plain, attached = of_both(tmp_path, kind)
    assert losses(attached) == pytest.approx(losses(plain), abs=1e-5)


def test_a_prediction_of_a_users_own_looks_at_logits(tmp_path):
    plain, attached = of_both(tmp_path, LooksAtPredictions, eval_strategy="steps", eval_steps=3)
    assert len(attached.seen) == len(plain.seen) == 2
    for ours, own in zip(attached.seen, plain.seen, strict=True):
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=0)


def test_an_evaluation_of_a_users_own_gets_batches_as_the_collator_made_them(tmp_path):
    keys = set()

    class Evaluates(Trainer):
        def evaluation_loop(self, dataloader, *args, **kwargs):
            for batch in dataloader:
                self.model(**{name: value.to(self.args.device) for name, value in batch.items()})
                keys.update(batch)
            return super().evaluation_loop(dataloader, *args, **kwargs)

    of_both(tmp_path, Evaluates, eval_strategy="steps", eval_steps=3)
    assert keys == {"input_ids", "labels"}


def test_a_data_set_of_ready_batches_stays_as_it_is(tmp_path):
    trainer = trainer_of(tmp_path, without_dropout(), per_device_train_batch_size=1)
    trainer.train_dataset = [{name: value[None] for name, value in one.items()} for one in trainer.train_dataset]
    trainer.data_collator = lambda rows: rows[0]
    pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    trainer.train()
    assert {name for batch in trainer.train_dataset for name in batch} == {"input_ids", "labels"}


def test_reentrant_checkpointing_of_the_model_is_refused_as_that_of_the_arguments_is(tmp_path):
    model = without_dropout()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer = trainer_of(tmp_path, model)
    pt.attach(trainer, pt.plan_freeze(model, LAST))
    with pytest.raises(RecipeError, match="Reentrant"):
        trainer.train()


def test_all_of_a_model_is_in_train_mode_when_all_of_it_trains_again(tmp_path):
    trainer = trainer_of(tmp_path, tiny_gpt2())
    pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    trainer.train()
    trainer.model.train()
    assert not trainer.model.transformer.h[0].training
    trainer.model.requires_grad_(True)
    trainer.model.train()
    assert all(module.training for module in trainer.model.modules())


def test_callbacks_made_anew_by_a_checkpoint_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, tiny_gpt2(), restore_callback_states_from_checkpoint=True)
    with pytest.raises(RecipeError, match="restore_callback_states_from_checkpoint"):
        pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))


def test_a_second_backward_pass_is_told_of_the_path_that_forbids_it(tmp_path):
    class LooksAtGradients(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, inputs)
            torch.autograd.grad(loss, list(model.transformer.ln_f.parameters()), retain_graph=True)
            loss.backward()
            return loss.detach()

    paths = {"fast_paths": ("gelu", "casts")}
    for options in ({}, paths):
        trainer = trainer_of(tmp_path, without_dropout(), kind=LooksAtGradients)
        pt.attach(trainer, pt.plan_freeze(trainer.model, LAST), **options)
        if options:
            trainer.train()
        else:
            with pytest.raises(RuntimeError, match=r"fast_paths=\['gelu', 'casts'\]"):
                trainer.train()


def test_a_second_training_is_checked_at_its_saves_too(tmp_path):
    class Writes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if self.armed and state.global_step == 5:
                with torch.no_grad():
                    model.transformer.h[0].mlp.c_fc.weight.add_(1.0)

    writes = Writes()
    writes.armed = False
    trainer = trainer_of(tmp_path, tiny_gpt2(), [writes], save_strategy="steps", save_steps=6)
    pt.attach(trainer, pt.plan_freeze(trainer.model, LAST))
    trainer.train()
    (tmp_path / "checkpoint-6").rename(tmp_path / "first")
    writes.armed = True
    with pytest.raises(FreezeViolation, match="c_fc"):
        trainer.train()
    assert not (tmp_path / "checkpoint-6").exists()


def test_a_forward_of_a_kernel_from_the_hub_is_known_and_one_of_a_users_own_is_not():
    class Norm(torch.nn.LayerNorm):
        kernel_layer_name = "LayerNorm"

    module, plain = Norm(4), torch.nn.LayerNorm(4)
    for one in (module, plain):
        one.forward = types.MethodType(OfTheHub.forward, one)
    assert not computes_otherwise(module)
    assert computes_otherwise(plain)
    module.forward = lambda states: states + 1
    assert computes_otherwise(module)


class OfTheHub(torch.nn.Module):
    def forward(self, states):
        return states


def test_methods_of_transformers_own_trainers_are_not_taken_for_a_users():
    def has_own(kind, name):
        return TunedTrainer._has_own(object.__new__(type("Attached", (TunedTrainer, kind), {})), name)

    assert "prediction_step" in vars(Seq2SeqTrainer)
    assert not has_own(Seq2SeqTrainer, "prediction_step")
    assert not has_own(Trainer, "get_batch_samples")
    assert has_own(LooksAtPredictions, "prediction_step")
    assert has_own(ChangesBatches, "get_batch_samples")
    assert not has_own(LooksAtPredictions, "evaluation_loop")
