"""Trainer's arguments by the length of the run, and the memory that a container leaves."""

import pytest

from partialtune import machine
from partialtune.errors import RecipeError
from partialtune.training.settings import run_length, suit_length, training_arguments


@pytest.fixture
def said(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 120, "per_device_train_batch_size": 16}


@pytest.mark.parametrize(
    ("more", "evaluates", "every"),
    [
        ({}, "steps", 12),
        ({"eval_strategy": "steps"}, "steps", 12),
        ({"eval_steps": 5}, "steps", 5),
        ({"eval_strategy": "epoch"}, "epoch", None),
        ({"eval_strategy": "no"}, "no", None),
        ({"load_best_model_at_end": True, "save_steps": 30}, "steps", 30),
    ],
)
def test_held_out_text_is_scored_ten_times_a_run_unless_the_recipe_says_otherwise(said, more, evaluates, every):
    args = training_arguments({**said, **more})
    suit_length(args, {**said, **more}, windows=64, held_out=True)
    assert args.eval_strategy == evaluates
    if every is not None:
        assert args.eval_steps == every


def test_without_held_out_text_there_is_no_evaluation(said):
    args = training_arguments(said)
    suit_length(args, said, windows=64, held_out=False)
    assert args.eval_strategy == "no"


def test_windows_that_fill_no_batch_are_an_error_and_no_run_of_nothing(said):
    args = training_arguments({**said, "dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 2})
    assert run_length(args, windows=33) == 4
    with pytest.raises(RecipeError, match="10 windows fill no batch of 16"):
        run_length(args, windows=10)


def test_a_containers_limit_counts_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole, free = machine.total_memory(), machine.free_memory()
    assert 0 < free < whole
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    assert machine.total_memory() == whole
    (tmp_path / "memory.max").write_text("5000000\n")
    assert (machine.total_memory(), machine.free_memory()) == (5_000_000, 2_000_000)
