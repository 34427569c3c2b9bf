"""Two processes on a CPU give the answer of one: same losses, weights, audit, and one set of files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from conftest import REPOSITORY

CONFIG = REPOSITORY / "accelerate_config.yaml"
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def launch(folder: Path, processes: int, batch: int) -> subprocess.CompletedProcess:
    """Run a small recipe under accelerate; `folder` gets the run."""
    values = {
        "model_name_or_path": "builtin:lilliput",
        "text": str(folder.parent / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm"],
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": batch,
        "learning_rate": 5e-5,
        "dataloader_drop_last": True,
        "save_steps": 2,
        "prompts": ["It was"],
    }
    (folder.parent / "text.txt").write_text(TEXT * 150)
    recipe = folder.parent / f"recipe-{processes}.yaml"
    recipe.write_text(yaml.safe_dump(values))
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), *several]
    return subprocess.run(
        [*command, "-m", "partialtune", "train", str(recipe)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with batch 4, two with batch 2 each."""
    folder = tmp_path_factory.mktemp("distributed")
    one, two = folder / "one", folder / "two"
    for path, processes, batch in ((one, 1, 4), (two, 2, 2)):
        run = launch(path, processes, batch)
        assert run.returncode == 0, run.stderr
    return one, two


@pytest.mark.slow
def test_two_processes_really_ran(runs):
    assert [yaml.safe_load((run / "recipe.yaml").read_text())["run"]["processes"] for run in runs] == [1, 2]


@pytest.mark.slow
def test_losses_weights_and_audit_agree(runs):
    histories = [read(run, "trainer_state.json")["log_history"] for run in runs]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 4
    one, two = (dict(AutoModelForCausalLM.from_pretrained(run).named_parameters()) for run in runs)
    for name in one:
        assert float((one[name] - two[name]).detach().abs().max()) <= 1e-5, name
    audits = [read(run, "audit.json") for run in runs]
    assert audits[0]["passed"] is audits[1]["passed"] is True
    assert audits[0]["trainable"]["l2_delta"] == pytest.approx(audits[1]["trainable"]["l2_delta"], rel=1e-3)
    scores = [read(run, "evaluation.json")["validation"]["after"]["loss"] for run in runs]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.slow
def test_insight_agrees(runs):
    one, two = (read(run, "insight.json") for run in runs)
    assert one["sampled_continuations"] == two["sampled_continuations"]
    assert one["next_token_shift"]["positions"] == two["next_token_shift"]["positions"] > 0
    assert one["next_token_shift"]["mean_bits"] == pytest.approx(two["next_token_shift"]["mean_bits"], abs=1e-4)
    ranks = [{e["name"]: e["effective_rank"] for e in insight["effective_ranks"]["matrices"]} for insight in (one, two)]
    assert len(ranks[0]) == 4
    assert ranks[0] == pytest.approx(ranks[1], rel=0.05)
    curves = [
        [
            entry["bits_per_byte/training"]
            for entry in read(run, "trainer_state.json")["log_history"]
            if "bits_per_byte/training" in entry
        ]
        for run in runs
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert len(curves[0]) == 5


@pytest.mark.slow
def test_nothing_is_written_twice(runs):
    names = [
        sorted(str(path.relative_to(run)) for path in run.rglob("*") if "rng_state" not in path.name) for run in runs
    ]
    assert names[0] == names[1]
    lines = [(run / "weight_deltas.jsonl").read_text().count("\n") for run in runs]
    assert lines[0] == lines[1]
