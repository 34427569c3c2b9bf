"""Learning rates of parts and layer decay: from the recipe to the weights, which are those of plain PyTorch."""

import copy
import json
import re

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import GPT2Config, Trainer, TrainerCallback, TrainingArguments, default_data_collator

import partialtune as pt
from conftest import REPOSITORY, some_windows, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.compare.compare import notes_on
from partialtune.compare.learning_rates import RateTrial
from partialtune.compare.outcomes import Outcome, Row
from partialtune.engine.attach import attach
from partialtune.errors import InputError, RecipeError
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.plan_table import plan_html, plan_table
from partialtune.freeze.recipe_plan import plan_before_text
from partialtune.model.loading import empty_model
from partialtune.recipe.arguments import FreezeArguments
from partialtune.recipe.recipe import read_recipe, recipe_from_values, write_recipe
from partialtune.training.recipe_trainer import attached_trainer
from partialtune.training.resume_check import recipe_differences
from partialtune.training.settings import training_arguments
from two_processes import on_two_processes

BASE = {"model_name_or_path": "builtin:lilliput", "text": "builtin:python-docs", "output_dir": "out"}


def model():
    """Three blocks, head tied to the token embeddings, no dropout: random numbers are in no way of equal weights."""
    return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_rates_come_from_a_file_or_the_command_line_in_their_order_and_are_recorded_so_that_they_read_again(tmp_path):
    file, recorded = tmp_path / "recipe.yaml", tmp_path / "recorded.yaml"
    lines = [*(f"{key}: {value}" for key, value in BASE.items()), "trainable: all"]
    rates = "{mlp: 1e-4, 'blocks[-1]': 1.0e-3, embeddings: 2}"
    file.write_text("\n".join([*lines, f"part_learning_rates: {rates}", "layer_decay: 0.9"]))
    recipe = read_recipe(file)
    assert list(recipe.freeze.part_learning_rates.items()) == [("mlp", 1e-4), ("blocks[-1]", 1e-3), ("embeddings", 2.0)]
    assert recipe.freeze.layer_decay == 0.9
    file.write_text("\n".join(lines))
    assert read_recipe(file, ["--part_learning_rates", rates, "--layer_decay", "0.9"]).values == recipe.values
    write_recipe(recorded, recipe.values, {})
    assert list(read_recipe(recorded).freeze.part_learning_rates) == ["mlp", "blocks[-1]", "embeddings"]


