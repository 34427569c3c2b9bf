"""`attach`: a plain Trainer under a plan ends with the weights of the same Trainer whose model was frozen by hand."""

import functools
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.optimization import Adafactor

import partialtune as pt
from conftest import REPOSITORY, tiny_gpt2
from partialtune.errors import RecipeError
from tiny_models import tiny_config
from two_processes import on_two_processes

WINDOWS, EPOCHS, BATCH, LENGTH = 12, 3, 4, 16
REUSED = WINDOWS * (EPOCHS - 1)  # rows that start from kept states where every epoch has the same windows
LAST = ["blocks[-1]", "final_norm"]
CLOSE = 1e-6  # fp32: the loss without logits adds in another order
RATE = 2e-5  # AdamW makes up to a whole step of a gradient that is nothing but rounding


def model_of(name):
    torch.manual_seed(0)
    if name == "gpt2":  # with its dropout of 0.1
        return tiny_gpt2(vocab_size=99, activation_function="gelu_new")
    if name == "gemma3":  # text part of a model that reads images too
        return AutoModelForImageTextToText.from_config(tiny_config("gemma3"))
    return AutoModelForCausalLM.from_config(tiny_config(name))


def windows(count=WINDOWS, lengths=(LENGTH,), seed=0):
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 99) for _ in range(lengths[number % len(lengths)])] for number in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100, *row[1:]] for row in rows]})


