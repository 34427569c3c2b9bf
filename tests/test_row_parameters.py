"""model.row_parameters: rows of a matrix learn, through a parameter of their own; the others keep every bit."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from partialtune import apply_plan, plan_freeze
from partialtune.errors import ModelError, RecipeError
from partialtune.model.parameters import named_learners, named_weights
from partialtune.model.rows import as_runs, other_runs, put_rows, rows_in_words, take_rows
from tiny_models import tiny_config

IDS = torch.tensor([[1, 2, 95, 98, 3, 98, 4, 97], [5, 6, 96, 7, 8, 9, 95, 95]])


def tiny_model(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()


def trained_rows(model, plan, steps=3, decay=0.1):
    """The model after some steps of AdamW on what the plan trains, and the optimizer."""
    apply_plan(model, plan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=decay)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def masked_by_hand(model, name, rows, steps=3, decay=0.1):
    """What these rows become where they alone learn: the whole matrix trains, and all else is put back each step."""
    matrix = model.get_parameter(name)
    model.requires_grad_(False)
    matrix.requires_grad_(True)
    start = matrix.detach().clone()
    optimizer = torch.optim.AdamW([matrix], lr=1e-2, weight_decay=decay)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            kept = take_rows(matrix, rows)
            matrix.copy_(start)
            put_rows(matrix, rows, kept)
    return matrix.detach()


@pytest.mark.parametrize(
    ("kind", "selector", "name"),
    [
        ("gpt2", "embeddings.tokens[-4:]", "transformer.wte.weight"),  # tied
        ("gpt2", "head[-4:]", "transformer.wte.weight"),
        ("llama", "embeddings.tokens[-4:]", "model.embed_tokens.weight"),  # not tied
        ("llama", "head[-4:]", "lm_head.weight"),
        ("gemma", "embeddings.tokens[95:]", "model.embed_tokens.weight"),  # tied, and its embeddings are scaled
    ],
)
def test_rows_learn_as_if_the_whole_matrix_did_and_no_gradient_or_state_of_it_exists(kind, selector, name):
    model, reference = tiny_model(kind), tiny_model(kind)
    start = model.get_parameter(name).detach().clone()
    plan = plan_freeze(model, [selector])
    assert plan.rows == {name: ((95, 99),)}
    assert plan.trainable_parameters == 4 * start.shape[1]
    optimizer = trained_rows(model, plan)
    (rows,) = optimizer.param_groups[0]["params"]
    assert rows.shape == (4, start.shape[1])
    state = optimizer.state[rows]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == rows.shape
    assert all(p.grad is None for p in model.parameters())
    matrix = dict(named_weights(model))[name]
    assert torch.equal(matrix[:95], start[:95])
    assert torch.equal(matrix[95:], rows)
    torch.testing.assert_close(matrix, masked_by_hand(reference, name, ((95, 99),)), rtol=0, atol=1e-6)


def test_the_rows_parameter_is_in_no_state_dict_and_follows_what_is_loaded():
    model = tiny_model("gpt2")
    names = set(model.state_dict())
    apply_plan(model, plan_freeze(model, ["embeddings.tokens[3,5:7]", "final_norm"]))
    assert set(model.state_dict()) == names
    with torch.no_grad():
        model.transformer.wte.weight_rows += 1
    saved = model.state_dict()
    assert torch.equal(take_rows(saved["transformer.wte.weight"], ((3, 4), (5, 7))), model.transformer.wte.weight_rows)
    other = tiny_model("gpt2")
    apply_plan(other, plan_freeze(other, ["embeddings.tokens[3,5:7]", "final_norm"]))
    assert other.load_state_dict(saved).missing_keys == []
    assert torch.equal(other.transformer.wte.weight_rows, model.transformer.wte.weight_rows)


def test_a_model_with_rows_that_train_can_be_copied_and_pickled():
    model = tiny_model("gpt2")
    apply_plan(model, plan_freeze(model, ["embeddings.tokens[3]"]))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.transformer.wte.weight_rows.zero_()
        assert not twin.lm_head(torch.ones(1, 32))[0, 3]  # by the tied head too
        assert model.lm_head(torch.ones(1, 32))[0, 3]


def test_names_and_learners_are_the_plans():
    model = tiny_model("gpt2")
    plan = plan_freeze(model, ["embeddings.tokens[3]"])
    apply_plan(model, plan)
    names = [parameter.name for parameter in plan.parameters]
    assert [name for name, _ in named_weights(model)] == names == [name for name, _ in named_learners(model)]
    assert dict(named_learners(model))["transformer.wte.weight"].shape == (1, 32)
    again = plan_freeze(model, ["embeddings.tokens[3]"])
    assert again == plan
    apply_plan(model, again)


def test_what_would_lose_the_gradient_of_rows_is_refused():
    model = tiny_model("gpt2")
    apply_plan(model, plan_freeze(model, ["embeddings.tokens[3]"]))
    with pytest.raises(ModelError, match="cannot be followed"):
        torch.ones(1, 32) @ model.transformer.wte.weight.T


def test_rows_unite_and_are_taken_away():
    model = tiny_model("gpt2")
    rows = lambda *selectors: plan_freeze(model, selectors).rows.get("transformer.wte.weight")  # noqa: E731
    assert rows("embeddings.tokens[:2]", "head[1:4]") == ((0, 4),)
    assert rows("embeddings.tokens", "embeddings.tokens[:2]") is None
    assert rows("embeddings.tokens", "!embeddings.tokens[:90]") == ((90, 99),)
    assert rows("embeddings.tokens[:]") is None
    assert "transformer.wte.weight" not in plan_freeze(model, ["final_norm", "head[2]", "!head[2]"]).trainable


@pytest.mark.parametrize(
    ("selectors", "words"),
    [
        (["embeddings.tokens[99:]"], "the slice 99: holds no row. transformer.wte.weight has 99 rows"),
        (["head[99]"], "row 99 is out of range"),
        (["embeddings.tokens[a]"], "neither an index nor a slice. Rows are written"),
        (["final_norm[0]"], "unknown selector"),
    ],
)
def test_rows_that_are_not_there_are_refused(selectors, words):
    with pytest.raises(RecipeError, match=words):
        plan_freeze(tiny_model("gpt2"), selectors)


def test_runs():
    assert as_runs([7, 3, 4]) == ((3, 5), (7, 8))
    assert other_runs(((0, 2), (4, 5)), 6) == ((2, 4), (5, 6))
    assert rows_in_words(((3, 5), (7, 8))) == "3:5,7"
