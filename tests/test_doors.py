"""The policies of the repository's recipes through two doors: `train`, and a stock Trainer with `attach`."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import partialtune as pt
from conftest import REPOSITORY, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.freeze.lora import plan_lora
from partialtune.model.parameters import named_learners
from partialtune.recipe.recipe import recipe_from_values
from partialtune.recipe_run import train as stages
from partialtune.training.training_data import collate_windows, data_of_recipe
from test_recipes import RECIPES

STEPS, WINDOWS, BATCH, LENGTH = 10, 16, 4, 32  # two and a half epochs
# What says where a run's things are, how long it is and what it is scored on; all else is its policy.
WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
OWN = {"model_name_or_path", "text", "output_dir", "max_steps", "per_device_train_batch_size", "block_size"}
OWN |= {"eval_texts", "prompts", "push_to_hub", "hub_model_id", "hub_private_repo"}
OWN |= {"prefix_cache"}  # where states lie is no part of the policy: test_prefix_on_disk has all doors
# An evaluation draws a seed for its loader, and so moves dropout's draws; `train` scores the training text in it too.
SCORED_AT_ITS_ENDS = {"eval_strategy": "no", "prompts": []}
PHASES = {25: 6, 50: 7, 75: 8, 100: 9}  # of 123 steps -> of 10: the first is longer than an epoch


def policies():
    """What recipes say of training, each policy once: name -> values and the kind of model."""
    found, seen = {}, {}
    for path in RECIPES:
        if path.parent.name == "parts":  # of models of their own, which test_experts and test_vision_language have
            continue
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = path.parent.name if path.parent.name in ("gpt2", "llama") else "lilliput"
        policy = {key: value for key, value in values.items() if key not in OWN}
        twin = seen.setdefault(json.dumps([kind, policy], sort_keys=True), path)
        if twin is path:
            found[str(path.relative_to(REPOSITORY / "recipes"))] = (kind, policy)
    return found


POLICIES = policies()
ROWS = re.compile(r"\d{4,}")
# Which windows make a step, and when to stop: in a Trainer of one's own that is its owner's.
OF_THE_LOOP = ("replay", "early_stopping_patience", "early_stopping_threshold")
QUICK = {
    "gpt2/gradual_unfreezing.yaml",
    "gpt2/layer_decay.yaml",
    "gpt2/notebook.yaml",
    "gpt2/lora.yaml",
    "gpt2/lora_and_norms.yaml",
    "llama/last_2_blocks.yaml",
    "frontier/head_only.yaml",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each kind of model: GPT-2 of 12 blocks with its dropout, a Llama, the bundled model; and a text."""
    folder = tmp_path_factory.mktemp("bases")
    lilliput = builtin_folder("builtin:lilliput")
    tokenizer = AutoTokenizer.from_pretrained(lilliput)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True)
    )
    for name, model in {"gpt2": tiny_gpt2(n_layer=12, vocab_size=len(tokenizer)), "llama": llama}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    story = (REPOSITORY / "recipes" / "frontier" / "voyage_to_lilliput.txt").read_text(encoding="utf-8")
    # so many tokens that WINDOWS of them fill the part that trains
    ids = tokenizer(story)["input_ids"]
    (folder / "text.txt").write_text(tokenizer.decode(ids[: int(WINDOWS * LENGTH / 0.85)]), encoding="utf-8")
    return {"gpt2": folder / "gpt2", "llama": folder / "llama", "lilliput": lilliput, "text": folder / "text.txt"}


class Phases(TrainerCallback):
    """Which parameters have a gradient and are in the optimizer, in each step."""

    def __init__(self):
        self.learning = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = {name for name, parameter in named_learners(model) if parameter.grad is not None}
        assert names == {name for name, parameter in named_learners(model) if id(parameter) in held}
        self.learning.append(names)


def recipe_of(name, bases, folder):
    kind, policy = POLICIES[name]
    values = {
        **policy,
        "model_name_or_path": str(bases[kind]),
        "text": str(bases["text"]),
        "output_dir": str(folder),
        "block_size": LENGTH,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        **SCORED_AT_ITS_ENDS,
    }
    for key in OF_THE_LOOP:
        values.pop(key, None)
    if isinstance(values.get("trainable"), list):  # rows of GPT-2's tokens; the models here have fewer
        values["trainable"] = [ROWS.sub(lambda row: str(int(row[0]) % 4096), text) for text in values["trainable"]]
    if "schedule" in values:
        values["schedule"] = [{**entry, "from_step": PHASES[entry["from_step"]]} for entry in values["schedule"]]
    if "block_sampling" in values:
        values["block_sampling"] = {**values["block_sampling"], "every": 3}
    return recipe_from_values(values)


