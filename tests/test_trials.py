"""Trials of learning rates: base, plan and kept states are made once, and each trial is what it is by itself."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.compare import try_rates
from partialtune.recipe.recipe import read_recipe

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
RATES = (1e-3, 1e-2)


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe of a tiny GPT-2, with changes -> its file."""
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "text.txt").write_text("".join(f"{number}. {TEXT}" for number in range(60)), encoding="utf-8")

    def write(**changes) -> Path:
        values = {
            "model_name_or_path": str(base),
            "text": str(tmp_path / "text.txt"),
            "block_size": 32,
            "trainable": ["blocks[-1]", "final_norm"],
            "output_dir": "unused",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "dropout": 0.1,  # drawn in the block that trains: from the same seed in each trial
            "disable_tqdm": True,
            **changes,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return file

    return write


@pytest.fixture
def trained(monkeypatch):
    """The weights of each trial, as they were scored; what was loaded; and each trial's fast paths."""
    weights, loads, paths = [], [], []
    score, load, make = try_rates.score_text, try_rates.load_base, try_rates.make_trainer

    def scored(model, *args, **kwargs):
        weights.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        return score(model, *args, **kwargs)

    def made(*args, **kwargs):
        run = make(*args, **kwargs)
        paths.append(run.tuning.fast)
        return run

    monkeypatch.setattr(try_rates, "score_text", scored)
    monkeypatch.setattr(try_rates, "load_base", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr(try_rates, "make_trainer", made)
    return weights, loads, paths


def trials_of(file: Path, recipe: Path, rates) -> list[dict]:
    try_rates.try_rates(file, rates, read_recipe(str(recipe), []))
    return json.loads(file.read_text())["trials"]


@pytest.mark.parametrize(
    ("changes", "loaded"),
    [
        ({"bf16": True}, 1),  # one epoch, whose states are kept for the next trial alone
        ({"trainable": ["blocks[-1].norms"], "prefix_cache": "disk", "optim": "sgd"}, 1),
        ({"head": "untied", "trainable": ["head"], "max_steps": 16}, 1),  # more than an epoch
        ({"lora": {"target": ["blocks[-1]"], "rank": 2}, "trainable": ["final_norm"]}, 2),
        ({"schedule": [{"from_step": 2, "trainable": ["blocks[-1]"]}], "trainable": ["final_norm"]}, 2),
    ],
    ids=["bf16", "disk", "untied head", "adapters", "schedule"],
)
def test_a_trial_has_every_bit_that_it_has_in_a_process_of_its_own(
    recipe_file, trained, tmp_path, monkeypatch, changes, loaded
):
    weights, loads, paths = trained
    recipe = recipe_file(**changes)
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    together = trials_of(tmp_path / "together.json", recipe, RATES)
    assert len(loads) == loaded
    first, second = paths
    assert first.misses > 0
    assert second.hits > 0
    assert second.misses == 0
    of_together = list(weights)
    weights.clear()
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setenv("PARTIALTUNE_PREFIX_SHARED", "0")
    alone = [trials_of(tmp_path / f"{rate}.json", recipe, [rate])[0] for rate in RATES]
    assert paths[2].misses == first.misses
    assert together == alone
    assert alone[0]["bits_per_byte"] != alone[1]["bits_per_byte"]
    for one, other in zip(of_together, weights, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_after_a_rate_that_diverges_the_base_is_loaded_anew(recipe_file, trained, tmp_path):
    _weights, loads, _ = trained
    recipe = recipe_file()
    diverged, good = trials_of(tmp_path / "rates.json", recipe, [1e30, 1e-3])
    assert diverged["failure"] in ("diverged", "not finite")
    assert len(loads) == (2 if diverged["failure"] == "diverged" else 1)
    assert good == trials_of(tmp_path / "alone.json", recipe, [1e-3])[0]
