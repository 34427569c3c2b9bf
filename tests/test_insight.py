"""Insight: how many directions matrices moved in, which tokens moved, what became likelier; against brute force."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import tiny_gpt2
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.planned import PlannedParameter
from partialtune.insight import effective_rank as ranks
from partialtune.insight import moved_tokens as tokens
from partialtune.insight.effective_rank import (
    effective_rank,
    effective_ranks,
    singular_values_of_adapter,
    singular_values_of_change,
    stable_rank,
    trained_matrices,
)
from partialtune.insight.moved_tokens import describe_rows, moved_tokens, quantiles_by_count, rank_correlation
from partialtune.insight.next_token_shift import PLACES_A_TOKEN, SHOWN_PLACES, next_token_shift
from partialtune.proof.snapshot import take_snapshot
from test_evaluation import ascii_tokenizer


def planted(model, selectors, head="tied"):
    """A model with a plan applied, and the copies of its trainable parameters."""
    plan = plan_freeze(model, selectors, head=head)
    apply_plan(model, plan)
    return plan, take_snapshot(model, plan).copies


def add(model, name, change):
    with torch.no_grad():
        model.get_parameter(name).add_(change)


# ---- effective rank


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [
        ([3.0, 3.0, 3.0, 0.0], 3.0, 3.0),
        ([7.0, 0.0], 1.0, 1.0),
        ([2.0, 1.0, 1.0], 2.0**1.5, 1.5),  # entropy of (1/2, 1/4, 1/4) is 1.5 ln 2
        ([0.0, 0.0], 0.0, 0.0),
    ],
)
def test_effective_rank_is_the_exponential_of_the_entropy_and_stable_rank_the_ratio_of_norms(values, effective, stable):
    assert effective_rank(torch.tensor(values)) == pytest.approx(effective, rel=1e-12)
    assert stable_rank(torch.tensor(values)) == pytest.approx(stable, rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_through_the_gram_matrix_are_those_of_the_change(shape, dtype, monkeypatch):
    monkeypatch.setattr(ranks, "CHUNK", 21)  # three rows at a time
    torch.manual_seed(0)
    before, now = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    expected = torch.linalg.svdvals(now.double() - before.double()).flip(0)
    assert torch.allclose(singular_values_of_change(before, now), expected, rtol=1e-9)


def test_ranks_of_planted_changes_are_found_and_what_is_frozen_or_a_vector_has_none():
    model = tiny_gpt2()
    plan, before = planted(model, ["blocks[1].attention", "blocks[2].mlp", "final_norm"])
    torch.manual_seed(1)
    add(model, "transformer.h.1.attn.c_attn.weight", torch.outer(torch.randn(32), torch.randn(96)))
    add(model, "transformer.h.2.mlp.c_fc.weight", torch.eye(32, 128))
    add(model, "transformer.ln_f.weight", 1.0)
    found = effective_ranks(model, plan, before)
    by_name = {entry["name"]: entry for entry in found["matrices"]}
    assert list(by_name) == [
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.h.2.mlp.c_fc.weight",
        "transformer.h.2.mlp.c_proj.weight",
    ]
    one, none, full, _ = by_name.values()
    assert one["effective_rank"] == pytest.approx(1.0, abs=1e-3)  # the sum is rounded to fp32
    assert (none["effective_rank"], none["stable_rank"]) == (0.0, 0.0)
    assert full["effective_rank"] == pytest.approx(32.0, abs=1e-3)
    assert (full["block"], full["component"], full["shape"], full["largest_possible"]) == (2, "mlp", [32, 128], 32)
    assert found["left_out"] == []
    assert found["seconds"] > 0


def test_matrices_that_would_take_too_long_are_left_out_by_name():
    model = tiny_gpt2()
    plan, before = planted(model, ["blocks[0].attention"])
    first, second = trained_matrices(plan)
    found = effective_ranks(model, plan, before, most_arithmetic=first.arithmetic + 0.5 * second.arithmetic)
    assert [entry["name"] for entry in found["matrices"]] == ["transformer.h.0.attn.c_attn.weight"]
    assert found["left_out"] == ["transformer.h.0.attn.c_proj.weight"]


def test_a_process_that_does_not_compute_gathers_and_gets_nothing():
    model = tiny_gpt2()
    plan, before = planted(model, ["embeddings"])
    assert effective_ranks(model, plan, {}, computes=False)["matrices"] == []
    assert moved_tokens(model, plan, {}, np.zeros(0), ascii_tokenizer(), computes=False)["matrices"] == []
    assert len(effective_ranks(model, plan, before)["matrices"]) == 2


def test_weights_that_are_not_finite_have_no_rank_and_stay_json():
    model = tiny_gpt2()
    plan, before = planted(model, ["embeddings"])
    add(model, "transformer.wte.weight", math.inf)
    found = effective_ranks(model, plan, before)
    assert found["matrices"][0]["effective_rank"] is None
    json.dumps([found, moved_tokens(model, plan, before, np.ones(3, int), ascii_tokenizer())], allow_nan=False)


def entry(name, shape):
    return PlannedParameter(name, shape, math.prod(shape), 0, "mlp", selector="mlp", from_step=0)


def test_an_adapter_is_measured_by_the_product_of_its_factors():
    torch.manual_seed(0)
    before = {"A": torch.randn(4, 30), "B": torch.zeros(20, 4)}
    now = {"A": torch.randn(4, 30), "B": torch.randn(20, 4)}
    expected = torch.linalg.svdvals(now["B"].double() @ now["A"].double())[:4]
    assert torch.allclose(singular_values_of_adapter(before, now)[:4], expected, rtol=1e-9)
    moved = {"A": before["A"] + 1, "B": now["B"] - 1}
    change = moved["B"].double() @ moved["A"].double() - now["B"].double() @ before["A"].double()
    both = singular_values_of_adapter({"A": before["A"], "B": now["B"]}, moved)
    assert torch.allclose(both, torch.linalg.svdvals(change)[:8], rtol=1e-6, atol=1e-6)
    plan = SimpleNamespace(
        parameters=[entry("h.0.c_fc.lora_A.weight", (4, 30)), entry("h.0.c_fc.lora_B.weight", (20, 4))]
    )
    (change,) = trained_matrices(plan)
    assert (change.name, change.shape, change.largest_possible) == ("h.0.c_fc", (20, 30), 4)


def test_fused_experts_are_a_stack_of_matrices_whose_mean_rank_is_told():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.zeros(2, 6, 5))

    model = Experts()
    before = {"experts": torch.zeros(2, 6, 5)}
    add(model, "experts", torch.stack([torch.eye(6, 5), torch.ones(6, 5)]))
    (found,) = effective_ranks(model, SimpleNamespace(parameters=[entry("experts", (2, 6, 5))]), before)["matrices"]
    assert found["effective_rank"] == pytest.approx((5 + 1) / 2, abs=1e-6)
    assert (found["matrices"], found["shape"]) == (2, [6, 5])


# ---- the token embedding


def test_tokens_are_counted_over_all_sources_and_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(tokens, "COUNTED_AT_ONCE", 3)
    ids = np.array([5, 1, 1, 0, 5, 5, 2], dtype=np.int32)
    ids.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.int32, mode="r")
    counts = tokens.token_counts([mapped, np.array([], dtype=np.int32), np.array([7], dtype=np.int32)])
    assert counts.tolist() == [1, 2, 1, 0, 0, 3, 0, 1]


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_the_rows_that_moved_are_the_tokens_that_are_named(head):
    model, tokenizer = tiny_gpt2(), ascii_tokenizer()
    plan, before = planted(model, ["embeddings", "head"], head)
    add(model, "transformer.wte.weight", torch.zeros(128, 32).index_fill(0, torch.tensor([ord("x")]), 0.5))
    counts = np.bincount([ord("x")] * 3 + [ord("y")], minlength=128)
    found = moved_tokens(model, plan, before, counts, tokenizer)["matrices"]
    assert [matrix["component"] for matrix in found] == ["embeddings.tokens", *(["head"] if head == "untied" else [])]
    rows = found[0]
    norm = float(before["transformer.wte.weight"][ord("x")].norm())
    assert rows["most"] == [
        {
            "token": "x",
            "id": ord("x"),
            "count": 3,
            "l2_delta": pytest.approx(0.5 * math.sqrt(32), rel=1e-6),
            "relative_delta": pytest.approx(0.5 * math.sqrt(32) / norm, rel=1e-5),
        }
    ]
    assert (rows["tokens"], rows["moved"], rows["occurring"], rows["moved_absent"]) == (128, 1, 2, 0)
    if head == "untied":
        assert (found[1]["moved"], found[1]["most"]) == (0, [])


def test_rows_without_a_token_and_a_model_of_another_architecture_are_read_too():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=160, **shape))  # 32 rows more than the tokenizer has tokens
    plan, before = planted(model, ["embeddings", "head"])
    add(model, "model.embed_tokens.weight", 1.0)
    embedding, head = moved_tokens(model, plan, before, np.ones(200, int), ascii_tokenizer())["matrices"]
    assert (embedding["tokens"], embedding["moved"]) == (128, 128)
    assert all(token["id"] < 128 for token in embedding["most"])
    assert head["name"] == "lm_head.weight"
    assert head["moved"] == 0


def test_an_embedding_that_did_not_train_has_no_entry():
    model = tiny_gpt2()
    plan, before = planted(model, ["blocks[0]"])
    assert moved_tokens(model, plan, before, np.ones(128, int), ascii_tokenizer())["matrices"] == []


def test_a_row_of_zeros_has_no_relative_delta_and_does_not_lead_the_list():
    rows = describe_rows(np.array([1.0, 0.5]), np.array([0.0, 2.0]), np.array([4, 4]), ascii_tokenizer())
    assert [token["id"] for token in rows["most"]] == [1]
    assert rows["by_count"] == [{"from": 4, "to": 7, "tokens": 1, "p10": 0.25, "median": 0.25, "p90": 0.25}]


def test_quantiles_are_taken_over_tokens_of_like_count():
    counts, relative = np.array([0, 0, 1, 2, 3, 4, 7, 8]), np.arange(8) / 10
    bins = [(row["from"], row["to"], row["tokens"]) for row in quantiles_by_count(counts, relative)]
    assert bins == [(0, 0, 2), (1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 1)]


def test_rank_correlation_is_spearmans_with_ties_at_their_mean_rank():
    assert rank_correlation(np.array([1, 2, 3]), np.array([0.1, 5.0, 5.5])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(np.array([1, 1]), np.array([1, 2])) is None
    assert rank_correlation(np.array([1]), np.array([1])) is None


# ---- the next-token shift


def shifted(rng, windows=3, size=12):
    ids = rng.integers(97, 103, size=(windows, size))
    before = rng.exponential(2.0, size=(windows, size - 1)).astype(np.float32)
    return ids, before, before - rng.normal(0.3, 1.0, size=before.shape).clip(max=before).astype(np.float32)


def test_the_shift_of_every_place_is_that_of_its_probability():
    ids, before, after = shifted(np.random.default_rng(0))
    found = next_token_shift(ids, before, after, ascii_tokenizer())
    assert (found["windows"], found["positions"]) == (3, 33)
    assert found["rose_share"] == pytest.approx(float((after < before).mean()))
    assert found["mean_bits"] == pytest.approx(float((before - after).mean()) / math.log(2), rel=1e-6)
    assert sum(found["histogram"]["counts"]) == 33
    difference = np.exp(-after.astype(float)) - np.exp(-before.astype(float))
    window, at = divmod(int(difference.argmax()), 11)
    best = found["rose"][0]
    assert (best["window"], best["position"], best["id"]) == (window, at + 1, ids[window, at + 1])
    assert best["before"] == pytest.approx(math.exp(-before[window, at]))
    assert best["after"] == pytest.approx(math.exp(-after[window, at]))
    assert found["fell"][0]["after"] - found["fell"][0]["before"] == pytest.approx(difference.min())
    for places in (found["rose"], found["fell"]):
        chosen = [place["id"] for place in places]
        assert len(chosen) <= SHOWN_PLACES
        assert max(map(chosen.count, chosen)) <= PLACES_A_TOKEN


def test_the_context_of_a_place_is_the_text_around_it():
    ids, before, after = shifted(np.random.default_rng(1), windows=1, size=60)
    text = "".join(map(chr, ids[0]))
    for place in next_token_shift(ids, before, after, ascii_tokenizer())["rose"]:
        at = place["position"]
        assert place["token"] == text[at]
        assert place["text_before"] == text[max(0, at - 24) : at]
        assert place["text_after"] == text[at + 1 : at + 9]


def test_tokens_gain_and_lose_the_sum_of_their_places():
    ids, before, after = shifted(np.random.default_rng(2))
    found = next_token_shift(ids, before, after, ascii_tokenizer())
    listed = [*found["gained"], *found["lost"]]
    assert sum(token["bits"] for token in listed) == pytest.approx(33 * found["mean_bits"], rel=1e-6)
    for token in listed:
        here = ids[:, 1:] == token["id"]
        assert token["occurrences"] == here.sum()
        assert token["bits"] == pytest.approx(float((before - after)[here].sum()) / math.log(2), rel=1e-5)
        assert token["after"] == pytest.approx(float(np.exp(-after[here]).mean()), rel=1e-5)


def test_places_without_a_finite_score_are_passed_over():
    ids, before, after = shifted(np.random.default_rng(3))
    after[0, 0], before[1, 1] = np.nan, np.inf
    found = next_token_shift(ids, before, after, ascii_tokenizer())
    assert found["positions"] == 31
    json.dumps(found, allow_nan=False)
    assert next_token_shift(ids, before, np.full_like(after, np.nan), ascii_tokenizer()) == {
        "windows": 3,
        "positions": 0,
    }


def test_an_unchanged_model_shifts_nothing():
    ids, before, _ = shifted(np.random.default_rng(4))
    found = next_token_shift(ids, before, before, ascii_tokenizer())
    assert (found["rose_share"], found["mean_bits"]) == (0.0, 0.0)
    assert [found[name] for name in ("rose", "fell", "gained", "lost")] == [[], [], [], []]


def test_a_plan_of_another_phase_counts_as_trained():
    plan, _ = planted(tiny_gpt2(), ["final_norm"])
    later = [
        replace(p, selector="embeddings", from_step=5) if p.name == "transformer.wpe.weight" else p
        for p in plan.parameters
    ]
    assert [change.name for change in trained_matrices(replace(plan, parameters=tuple(later)))] == [
        "transformer.wpe.weight"
    ]
