"""Learning curves: bits per byte in the log at every evaluation, on a bounded sample, and nothing else changed."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import some_windows, tiny_gpt2
from partialtune.insight.learning_curves import CURVE_WINDOWS, LearningCurves
from partialtune.scoring.evaluation import ScoredText, score_text, spaced_indices
from partialtune.training.training_data import collate_windows


def text(windows, seed=0):
    dataset = some_windows(windows, seed=seed)
    return ScoredText(dataset, text_tokens=16 * windows, text_bytes=50 * windows)


TEXTS = {"validation": text(6, seed=1), "training": text(40, seed=2), "fable": text(3, seed=3)}


def run(folder, curves=True, held_out=True, resume=None, **settings):
    """A plain Trainer over 6 steps; with `curves` it scores them."""
    torch.manual_seed(0)
    args = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "remove_unused_columns": False, **({"eval_strategy": "steps", "eval_steps": 2} if held_out else {}),
    }  # fmt: skip
    trainer = Trainer(
        tiny_gpt2(),
        TrainingArguments(**{**args, **settings}),
        data_collator=collate_windows,
        train_dataset=some_windows(),
        eval_dataset=TEXTS["validation"].windows if held_out else None,
    )
    texts = {name: scored for name, scored in TEXTS.items() if held_out or name != "validation"}
    found = LearningCurves(texts, batch_size=4).attach(trainer) if curves else None
    trainer.train(resume_from_checkpoint=resume)
    return trainer, found


def points(trainer, name):
    key = f"bits_per_byte/{name}"
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


def test_every_text_is_scored_before_the_first_step_and_at_every_evaluation(tmp_path):
    trainer, curves = run(tmp_path)
    assert [step for step, _ in points(trainer, "training")] == [0, 2, 4, 6]
    assert [step for step, _ in points(trainer, "fable")] == [0, 2, 4, 6]
    assert [step for step, _ in points(trainer, "validation")] == [2, 4, 6]
    assert curves.to_json()["windows"] == {"training": CURVE_WINDOWS, "fable": 3}
    assert curves.seconds > 0


def test_the_points_are_the_scores_of_the_sample_and_the_held_out_loss_in_bits_per_byte(tmp_path):
    trainer, _ = run(tmp_path)
    sample = TEXTS["training"].windows.select(spaced_indices(40, CURVE_WINDOWS))
    expected = score_text(trainer.model, ScoredText(sample, 16 * 40, 50 * 40), 8, None)["bits_per_byte"]
    assert points(trainer, "training")[-1][1] == pytest.approx(expected, rel=1e-6)
    whole = score_text(trainer.model, TEXTS["validation"], 8, None)["bits_per_byte"]
    assert points(trainer, "validation")[-1][1] == pytest.approx(whole, rel=1e-5)
    before = score_text(tiny_gpt2(), TEXTS["fable"], 8, None)["bits_per_byte"]
    assert points(trainer, "fable")[0][1] == pytest.approx(before, rel=1e-6)


def test_training_and_its_log_are_what_they_are_without_curves(tmp_path):
    with_curves, without = (run(tmp_path / str(curves), curves)[0] for curves in (True, False))
    weights = zip(with_curves.model.parameters(), without.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (with_curves, without)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_a_run_without_held_out_text_has_points_all_the_same(tmp_path):
    trainer, _ = run(tmp_path, held_out=False)
    assert [step for step, _ in points(trainer, "training")] == list(range(7))
    assert points(trainer, "validation") == []
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 6


def test_the_last_step_is_scored_where_no_evaluation_falls_on_it(tmp_path):
    trainer, _ = run(tmp_path, max_steps=5)
    assert [step for step, _ in points(trainer, "fable")] == [0, 2, 4, 5]


def test_a_run_that_goes_on_keeps_its_points_and_ends_with_the_same(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole, _ = run(tmp_path / "whole", **settings)
    resumed, _ = run(tmp_path / "other", resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    for name in TEXTS:
        assert points(resumed, name) == points(whole, name)


def test_a_score_that_is_not_finite_is_left_out_of_the_log(tmp_path):
    trainer, curves = run(tmp_path, max_steps=1, held_out=False)
    trainer.state.log_history.clear()
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight.fill_(math.nan)
    curves.on_evaluate(
        trainer.args, trainer.state, trainer.control, model=trainer.model, metrics={"eval_loss": math.nan}
    )
    assert points(trainer, "training") == []
