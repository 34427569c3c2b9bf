"""A plan decides without touching the model; applying it sets requires_grad, keeps frozen modules in eval, unties."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, XLMConfig, XLMWithLMHeadModel

from conftest import tiny_gpt2
from partialtune.errors import RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.lora import plan_lora
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.plan_table import plan_table

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


# --- what the model's own code keeps fixed ---

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
TABLE, BIAS = "model.decoder.embed_positions.weight", "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"


def marian():
    """Its positions are a sinusoidal table; its head is tied."""
    says = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("marian", **SMALL, **says))


def ernie():
    """Its routers, in every block but the first, have a bias that corrects the load of experts."""
    says = {"num_key_value_heads": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("ernie4_5_moe", **SMALL, **says))


def on_meta(build):
    with torch.device("meta"):
        return build()


def as_loaded(build, folder):
    """`from_pretrained` makes every parameter one that requires gradients."""
    build().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return model


def frozen_by_hand(build):
    return build().requires_grad_(False)


def under_a_plan(build):
    model = build()
    apply_plan(model, plan_freeze(model, ["final_norm"] if build is ernie else ["blocks[-1].norms"]))
    return model


@pytest.mark.parametrize(("build", "fixed"), [(marian, [TABLE]), (ernie, [BIAS, BIAS.replace("1", "2", 1)])])
def test_what_the_models_code_keeps_fixed_stays_frozen_under_any_selector(tmp_path, build, fixed):
    models = [build(), on_meta(build), as_loaded(build, tmp_path), frozen_by_hand(build), under_a_plan(build)]
    for model in models:
        plan = plan_freeze(model, ["all"])
        assert plan.fixed == plan.frozen == fixed
        assert len(plan.trainable) == len(list(model.parameters())) - len(fixed)
    model = models[2]
    apply_plan(model, plan)
    apply_plan(model, plan)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == fixed
    every = "/.*/"
    assert plan_freeze(model, [every]).frozen == plan_freeze(model, ["embeddings", "blocks[:]", every]).frozen == fixed
    assert plan_lora(model, ["all"]).fixed == fixed


def test_fixed_parameters_are_listed_as_such_and_keep_the_keys_of_the_contract():
    plan = plan_freeze(marian(), ["all"])
    assert f"fixed by the model's own code, frozen under any selector: {TABLE} (2,048 values)" in plan_table(plan)
    content = plan.to_json({}, {})
    assert content["fixed"] == [TABLE]
    (entry,) = (entry for entry in content["parameters"] if entry["name"] == TABLE)
    assert (entry["trainable"], entry["selector"], entry["component"]) == (False, None, "embeddings.positions")
    assert entry.keys() == content["parameters"][0].keys()
    assert "2 parameters, model.layers.1" in plan_table(plan_freeze(ernie(), ["all"]))
    assert plan_freeze(tiny_gpt2(), ["all"]).to_json({}, {})["fixed"] == []


@pytest.mark.parametrize("selector", ["embeddings.positions", "/.*embed_positions.*/"])
def test_a_selector_that_names_only_what_is_fixed_is_refused_in_words(selector):
    with pytest.raises(RecipeError, match=r"chooses only what .* keeps fixed itself, model\.decoder\.embed_positions"):
        plan_freeze(marian(), ["blocks[-1]", selector])
    with pytest.raises(RecipeError, match=r"schedule, from step 3: .* keeps fixed itself"):
        plan_freeze(marian(), ["blocks[-1]"], schedule=[{"from_step": 3, "trainable": [selector]}])
    assert plan_freeze(marian(), ["all", f"!{selector}"]).frozen == [TABLE]  # it is what holds anyway
    with pytest.raises(RecipeError, match=r"2 parameters, .*e_score_correction_bias first"):
        plan_freeze(ernie(), ["/.*correction_bias/"])


def test_a_sinusoidal_table_whose_flag_transformers_loses_is_fixed_too():
    config = XLMConfig(vocab_size=64, emb_dim=32, n_layers=2, n_heads=2, max_position_embeddings=16, causal=True)
    assert plan_freeze(XLMWithLMHeadModel(config), ["all"]).fixed == []
    config.sinusoidal_embeddings = True
    assert plan_freeze(XLMWithLMHeadModel(config), ["all"]).fixed == ["transformer.position_embeddings.weight"]


def test_a_model_in_peft_is_looked_through_for_what_is_fixed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(marian(), peft.LoraConfig(target_modules=["q_proj"]))
    assert plan_freeze(model, ["all"]).fixed == [TABLE]


def test_of_a_class_that_needs_more_than_a_config_nothing_is_known_and_that_is_said(caplog):
    class Wider(GPT2LMHeadModel):
        def __init__(self, config, factor):
            super().__init__(config)
            self.factor = factor

    plan = plan_freeze(Wider(tiny_gpt2().config, 2), ["all"])
    assert (plan.frozen, plan.fixed) == ([], [])
    assert "Wider cannot be built from its config alone (TypeError" in caplog.text


def test_planning_draws_no_random_number():
    model = marian()
    torch.manual_seed(5)
    plan_freeze(model, ["all"])
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
