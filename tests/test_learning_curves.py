"""Learning curves: bits per byte in the log at every evaluation, on a bounded sample, and nothing else changed."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import some_windows, tiny_gpt2
from partialtune.insight.learning_curves import CURVE_WINDOWS, LearningCurves, bits_per_byte, windows_a_point
from partialtune.scoring.evaluation import ScoredText, evenly_spaced, score_text, score_windows, spaced_indices
from partialtune.scoring.fast_scoring import FastScoring
from partialtune.training.recipe_trainer import decides_by_held_out, evaluated_windows
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


# ---- samples, and the scores before and after


def sampled_run(folder, **changes):
    """A run whose evaluations take 2 of the 6 held-out windows, and which knows the scores before training."""
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder), max_steps=5, eval_strategy="steps", eval_steps=2, use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, report_to="none", remove_unused_columns=False, learning_rate=1e-2,
    )  # fmt: skip
    held_out = evenly_spaced(TEXTS["validation"].windows, 2)
    trainer = Trainer(
        tiny_gpt2(), args, data_collator=collate_windows, train_dataset=some_windows(), eval_dataset=held_out
    )
    model = trainer.model
    before = {name: score_windows(model, scored, 4, None) for name, scored in TEXTS.items()}
    whole = []

    def score_whole(name):
        whole.append(name)
        return score_windows(model, TEXTS[name], 4, None)

    settings = {"held_out": 2, "before": before, "score_whole": score_whole, "fast": FastScoring(model, ("loss",))}
    curves = LearningCurves(TEXTS, 4, 4, **{**settings, **changes}).attach(trainer)
    trainer.train()
    return trainer, curves, before, whole


def sample(name, windows):
    scored = TEXTS[name]
    return ScoredText(evenly_spaced(scored.windows, windows), scored.text_tokens, scored.text_bytes)


def test_every_point_of_a_curve_is_of_the_same_windows_and_the_whole_text_is_scored_once_at_the_end(tmp_path):
    trainer, curves, before, whole = sampled_run(tmp_path)
    for name, count in {"training": 4, "fable": 3, "validation": 2}.items():
        found = dict(points(trainer, name))
        assert list(found) == [0, 2, 4, 5]
        for step, model in ((0, tiny_gpt2()), (5, trainer.model)):
            expected = score_text(model, sample(name, count), 4, None)["bits_per_byte"]
            assert found[step] == pytest.approx(expected, rel=1e-5)
        after = score_text(trainer.model, TEXTS[name], 4, None)
        assert curves.at_end[name].figures == pytest.approx(after, rel=1e-6)
    assert before["validation"].figures["loss"] != pytest.approx(
        score_text(tiny_gpt2(), sample("validation", 2), 4, None)["loss"], abs=1e-3
    )
    assert whole == list(TEXTS)  # once, at the last evaluation
    assert curves.to_json()["windows"] == {"training": 4, "fable": 3, "validation": 2}


def test_the_logged_held_out_loss_is_that_of_the_windows_that_are_evaluated(tmp_path):
    trainer, *_ = sampled_run(tmp_path)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses[5] == pytest.approx(score_text(trainer.model, sample("validation", 2), 4, None)["loss"], abs=1e-5)
    bits = dict(points(trainer, "validation"))
    assert bits[4] == pytest.approx(bits_per_byte(losses[4], TEXTS["validation"]), rel=1e-6)


def test_where_the_best_model_is_loaded_afterwards_the_end_is_scored_by_samples(tmp_path):
    trainer, curves, _, whole = sampled_run(tmp_path, score_whole=None)
    assert (whole, curves.at_end) == ([], {})
    assert [step for step, _ in points(trainer, "training")] == [0, 2, 4, 5]


def test_a_runs_curves_cost_little_beside_the_windows_that_it_trains_on_but_show_something():
    assert windows_a_point(trained=123 * 16, points=10, texts=2) == 4
    assert windows_a_point(trained=10_000, points=10, texts=2) == 20
    assert windows_a_point(trained=12, points=3, texts=4) == 4


@pytest.mark.parametrize(
    ("settings", "decides"),
    [
        ({}, False),
        ({"load_best_model_at_end": True, "save_steps": 2}, True),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, True),
        ({"metric_for_best_model": "loss"}, True),
    ],
)
def test_where_the_held_out_loss_decides_something_all_of_it_is_evaluated(settings, decides, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=2, **settings)
    assert decides_by_held_out(args) == decides


def test_all_held_out_windows_are_evaluated_unless_that_takes_long(tmp_path):
    held_out = some_windows(100, block_size=16)
    data = SimpleNamespace(held_out=held_out, epoch_windows=48, scored={"validation": None, "training": None})
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=20, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2
    )
    at_most = 10**13 // (2 * 10 * 100 * 16)  # parameters: 10 evaluations of 100 windows of 16 tokens
    assert evaluated_windows(args, data, at_most) is held_out
    sample = evaluated_windows(args, data, at_most + 1)
    assert sample["input_ids"][:] == held_out.select(spaced_indices(100, 8))["input_ids"][:]
    args.metric_for_best_model = "loss"
    assert evaluated_windows(args, data, 10**12) is held_out
