"""What the benchmark scripts compute from their measurements. The measurements themselves are made by hand."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import REPOSITORY, tiny_gpt2
from partialtune.freeze.plan import plan_freeze
from partialtune.model.loading import empty_model
from test_no_logits import SMALL

sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))

import compare_prefix
import random_models
import trl_speed
import yardsticks
from growth import Point, all_series, fit, lines_of
from plain_loop import freeze_by_hand, train
from speed import BESIDE, JOBS, Measurement, Shape, as_table, beside_table, needed, rows_of


@pytest.mark.parametrize(
    ("policy", "trained"), [("full", None), ("notebook", {"wte", "wpe", "ln_f"}), ("last_2", {"h.1", "h.2", "ln_f"})]
)
def test_the_plain_loop_trains_what_its_policy_says(policy, trained):
    model = tiny_gpt2().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(train(model, policy, steps=2, batch_size=2, block_size=8)) == 2
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    everything = {name for name, _ in model.named_parameters()}
    assert moved == {n for n in everything if trained is None or n.split(".")[1] in trained or n[12:15] in trained}


def test_the_speed_table_holds_medians_over_the_rounds_and_their_ratios_beside_the_targets():
    job = next(job for job in JOBS if job.name == "notebook")
    found = [{"fp32": 100.0, "bf16": 400.0}]
    for plain, ours in ((20.0, 14.0), (22.0, 16.0), (90.0, 15.0)):  # other work disturbed the third round
        found += [Measurement("notebook", "plain", plain, 8000, 60), Measurement("notebook", "fp32", ours, 4000, 60)]
    (row,) = rows_of([job], ["fp32"], found, {"notebook": 900.0})
    assert row["time_ratio"] == 15 / 22
    assert row["memory_ratio"] == 0.5
    assert (row["time_met"], row["memory_met"]) == (True, False)
    assert row["utilisation"] == 900 / 15 / 100
    assert "| 0.68 | 0.75 met |" in as_table([row])
    assert "| 0.50 | 0.45 MISSED |" in as_table([row])


def test_another_checkout_is_compared_by_the_ratio_of_medians():
    job = next(job for job in JOBS if job.name == "norms")
    found = [{"fp32": 100.0, "bf16": 400.0}]
    for here, there in ((10.2, 10.0), (30.0, 11.0), (9.0, 31.0)):  # other work disturbed two of them
        found += [Measurement("norms", "fp32", here, 303, 66), Measurement("norms", "fp32" + BESIDE, there, 300, 60)]
    assert beside_table([job], ["fp32"], found).splitlines()[-1] == "| norms only | fp32 | 0.927 | 1.010 | 1.100 |"


def test_a_cached_job_does_not_need_the_products_of_its_prefix():
    last_2 = next(job for job in JOBS if job.name == "last_2")
    shape = Shape(batch_size=2, block_size=8)
    config = tiny_gpt2(n_layer=4, vocab_size=160).config
    a_block, head, tokens = 12 * 32**2, 160 * 32, 2 * 8
    forward_and_both_gradients = 3 * 2 * a_block + 2 * head  # the head itself is frozen
    assert needed(config, shape, last_2) == 2 * tokens * forward_and_both_gradients


def test_points_on_a_line_lie_on_it_and_one_beside_it_is_found():
    straight = fit([0, 1, 2, 3], [1, 3, 5, 7])
    assert (straight.intercept, straight.slope) == (pytest.approx(1), pytest.approx(2))
    assert straight.farthest == pytest.approx(0, abs=1e-12)
    assert fit([1, 2, 3, 4], [1, 4, 9, 16]).farthest > 0.15


def test_seconds_are_set_against_arithmetic_and_memory_against_what_changes():
    points = [Point(value, seconds=value**2, peak_mb=100 + value, arithmetic=5 * value**2) for value in (1, 2, 4)]
    seconds, memory = lines_of(points)
    assert seconds.farthest == pytest.approx(0, abs=1e-9)
    assert memory.farthest == pytest.approx(0, abs=1e-9)


def test_the_growth_benchmark_covers_what_it_says():
    values = [[value for value, _ in series.points] for series in all_series()]
    assert [(min(points), max(points)) for points in values] == [(128, 1024), (1, 32), (0, 12), (0, 10)]


def test_the_table_of_trl_holds_ratios_and_what_is_above_the_floor_of_arithmetic():
    found = [{"fp32": 100.0, "bf16": 400.0}]
    for name, by_hand, attached in (("llama", 10.0, 4.0), ("gpt2", 10.0, 6.0)):
        found.append(trl_speed.Measurement(name, "by hand", by_hand, by_hand, 1000, 5.0, 0))
        found.append(trl_speed.Measurement(name, "attach", attached, 9.0, 900, 5.0, 48))
    products = {"by hand": 800.0, "attach": 500.0}
    llama, gpt2 = (trl_speed.row_of(name, found, products, "fp32") for name in ("llama", "gpt2"))
    assert (llama["time_ratio"], llama["met"]) == (0.4, True)
    assert (gpt2["floor_seconds"], gpt2["over_floor"], gpt2["met"]) == (5.0, 1.2, False)
    assert "| 0.60 | 0.62 | 5.00 | 1.20 | x floor 1.15 MISSED |" in trl_speed.as_table([gpt2])


def test_with_attach_the_products_of_the_frozen_blocks_are_not_needed():
    job = trl_speed.Job("", "gpt2", 4, 64, 160, 2, 8)
    a_block, head, tokens = 12 * 64**2, 160 * 64, 2 * 8
    products = trl_speed.needed(job)
    assert products["attach"] == 2 * tokens * (3 * 2 * a_block + 2 * head)
    assert products["by hand"] == products["attach"] + 2 * tokens * 2 * a_block


@pytest.mark.parametrize("policy", yardsticks.POLICIES)
def test_by_hand_the_same_trains_as_by_the_recipe_of_each_policy(policy):
    for shape in ("gpt2", "smollm2"):
        model = random_models.empty(random_models.SHAPES[shape])
        freeze_by_hand(model, policy)
        by_hand = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        recipe = yardsticks.POLICIES[policy].recipe
        assert by_hand == set(plan_freeze(model, recipe.get("trainable", ["all"])).trainable)


def test_random_weights_are_written_file_by_file_and_load_as_a_model(tmp_path):
    config = LlamaConfig(**SMALL, tie_word_embeddings=True, dtype=torch.bfloat16)
    model = empty_model(config)
    random_models.write_random_weights(model, torch.bfloat16, tmp_path, shard=3000)
    config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert loaded.model.norm.weight.eq(1).all()


def test_the_table_of_yardsticks_holds_medians_and_what_ours_is_of_each_way():
    setting = yardsticks.Setting("smollm2", "last_2", "fp32")
    found = []
    for turn, noise in enumerate((0, 1, 50)):  # other work disturbed the third round
        found.append(yardsticks.Measurement(setting, "plain", 8 + noise, 4000, 60))
        found.append(yardsticks.Measurement(setting, "trl", 10 + noise, 5000, 60))
        found.append(yardsticks.Measurement(setting, "ours", 2 + noise, 2500, 60, 2000, 0.9 - turn / 10))
    only_ours = yardsticks.Measurement(yardsticks.Setting("llama-1.1b", "last_2", "bf16", 4), "ours", 5, 5400, 60)
    row, alone = yardsticks.rows_of([*found, only_ours])
    assert (row["step_seconds_over_trl"], row["step_seconds_over_plain"]) == (3 / 11, 3 / 9)
    assert (row["peak_mb_over_trl"], row["peak_mb_over_plain"]) == (0.5, 0.625)
    assert alone["trl_step_seconds"] is alone["step_seconds_over_trl"] is None
    table = yardsticks.as_table([row, alone])
    assert "| 9.00 | 11.00 | 3.00 | 0.273 | 0.30 met | 0.333 |" in table
    assert "| 4,000 | 5,000 | 2,500 | 2,000 | 0.500 | 0.40 MISSED | 0.625 | 0.80 |" in table
    assert "| bf16 | 4 x 256 |  |  | 5.00 |  |  |  |  |  | 5,400 |" in table


def test_comparisons_stand_beside_the_first_one_with_their_share_of_its_time_and_whether_bits_are_the_same():
    alone = compare_prefix.Comparison(100.0, 180.0, {1e-4: 2.5}, {"a-seed0": "f00"})
    shared = compare_prefix.Comparison(48.0, 90.0, {1e-4: 2.5}, {"a-seed0": "bad"})
    _, first, second = compare_prefix.table({"each for itself": alone, "shared": shared}).splitlines()
    assert first.split()[-4:] == ["trials", "True,", "weights", "True"]
    assert second.split() == ["shared", "48.0", "0.48", "90.0", "0.50", "trials", "True,", "weights", "False"]