MISTAKES = {
    "a list": ({"part_learning_rates": ["embeddings"]}, ["part_learning_rates: got ['embeddings']", "a mapping"]),
    "a negative rate": (
        {"part_learning_rates": {"head": -1e-4}},
        ["part_learning_rates: head: got -0.0001; allowed: a number, more than 0"],
    ),
    "a rate of 0": ({"part_learning_rates": {"head": 0}}, ["head: got 0; allowed: a number, more than 0"]),
    "a rate in words": ({"part_learning_rates": {"head": "low"}}, ["head: got 'low'; allowed: a number"]),
    "a rate that is true": ({"part_learning_rates": {"head": True}}, ["head: got true; allowed: a number"]),
    "no finite rate": ({"part_learning_rates": {"head": float("inf")}}, ["head: got inf, which is not finite"]),
    "no selector": (
        {"part_learning_rates": {"blocks[1": 1}},
        ["'blocks[1': unknown selector", "Blocks are written blocks[11]"],
    ),
    "no text": ({"part_learning_rates": {3: 1}}, ["3: selector 3 is not text"]),
    "a selector that takes away": ({"part_learning_rates": {"!head": 1}}, ["'!head': takes away"]),
    "a decay of 0": ({"layer_decay": 0}, ["layer_decay: got 0; allowed: a number or null, more than 0 and at most 1"]),
    "a decay above 1": ({"layer_decay": 1.1}, ["layer_decay: got 1.1; allowed:"]),
    "a decay that is true": ({"layer_decay": True}, ["layer_decay: got true; allowed: a number"]),
    "a bounded scheduler": (
        {"part_learning_rates": {"head": 1}, "lr_scheduler_type": "greedy"},
        ["lr_scheduler_type: greedy holds all rates above one bound, so that part_learning_rates would not"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_rates_is_named_with_what_is_allowed(name):
    changes, words = MISTAKES[name]
    with pytest.raises(RecipeError) as caught:
        recipe_from_values({**BASE, "trainable": "all", **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_recipes_of_other_rates_or_of_the_same_in_another_order_are_other_runs():
    one, two = {"mlp": 1e-4, "blocks[-1]": 1e-3}, {"blocks[-1]": 1e-3, "mlp": 1e-4}
    said = {**BASE, "trainable": ["all"], "part_learning_rates": one}
    assert recipe_differences(said, said) == []
    assert recipe_differences(said, {**said, "part_learning_rates": two}) == ["part_learning_rates"]
    assert recipe_differences(said, {**said, "layer_decay": 0.9}) == ["layer_decay"]
    assert recipe_differences({**BASE, "trainable": ["all"]}, {**said, "part_learning_rates": {}}) == []


# ---- the plan -------------------------------------------------------------------------------------------------------


def rates_in(plan):
    return {p.name: (p.learning_rate, p.rate_factor) for p in plan.parameters if p.trainable}


def test_the_last_selector_that_matches_wins_and_what_none_names_has_the_recipes_rate():
    rates = {"blocks[-1]": 1e-3, "norms": 1e-4, "embeddings": 1e-5}
    plan = plan_freeze(model(), ["embeddings", "blocks[1:]", "final_norm"], part_learning_rates=rates)
    expected = {
        "transformer.wte.weight": (1e-5, 1.0),
        "transformer.wpe.weight": (1e-5, 1.0),
        "transformer.h.1.mlp.c_fc.weight": (None, 1.0),
        "transformer.h.1.ln_1.weight": (1e-4, 1.0),
        "transformer.h.2.mlp.c_fc.weight": (1e-3, 1.0),
        "transformer.h.2.ln_1.weight": (1e-4, 1.0),
        "transformer.ln_f.bias": (1e-4, 1.0),
    }
    assert expected.items() <= rates_in(plan).items()
    assert not any(p.learning_rate or p.rate_name for p in plan.parameters if not p.trainable)


def layers_below_the_head(name):
    """By the name alone, of a GPT-2 of three blocks."""
    if name.startswith("transformer.h."):
        return 3 - int(name.split(".")[2])
    return 4 if "wte" in name or "wpe" in name else 0


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_layer_decay_counts_layers_from_the_head_down_to_the_embeddings_and_a_tied_head_lies_with_them(head):
    plan = plan_freeze(model(), ["all"], head=head, layer_decay=0.5)
    assert rates_in(plan) == {name: (None, 0.5 ** layers_below_the_head(name)) for name in plan.trainable}
    assert rates_in(plan)["transformer.wte.weight"] == (None, 0.0625)
    assert ("lm_head.weight" in rates_in(plan)) is (head == "untied")
    assert ("the head is one tensor with the token embeddings" in plan_table(plan)) is (head == "tied")


def test_layers_count_over_the_whole_stack_whatever_trains_of_it():
    plan = plan_freeze(model(), ["blocks[1].mlp", "!biases"], layer_decay=0.5)
    assert set(rates_in(plan).values()) == {(None, 0.25)}


def test_a_part_rate_is_the_rate_and_a_phases_rate_falls_with_the_layers():
    schedule = [{"from_step": 3, "trainable": ["blocks[1:]"], "learning_rate": 2e-3}]
    rates = {"blocks[-1].norms": 1e-4}
    plan = plan_freeze(model(), ["final_norm"], schedule=schedule, part_learning_rates=rates, layer_decay=0.5)
    found = rates_in(plan)
    assert found["transformer.ln_f.weight"] == (None, 1.0)
    assert found["transformer.h.1.ln_1.weight"] == (2e-3, 0.25)
    assert found["transformer.h.2.mlp.c_fc.weight"] == (2e-3, 0.5)
    assert found["transformer.h.2.ln_1.weight"] == (1e-4, 1.0)
    names = {p.name: p.rate_name for p in plan.parameters if p.trainable}
    assert names["transformer.ln_f.weight"] == "final_norm"
    assert names["transformer.h.1.ln_1.weight"] == "from_step_3/block_01"
    assert names["transformer.h.2.ln_1.weight"] == "blocks[-1].norms"


@pytest.mark.parametrize(
    ("trainable", "rates", "words"),
    [
        (["blocks[-1]"], {"blocks[0]": 1}, r"blocks\[0\]: nothing that it names trains.*Did you mean blocks\[-1\]\?"),
        (["final_norm"], {"embeddings": 1}, r"embeddings: nothing that it names trains.*final_norm chose"),
        (["all"], {"blocks[7]": 1}, r"part_learning_rates, blocks\[7\] is out of range"),
        (["all"], {"/.*wxe.*/": 1}, "matches no parameter: the nearest names"),
        (["all"], {"embeddings": 1e-5, "head": 1e-3}, "two rates of one tensor.*are tied. Set `head: untied`"),
        (["head[-4:]"], {"head[-2:]": 1e-3}, r"more rows of transformer.wte.weight train than these.*Write head\."),
        (["all"], {"head": True}, "part_learning_rates, head: got true"),
        (["all"], {"head": 0.0}, "part_learning_rates, head: got 0.0; allowed: a number, more than 0"),
    ],
)
def test_rates_that_cannot_be_planned_are_an_error_in_words(trainable, rates, words):
    with pytest.raises(RecipeError, match=words):
        plan_freeze(model(), trainable, part_learning_rates=rates)


@pytest.mark.parametrize("decay", [0, 1.01, -0.5, True, "much", float("nan")])
def test_a_layer_decay_that_is_none_is_an_error_in_words(decay):
    with pytest.raises(RecipeError, match=r"layer_decay: got .*; allowed: a number, more than 0 and at most 1"):
        plan_freeze(model(), ["all"], layer_decay=decay)


def test_two_names_of_a_tied_tensor_may_have_one_rate_and_an_untied_head_its_own():
    plan = plan_freeze(model(), ["all"], part_learning_rates={"embeddings": 1e-5, "head": 1e-5})
    assert rates_in(plan)["transformer.wte.weight"] == (1e-5, 1.0)
    plan = plan_freeze(model(), ["all"], head="untied", part_learning_rates={"embeddings": 1e-5, "head": 1e-3})
    assert rates_in(plan)["transformer.wte.weight"] == (1e-5, 1.0)
    assert rates_in(plan)["lm_head.weight"] == (1e-3, 1.0)


def test_rows_have_the_rate_of_a_selector_that_names_all_of_them():
    for selector in ("embeddings.tokens", "head[-8:]", "head[-4:]"):
        plan = plan_freeze(model(), ["head[-4:]"], part_learning_rates={selector: 1e-3})
        assert rates_in(plan) == {"transformer.wte.weight": (1e-3, 1.0)}


def test_a_rate_that_later_ones_override_is_said(caplog):
    plan = plan_freeze(model(), ["all"], part_learning_rates={"blocks[-1]": 1e-3, "all": 1e-5})
    assert "blocks[-1]: later selectors name all that it names" in caplog.text
    assert "part_learning_rates, blocks[-1]: 0.001 for nothing" in plan_table(plan)


def test_adapters_have_the_rates_of_the_matrices_beside_which_they_stand():
    plan = plan_lora(model(), ["attention"], part_learning_rates={"blocks[0]": 1e-3}, layer_decay=0.5)
    found = rates_in(plan)
    assert len(found) == 12
    for name, rate in found.items():
        below = layers_below_the_head(name)
        assert rate == ((1e-3, 1.0) if below == 3 else (None, 0.5**below)), name
    plan = plan_lora(model(), ["attention"], part_learning_rates={"/.*lora_B.*/": 1e-2})
    assert {name: rate for name, (rate, _) in rates_in(plan).items() if rate} == {
        name: 1e-2 for name in plan.trainable if "lora_B" in name
    }


def test_the_plan_shows_rates_by_place_in_text_and_html_and_json():
    plan = plan_freeze(model(), ["all"], part_learning_rates={"embeddings": 1e-5}, layer_decay=0.5)
    rows = [line.split() for line in plan_table(plan, 1e-3).splitlines()]
    titles = rows.index(["place", "parameters", "trainable", "learning", "rate"])
    places = {" ".join(row[:-3]): row[-1] for row in rows[titles + 1 : titles + 7]}
    assert places == {
        "embeddings.tokens": "1e-05",
        "embeddings.positions": "1e-05",
        "block 0": "0.000125",
        "block 1": "0.00025",
        "block 2": "0.0005",
        "final_norm": "0.001",
    }
    assert "0.25 x learning_rate" in plan_table(plan)
    assert "0.25 x learning_rate" in plan_html(plan)
    content = plan.to_json({}, {})
    assert content["part_learning_rates"] == {"embeddings": 1e-5}
    assert content["layer_decay"] == 0.5
    by_name = {p["name"]: (p["learning_rate"], p["rate_factor"]) for p in content["parameters"]}
    assert by_name == rates_in(plan)


def test_a_plan_without_rates_of_parts_is_written_and_shown_as_it_was():
    plan = plan_freeze(model(), ["blocks[-1]", "final_norm"])
    content = plan.to_json({}, {})
    assert not {"part_learning_rates", "layer_decay"} & content.keys()
    assert set().union(*content["parameters"]) == {
        *("name", "shape", "numel", "block", "component", "trainable", "selector", "sha256_before", "sha256_after")
    }
    assert "rate" not in plan_table(plan, 1e-3)
    assert plan_freeze(model(), ["all"], part_learning_rates={}, layer_decay=None) == plan_freeze(model(), ["all"])


def test_gpt2_with_method_full_has_a_rate_for_each_of_its_fourteen_layers():
    freeze = FreezeArguments(trainable=["all"], method="full", layer_decay=0.9)
    plan = plan_before_text(empty_model(GPT2Config()), freeze)
    factors = {p.rate_name: p.rate_factor for p in plan.parameters}
    names = ["embeddings", *(f"block_{block:02d}" for block in range(12)), "final_norm"]
    assert factors == {name: 0.9 ** (13 - layer) for layer, name in enumerate(names)}


# ---- weights: those of AdamW with groups and LambdaLR, by hand ------------------------------------------------------

RATE, STEPS, WARM, BATCH = 1e-2, 9, 2, 4
PHASES = [
    {"from_step": 3, "trainable": ["blocks[-1]"], "learning_rate": 4e-3},
    {"from_step": 6, "trainable": ["blocks[1].mlp"]},
]


def decayed(name):
    return RATE * 0.5 ** layers_below_the_head(name)


def by_part(name):
    if ".ln_" in name:
        return 2e-3
    return 1e-4 if "wte" in name or "wpe" in name else RATE


def with_phases(name):
    if name == "transformer.ln_f.weight":
        return 5e-4
    return 4e-3 * 0.5 if ".h.2." in name else decayed(name)


# What the plan is told -> the rate at full speed of each parameter that trains, by its name.
CASES = {
    "layer decay": ({"trainable": ["all"], "layer_decay": 0.5}, decayed),
    "part rates": (
        {
            "trainable": ["embeddings", "blocks[1:]", "final_norm"],
            "part_learning_rates": {"norms": 2e-3, "embeddings": 1e-4},
        },
        by_part,
    ),
    "both with phases": (
        {
            "trainable": ["final_norm"],
            "schedule": PHASES,
            "layer_decay": 0.5,
            "part_learning_rates": {r"/transformer\.ln_f\.weight/": 5e-4},
        },
        with_phases,
    ),
}


def share_of_rate(step):
    """Linear warm-up and decay, as `get_linear_schedule_with_warmup`."""
    return step / WARM if step < WARM else max(0.0, (STEPS - step) / (STEPS - WARM))


def batches(count=BATCH):
    rows = list(some_windows(STEPS * BATCH).with_format("torch"))
    return [
        default_data_collator([{**r, "labels": r["input_ids"]} for r in rows[i * BATCH :][:count]])
        for i in range(STEPS)
    ]


def begins_at(plan):
    return {parameter.name: parameter.from_step for parameter in plan.parameters if parameter.trainable}


def loss_of(trained, batch, first_counts=False):
    """Summed and divided by the number of targets; to a stock Trainer the first token of a window counts as one."""
    targets = batch["labels"] if first_counts else batch["labels"][:, 1:]
    return trained(**batch, num_items_in_batch=targets.numel()).loss


def by_hand(case, weight_decay=0.1, first_counts=False, kind=torch.optim.AdamW, **settings):
    """Plain PyTorch: a group for each parameter -> the trained model, and the rates of each step by name."""
    arguments, rate = CASES[case]
    trained = model().train()
    begins = begins_at(plan_freeze(trained, **arguments))
    groups = []
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(False)
        decay = 0.0 if ".ln_" in name or name.endswith("bias") else weight_decay
        if name in begins:
            groups.append({"params": [parameter], "lr": rate(name), "weight_decay": decay})
    optimizer = kind(groups, **settings)
    scheduler = LambdaLR(optimizer, share_of_rate)
    rates = []
    for step, batch in enumerate(batches()):
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_(begins.get(name, STEPS) <= step)
        loss_of(trained, batch, first_counts).backward()
        torch.nn.utils.clip_grad_norm_([p for p in trained.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        rates.append({name: group["lr"] for name, group in zip(begins, optimizer.param_groups, strict=True)})
        scheduler.step()
        optimizer.zero_grad()
    return dict(trained.named_parameters()), rates


class Watch(TrainerCallback):
    """The rate of each parameter in each step, and what trackers are told."""

    def __init__(self):
        self.rates, self.told = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append(rates_by_parameter(model, optimizer))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "learning_rate" in logs:
            self.told.append({name: rate for name, rate in logs.items() if name.startswith("learning_rate")})


def rates_by_parameter(trained, optimizer):
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": RATE,
    "weight_decay": 0.1,
    "warmup_steps": WARM,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def trainer_of(folder, case, *callbacks, door="attach", changes=None, **said):
    """A Trainer attached to the plan of a case, stock or as `train` makes it; `said` goes to the plan."""
    trained = model()
    plan = plan_freeze(trained, **{**CASES[case][0], **said})
    data = some_windows(STEPS * BATCH)
    values = {**SETTINGS, "output_dir": str(folder), **(changes or {})}
    if door == "train":
        run = attached_trainer(
            plan=plan, model=trained, args=training_arguments(values), train_dataset=data, eval_dataset=data
        )
        trainer = run.trainer
    else:
        data = data.map(lambda row: {"labels": row["input_ids"]})
        trainer = Trainer(
            eval_dataset=data,
            model=trained,
            args=TrainingArguments(**values),
            train_dataset=data,
            data_collator=default_data_collator,
        )
        attach(trainer, plan, fast_paths=(), prefix_cache="off", weight_decay_on="matrices")
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def differences(found, expected):
    return {name: (values - expected[name]).abs().max().item() for name, values in found.items()}


@pytest.mark.parametrize("door", ["attach", "train"])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_rates_are_those_of_adamw_with_groups_and_lambda_lr_by_hand(tmp_path, case, door):
    watch = Watch()
    trainer = trainer_of(tmp_path, case, watch, door=door)
    trainer.train()
    expected, rates = by_hand(case, first_counts=door == "attach", fused=True)  # Trainer's AdamW is the fused one
    assert len(watch.rates) == STEPS
    for step, found in enumerate(watch.rates):
        assert found == {name: rate for name, rate in rates[step].items() if name in found}
        assert found.keys() == set(trainer.tuning.plan.phase_at(step).trainable)
    assert set(differences(dict(trainer.model.named_parameters()), expected).values()) == {0.0}
    assert trainer.tuning.audit.passed


def audited_loop(case, saved=None):
    """A loop of one's own, AdamW with decay groups, LambdaLR made after -> its tuning, rates and states by step.

    Args:
        case: One of CASES.
        saved: Of another loop after some steps, from which this one goes on: step, weights, optimizer, scheduler.
    """
    trained = model().train()
    plan = plan_freeze(trained, **CASES[case][0])
    decaying = [p for n, p in trained.named_parameters() if not (".ln_" in n or n.endswith("bias"))]
    others = [p for n, p in trained.named_parameters() if ".ln_" in n or n.endswith("bias")]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    first, rates, states = saved[0] if saved else 0, [], []
    plain = {"fast_paths": (), "prefix_cache": "off"}  # GELU in one operation rounds otherwise
    with pt.audited(trained, plan, optimizer, delta_steps=3, first_step=first, **plain) as tuning:
        scheduler = LambdaLR(optimizer, share_of_rate)
        if saved:
            for part, state in zip((trained, optimizer, scheduler), saved[1:], strict=True):
                part.load_state_dict(state)
        for step in range(first, STEPS):
            loss_of(trained, batches()[step]).backward()
            torch.nn.utils.clip_grad_norm_([p for p in trained.parameters() if p.grad is not None], 1.0)
            rates.append(rates_by_parameter(trained, optimizer))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            parts = (trained, optimizer, scheduler)
            states.append((step + 1, *(copy.deepcopy(part.state_dict()) for part in parts)))
    return tuning, rates, states


@pytest.mark.parametrize("case", CASES)
def test_a_loop_of_ones_own_has_the_weights_and_rates_of_groups_by_hand(case):
    tuning, rates, _ = audited_loop(case)
    expected, rates_by_hand = by_hand(case, fused=True)
    for step, found in enumerate(rates):
        assert found == {name: rate for name, rate in rates_by_hand[step].items() if name in found}
        assert found.keys() == set(tuning.plan.phase_at(step).trainable)
    assert set(differences(dict(tuning.model.named_parameters()), expected).values()) == {0.0}
    assert tuning.audit.passed


@pytest.mark.parametrize(
    "scheduler", ["cosine_with_min_lr", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"]
)
def test_every_group_keeps_its_ratio_whatever_the_scheduler(tmp_path, scheduler):
    watch = Watch()
    changes = {"lr_scheduler_type": scheduler, "learning_rate": 8e-3}
    if scheduler == "cosine_with_min_lr":
        changes["lr_scheduler_kwargs"] = {"min_lr": 1e-3}
    if scheduler == "reduce_lr_on_plateau":
        changes |= {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "lr_scheduler_kwargs": {"patience": 0, "threshold": 9.0, "factor": 0.5},
        }
    trainer = trainer_of(tmp_path, "layer decay", watch, door="train", changes=changes)
    trainer.train()
    assert len({rates["transformer.ln_f.weight"] for rates in watch.rates}) > 1
    for rates in watch.rates:
        for name, rate in rates.items():
            shallowest = rates["transformer.ln_f.weight"]
            assert rate == pytest.approx(shallowest * 0.5 ** layers_below_the_head(name), rel=1e-12)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adagrad", "rmsprop", "sgd"])
def test_every_optimizer_of_a_recipe_takes_the_rates(tmp_path, optim):
    watch = Watch()
    trainer = trainer_of(tmp_path, "part rates", watch, door="train", changes={"optim": optim, "max_steps": 3})
    trainer.train()
    assert watch.rates[1]["transformer.ln_f.bias"] == pytest.approx(2e-3 / 2)
    assert watch.rates[1]["transformer.h.1.mlp.c_fc.bias"] == pytest.approx(RATE / 2)
    assert trainer.tuning.audit.passed


def test_adapters_learn_at_the_rates_of_their_blocks(tmp_path):
    trained, watch = model(), Watch()
    plan = plan_lora(trained, ["attention"], part_learning_rates={"blocks[0]": 1e-4}, layer_decay=0.5)
    args = training_arguments({**SETTINGS, "output_dir": str(tmp_path), "max_steps": 3})
    trainer = attached_trainer(plan=plan, model=trained, args=args, train_dataset=some_windows()).trainer
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.rates[1]) == 12
    for name, rate in watch.rates[1].items():
        assert rate == pytest.approx((1e-4 if ".h.0." in name else decayed(name)) / 2), name
    assert trainer.tuning.audit.passed


# ---- the log --------------------------------------------------------------------------------------------------------


def test_each_rate_is_logged_once_under_a_stable_name_beside_the_stock_one(tmp_path):
    watch = Watch()
    trainer = trainer_of(tmp_path, "both with phases", watch)
    trainer.train()
    at_full_speed = {
        "learning_rate": RATE,
        "learning_rate/block_01": RATE / 4,
        "learning_rate/from_step_3/block_02": 4e-3 / 2,
        "learning_rate/final_norm": RATE,
        r"learning_rate/transformer\.ln_f\.weight": 5e-4,
    }
    expected = [{name: rate * share_of_rate(step) for name, rate in at_full_speed.items()} for step in range(STEPS)]
    history = [
        {name: value for name, value in entry.items() if name.startswith("learning_rate")}
        for entry in trainer.state.log_history
        if "learning_rate" in entry
    ]
    assert watch.told == history
    assert history == [pytest.approx(entry, rel=1e-12) for entry in expected]


def test_the_stock_rate_is_the_recipes_though_nothing_has_it(tmp_path):
    rates = {"all": 1e-4}
    trainer = trainer_of(tmp_path, "part rates", changes={"max_steps": 3}, part_learning_rates=rates)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([0, RATE / 2, RATE])
    assert [entry["learning_rate/all"] for entry in logged] == pytest.approx([0, 1e-4 / 2, 1e-4])


def test_a_loop_of_ones_own_has_the_rates_in_its_log_at_each_report_and_in_its_tuning():
    tuning, _, _ = audited_loop("part rates")
    entries = [entry for entry in tuning.log if "learning_rate" in entry]
    assert entries == [
        {
            "learning_rate": pytest.approx(RATE * share_of_rate(step - 1)),
            "learning_rate/norms": pytest.approx(2e-3 * share_of_rate(step - 1)),
            "learning_rate/embeddings": pytest.approx(1e-4 * share_of_rate(step - 1)),
            "step": step,
        }
        for step in (3, 6, 9)
    ]
    assert tuning.rates == {name: entries[-1][name] for name in ("learning_rate/norms", "learning_rate/embeddings")}


def test_groups_of_a_users_own_rates_do_not_share_a_name():
    trained = model()
    plan = plan_freeze(trained, ["blocks[-1]"], layer_decay=0.5)
    last = list(trained.transformer.h[2].parameters())
    optimizer = torch.optim.SGD([{"params": last[:4]}, {"params": last[4:], "lr": 1e-3}], lr=1e-2)
    with pt.audited(trained, plan, optimizer) as tuning:
        loss_of(trained, batches()[0]).backward()
        optimizer.step()
    assert tuning.rates == {"learning_rate/block_02/group_0": 5e-3, "learning_rate/block_02/group_1": 5e-4}


def test_runs_without_rates_of_parts_log_and_keep_what_they_did(tmp_path):
    trained = model()
    plan = plan_freeze(trained, ["final_norm"], schedule=PHASES)
    args = training_arguments({**SETTINGS, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 9})
    trainer = attached_trainer(plan=plan, model=trained, args=args, train_dataset=some_windows()).trainer
    trainer.train()
    assert not any(name.startswith("learning_rate/") for entry in trainer.state.log_history for name in entry)
    saved = torch.load(tmp_path / "checkpoint-9" / "optimizer.pt", weights_only=True)
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True).state_dict()["param_groups"][0]
    assert all(group.keys() - {"initial_lr"} == plain.keys() for group in saved["param_groups"])
    assert "rates" not in json.loads((tmp_path / "checkpoint-9" / "origin.json").read_text())


# ---- resume ---------------------------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of rates and phases in which every step is saved."""
    watch = Watch()
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, "both with phases", watch, door="train", changes=SAVING)
    trainer.train()
    return folder, trainer, watch


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_run_that_goes_on_has_the_same_weights_and_rates_bit_for_bit(whole, tmp_path, step):
    folder, first, before = whole
    watch = Watch()
    again = trainer_of(tmp_path, "both with phases", watch, door="train")
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert watch.rates == before.rates[step:]
    assert watch.told == before.told[step:]
    assert set(differences(dict(again.model.named_parameters()), dict(first.model.named_parameters())).values()) == {
        0.0
    }
    assert again.tuning.audit.passed


OTHER_RATES = {
    "another rate": {"part_learning_rates": {r"/transformer\.ln_f\.weight/": 6e-4}},
    "another decay": {"layer_decay": 0.6},
    "no decay": {"layer_decay": None},
    "none at all": {"layer_decay": None, "part_learning_rates": None},
}


@pytest.mark.parametrize("name", OTHER_RATES)
def test_a_checkpoint_of_other_rates_is_refused(whole, tmp_path, name):
    again = trainer_of(tmp_path, "both with phases", door="train", **OTHER_RATES[name])
    with pytest.raises(InputError, match=r"`part_learning_rates`.* `layer_decay` .*differ. Go on with the recipe of"):
        again.train(resume_from_checkpoint=str(whole[0] / "checkpoint-7"))


@pytest.mark.parametrize("step", [1, 5])
def test_a_loop_of_ones_own_goes_on_bit_for_bit_and_refuses_a_state_of_other_rates(step, monkeypatch):
    first, rates, states = audited_loop("layer decay")
    again, rates_again, _ = audited_loop("layer decay", saved=states[step - 1])
    assert rates_again == rates[step:]
    parameters = [dict(tuning.model.named_parameters()) for tuning in (again, first)]
    assert set(differences(*parameters).values()) == {0.0}
    monkeypatch.setitem(CASES, "other", ({"trainable": ["all"], "layer_decay": 0.6}, None))
    with pytest.raises(InputError, match="`layer_decay` differ"):
        audited_loop("other", saved=states[step - 1])


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_scheduler_that_exists_is_refused_with_the_way_out():
    trained = model()
    plan = plan_freeze(trained, ["all"], layer_decay=0.5)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE)
    LambdaLR(optimizer, share_of_rate)
    with pytest.raises(
        RecipeError, match=r"layer_decay gives parameters a rate of their own \(0.0625 times learning_rate"
    ):
        pt.audited(trained, plan, optimizer)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("listed", [False, True])
def test_a_scheduler_with_one_rate_for_all_is_refused_and_one_with_a_list_is_not(listed):
    trained = model()
    plan = plan_freeze(trained, ["all"], layer_decay=0.5)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE)

    def train():
        with pt.audited(trained, plan, optimizer) as tuning:
            most = [group["lr"] for group in optimizer.param_groups] if listed else RATE
            scheduler = OneCycleLR(optimizer, max_lr=most, total_steps=5)
            for batch in batches()[:3]:
                loss_of(trained, batch).backward()
                optimizer.step()
                scheduler.step()
        return tuning

    if listed:
        assert train().audit.passed
    else:
        with pytest.raises(RecipeError, match=r"scheduler begins embeddings at .*one rate for all groups"):
            train()


def test_suiting_an_optimizer_again_changes_nothing_and_another_plan_is_refused():
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE)
    plans = [plan_freeze(trained, ["all"], layer_decay=decay) for decay in (0.5, 0.5, 0.6, None)]
    for plan in plans[:2]:
        with pt.audited(trained, plan, optimizer):
            loss_of(trained, batches()[0]).backward()
            optimizer.step()
        rates = rates_by_parameter(trained, optimizer)
        assert rates == {name: decayed(name) for name in plan.trainable}
    for plan in plans[2:]:
        with pytest.raises(RecipeError, match="has the learning rates of another plan"):
            pt.audited(trained, plan, optimizer)


def test_a_trainer_with_the_greedy_scheduler_is_refused(tmp_path):
    changes = {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(RecipeError, match="greedy holds all rates above one bound"):
        trainer_of(tmp_path, "layer decay", changes=changes)


# ---- two processes --------------------------------------------------------------------------------------------------


def train_as_one_of_two(folder, case):
    """SGD: its steps are in proportion to gradients, so that rounding between processes stays rounding."""
    watch = Watch()
    changes = {"per_device_train_batch_size": BATCH // 2, "optim": "sgd"}
    trainer = trainer_of(folder, case, watch, door="train", changes=changes)
    trainer.train()
    return {
        "world_size": dist.get_world_size(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": {name: values.detach() for name, values in trainer.model.named_parameters()},
        "rates": watch.rates,
        "told": watch.told,
        "passed": trainer.tuning.audit.passed,
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["layer decay", "both with phases"])
def test_two_processes_have_the_rates_and_weights_of_groups_by_hand_on_one(tmp_path, case):
    first, second = on_two_processes(train_as_one_of_two, tmp_path, case)
    assert (first["world_size"], first["wrapped"], first["passed"]) == (2, "DistributedDataParallel", True)
    assert first["rates"] == second["rates"]
    assert set(differences(first["weights"], second["weights"]).values()) == {0.0}
    expected, rates = by_hand(case, kind=torch.optim.SGD)
    for step, found in enumerate(first["rates"]):
        assert found == {name: rate for name, rate in rates[step].items() if name in found}
    assert max(differences(first["weights"], expected).values()) < 1e-6
    moved = differences(first["weights"], dict(model().named_parameters()))
    assert all(moved[name] > 1e-7 for name in found if name.endswith("weight"))


# ---- a whole run, and what reads it ---------------------------------------------------------------------------------

RUN = {
    "model_name_or_path": "builtin:lilliput",
    "block_size": 32,
    "trainable": ["embeddings", "blocks[-2:]", "final_norm"],
    "part_learning_rates": {"embeddings.positions": 1e-5, "blocks[-1].norms": 3e-3},
    "layer_decay": 0.5,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 3,
    "validation_share": 0.2,
    "prompts": [],
}


def recipe_file(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(" ".join(f"The {n}th voyage was longer than the one before it, and colder." for n in range(99)))
    file = folder / "recipe.yaml"
    values = {"text": str(text), "output_dir": str(folder / "run"), **RUN, **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
    return str(file)


def logged_rates(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entries = [{k: v for k, v in entry.items() if k.startswith("learning_rate")} for entry in history]
    return [entry for entry in entries if entry]


@pytest.mark.slow
def test_a_recipe_killed_midway_goes_on_with_the_same_weights_and_rates_and_other_rates_are_refused(
    tmp_path, undrawn, monkeypatch, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", recipe_file(whole)]) == 0
    file = recipe_file(cut)
    with monkeypatch.context() as patched:
        patched.setattr(TrainerCallback, "on_step_begin", stop_after_four)
        assert main(["train", file]) == 130
    for changes in ({"layer_decay": 0.6}, {"part_learning_rates": {"blocks[-1].norms": 3e-3}}, {"layer_decay": None}):
        assert main(["train", recipe_file(cut, **changes), "--resume_from_checkpoint", "auto"]) == 2
        assert f"holds a run of another recipe; they differ in {next(iter(changes))}" in capsys.readouterr().err
        # into another folder: what the checkpoint began with is compared
        words = ["--output_dir", str(cut / "other"), "--resume_from_checkpoint", str(cut / "run" / "checkpoint-3")]
        assert main(["train", recipe_file(cut, **changes), *words]) == 2
        said = capsys.readouterr().err
        assert "belongs to another run" in said
        assert f"{next(iter(changes))}: " in said
    assert main(["train", recipe_file(cut), "--resume_from_checkpoint", "auto"]) == 0
    weights = [(folder / "run" / "model.safetensors").read_bytes() for folder in (cut, whole)]
    assert weights[0] == weights[1]
    rates = logged_rates(whole / "run")
    assert logged_rates(cut / "run") == rates
    assert rates[2] == pytest.approx(
        {
            "learning_rate": 1e-3,
            "learning_rate/embeddings": 1e-3 * 0.5**5,
            "learning_rate/embeddings.positions": 1e-5,
            "learning_rate/block_02": 1e-3 * 0.25,
            "learning_rate/block_03": 1e-3 * 0.5,
            "learning_rate/blocks[-1].norms": 3e-3,
            "learning_rate/final_norm": 1e-3,
        }
    )
    page = (whole / "run" / "report.html").read_text()
    assert "embeddings.positions: 1.0e-05, &#39;blocks[-1].norms&#39;: 0.003" in page
    plan = json.loads((whole / "run" / "freeze_plan.json").read_text())
    assert plan["layer_decay"] == 0.5
    assert main(["verify", "builtin:lilliput", str(whole / "run")]) == 0


def stop_after_four(self, args, state, control, **kwargs):
    """As Ctrl-C, in the midst of a run whose newest checkpoint is that of step 3."""
    if state.global_step == 4:
        raise KeyboardInterrupt
    return control


def test_plan_shows_the_rates_of_a_recipe_and_json_holds_them(tmp_path, capsys):
    file = recipe_file(tmp_path)
    assert main(["plan", file]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["block", "2", "444,864", "444,864", "0.00025"] in rows
    assert ["block", "3", "444,864", "444,864", "0.003,", "0.0005"] in rows
    assert main(["plan", file, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["part_learning_rates"] == RUN["part_learning_rates"]
    factors = {p["name"]: (p["learning_rate"], p["rate_factor"]) for p in content["parameters"]}
    assert factors["transformer.h.2.mlp.c_fc.weight"] == (None, 0.25)
    assert factors["transformer.h.3.ln_1.weight"] == (3e-3, 1.0)
    assert factors["transformer.h.0.ln_1.weight"] == (None, None)


def test_compare_refuses_to_try_rates_that_nothing_has(tmp_path, capsys):
    file = recipe_file(tmp_path, part_learning_rates={"all": 1e-4}, layer_decay=None)
    words = ["--output_dir", str(tmp_path / "out"), "--learning_rates", "1e-3", "1e-2"]
    assert main(["compare", file, *words]) == 2
    assert "all that trains has a rate of its own (part_learning_rates)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = (REPOSITORY / "docs" / "what-may-learn.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("\n## Rates\n") :].partition("\n## Rates\n")[2].partition("\n## ")[0]


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


def test_the_recipes_of_the_page_have_the_rates_that_it_tells():
    parts, depths = (
        plan_before_text(empty_model(GPT2Config()), recipe_from_values({**BASE, **yaml.safe_load(text)}).freeze)
        for text in snippets("yaml")
    )
    found = rates_in(parts)
    assert found["transformer.wpe.weight"] == (1e-5, 1.0)
    assert found["transformer.h.11.ln_1.weight"] == (1e-4, 1.0)
    assert found["transformer.h.10.ln_1.weight"] == found["transformer.ln_f.weight"] == (None, 1.0)
    assert rates_in(depths)["transformer.wte.weight"] == (None, 0.9**13)
    for name in parts.part_learning_rates:
        assert f"learning_rate/{name[0]}" in SECTION
    for name in ("embeddings", "block_00", "final_norm"):
        assert name in {parameter.rate_name for parameter in depths.parameters}
        assert f"learning_rate/{name}" in SECTION


def test_the_code_of_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    windows = some_windows(8).map(lambda row: {"labels": row["input_ids"]})
    loader = torch.utils.data.DataLoader(windows.with_format("torch"), batch_size=4)
    names = {"windows": windows, "loader": loader}
    first, second = (
        code.replace("openai-community/gpt2", str(builtin_folder("builtin:lilliput"))) for code in snippets("python")
    )
    exec(compile(first, "docs/what-may-learn.md, Rates", "exec"), names)
    assert names["tuning"].audit.passed
    assert names["tuning"].rates == pytest.approx({"learning_rate/embeddings": 5e-6, "learning_rate/blocks[-1]": 5e-5})
    exec(compile(second, "docs/what-may-learn.md, Rates", "exec"), names)
    assert names["tuning"].rates["learning_rate/block_03"] == pytest.approx(5e-5 * 0.9 * 0.5)


# ---- beside what else may learn -------------------------------------------------------------------------------------


def test_adapters_beside_trained_parts_and_rows_have_rates_of_their_own(tmp_path):
    trained, watch = model(), Watch()
    rates = {"attention": 2e-3, "embeddings.tokens": 1e-4}
    said = {"lora": {"target": ["attention"], "rank": 2}, "part_learning_rates": rates, "layer_decay": 0.5}
    plan = plan_freeze(trained, ["embeddings.tokens[-4:]", "final_norm", "blocks[0].mlp"], **said)
    args = training_arguments({**SETTINGS, "output_dir": str(tmp_path), "max_steps": 3})
    trainer = attached_trainer(plan=plan, model=trained, args=args, train_dataset=some_windows()).trainer
    trainer.add_callback(watch)
    trainer.train()
    found = set(watch.rates[1].values())
    assert found == {2e-3 / 2, 1e-4 / 2, RATE / 2, RATE * 0.125 / 2}
    assert sum(rate == 2e-3 / 2 for rate in watch.rates[1].values()) == 12
    assert watch.told[1].keys() == {
        *("learning_rate", "learning_rate/attention", "learning_rate/embeddings.tokens"),
        *("learning_rate/block_00", "learning_rate/final_norm"),
    }
    assert trainer.tuning.audit.passed


@pytest.mark.parametrize("keep_state", [False, True])
def test_blocks_that_learn_in_turn_have_the_rates_of_their_layers(tmp_path, keep_state):
    trained, watch = model(), Watch()
    sampling = {"blocks": 1, "every": 2, "order": "ascending", "keep_state": keep_state}
    plan = plan_freeze(trained, ["final_norm"], block_sampling=sampling, layer_decay=0.5)
    args = training_arguments(
        {**SETTINGS, "output_dir": str(tmp_path), "warmup_steps": 0, "lr_scheduler_type": "constant"}
    )
    trainer = attached_trainer(plan=plan, model=trained, args=args, train_dataset=some_windows(36)).trainer
    trainer.add_callback(watch)
    trainer.train()
    blocks = [{int(name.split(".")[2]) for name in rates if ".h." in name} for rates in watch.rates]
    assert blocks == [{0}, {0}, {1}, {1}, {2}, {2}, {0}, {0}, {1}]
    for rates in watch.rates:
        assert rates == {name: decayed(name) for name in rates}
    assert trainer.tuning.audit.passed


def sharded_loop(case):
    """`audited` under fully_shard, each process with half of each batch, SGD."""
    dist.init_process_group("gloo")
    trained, mesh = model(), init_device_mesh("cpu", (2,))
    for block in trained.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    plan = plan_freeze(trained, **CASES[case][0])
    optimizer = torch.optim.SGD(trained.parameters(), lr=RATE)
    half = slice(BATCH // 2 * dist.get_rank(), BATCH // 2 * (dist.get_rank() + 1))
    with pt.audited(trained.train(), plan, optimizer, fast_paths=(), prefix_cache="off") as tuning:
        scheduler = LambdaLR(optimizer, share_of_rate)
        for batch in batches():
            loss_of(trained, {name: rows[half] for name, rows in batch.items()}).backward()
            torch.nn.utils.clip_grad_norm_([p for p in trained.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    whole = {name: values.full_tensor().detach() for name, values in trained.named_parameters()}
    return whole, tuning.rates, tuning.audit.passed


@pytest.mark.slow
def test_shards_have_the_rates_and_weights_of_groups_by_hand_on_one_process():
    (weights, rates, passed), _ = on_two_processes(sharded_loop, "layer decay")
    expected, rates_by_hand = by_hand("layer decay", weight_decay=0.0, kind=torch.optim.SGD)
    assert max(differences(weights, expected).values()) < 1e-6
    assert rates["learning_rate/block_01"] == rates_by_hand[-1]["transformer.h.1.ln_1.weight"]
    assert passed


def test_a_comparison_says_which_rates_its_trials_kept(tmp_path):
    values = {**RUN, "output_dir": "out", "text": "text"}
    outcome = Outcome(
        tmp_path, values, 10, 5, {"sources": [], "windows": None, "stopped_early": None}, {}, {}, None, 0, ""
    )
    row = Row("parts", [outcome], [RateTrial(1e-3, 2.0), RateTrial(1e-2, 2.5)])
    assert row.selectors == [
        *RUN["trainable"],
        *("embeddings.positions at 1e-05", "blocks[-1].norms at 0.003", "layer_decay 0.5"),
    ]
    kept = "its part_learning_rates were kept in every trial (embeddings.positions 1e-05, blocks[-1].norms 0.003)"
    assert any(kept in note for note in notes_on([row]))
    assert not any("part_learning_rates" in note for note in notes_on([Row("parts", [outcome])]))
