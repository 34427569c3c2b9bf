"""verify finds every changed bit between two checkpoints, whatever their files look like, and judges by the claim."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from conftest import tiny_gpt2
from partialtune.delta_checkpoint import Base, write_delta
from partialtune.errors import FreezeViolation, ModelError, RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import plan_freeze
from partialtune.model import weight_files
from partialtune.model.digests import digests
from partialtune.model.loading import load_config, load_model
from partialtune.model.model_checks import dtypes_in
from partialtune.verify.comparison_table import comparison_table
from partialtune.verify.verify import changed_values, verify
from test_modeling import rename_to_hub

pytestmark = pytest.mark.contract

MLP = "transformer.h.2.mlp.c_fc.weight"
FIRST_NORM = "transformer.h.0.ln_1.weight"


@pytest.fixture
def base(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapt(tmp_path):
    """Save a copy of the base as `adapted`, changed by a function of the model."""

    def save(change=lambda model: None, name="adapted", **settings):
        model = tiny_gpt2()
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / name, **settings)
        return tmp_path / name

    return save


def compare(base, adapted, trainable=None):
    """The comparison, after a look at what holds for every one of them."""
    comparison = verify(str(base), str(adapted), trainable)
    content = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert [entry["name"] for entry in content["parameters"] if entry["changed"]] == content["moved"]
    assert comparison_table(comparison).splitlines()[-1].startswith("verdict: ")
    return comparison


def moved(comparison):
    return [parameter.name for parameter in comparison.moved]


def flip_a_bit(tensor, index=0):
    tensor.view(-1).view(torch.int32)[index] ^= 1


def train_last_mlp(model):
    for parameter in model.transformer.h[2].mlp.parameters():
        parameter.add_(torch.linspace(0.01, 0.02, parameter.numel()).view_as(parameter))


def test_a_copy_differs_in_nothing_and_without_a_claim_there_is_no_verdict(base, adapt):
    comparison = compare(base, adapt())
    assert moved(comparison) == []
    assert comparison.passed is None
    comparison.raise_if_violated()
    assert {parameter.l2_delta for parameter in comparison.parameters} == {0.0}
    assert "verdict: none" in comparison_table(comparison)


def in_fp64(folder, change=lambda model: None, build=tiny_gpt2):
    """Save a model whose files hold fp64, changed by a function of it."""
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-12)  # so that fp32 holds none of its values
        change(model)
    model.save_pretrained(folder)
    assert set(dtypes_in(folder).values()) == {"F64"}
    return folder


def test_a_change_of_1e_9_in_an_fp64_file_is_found(tmp_path):
    def change(model):
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-9

    base, adapted = in_fp64(tmp_path / "base"), in_fp64(tmp_path / "adapted", change)
    comparison = compare(base, adapted, ["final_norm"])
    assert moved(comparison) == ["transformer.h.0.mlp.c_fc.weight"]
    assert comparison.moved[0].changed_values == 1
    assert comparison.moved[0].l2_delta == pytest.approx(1e-9, rel=1e-5)
    with pytest.raises(FreezeViolation, match=r"transformer\.h\.0\.mlp\.c_fc\.weight"):
        comparison.raise_if_violated()
    assert moved(compare(base, in_fp64(tmp_path / "copy"), [])) == []


def test_a_change_of_1e_9_in_an_fp64_file_whose_experts_are_fused_on_load_is_found(tmp_path):
    def change(model):
        model.model.embed_tokens.weight[0, 0] += 1e-9

    base = in_fp64(tmp_path / "base", build=tiny_mixtral)
    adapted = in_fp64(tmp_path / "adapted", change, build=tiny_mixtral)
    assert moved(compare(base, adapted, ["final_norm"])) == ["model.embed_tokens.weight"]


def test_an_fp64_copy_of_a_model_equals_it_and_its_digests(base, adapt, tmp_path):
    adapted = adapt(train_last_mlp)
    plan = plan_freeze(tiny_gpt2(), ["blocks[-1].mlp"])
    before, after = digests(tiny_gpt2()), digests(load_model(str(adapted), load_config(str(adapted))))
    wide = tiny_gpt2().double()
    with torch.no_grad():
        trained = dict(load_model(str(adapted), load_config(str(adapted))).named_parameters())
        for name, parameter in wide.named_parameters():
            parameter.copy_(trained[name])
    wide.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "freeze_plan.json").write_text(json.dumps(plan.to_json(before, after)))
    comparison = compare(base, tmp_path / "wide")
    assert comparison.passed is True
    assert len(comparison.moved) == 4


def test_an_fp64_base_is_not_loaded_in_fp32_and_the_message_says_how_to_round_it(tmp_path):
    base = in_fp64(tmp_path / "base")
    with pytest.raises(ModelError, match=r"holds 40 tensors in fp64, .*dtype=torch\.float32\)\.save_pretrained"):
        load_model(str(base), load_config(str(base)))
    load_model(str(base), load_config(str(base)), dtype=torch.float64).save_pretrained(
        tmp_path / "parts", max_shard_size="60kB"
    )
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    with pytest.raises(ModelError, match="tensors in fp64"):
        load_model(str(tmp_path / "parts"), load_config(str(base)))


def test_a_result_that_rounds_an_fp64_base_says_so(tmp_path):
    base = in_fp64(tmp_path / "base")
    load_model(str(base), load_config(str(base)), dtype=torch.float64).float().save_pretrained(tmp_path / "rounded")
    comparison = compare(base, tmp_path / "rounded", ["final_norm"])
    assert "equal the base rounded to fewer bits" in " ".join(comparison.notes)
    assert comparison.passed is False


@pytest.mark.parametrize(
    ("now", "before", "count"),
    [
        (torch.tensor([2**53 + 1, 5]), torch.tensor([2**53, 5]), 1),
        (torch.tensor([1 + 2j, 3]), torch.tensor([1 - 2j, 3]), 1),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 1),
        (torch.tensor([1.0, float("nan")], dtype=torch.bfloat16), torch.tensor([1.0, float("nan")]), 0),
        (torch.tensor([1 + 1e-9], dtype=torch.float64), torch.tensor([1.0]), 1),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1),
    ],
)
def test_values_are_compared_in_a_dtype_that_holds_both(now, before, count):
    assert changed_values(now, before) == count


def test_without_a_claim_nothing_that_moved_is_a_violation(base, adapt):
    comparison = compare(base, adapt(train_last_mlp))
    assert len(moved(comparison)) == 4
    assert (comparison.violations, comparison.changed_though_frozen, comparison.unmoved) == ([], [], [])
    comparison.raise_if_violated()


def test_one_flipped_bit_in_one_frozen_tensor_is_found_and_named(base, adapt):
    adapted = adapt(lambda model: flip_a_bit(model.transformer.h[0].ln_1.weight, 7))
    comparison = compare(base, adapted, ["blocks[-1].mlp"])
    assert moved(comparison) == [FIRST_NORM]
    assert comparison.moved[0].changed_values == 1
    with pytest.raises(
        FreezeViolation, match=rf"1 frozen parameter changed: {FIRST_NORM} \(1 of 32 values\)"
    ) as caught:
        comparison.raise_if_violated()
    assert caught.value.exit_code == 3
    table = comparison_table(comparison)
    assert "1 CHANGED, though frozen" in table
    assert "verdict: VIOLATED" in table.splitlines()[-1]


def test_what_the_claim_allows_may_move_and_its_distance_is_exact(base, adapt):
    comparison = compare(base, adapt(train_last_mlp), ["blocks[-1].mlp"])
    assert comparison.passed
    comparison.raise_if_violated()
    assert len(moved(comparison)) == 4
    found = next(parameter for parameter in comparison.parameters if parameter.name == MLP)
    before, model = tiny_gpt2().get_parameter(MLP).detach(), tiny_gpt2()
    with torch.no_grad():
        train_last_mlp(model)
    change = model.get_parameter(MLP).detach().double() - before.double()
    assert found.l2_delta == pytest.approx(float(change.norm()), rel=1e-12)
    assert found.relative_delta == pytest.approx(float(change.norm() / before.double().norm()), rel=1e-12)
    assert found.max_abs_delta == float(change.abs().max())
    assert (found.block, found.component, found.numel, found.allowed) == (2, "mlp", 4096, True)


def test_a_trainable_parameter_that_kept_every_bit_is_a_note_and_no_violation(base, adapt):
    comparison = compare(base, adapt(), ["final_norm"])
    assert comparison.passed
    assert [parameter.name for parameter in comparison.unmoved] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert "2 parameters may move and kept every bit: transformer.ln_f.weight" in " ".join(comparison.notes)


def test_an_empty_claim_lets_nothing_move(base, adapt):
    assert compare(base, adapt(), []).passed
    with pytest.raises(FreezeViolation, match=r"4 frozen parameters changed"):
        compare(base, adapt(train_last_mlp), []).raise_if_violated()


def test_a_selector_that_matches_nothing_is_refused(base, adapt):
    with pytest.raises(RecipeError, match=r"blocks\[3\] is out of range"):
        verify(str(base), str(adapt()), ["blocks[3]"])


def test_a_zero_that_changed_its_sign_has_changed_and_a_nan_equals_itself(tmp_path, adapt):
    def spoil(model):
        model.transformer.ln_f.weight[0] = float("nan")

    def spoil_and_negate(model):
        spoil(model)
        model.transformer.ln_f.bias[3] = -0.0

    comparison = compare(adapt(spoil, "base"), adapt(spoil_and_negate))
    assert moved(comparison) == ["transformer.ln_f.bias"]
    assert (comparison.moved[0].l2_delta, comparison.moved[0].relative_delta) == (0.0, None)


def test_a_weight_that_became_nan_has_moved_by_an_unknown_distance(base, adapt):
    comparison = compare(base, adapt(lambda model: model.transformer.ln_f.weight.fill_(float("nan"))))
    assert moved(comparison) == ["transformer.ln_f.weight"]
    assert comparison.moved[0].l2_delta is None


# Files of other shapes


def refuse_to_load(*args, **kwargs):
    raise AssertionError("the whole model was loaded")


def test_a_base_with_the_names_and_mask_buffers_of_the_hubs_file_is_compared_tensor_by_tensor(base, adapt, monkeypatch):
    monkeypatch.setattr(weight_files, "load_model", refuse_to_load)
    rename_to_hub(base)
    comparison = compare(base, adapt(train_last_mlp), ["blocks[-1].mlp"])
    assert comparison.passed
    assert len(comparison.parameters) == len(list(tiny_gpt2().parameters()))
    assert len(moved(comparison)) == 4
    assert any("h.0.attn.bias" in note for note in comparison.notes)


def test_a_changed_bit_is_found_under_the_hubs_names_too(base, adapt):
    adapted = adapt(lambda model: flip_a_bit(model.transformer.h[0].ln_1.weight))
    rename_to_hub(base)
    rename_to_hub(adapted)
    assert moved(compare(base, adapted)) == [FIRST_NORM]


def test_sharded_files_are_compared_tensor_by_tensor(base, adapt, monkeypatch):
    monkeypatch.setattr(weight_files, "load_model", refuse_to_load)
    adapted = adapt(train_last_mlp, max_shard_size="20KB")
    assert len(list(adapted.glob("model-*.safetensors"))) > 3
    assert len(moved(compare(base, adapted))) == 4
    assert len(moved(compare(adapted, base))) == 4


def test_a_16_bit_base_equals_its_fp32_copy(tmp_path):
    narrow = tiny_gpt2().to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "base")
    wide = narrow.float()
    wide.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        flip_a_bit(wide.transformer.h[0].ln_1.weight)  # far below what bf16 can hold
    wide.save_pretrained(tmp_path / "flipped")
    assert moved(compare(tmp_path / "base", tmp_path / "same")) == []
    assert moved(compare(tmp_path / "base", tmp_path / "flipped")) == [FIRST_NORM]


def test_a_result_saved_in_16_bits_breaks_the_claim_and_the_reason_is_said(base, tmp_path):
    tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path / "adapted")
    comparison = compare(base, tmp_path / "adapted", ["blocks[-1]"])
    assert not comparison.passed
    assert "rounded to fewer bits" in " ".join(comparison.notes)


def tiny_mixtral():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=3, **shape))


def test_experts_that_lie_apart_in_the_file_are_compared_as_the_fused_parameters_they_are(tmp_path):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapted", max_shard_size="5KB")
    shard = next(
        file for file in tmp_path.glob("adapted/*.safetensors") if any(".experts.2.w1." in n for n in load_file(file))
    )
    tensors = load_file(shard)
    assert len(load_file(tmp_path / "base/model.safetensors")) > len(list(model.parameters()))
    assert moved(compare(tmp_path / "base", tmp_path / "adapted", [])) == []
    name = next(name for name in tensors if ".experts.2.w1." in name)
    flip_a_bit(tensors[name], 5)
    save_file(tensors, shard, metadata={"format": "pt"})
    comparison = compare(tmp_path / "base", tmp_path / "adapted", ["attention"])
    block = name.split(".")[2]
    assert moved(comparison) == [f"model.layers.{block}.mlp.experts.gate_up_proj"]
    assert (comparison.moved[0].component, comparison.moved[0].changed_values) == ("mlp", 1)
    assert not comparison.passed


def test_a_buffer_that_changed_breaks_every_claim_and_is_noted_where_there_is_none(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
    }
    experts = {
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(vocab_size=32, v_head_dim=4, num_experts_per_tok=2, **shape, **heads, **experts)
    )
    model.save_pretrained(tmp_path / "base")
    model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")[0] += 1
    model.save_pretrained(tmp_path / "adapted")
    comparison = compare(tmp_path / "base", tmp_path / "adapted", ["attention"])
    assert comparison.changed_buffers == ("model.layers.1.mlp.gate.e_score_correction_bias",)
    with pytest.raises(FreezeViolation, match=r"1 buffer changed, which nothing trains: .*e_score_correction_bias"):
        comparison.raise_if_violated()
    unclaimed = compare(tmp_path / "base", tmp_path / "adapted")
    assert unclaimed.passed is None
    assert "1 buffer changed" in " ".join(unclaimed.notes)


def test_a_config_that_computes_otherwise_is_noted_where_nothing_is_claimed(base, adapt):
    comparison = compare(base, adapt(lambda model: setattr(model.config, "n_head", 4)))
    assert "config.json differs: n_head (2 -> 4)." in comparison.notes


# Ties


def untie(model):
    apply_plan(model, plan_freeze(model, ["head"], head="untied"))


def test_an_untied_head_is_compared_with_the_token_embedding_it_was_copied_from(base, adapt):
    comparison = compare(base, adapt(untie), ["head"])
    assert [parameter.name for parameter in comparison.unmoved] == ["lm_head.weight"]
    assert any(note.startswith("lm_head.weight has a tensor of its own") for note in comparison.notes)

    def train_head(model):
        untie(model)
        model.lm_head.weight[5].add_(0.5)

    adapted = adapt(train_head)
    comparison = compare(base, adapted, ["head"])
    assert comparison.passed
    assert moved(comparison) == ["lm_head.weight"]
    assert comparison.moved[0].changed_values == 32
    assert comparison.moved[0].max_abs_delta == pytest.approx(0.5)
    assert compare(base, adapted, ["embeddings.tokens"]).changed_though_frozen[0].name == "lm_head.weight"


def test_a_head_that_the_adapted_model_ties_again_has_moved(base, adapt):
    def train_head(model):
        untie(model)
        model.lm_head.weight.add_(0.5)

    assert moved(compare(adapt(train_head), base)) == ["lm_head.weight"]


def test_a_second_tensor_in_the_file_of_a_tied_model_is_not_overlooked(base, adapt):
    adapted = adapt()
    tensors = load_file(adapted / "model.safetensors")
    same = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(same, adapted / "model.safetensors", metadata={"format": "pt"})
    assert len(compare(base, adapted).parameters) == len(compare(base, base).parameters)
    flip_a_bit(same["lm_head.weight"])
    save_file(same, adapted / "model.safetensors", metadata={"format": "pt"})
    assert moved(compare(base, adapted)) == ["lm_head.weight"]


# A run's own plan


@pytest.fixture
def run(tmp_path):
    """A finished run: its folder, with the last MLP trained and the plan that says so."""
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1].mlp", "head"], head="untied")
    apply_plan(model, plan)
    before = digests(model)
    with torch.no_grad():
        train_last_mlp(model)
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run/freeze_plan.json").write_text(json.dumps(plan.to_json(before, digests(model))))
    return tmp_path / "run"


def change_plan(run, **changes):
    """Change the entry of FIRST_NORM in the run's plan."""
    file = run / "freeze_plan.json"
    content = json.loads(file.read_text())
    next(entry for entry in content["parameters"] if entry["name"] == FIRST_NORM).update(changes)
    file.write_text(json.dumps(content))