class RandomWindows(torch.utils.data.Dataset):
    """Windows of a text, each from wherever it is drawn: few places, so that some come again."""

    def __init__(self):
        draw = random.Random(0)
        self.text, self.draw = [draw.randrange(3, 99) for _ in range(40)], draw

    def __len__(self):
        return WINDOWS

    def __getitem__(self, _):
        start = self.draw.randrange(8)
        ids = self.text[start : start + LENGTH]
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def padding(side):
    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values, filler):
            rest = [filler] * (longest - len(values))
            return values + rest if side == "right" else rest + values

        return {
            "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        }

    return collate


def freeze_by_hand(model, plan):
    """What a user does without this package: no gradients, and no dropout below what trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in plan.trainable)
    if model.config.model_type == "gpt2":
        model.transformer.drop.p = 0.0
        for module in model.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                for dropout in (one for one in module.children() if isinstance(one, nn.Dropout)):
                    dropout.p = 0.0


def run(
    folder,
    attached,
    name="llama",
    trainable=LAST,
    schedule=(),
    data=windows,
    kind=Trainer,
    optimizer=None,
    patch=None,
    callbacks=(),
    options=None,
    resume=None,
    attach_options=None,
    **changes,
):
    """Train a tiny model, attached or frozen by hand -> its Trainer and, where attached, its tuning."""
    model = model_of(name)
    plan = pt.plan_freeze(model, trainable, schedule=schedule)
    if not attached:
        freeze_by_hand(model, plan)
    if patch is not None:
        patch(model)
    settings = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=data(),
        eval_dataset=windows(6, seed=1),
        optimizers=optimizer(model) if optimizer else (None, None),
        callbacks=list(callbacks),
        **{"data_collator": default_data_collator, **(options or {})},
    )
    tuning = pt.attach(trainer, plan, **(attach_options or {})) if attached else None
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tuning


def logged(trainer):
    """What was measured in each step: losses, norms of gradients, scores of evaluations."""
    kept = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_width", "learning_rate")
    return [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_equal_training(plain, attached, tuning, close=CLOSE):
    """The same weights and figures; what is frozen keeps every bit, what trains has moved; proved."""
    before = dict(model_of_class(attached.model).named_parameters())
    expected, got = weights(plain), weights(attached)
    assert got.keys() == expected.keys() == before.keys()
    for name in got:
        assert torch.allclose(got[name], expected[name], rtol=0, atol=close), name
    for name in tuning.plan.frozen:
        assert torch.equal(got[name], before[name]), name
        assert tuning.deltas[name].l2_delta == 0.0
    for name in tuning.plan.trainable:
        moved = float((got[name] - before[name].detach()).norm())
        assert moved > 0 or name in tuning.audit.unmoved, name
        assert tuning.deltas[name].l2_delta == pytest.approx(moved, rel=1e-4)
    assert tuning.audit.passed
    wanted = [entry for entry in logged(plain) if entry]
    found = [entry for entry in logged(attached) if entry]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def model_of_class(model):
    names = {"GPT2LMHeadModel": "gpt2", "Gemma3ForConditionalGeneration": "gemma3", "Gemma3ForCausalLM": "gemma3_text"}
    return model_of(names.get(type(model).__name__, model.config.model_type))


# ---- each family, each variation ------------------------------------------------------------------------------------

FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma3", "mixtral", "gpt2")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_trainer_ends_with_the_weights_of_one_that_was_frozen_by_hand(tmp_path, name):
    plain, _ = run(tmp_path / "plain", False, name)
    attached, tuning = run(tmp_path / "attached", True, name)
    assert_equal_training(plain, attached, tuning)
    assert (tuning.fast.hits, tuning.fast.misses) == (REUSED, WINDOWS)
    assert json.loads((tmp_path / "attached" / "audit.json").read_text())["passed"] is True
    assert (tmp_path / "attached" / "weight_deltas.jsonl").read_text().count("\n") > len(tuning.plan.trainable)
    assert not any("forward" in vars(module) for module in attached.model.modules())  # nothing stays on the model


def over_all(model):
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1), None


def over_trainable(model):  # the user knows what is to train, and the plan says the same
    chosen = [p for name, p in model.named_parameters() if name in pt.plan_freeze(model, LAST).trainable]
    return torch.optim.AdamW(chosen, lr=RATE), None


def with_scheduler(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def adafactor(model):
    return Adafactor(model.parameters(), lr=1e-4, relative_step=False, scale_parameter=False), None


class ReadsLogits(Trainer):
    """Adds a term of all logits to the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        assert outputs.logits.shape[-1] == 99
        loss = outputs.loss + 0.1 * outputs.logits.float().logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


def loss_of_ones_own(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    summed = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return 2 * summed / (num_items_in_batch or (labels[:, 1:] >= 0).sum())


def patched_blocks(model):
    """A frozen block and one that trains, as other libraries patch them: on the instance."""
    for block in (model.model.layers[0], model.model.layers[-1]):

        def forward(*args, _own=block.forward, **kwargs):
            return 1.25 * _own(*args, **kwargs)

        block.forward = forward


def patched_model(model):
    """Logits in the loss, beneath the Trainer."""
    own = model.forward

    @functools.wraps(own)  # Trainer reads its parameters
    def forward(*args, **kwargs):
        outputs = own(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.float().logsumexp(-1).square().mean()
        return outputs

    model.forward = forward


def accuracy(prediction):
    """Of whole logits: their width is the vocabulary's."""
    logits, labels = prediction.predictions, prediction.label_ids
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).mean()
    return {"accuracy": float(hits), "width": logits.shape[-1]}


def accuracy_of_ids(prediction):
    hits = (prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean()
    return {"accuracy": float(hits), "width": prediction.predictions.ndim}


EVALUATED = {"eval_strategy": "epoch", "per_device_eval_batch_size": 3}
SEEN_BY_EVALUATIONS = 6 * (EPOCHS - 1)
VARIATIONS = {
    "recomputed activations": ({"name": "qwen3", "activation_checkpointing": True}, REUSED),
    "recomputed activations of GPT-2": ({"name": "gpt2", "activation_checkpointing": True}, REUSED),
    "accumulated gradients": ({"name": "gemma3_text", "gradient_accumulation_steps": 2}, REUSED),
    "a batch that is smaller": ({"name": "mixtral", "per_device_train_batch_size": 5}, REUSED),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, REUSED),
    "Adafactor": ({"name": "mixtral", "optim": "adafactor", "learning_rate": 1e-4}, REUSED),
    "an own optimizer over all": ({"name": "qwen3", "optimizer": over_all}, REUSED),
    "an own optimizer over what trains": ({"name": "gpt2", "optimizer": over_trainable}, REUSED),
    "an own optimizer with a scheduler": ({"name": "gemma3_text", "optimizer": with_scheduler}, REUSED),
    "an own Adafactor": ({"optimizer": adafactor, "gradient_accumulation_steps": 3}, REUSED),
    "metrics of logits": (
        {"name": "qwen3", "options": {"compute_metrics": accuracy}, **EVALUATED},
        REUSED + SEEN_BY_EVALUATIONS,
    ),
    "metrics of what is made of logits": (
        {
            "name": "gpt2",
            "options": {
                "compute_metrics": accuracy_of_ids,
                "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            },
            **EVALUATED,
        },
        REUSED + SEEN_BY_EVALUATIONS,
    ),
    "losses of evaluations alone": ({"name": "gemma3_text", **EVALUATED}, REUSED + SEEN_BY_EVALUATIONS),
    "label smoothing": ({"name": "mixtral", "label_smoothing_factor": 0.1, **EVALUATED}, REUSED + SEEN_BY_EVALUATIONS),
    "a loss function": ({"options": {"compute_loss_func": loss_of_ones_own}}, REUSED),
    "a subclass with its own loss": ({"name": "qwen3", "kind": ReadsLogits}, REUSED),
    "a patch on blocks": ({"patch": patched_blocks}, REUSED),
    "a patch on the model": ({"patch": patched_model, "name": "qwen3"}, REUSED),
    "padding on the right": (
        {
            "name": "gemma3_text",
            "data": lambda: windows(lengths=(9, 16, 12)),
            "options": {"data_collator": padding("right")},
        },
        REUSED,
    ),
    "padding on the left": (
        {"data": lambda: windows(lengths=(9, 16, 12)), "options": {"data_collator": padding("left")}},
        None,  # models count positions from the first column: a row is known where it is padded by as much
    ),
    "random windows": ({"name": "gpt2", "data": RandomWindows}, None),
    "a stream": (
        {"data": lambda: windows().to_iterable_dataset(), "max_steps": WINDOWS // BATCH * EPOCHS},
        REUSED,
    ),
    "a worker that loads": ({"name": "mixtral", "dataloader_num_workers": 1}, REUSED),
    "half of a block, without clipping": (
        {"name": "gpt2", "trainable": ["blocks[-1].mlp"], "max_grad_norm": 0.0},
        REUSED,
    ),
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_whatever_the_trainer_is_told_weights_and_figures_are_those_of_the_plain_path(tmp_path, variation):
    changes, hits = VARIATIONS[variation]
    plain, _ = run(tmp_path / "plain", False, **changes)
    attached, tuning = run(tmp_path / "attached", True, **changes)
    assert_equal_training(plain, attached, tuning)
    if hits is None:
        assert tuning.fast.hits > 0
    else:
        assert tuning.fast.hits == hits


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_states_alone_change_no_bit(tmp_path, name):
    plain, _ = run(tmp_path / "plain", False, name, max_steps=5)
    attached, tuning = run(tmp_path / "attached", True, name, max_steps=5, attach_options={"fast_paths": ()})
    assert tuning.fast.hits == 2 * BATCH
    assert all(torch.equal(weights(plain)[name], values) for name, values in weights(attached).items())
    assert losses(attached) == losses(plain)


def distance(one, other):
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_the_weights_are_as_near_to_those_of_fp32_as_the_plain_path_is(tmp_path, name):
    # AdamW makes whole steps of gradients that bf16 rounds by 2^-8 of their sum, so no bound on single weights says
    # anything. What bf16 costs is how far the plain path ends from fp32. The fast paths may cost as much, and a half
    # for the chance in a few roundings; two independent ones are that times the root of 2 apart.
    exact = weights(run(tmp_path / "fp32", False, name)[0])
    plain, _ = run(tmp_path / "plain", False, name, bf16=True)
    attached, tuning = run(tmp_path / "attached", True, name, bf16=True)
    rounding, got = distance(exact, weights(plain)), weights(attached)
    assert 0 < distance(exact, got) < 1.5 * rounding
    assert distance(weights(plain), got) < 2**0.5 * 1.5 * rounding
    assert losses(attached) == pytest.approx(losses(plain), rel=2**-8)
    assert tuning.audit.passed
    assert all(tuning.deltas[name].l2_delta == 0.0 for name in tuning.plan.frozen)
    assert (tuning.fast.hits, "casts" in tuning.fast.in_use) == (REUSED, True)


@pytest.mark.slow
def test_a_model_that_inductor_compiles_ends_with_the_weights_of_the_plain_path(tmp_path):
    changes = {"torch_compile": True, "torch_compile_backend": "inductor"}
    plain, _ = run(tmp_path / "plain", False)
    attached, tuning = run(tmp_path / "attached", True, **changes)
    assert_equal_training(plain, attached, tuning, close=5e-6)  # operations are fused otherwise, and round otherwise
    assert tuning.fast.hits == REUSED


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"name": "gpt2", "gradient_accumulation_steps": 2}, {"optimizer": over_all}])
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, changes):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **changes}
    whole, _ = run(tmp_path / "whole", True, **saving)
    again, tuning = run(tmp_path / "again", True, resume=str(tmp_path / "whole" / "checkpoint-4"), **saving)
    assert all(torch.equal(weights(whole)[name], values) for name, values in weights(again).items())
    assert tuning.audit.passed
    assert tuning.deltas == whole.tuning.deltas  # measured from the base, not from the checkpoint
    assert losses(again) == losses(whole)


