"""What a Trainer or a model becomes after `attach`, or is in train mode alone: computed as without it, or refused."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_pt_utils import LabelSmoother

import partialtune as pt
from conftest import tiny_gpt2
from partialtune.engine import prefix
from partialtune.errors import FreezeViolation, InputError, RecipeError

LAST = ["blocks[-1]", "final_norm"]
EVERY_STEP = {"save_strategy": "steps", "save_steps": 2}


def trainer_of(folder, model, callbacks=(), **settings):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 90, (12,), generator=draw) for _ in range(8)]
    known = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    windows = [{"input_ids": row, "labels": row.clone()} for row in rows]
    return Trainer(
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


CHANGES = [
    with_a_term_of_logits,
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
