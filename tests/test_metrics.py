"""The table of metrics: one row is all that a new metric needs to be computed, written and compared."""

import math

import pytest

from partialtune.metrics import CHOOSES_BEST, METRICS, WINDOW_SUMS, Metric, WindowSum, best_model_metric, value_of_loss
from partialtune.pages.findings import score_changes
from partialtune.scoring.evaluation import score_text
from test_evaluation import half_predictable_text, tiny_gpt2


def test_a_row_and_its_sum_make_a_new_metric_scored_and_shown(monkeypatch):
    top3 = WindowSum("int64", lambda nats, hits: hits[..., :3].any(-1).sum(1))
    row = Metric("top3_accuracy", "top-3 accuracy", "higher", "share", lambda sums: sums["top3"] / sums["tokens"])
    monkeypatch.setitem(WINDOW_SUMS, "top3", top3)
    monkeypatch.setitem(METRICS, row.key, row)
    model = tiny_gpt2()
    scores = score_text(model, half_predictable_text(model), batch_size=3, description=None)
    assert scores["next_token_accuracy"] < scores["top3_accuracy"] < scores["top5_accuracy"]
    shown = score_changes({"before": {**scores, "top3_accuracy": 0.25}, "after": {**scores, "top3_accuracy": 0.5}})[-1]
    assert (shown.metric, shown.before, shown.after) == ("top-3 accuracy", "25.0%", "50.0%")
    assert (shown.change, shown.better) == ("+25.0 points", True)


def test_only_what_is_made_of_the_loss_chooses_the_best_model():
    assert set(CHOOSES_BEST) == {"loss", "perplexity", "bits_per_byte"}
    assert best_model_metric("eval_perplexity") is METRICS["perplexity"]
    assert best_model_metric(None) is best_model_metric("accuracy") is None
    bits = METRICS["bits_per_byte"]
    assert value_of_loss(bits, math.log(2), tokens_per_byte=0.25) == pytest.approx(0.25)
    assert value_of_loss(bits, math.log(2), tokens_per_byte=None) is None
    assert value_of_loss(METRICS["next_token_accuracy"], 1.0, 0.25) is None
    assert math.isfinite(value_of_loss(METRICS["perplexity"], 5000.0, None))


@pytest.mark.parametrize("key", METRICS)
def test_every_row_says_which_way_is_better_and_what_is_unknown(key):
    metric = METRICS[key]
    assert metric.improved(0.5, 0.25) is (metric.better == "lower")
    assert metric.improved(0.5, 0.5) is metric.improved(None, 0.5) is None
    assert metric.words(None) == metric.change_words(None, 0.5) == "–"
    assert (metric.of_sums is None) != (metric.of_loss is None)