def test_a_trainers_own_checkpoint_is_one_that_a_plain_trainer_reads(tmp_path):
    attached, _ = run(tmp_path, True, save_strategy="steps", save_steps=4, max_steps=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(values, weights(attached)[name]) for name, values in model.named_parameters())


def test_the_best_model_is_loaded_at_the_end_and_is_what_is_audited(tmp_path):
    changes = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
    }
    plain, _ = run(tmp_path / "plain", False, **changes)
    attached, tuning = run(tmp_path / "attached", True, **changes)
    assert attached.state.best_global_step == plain.state.best_global_step
    assert_equal_training(plain, attached, tuning)


# ---- phases ---------------------------------------------------------------------------------------------------------

SCHEDULE = [
    {"from_step": 3, "trainable": ["blocks[-1]"], "learning_rate": 1e-5},
    {"from_step": 6, "trainable": ["blocks[1].mlp"]},
]


class Watch(TrainerCallback):
    """What has a gradient, and what the optimizer holds at which rate, just before each of its steps."""

    def __init__(self):
        self.learning, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.learning.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        self.rates.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})


def thawing_loop(name, batches):
    """A loop by hand: AdamW as Trainer makes it, gradients cut at 1, rates that fall linearly."""
    model = model_of(name)
    plan = pt.plan_freeze(model, ["final_norm"], schedule=SCHEDULE)
    rate_of = {p.name: p.learning_rate or RATE for p in plan.parameters if p.trainable}
    freeze_by_hand(model, SimpleNamespace(trainable=[]))
    model.train()
    optimizer = torch.optim.AdamW([{"params": [], "lr": RATE}], weight_decay=0.0)
    for step, batch in enumerate(batches):
        for name, parameter in model.named_parameters():
            if name in plan.phase_at(step).trainable and not parameter.requires_grad:
                parameter.requires_grad_(True)
                optimizer.add_param_group({"params": [parameter], "base": rate_of[name]})
        for group in optimizer.param_groups:
            group["lr"] = group.get("base", RATE) * (len(batches) - step) / len(batches)
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_the_phases_of_a_schedule_happen_and_weights_are_those_of_a_loop_that_thaws_by_hand(tmp_path, name):
    batches, watch = [], Watch()

    def collate(rows):
        batches.append(default_data_collator(rows))
        return dict(batches[-1])

    changes = {"trainable": ["final_norm"], "schedule": SCHEDULE, "options": {"data_collator": collate}}
    attached, tuning = run(tmp_path, True, name, callbacks=[watch], **changes)
    assert len(batches) == 9
    for step in range(9):
        names = set(tuning.plan.phase_at(step).trainable)
        assert watch.learning[step] == names
        assert watch.rates[step].keys() == names
    assert [len(names) for names in watch.learning] == sorted(len(names) for names in watch.learning)
    last_norm = next(one.name for one in tuning.plan.parameters if one.component == "final_norm")
    later = next(iter(watch.learning[3] - watch.learning[2]))
    assert [rates[last_norm] for rates in watch.rates] == pytest.approx([RATE * (9 - s) / 9 for s in range(9)])
    assert [rates[later] for rates in watch.rates[3:]] == pytest.approx([1e-5 * (9 - s) / 9 for s in range(3, 9)])
    by_hand = thawing_loop(name, batches)
    for parameter, values in weights(attached).items():
        assert torch.allclose(values, by_hand[parameter], rtol=0, atol=CLOSE), parameter
    assert tuning.audit.passed
    assert {name for name, delta in tuning.deltas.items() if delta.l2_delta} == set(tuning.plan.trainable)
    assert tuning.fast.hits == 0  # each phase has an epoch, and keeps states behind another block
    assert tuning.fast.misses == 9 * BATCH