def through_train(recipe, monkeypatch):
    """`partialtune train`, with a look at its Trainer."""
    found, watch = SimpleNamespace(), Phases()

    def make(*args, **kwargs):
        run = stages_make(*args, **kwargs)
        run.trainer.add_callback(watch)
        found.trainer, found.tuning = run.trainer, run.tuning
        return run

    stages_make = stages.make_trainer
    monkeypatch.setattr(stages, "make_trainer", make)
    stages.train(recipe)
    return found.trainer, found.tuning, watch.learning


def through_attach(recipe, folder):
    """What a user writes who has the same windows."""
    values, given = recipe.values, recipe.training
    path = values["model_name_or_path"]
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if values.get("dropout") == 0 else {}
    model = AutoModelForCausalLM.from_pretrained(path, **dropout)
    names = ("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "max_grad_norm")
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **{name: given[name] for name in names if name in given},
    )
    tokenizer, selectors = AutoTokenizer.from_pretrained(path), []
    if "new_tokens" in values:
        selectors = pt.add_tokens(model, tokenizer, values["new_tokens"], values.get("new_tokens_init"))
    data = data_of_recipe(recipe, args, tokenizer)
    assert len(data.train) >= WINDOWS
    if values.get("method") == "lora":
        plan = plan_lora(model, values["trainable"], values["lora_rank"], values["lora_alpha"], args.seed)
    else:
        trainable = ["all"] if values.get("method") == "full" else [*values.get("trainable", []), *selectors]
        keys = ("lora", "block_sampling", "part_learning_rates", "layer_decay", "frozen_quantization")
        plan = pt.plan_freeze(
            model,
            trainable,
            head=values.get("head", "tied"),
            schedule=recipe.freeze.schedule,
            seed=args.seed,
            **{key: values[key] for key in keys if key in values},
        )
    watch = Phases()
    set_seed(args.seed)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_windows,
        callbacks=[watch],
    )
    tuning = pt.attach(trainer, plan, weight_decay_on=values.get("weight_decay_on", "matrices"))
    trainer.train()
    trainer.save_model()
    return trainer, tuning, watch.learning


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in POLICIES]
)
def test_a_recipe_trains_the_same_bits_through_a_stock_trainer_and_through_train(
    tmp_path, name, bases, monkeypatch, undrawn
):
    recipe = recipe_of(name, bases, tmp_path / "recipe")
    own, tuning, learning = through_train(recipe, monkeypatch)
    stock, attached, learning_there = through_attach(recipe, tmp_path / "stock")
    weights = dict(own.model.named_parameters())
    assert weights.keys() == dict(stock.model.named_parameters()).keys()
    for parameter, values in stock.model.named_parameters():
        assert torch.equal(values, weights[parameter]), parameter
    assert [one["loss"] for one in own.state.log_history if "loss" in one] == [
        one["loss"] for one in stock.state.log_history if "loss" in one
    ]
    assert (len(learning), learning) == (STEPS, learning_there)
    for step, names in enumerate(learning):
        assert names == set(attached.plan.phase_at(step).trainable)
    assert attached.plan.to_json({}, {}) == tuning.plan.to_json({}, {})
    audits = [json.loads((tmp_path / folder / "audit.json").read_text()) for folder in ("recipe", "stock")]
    assert audits[0].pop("saved_files") == {"read_back": True, "different": []}  # train reads its folder again
    audits[1].pop("saved_files")
    assert audits[0] == audits[1]
    assert audits[0]["passed"] is True
    deltas = [Path(tmp_path / folder / "weight_deltas.jsonl").read_text() for folder in ("recipe", "stock")]
    assert deltas[0] == deltas[1]
    expected = any(phase.first_block for phase in attached.plan.phases)
    assert (tuning.fast.hits > 0, attached.fast.hits > 0) == (expected, expected)


def test_every_recipe_of_the_repository_is_among_the_policies_or_has_a_twin_there():
    kinds = {kind for kind, _ in POLICIES.values()}
    assert kinds == {"gpt2", "llama", "lilliput"}
    of_other_models = sum(path.parent.name == "parts" for path in RECIPES)
    # gulliver_push pushes what gulliver trains, prefix_on_disk trains what last_2_blocks does
    assert len(RECIPES) - len(POLICIES) - of_other_models == 2
    assert POLICIES.keys() >= QUICK