def change_weight(folder, name):
    tensors = load_file(folder / "model.safetensors")
    flip_a_bit(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_finished_run_is_held_to_its_own_plan(base, run):
    comparison = compare(base, run)
    assert comparison.passed
    assert len(moved(comparison)) == 5
    assert "freeze_plan.json" in comparison.claim


def test_a_run_whose_frozen_weight_changed_on_the_way_breaks_its_plan_twice(base, run):
    change_weight(run, FIRST_NORM)
    comparison = compare(base, run)
    assert [parameter.name for parameter in comparison.changed_though_frozen] == [FIRST_NORM]
    assert comparison.not_the_result == (FIRST_NORM,)
    with pytest.raises(
        FreezeViolation, match=r"1 frozen parameter changed: .* other values than the run ended with .* in 1 parameter"
    ):
        comparison.raise_if_violated()


def test_a_trained_weight_that_changed_after_the_run_is_found_by_its_digest(base, run):
    change_weight(run, MLP)
    comparison = compare(base, run)
    assert comparison.changed_though_frozen == []
    assert comparison.not_the_result == (MLP,)
    assert not comparison.passed


def test_another_base_than_that_of_the_run_is_found_by_its_digests(base, run):
    change_weight(base, MLP)
    comparison = compare(base, run)
    assert comparison.not_the_base == (MLP,)
    assert any("Name the base" in sentence for sentence in comparison.violations)


def change_config(folder, **changes):
    """Change keys of the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_head": 4}, "n_head (2 -> 4)"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon (1e-05 -> 0.001)"),
        ({"scale_attn_weights": False}, "scale_attn_weights (True -> False)"),
        ({"activation_function": "relu"}, "activation_function (gelu_new -> relu)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings (True -> True, and the run left its head untied)"),
    ],
)
def test_a_config_that_makes_another_function_of_the_weights_breaks_every_claim(base, run, changes, said):
    change_config(run, **changes)
    for trainable in (None, ["blocks[-1].mlp", "head"]):
        comparison = compare(base, run, trainable)
        if trainable and "tie_word_embeddings" in changes:  # without the run's plan nothing says what it was
            continue
        assert comparison.changed_config == (said,)
        with pytest.raises(FreezeViolation, match=r"makes another function of the same weights") as caught:
            comparison.raise_if_violated()
        assert caught.value.exit_code == 3
        assert said in str(caught.value)


def test_a_config_that_differs_in_what_a_run_may_change_breaks_no_claim(base, run):
    harmless = {"resid_pdrop": 0.0, "attn_pdrop": 0.3, "use_cache": False, "dtype": "bfloat16", "eos_token_id": 5}
    change_config(run, **harmless, pad_token_id=3, transformers_version="5.20.0", summary_type="mean")
    comparison = compare(base, run)
    assert (comparison.passed, comparison.changed_config) == (True, ())


def test_a_plan_without_digests_still_says_what_may_move(base, run):
    change_plan(run, sha256_before=None, sha256_after=None)
    assert compare(base, run).passed


def test_selectors_take_the_place_of_the_plan(base, run):
    change_plan(run, sha256_after="0" * 64)
    assert not compare(base, run).passed
    assert compare(base, run, ["blocks[-1]", "head"]).passed


def test_a_plan_that_cannot_be_read_or_is_of_another_model_is_refused(base, run):
    change_plan(run, name="transformer.h.9.ln_1.weight")
    with pytest.raises(ModelError, match=r"another model; transformer\.h\.9\.ln_1\.weight"):
        verify(str(base), str(run))
    for content in ("{", "[]", '{"parameters": [{"name": "a"}]}', '{"parameters": [1]}'):
        (run / "freeze_plan.json").write_text(content)
        with pytest.raises(ModelError, match="cannot be read as a freeze plan"):
            verify(str(base), str(run))


# What cannot be compared


def refused(base, adapted, match):
    with pytest.raises(ModelError, match=match) as caught:
        verify(str(base), str(adapted))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_another_architecture_another_size_or_another_vocabulary_is_refused(base, tmp_path):
    llama = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    refused(base, tmp_path / "llama", "is a gpt2 model, .*llama a llama model")
    tiny_gpt2(n_layer=2).save_pretrained(tmp_path / "short")
    refused(base, tmp_path / "short", "base has 3 blocks, .*short 2")
    tiny_gpt2(vocab_size=130).save_pretrained(tmp_path / "wide")
    refused(base, tmp_path / "wide", r"transformer\.wte\.weight is \(128, 32\) in .* and \(130, 32\) in")
    llama.attention_bias = True
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "biased")
    refused(tmp_path / "llama", tmp_path / "biased", r"llama lacks 4 parameters of .*biased: .*q_proj\.bias")


def test_a_file_that_lacks_a_tensor_is_refused(base, adapt):
    adapted = adapt()
    tensors = load_file(adapted / "model.safetensors")
    del tensors[MLP]
    save_file(tensors, adapted / "model.safetensors", metadata={"format": "pt"})
    refused(base, adapted, rf"ADAPTED: .*lacks 1 of the model's tensors, {MLP}")


def test_a_file_that_does_not_fit_its_config_is_refused(base, adapt):
    adapted = adapt(lambda model: setattr(model.config, "vocab_size", 130))
    refused(
        base, adapted, r"transformer\.wte\.weight is \(128, 32\) in the weight file and \(130, 32\) by config\.json"
    )


def test_damaged_files_are_refused(base, adapt):
    adapted = adapt(max_shard_size="20KB")
    shard = min(adapted.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(base, adapted, "ADAPTED: .*damaged")
    shard.unlink()
    refused(base, adapted, shard.name)
    (adapted / "model.safetensors.index.json").write_text("{}")
    refused(base, adapted, "does not say which file")
    (base / "model.safetensors").write_bytes(b"not a tensor in sight")
    refused(base, adapted, "BASE: .*damaged")


def test_folders_without_a_whole_model_are_refused(base, adapt, tmp_path):
    refused(tmp_path / "absent", base, "^BASE: there is no folder")
    refused(base, tmp_path, r"^ADAPTED: .* is a folder without config\.json")
    refused(f"{base}@main", base, "where it has one revision")
    refused("builtin:absent", base, "lilliput")
    adapted = adapt()
    (adapted / "adapter_config.json").write_text("{}")
    refused(base, adapted, "holds an adapter")
    quantised = adapt(lambda model: setattr(model.config, "quantization_config", {"quant_method": "fp8"}), "quantised")
    refused(base, quantised, "is quantised")
    (base / "model.safetensors").unlink()
    refused(base, adapt(), r"no file named model\.safetensors")


# From the Hub, here from its cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a folder into a cache of the Hub, as one commit of a repository, and stay offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(folder, repository, commit, revision="main"):
        repository = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots").mkdir(exist_ok=True)
        folder.rename(repository / "snapshots" / commit)

    return add


def test_hub_ids_are_compared_at_their_revisions_plan_included(base, run, adapt, hub):
    other = adapt(train_last_mlp)
    rename_to_hub(base)
    hub(base, "someone/tiny", "a" * 40)
    hub(run, "me/tiny-adapted", "b" * 40)
    hub(other, "me/tiny-adapted", "c" * 40, revision="v1")
    comparison = compare("someone/tiny", "me/tiny-adapted")
    assert comparison.passed
    assert comparison.base == f"someone/tiny (commit {'a' * 40})"
    assert comparison.adapted == f"me/tiny-adapted (commit {'b' * 40})"
    assert len(moved(comparison)) == 5
    assert len(moved(compare("someone/tiny", "me/tiny-adapted@v1"))) == 4
    refused(
        "someone/tiny",
        "me/tiny-adapted@v2",
        "ADAPTED: There is no folder me/tiny-adapted, and the Hub does not give me/tiny-adapted at revision v2",
    )
    refused("someone/absent", "me/tiny-adapted", "BASE: There is no folder someone/absent")


# Delta checkpoints


@pytest.fixture
def delta(tmp_path):
    """Make a delta checkpoint of the base, trained by a function of the model, with the plan that says so."""

    def make(base, change=train_last_mlp, selectors=("blocks[-1].mlp",), name="delta", head="tied"):
        model = load_model(str(base), load_config(str(base)))
        plan = plan_freeze(model, selectors, head=head)
        apply_plan(model, plan)
        before = digests(model)
        with torch.no_grad():
            change(model)
        (tmp_path / name).mkdir()
        write_delta(tmp_path / name, model, plan, before, digests(model), Base(str(base)))
        (tmp_path / name / "freeze_plan.json").write_text(json.dumps(plan.to_json(before, digests(model))))
        return tmp_path / name

    return make


@pytest.mark.parametrize("hub_names", [False, True])
def test_a_delta_is_compared_with_its_base_tensor_by_tensor(base, adapt, delta, monkeypatch, hub_names):
    if hub_names:
        rename_to_hub(base)
    adapted = delta(base)
    monkeypatch.setattr(weight_files, "load_model", refuse_to_load)
    comparison, whole = compare(base, adapted), compare(base, adapt(train_last_mlp))
    assert comparison.passed
    assert [parameter.l2_delta for parameter in comparison.parameters] == [p.l2_delta for p in whole.parameters]
    assert "freeze_plan.json" in comparison.claim
    assert not compare(base, adapted, ["final_norm"]).passed


def test_a_delta_with_an_untied_head_is_compared_as_the_model_that_it_makes(base, delta):
    def train_head(model):
        model.lm_head.weight.mul_(1.5)

    adapted = delta(base, train_head, ["head"], head="untied")
    comparison = compare(base, adapted)
    assert comparison.passed
    assert moved(comparison) == ["lm_head.weight"]
    assert moved(compare(adapted, base)) == ["lm_head.weight"]


def test_a_delta_of_fused_experts_is_compared_as_the_parameters_that_they_are(tmp_path, delta):
    tiny_mixtral().save_pretrained(tmp_path / "base")
    name = "model.layers.1.mlp.experts.down_proj"
    adapted = delta(tmp_path / "base", lambda model: model.get_parameter(name).mul_(2), [f"/{re.escape(name)}/"])
    comparison = compare(tmp_path / "base", adapted)
    assert comparison.passed
    assert moved(comparison) == [name]


def test_a_delta_may_stand_on_either_side_or_on_both(base, adapt, delta):
    adapted = delta(base)
    assert moved(compare(adapted, adapted)) == []
    assert len(moved(compare(adapted, base))) == 4
    assert moved(compare(adapted, adapt(train_last_mlp))) == []


def test_a_bit_that_changed_in_a_delta_after_the_run_is_found_and_named(base, delta):
    adapted = delta(base)
    tensors = load_file(adapted / "delta.safetensors")
    flip_a_bit(tensors[MLP])
    save_file(tensors, adapted / "delta.safetensors", metadata={"format": "pt"})
    comparison = compare(base, adapted)
    assert comparison.not_the_result == (MLP,)
    assert not comparison.passed


def test_a_bit_that_changed_in_the_base_of_a_delta_is_found_and_named(base, delta):
    adapted = delta(base)
    change_weight(base, FIRST_NORM)
    refused(base, adapted, rf"ADAPTED: .* is another model: 1 of 40 parameters differ \({FIRST_NORM}\)")


def test_a_delta_whose_base_is_elsewhere_takes_the_one_that_is_named(tmp_path, base, delta):
    adapted = delta(base)
    base.rename(tmp_path / "moved")
    assert compare(tmp_path / "moved", adapted).passed
    tiny_gpt2(1).save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", adapted, "ADAPTED: .* is a delta of .*base, which cannot be had: .*there is no folder")


# For the terminal


def test_the_table_gathers_blocks_at_rest_and_shows_the_parts_of_those_that_moved(base, adapt):
    table = comparison_table(compare(base, adapt(train_last_mlp), ["blocks[-1].mlp"])).splitlines()
    assert sum(line.startswith("block 0 to 1, each") for line in table) == 1
    assert [line.split()[:5] for line in table if line.startswith("block 2 mlp")] == [
        ["block", "2", "mlp", "8,352", "4"]
    ]
    assert "4 of the 4 parameters that may move did; the other 36 kept every bit" in table[-1]
