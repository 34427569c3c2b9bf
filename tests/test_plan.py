"""A plan decides without touching the model; applying it sets requires_grad, keeps frozen modules in eval, unties."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_gpt2
from partialtune.errors import RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.table import plan_table

IDS = torch.arange(20)[None]


def test_planning_touches_nothing():
    model = tiny_gpt2()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    plan_freeze(model, ["blocks[-1]", "head"], head="untied")
    assert before == {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    assert model.config.tie_word_embeddings


def test_applying_sets_requires_grad_for_the_chosen_parameters_and_no_others():
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1].mlp", "final_norm"])
    apply_plan(model, plan)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == plan.trainable
    assert set(plan.trainable) == {
        *(f"transformer.h.2.mlp.{part}" for part in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")),
        *("transformer.ln_f.weight", "transformer.ln_f.bias"),
    }


def test_a_second_plan_replaces_the_first():
    model = tiny_gpt2()
    apply_plan(model, plan_freeze(model, ["embeddings"]))
    second = plan_freeze(model, ["final_norm"])
    apply_plan(model, second)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == second.trainable


def test_frozen_modules_stay_in_eval_mode_under_train_and_modules_without_parameters_follow_their_parent():
    model = tiny_gpt2()
    apply_plan(model, plan_freeze(model, ["blocks[-1].mlp"]))
    model.train()
    first, last = model.transformer.h[0], model.transformer.h[2]
    assert not any(module.training for module in first.modules())
    assert not any(module.training for module in last.attn.modules())
    assert last.mlp.dropout.training
    assert model.transformer.drop.training  # its parent holds something that trains
    model.eval()
    assert not any(module.training for module in model.modules())


def test_dropout_of_frozen_blocks_is_off_so_that_they_compute_the_same_twice():
    model = tiny_gpt2(embd_pdrop=0.0, resid_pdrop=0.5, attn_pdrop=0.5)
    apply_plan(model, plan_freeze(model, ["final_norm"]))
    model.train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_copied_model_keeps_its_frozen_modules_in_eval():
    model = tiny_gpt2().eval()
    apply_plan(model, plan_freeze(model, ["final_norm"]))
    twin = copy.deepcopy(model)
    twin.train()
    assert not twin.transformer.h[0].training
    assert not model.transformer.ln_f.training  # the original was left alone


def test_untying_keeps_the_logits_bit_for_bit_and_survives_save_and_reload(tmp_path):
    model = tiny_gpt2().eval()
    logits = model(IDS).logits
    apply_plan(model, plan_freeze(model, ["head"], head="untied"))
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert torch.equal(model(IDS).logits, logits)
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    reloaded.resize_token_embeddings(130)
    assert torch.equal(reloaded.lm_head.weight[:128], model.lm_head.weight)


def test_untying_counts_the_head_as_parameters_of_its_own():
    model = tiny_gpt2()
    tied, untied = plan_freeze(model, ["head"]), plan_freeze(model, ["head"], head="untied")
    assert tied.ties == (("transformer.wte.weight", "lm_head.weight"),)
    assert untied.ties == ()
    assert untied.total_parameters == tied.total_parameters + 128 * 32
    assert untied.trainable == ["lm_head.weight"]
    assert untied.backward_from == "lm_head.weight"
    assert tied.backward_from == "transformer.wte.weight"


def test_untying_has_no_effect_on_a_model_that_does_not_tie():
    model = tiny_gpt2(tie_word_embeddings=False)
    plan = plan_freeze(model, ["head"], head="untied")
    assert plan.head == "tied"
    assert plan.total_parameters == plan_freeze(model, ["head"]).total_parameters


def test_backward_reaches_the_first_trainable_parameter_in_forward_order_and_not_in_the_order_of_the_selectors():
    plan = plan_freeze(tiny_gpt2(), ["final_norm", "blocks[2].mlp", "blocks[1].attention"])
    assert plan.backward_from == "transformer.h.1.attn.c_attn.weight"


def test_a_plan_for_another_model_is_refused():
    plan = plan_freeze(tiny_gpt2(), ["final_norm"])
    with pytest.raises(RecipeError, match="another model"):
        apply_plan(tiny_gpt2(n_layer=2), plan)


def test_an_unknown_choice_for_the_head_is_refused():
    with pytest.raises(RecipeError, match="tied, untied"):
        plan_freeze(tiny_gpt2(), ["head"], head="loose")


def test_the_plan_as_json_follows_the_contract():
    plan = plan_freeze(tiny_gpt2(), ["blocks[-1].norms"])
    content = json.loads(json.dumps(plan.to_json({"transformer.wte.weight": "a"}, {"transformer.wte.weight": "b"})))
    assert content["trainable_parameters"] == 4 * 32
    assert content["phases"] == [
        {"from_step": 0, "backward_from": "transformer.h.2.ln_1.weight", "trainable": plan.trainable}
    ]
    first = content["parameters"][0]
    assert first == {
        "name": "transformer.wte.weight",
        "shape": [128, 32],
        "numel": 4096,
        "block": None,
        "component": "embeddings.tokens",
        "trainable": False,
        "selector": None,
        "sha256_before": "a",
        "sha256_after": "b",
    }
    norm = next(entry for entry in content["parameters"] if entry["name"] == "transformer.h.2.ln_1.weight")
    assert (norm["block"], norm["component"], norm["selector"]) == (2, "norms", "blocks[-1].norms")


def test_the_table_says_shares_ties_and_where_backward_stops():
    table = plan_table(plan_freeze(tiny_gpt2(), ["embeddings", "final_norm", "head"]))
    assert "trainable 6,208 of 44,320 (14.0%): embeddings, final_norm, head" in table
    assert "tied: transformer.wte.weight is lm_head.weight, one tensor" in table
    assert "block 0 to 2, each" in table
    assert "backward reaches transformer.wte.weight and runs through 3 of 3 blocks" in table
    stops = plan_table(plan_freeze(tiny_gpt2(), ["blocks[-1]"]))
    assert "runs through 1 of 3 blocks" in stops