@pytest.mark.parametrize("variation", ["recomputed", "own optimizer", "accumulated", "bf16", "compiled"])
def test_a_schedule_goes_with_what_the_trainer_is_told(tmp_path, variation):
    changes = {
        "recomputed": {"activation_checkpointing": True},
        "own optimizer": {"optimizer": over_all},
        "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        "bf16": {"bf16": True},
        "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    }[variation]
    schedule = [{"from_step": 5, "trainable": ["blocks[-1]"]}, {"from_step": 7, "trainable": ["embeddings"]}]
    watch = Watch()
    changes = {"trainable": ["final_norm"], "schedule": schedule, "name": "gpt2", **changes}
    _, tuning = run(tmp_path, True, callbacks=[watch], **changes)
    for step in range(9):
        assert watch.learning[step] == watch.rates[step].keys() == set(tuning.plan.phase_at(step).trainable)
    assert tuning.audit.passed
    # the second epoch has two steps in the first phase, and the third begins with two steps behind a shorter prefix
    assert tuning.fast.hits == 2 * BATCH


# ---- what is refused ------------------------------------------------------------------------------------------------


def made(folder, plan_of=LAST, model=None, **options):
    """A Trainer that has not trained, and a plan for its model."""
    model = model_of("llama") if model is None else model
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", max_steps=3, disable_tqdm=True)
    options = {"model": model, "args": args, "train_dataset": windows(), **options}
    return Trainer(**{"data_collator": default_data_collator, **options}), pt.plan_freeze(model, plan_of)


def test_a_second_attach_is_an_error_before_and_after_training(tmp_path):
    trainer, plan = made(tmp_path)
    pt.attach(trainer, plan)
    with pytest.raises(RecipeError, match=r"this Trainer is attached already\. One plan holds all that trains"):
        pt.attach(trainer, plan)
    other, _ = made(tmp_path, model=trainer.model)
    with pytest.raises(RecipeError, match="This model is attached already"):
        pt.attach(other, plan)
    trainer.train()
    with pytest.raises(RecipeError, match="this Trainer is attached already"):
        pt.attach(trainer, plan)


def test_another_trainer_may_go_on_with_a_model_whose_training_is_over(tmp_path):
    first, tuning = run(tmp_path, True)
    before = weights(first)
    trainer, plan = made(tmp_path, ["embeddings"], model=first.model)
    again = pt.attach(trainer, plan)
    trainer.train()
    assert tuning.audit.passed
    assert again.audit.passed
    moved = {name for name, values in weights(trainer).items() if not torch.equal(values, before[name])}
    assert moved == set(plan.trainable) == {"model.embed_tokens.weight"}


def test_attach_takes_a_trainer_that_has_trained_and_measures_from_there(tmp_path):
    trainer, plan = made(tmp_path)
    trainer.train()
    before = weights(trainer)
    tuning = pt.attach(trainer, plan)
    trainer.train()
    assert tuning.audit.passed
    for name in plan.frozen:
        assert torch.equal(weights(trainer)[name], before[name])
    assert all(tuning.deltas[name].l2_delta > 0 for name in plan.trainable)


def test_a_plan_of_another_model_is_refused_and_the_model_stays_as_it_was(tmp_path):
    trainer, _ = made(tmp_path)
    for other in (model_of("gpt2"), AutoModelForCausalLM.from_config(tiny_config("mixtral"))):
        with pytest.raises(RecipeError, match="This plan was made for another model"):
            pt.attach(trainer, pt.plan_freeze(other, ["final_norm"]))
    assert type(trainer) is Trainer
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_plan_made_before_peft_wraps_the_model_says_plan_after_wrapping(tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of("llama")
    plan = pt.plan_freeze(model, LAST)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(RecipeError, match="plan after wrapping"):
        pt.attach(Trainer(model=wrapped, args=args, train_dataset=windows()), plan)


def test_the_callbacks_of_this_plan_are_taken_as_they_are_and_those_of_another_refused(tmp_path):
    model = model_of("llama")
    plan = pt.plan_freeze(model, LAST)
    own = [pt.FreezeAuditCallback(plan), pt.WeightDeltaCallback(plan, delta_steps=1)]
    trainer, other = made(tmp_path, model=model, callbacks=own)
    with pytest.raises(RecipeError, match="the Trainer has a FreezeAuditCallback of another plan"):
        pt.attach(trainer, other)
    trainer, _ = made(tmp_path, model=model, callbacks=own)
    tuning = pt.attach(trainer, plan)
    trainer.train()
    assert (tuning.audit_callback, tuning.delta_callback) == tuple(own)
    assert sum(isinstance(one, pt.FreezeAuditCallback) for one in trainer.callback_handler.callbacks) == 1
    assert own[0].result.passed
    lines = [json.loads(line) for line in (tmp_path / "weight_deltas.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 2, 3}


def test_what_begins_training_anew_with_another_model_is_refused(tmp_path):
    plan = pt.plan_freeze(model_of("llama"), LAST)
    trainer, _ = made(tmp_path, args=TrainingArguments(str(tmp_path), use_cpu=True, auto_find_batch_size=True))
    with pytest.raises(RecipeError, match="auto_find_batch_size begins training anew"):
        pt.attach(trainer, plan)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(RecipeError, match="this Trainer makes its model anew in train"):
        pt.attach(Trainer(model_init=lambda: model_of("llama"), args=args), plan)


def test_an_optimizer_that_exists_when_the_head_is_untied_is_refused(tmp_path):
    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer, _ = made(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(RecipeError, match="The plan adds a matrix of its own for the head"):
        pt.attach(trainer, pt.plan_freeze(model, ["head"], head="untied"))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_what_is_no_trainer_is_told_of_the_other_door(tmp_path):
    model = model_of("llama")
    with pytest.raises(RecipeError, match=r"got a LlamaForCausalLM. For a loop of your own: with audited"):
        pt.attach(model, pt.plan_freeze(model, LAST))
    trainer, plan = made(tmp_path)
    with pytest.raises(RecipeError, match="fast_paths: logits is none; there are loss, gelu, casts"):
        pt.attach(trainer, plan, fast_paths=["logits"])
    with pytest.raises(RecipeError, match="prefix_cache is 'tape'; allowed are auto, off, memory, disk"):
        pt.attach(made(tmp_path)[0], plan, prefix_cache="tape")


# ---- violations -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_exits(monkeypatch):
    def leave(code=None):
        raise AssertionError(f"the process was to end with {code}")

    monkeypatch.setattr(sys, "exit", leave)
    monkeypatch.setattr(os, "_exit", leave)


class FlipsABit(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.model.layers[0].mlp.up_proj.weight.data.view(torch.int32)[3, 5] ^= 1


def test_one_bit_of_a_frozen_weight_is_a_violation_that_is_raised(tmp_path, nothing_exits):
    with pytest.raises(pt.FreezeViolation, match=r"1 frozen parameters changed: model\.layers\.0\.mlp\.up_proj"):
        run(tmp_path, True, callbacks=[FlipsABit()])
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["passed"] is False
    assert found["frozen"]["changed"] == ["model.layers.0.mlp.up_proj.weight"]


def test_a_violation_is_only_written_where_the_user_wants_no_stop(tmp_path, nothing_exits, caplog):
    options = {"attach_options": {"stop_on_violation": False}}
    trainer, tuning = run(tmp_path, True, callbacks=[FlipsABit()], **options)
    assert trainer.state.global_step == 9
    assert (tuning.audit.passed, tuning.audit.changed) == (False, ["model.layers.0.mlp.up_proj.weight"])
    assert "Freeze audit failed" in caplog.text


def test_what_trains_and_is_missing_from_an_own_optimizer_is_a_violation_before_the_first_step(tmp_path, nothing_exits):
    def without_a_norm(model):
        chosen = [p for name, p in model.named_parameters() if not name.endswith("norm.weight")]
        return torch.optim.AdamW(chosen), None

    with pytest.raises(pt.FreezeViolation, match=r"trainable parameters are missing from the optimizer"):
        run(tmp_path, True, optimizer=without_a_norm)
    found = json.loads((tmp_path / "audit.json").read_text())
    assert "model.norm.weight" in found["trainable"]["not_in_optimizer"]


# ---- two processes --------------------------------------------------------------------------------------------------


def as_one_of_two(folder, schedule):
    changes = {"per_device_train_batch_size": 2, "name": "gpt2", "trainable": ["final_norm"] if schedule else LAST}
    watch = Watch()
    plain = None if schedule else weights(run(folder / "plain", False, **changes)[0])
    attached, tuning = run(folder / "attached", True, schedule=schedule, callbacks=[watch], **changes)
    got = weights(attached)
    everybody = [None, None]
    dist.all_gather_object(everybody, {name: values.tolist() for name, values in got.items()})
    return {
        "world_size": dist.get_world_size(),
        "wrapped": type(attached.model_wrapped).__name__,
        "apart": max(float((plain[name] - got[name]).abs().max()) for name in got) if plain else None,
        "alike": everybody[0] == everybody[1],
        "phases": all(
            watch.learning[s] == watch.rates[s].keys() == set(tuning.plan.phase_at(s).trainable) for s in range(9)
        ),
        "passed": tuning.audit.passed,
        "moved": {name for name, delta in tuning.deltas.items() if delta.l2_delta} == set(tuning.plan.trainable),
        "hits": tuning.fast.hits,
    }


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [(), SCHEDULE], ids=["one phase", "schedule"])
def test_two_processes_end_alike_and_as_the_plain_path(tmp_path, schedule):
    found = on_two_processes(as_one_of_two, tmp_path, schedule)
    for one in found:
        assert (one["world_size"], one["wrapped"]) == (2, "DistributedDataParallel")
        assert (one["alike"], one["phases"], one["passed"]) == (True, True, True)
        assert one["apart"] is None or one["apart"] < CLOSE
    assert found[0]["moved"]  # distances are known on the main process
    # a window is read by the other process in another epoch too, and its states are shared
    assert sum(one["hits"] for one in found) == (0 if schedule else REUSED)


# ---- what it pulls in -----------------------------------------------------------------------------------------------


def test_the_engine_imports_neither_recipes_nor_training_nor_texts():
    code = """
import json, pkgutil, sys
from importlib import import_module
import partialtune.engine
for module in pkgutil.iter_modules(partialtune.engine.__path__):
    import_module(f"partialtune.engine.{module.name}")
print(json.dumps(sorted(name for name in sys.modules if name.startswith("partialtune."))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    imported = json.loads(done.stdout.splitlines()[-1])
    modules = {path.stem for path in (REPOSITORY / "src" / "partialtune" / "engine").glob("*.py")} - {"__init__"}
    assert {f"partialtune.engine.{name}" for name in modules} <= set(imported)
    packages = {name.split(".")[1] for name in imported}
    assert not packages & {"recipe", "recipe_run", "training", "text", "compare", "rank", "bench", "pages", "hub"}
