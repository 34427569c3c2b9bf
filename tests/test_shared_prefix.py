"""A comparison whose runs and trials share a frozen prefix: who shares it, in which order they run, the same bits."""

import json
import logging
import os
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from partialtune.cli import main
from partialtune.compare import run_queue, try_rates
from partialtune.compare.compare import plan_policies
from partialtune.compare.policies import read_policies
from partialtune.compare.shared_prefix import shared_prefixes, told_to_share
from partialtune.engine import prefix_place
from partialtune.engine.prefix_place import SHARED_BY_OTHERS, Rows, choose_place

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
COMMON = {
    "model_name_or_path": "builtin:lilliput",
    "block_size": 32,
    "output_dir": "unused",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "prompts": [],
    "save_strategy": "no",
}


def written(folder: Path, **policies) -> list[str]:
    """Recipe files, one a policy, in their order."""
    (folder / "text.txt").write_text("".join(f"{number}. {TEXT}" for number in range(40)), encoding="utf-8")
    for name, changes in policies.items():
        values = {**COMMON, "text": str(folder / "text.txt"), **changes}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return [str(folder / f"{name}.yaml") for name in policies]


LAST, HEAD = {"trainable": ["blocks[-1]"]}, {"trainable": ["final_norm"]}
NORMS_OF_LAST = {"trainable": ["blocks[-1].norms", "final_norm"]}


def sharing(folder, seeds, rates, **policies):
    read = read_policies(written(folder, **policies))
    return read, shared_prefixes(read, plan_policies(read), seeds, rates)


def test_policies_with_the_same_prefix_follow_one_another_and_share_it_with_seeds_and_trials(tmp_path, monkeypatch):
    everything = {"trainable": ["all"]}
    read, shared = sharing(
        tmp_path, [0, 1], 3, a=LAST, b=HEAD, c=everything, d={**LAST, "bf16": True}, e=NORMS_OF_LAST, f=everything
    )
    assert [policy.name for policy in shared.policies] == ["a", "e", "b", "c", "f", "d"]
    depth = shared.plans["a"].block_count
    found = sorted((prefix.blocks, count) for prefix, count in shared.users.items())
    assert found == [(depth - 1, 5), (depth - 1, 10), (depth, 5)]  # d is of another precision
    assert {p.name for p in read if shared.has(p, 0, trial=False)} == {"a", "b", "d", "e"}
    assert len(shared.words()) == 3
    assert "10 runs and trials have the same" in shared.words()[0]
    monkeypatch.setenv(SHARED_BY_OTHERS, "0")
    assert not any(shared.has(policy, 0, trial=True) for policy in read)
    assert not shared.words()


def test_a_prefix_is_shared_by_nobody_where_it_is_switched_off_or_one_run_has_it_or_windows_are_others(tmp_path):
    off = {"prefix_cache": "off"}
    _, shared = sharing(tmp_path, [0], 0, a=LAST, b=HEAD, c={**LAST, **off}, d={**HEAD, **off})
    assert set(shared.users.values()) == {1}
    drawn = {"window_sampling": "random"}
    read, shared = sharing(tmp_path, [0, 1], 0, a={**LAST, **drawn}, b=HEAD | drawn)
    assert not any(shared.has(policy, seed, trial=False) for policy in read for seed in (0, 1))
    read, shared = sharing(tmp_path, [0, 1], 2, a={**LAST, **drawn}, b=LAST | drawn | {"prefix_cache": "memory"})
    one, memory = read
    assert shared.has(one, 0, trial=True)  # the trials, which have one seed and one text
    assert not shared.has(one, 0, trial=False)
    assert not shared.has(memory, 0, trial=True)
    _, shared = sharing(tmp_path, [0, 1], 0, a={**LAST, **drawn, "data_seed": 5})
    assert set(shared.users.values()) == {2}


def test_auto_takes_the_disk_for_states_that_others_want_as_soon_as_writing_is_faster_than_computing(monkeypatch):
    from conftest import tiny_gpt2

    model, rows = tiny_gpt2(), Rows(100, 32, come_again=False)
    monkeypatch.setattr(prefix_place, "measure", lambda *_: prefix_place.Cost(64, 1e-5))
    monkeypatch.setattr(prefix_place, "writing_rate", lambda: 64e5 * 2)
    with told_to_share(False):
        assert choose_place(model, 2, rows) == ""
    with told_to_share(True):
        assert "others of this comparison start from them" in choose_place(model, 2, rows)
        monkeypatch.setattr(prefix_place, "writing_rate", lambda: 64e5 / 2)
        assert choose_place(model, 2, rows) == ""
        monkeypatch.setenv("PARTIALTUNE_PREFIX_GB", "0")
        monkeypatch.setattr(prefix_place, "writing_rate", lambda: 64e5 * 2)
        assert choose_place(model, 2, rows) == ""
    assert SHARED_BY_OTHERS not in os.environ


@pytest.mark.slow
def test_runs_of_a_comparison_on_one_prefix_have_the_bits_of_single_runs_and_a_second_start_repeats_nothing(
    tmp_path, monkeypatch, undrawn, caplog
):
    """2 policies x 2 rates x 2 seeds. The first trial fills the disk; nobody after it computes a row of training."""
    commands, out = [], tmp_path / "out"

    def run_here(command, log, look, *held):
        commands.append(command[2:])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        run = {"partialtune": main, "partialtune.compare.try_rates": try_rates.main}[command[2]]
        return run(command[3:])

    monkeypatch.setattr(run_queue, "run_child", run_here)
    monkeypatch.setattr(prefix_place, "writing_rate", lambda: 1e12)  # whatever else the machine's disk does
    recipes = written(tmp_path, last=LAST, norms=NORMS_OF_LAST)
    words = ["compare", *recipes, "--output_dir", str(out), "--seeds", "0", "1", "--learning_rates", "1e-4", "1e-3"]
    with caplog.at_level(logging.INFO, "partialtune"):
        assert main(words) == 0
    assert "8 runs and trials have the same" in caplog.text
    assert "others of this comparison start from them, too" in caplog.text
    assert [command[0] for command in commands] == ["partialtune.compare.try_rates"] * 2 + ["partialtune"] * 4

    folders = sorted((out / "runs").iterdir())
    assert len(folders) == 4
    monkeypatch.setenv(SHARED_BY_OTHERS, "0")
    for folder in (folders[0], folders[3]):  # each policy and each seed once
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert recipe["run"]["prefix_cache"][0]["on_disk"] is True
        assert "prefix_cache" not in recipe  # it is the recipe's own auto
        alone = tmp_path / "alone" / folder.name
        rate, seed = str(recipe["learning_rate"]), str(recipe["seed"])
        monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "caches" / folder.name))
        name = folder.name.split("-")[0]
        train = ["train", str(tmp_path / f"{name}.yaml"), "--output_dir", str(alone), "--learning_rate", rate]
        assert main([*train, "--seed", seed]) == 0
        by_itself = yaml.safe_load((alone / "recipe.yaml").read_text())
        assert "on_disk" not in by_itself["run"]["prefix_cache"][0]
        assert json.loads((folder / "performance.json").read_text())["prefix_cache"] == "disk"
        one, other = (load_file(place / "model.safetensors") for place in (folder, alone))
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one)
        for file in ("evaluation.json", "weight_deltas.jsonl", "audit.json"):
            assert (folder / file).read_bytes() == (alone / file).read_bytes(), file

    commands.clear()
    assert main(words) == 0
    assert commands == []
