"""Scores of the base are taken once: what a run finds of an earlier one, and what it does not take for its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import some_windows, tiny_gpt2
from partialtune.cache import cache_root
from partialtune.model.digests import digests
from partialtune.recipe_run import evaluate_before_after
from partialtune.recipe_run.evaluate_before_after import Evaluator
from partialtune.scoring.evaluation import ScoredText
from partialtune.scoring.fast_scoring import FastScoring
from test_evaluation import ascii_tokenizer

ALL = ("loss", "gelu", "casts")
TEXTS = {
    name: ScoredText(some_windows(count, seed=count), 16 * count, 50 * count)
    for name, count in (("validation", 5), ("training", 3))
}


@pytest.fixture
def scored(monkeypatch):
    """Labels of the texts that are scored from now on."""
    labels, plain = [], evaluate_before_after.score_windows

    def noting(model, text, batch_size, label, *args):
        labels.append(label)
        return plain(model, text, batch_size, label, *args)

    monkeypatch.setattr(evaluate_before_after, "score_windows", noting)
    return labels


def evaluator(model, **changes) -> Evaluator:
    return replace(Evaluator(ascii_tokenizer(), TEXTS, ["ab"], 4, FastScoring(model, ALL)), **changes)


def before(folder, model=None, **changes):
    model = model or tiny_gpt2()
    return evaluator(model, **changes).before(model, folder, digests(model))


def test_another_run_finds_the_scores_of_the_same_base_and_an_unfinished_one_its_own(tmp_path, scored, caplog):
    caplog.set_level("INFO")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first = before(tmp_path / "one")
    assert scored == ["validation, before", "training, before"]
    second = before(tmp_path / "two")
    assert len(scored) == 2
    assert "taken by an earlier run, are used again: validation, training, prompts" in caplog.text
    assert second.scores == first.scores
    assert np.array_equal(second.nats, first.nats)
    assert np.array_equal(second.texts["training"].sums, first.texts["training"].sums)
    assert torch.equal(second.prompts[0].log_probabilities, first.prompts[0].log_probabilities)
    before(tmp_path / "one")
    assert "taken by an earlier start, are used again" in caplog.text


def other_weights():
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1e-6
    return model


def test_another_base_text_batch_prompt_or_path_has_scores_of_its_own(tmp_path, scored):
    (tmp_path / "run").mkdir()
    before(tmp_path / "run")
    other_text = {**TEXTS, "training": replace(TEXTS["training"], windows=some_windows(3, seed=9))}
    model = tiny_gpt2()
    others = [
        {"model": other_weights()},
        {"texts": other_text},
        {"batch_size": 3},
        {"prompts": ["ac"]},
        {"fast": FastScoring(model, ("loss",)), "model": model},
    ]
    for number, changes in enumerate(others):
        (tmp_path / str(number)).mkdir()
        before(tmp_path / str(number), **changes)
        assert len(scored) == 2 * (number + 2), changes


def test_without_fast_paths_scores_are_taken_anew_and_a_damaged_file_of_the_cache_is_made_again(tmp_path, scored):
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()
    model = tiny_gpt2()
    for name in ("one", "two"):
        before(tmp_path / name, model, fast=FastScoring(model, ()))
    assert len(scored) == 4
    assert not (cache_root() / "prepared" / "scores").exists()
    before(tmp_path / "three")
    (file,) = (cache_root() / "prepared" / "scores").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    before(tmp_path / "four")
    assert len(scored) == 8


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, scored, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "file"))
    before(tmp_path)
    assert len(scored) == 2
