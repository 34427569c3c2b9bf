"""What read_structure finds in tiny random models, against their own forward pass and plain arithmetic."""

import copy
import functools

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_models
from conftest import tiny_gpt2
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.adapter_plan import PAST_THE_MODULE
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.lora import plan_lora
from partialtune.model.parameters import named_weights
from partialtune.model.structure import read_structure

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_LIKE = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA_2 = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
BLOCKS = {"attention", "mlp", "norms"}

# model type -> (what its config says beyond SMALL, the components that it has beside embeddings.tokens)
ARCHITECTURES = {
    "gpt2": (GPT2_LIKE, {*BLOCKS, "embeddings.positions", "final_norm"}),
    "gpt_bigcode": (GPT2_LIKE, {*BLOCKS, "embeddings.positions", "final_norm"}),
    "gpt_neo": (
        {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]},
        {*BLOCKS, "embeddings.positions", "final_norm"},
    ),
    "openai-gpt": (GPT2_LIKE, {*BLOCKS, "embeddings.positions"}),
    "gptj": ({**GPT2_LIKE, "rotary_dim": 4}, {*BLOCKS, "final_norm", "head"}),
    "gpt_neox": ({}, {*BLOCKS, "final_norm", "head"}),
    "llama": ({}, {*BLOCKS, "final_norm", "head"}),
    "mistral": ({}, {*BLOCKS, "final_norm", "head"}),
    "qwen2": ({}, {*BLOCKS, "final_norm", "head"}),
    "qwen3": ({"head_dim": 8}, {*BLOCKS, "final_norm", "head"}),
    "gemma2": ({"head_dim": 8}, {*BLOCKS, "final_norm"}),
    "gemma3_text": ({"head_dim": 8}, {*BLOCKS, "final_norm"}),
    "olmo2": ({}, {*BLOCKS, "final_norm", "head"}),
    "cohere": ({"use_qk_norm": True}, {*BLOCKS, "final_norm"}),
    "stablelm": ({"qk_layernorm": True}, {*BLOCKS, "final_norm", "head"}),
    "starcoder2": ({}, {*BLOCKS, "final_norm"}),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 16},
        {*BLOCKS, "embeddings.positions", "embeddings.other", "final_norm", "head"},
    ),
    "phi": ({}, {*BLOCKS, "final_norm", "head"}),
    "phi3": ({}, {*BLOCKS, "final_norm", "head"}),
    "falcon": ({}, {*BLOCKS, "final_norm"}),
    "bloom": ({"n_layer": 3, "n_head": 4}, {*BLOCKS, "embeddings.other", "final_norm"}),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}, {*BLOCKS, "final_norm"}),
    "bart": (
        {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        {*BLOCKS, "embeddings.positions", "embeddings.other"},
    ),
    "modernbert-decoder": ({}, {*BLOCKS, "embeddings.other", "final_norm", "head"}),
    "mixtral": ({"num_local_experts": 4}, {*BLOCKS, "final_norm", "head"}),
    "qwen2_moe": ({**MOE, "shared_expert_intermediate_size": 24}, {*BLOCKS, "final_norm", "head"}),
    "qwen3_moe": ({**MOE, "head_dim": 8}, {*BLOCKS, "final_norm", "head"}),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4}, {*BLOCKS, "final_norm", "head"}),
    "deepseek_v3": (
        {
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "v_head_dim": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "num_key_value_heads": 4,
        },
        {*BLOCKS, "final_norm", "head"},
    ),
    "mamba": ({"state_size": 4, "time_step_rank": 4}, {"mixer", "norms", "final_norm"}),
    "mamba2": ({"state_size": 4, **MAMBA_2}, {"mixer", "norms", "final_norm", "head"}),
    "jamba": (
        {
            "num_hidden_layers": 6,
            "attn_layer_offset": 2,
            "attn_layer_period": 4,
            "expert_layer_period": 2,
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        {*BLOCKS, "mixer", "final_norm", "head"},
    ),
    "qwen3_next": (
        {
            **MOE,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
        {*BLOCKS, "mixer", "final_norm", "head"},
    ),
    "lfm2": (
        {"layer_types": ["conv", "conv", "full_attention"], "block_ff_dim": 48},
        {*BLOCKS, "mixer", "final_norm"},
    ),
    "recurrent_gemma": (
        {"lru_width": 32, "head_dim": 8, "block_types": ["recurrent", "recurrent", "attention"]},
        {*BLOCKS, "mixer", "final_norm"},
    ),
    "nemotron_h": (
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 4,
            "n_groups": 1,
            "n_group": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 24,
        },
        {*BLOCKS, "mixer", "final_norm", "head"},
    ),
}
every_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)


@functools.cache
def tiny_config(model_type: str):
    return AutoConfig.for_model(model_type, **{**SMALL, **ARCHITECTURES[model_type][0]})


@functools.cache
def tiny(model_type: str) -> nn.Module:
    """Shared by the tests, which do not change it."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config(model_type))).eval()


def on_meta(config) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def components(structure) -> dict[str, str]:
    return {place.name: place.component for info in structure.parameters for place in info.places}


def numbers(structure, block: int | None = None) -> dict[str, int]:
    """Component -> number of parameters, in one block or in all of the model."""
    found: dict[str, int] = {}
    for info in structure.parameters:
        if block is None or info.block == block:
            found[info.component] = found.get(info.component, 0) + info.numel
    return found


@every_architecture
def test_components_partition_the_parameters(model_type):
    model, structure = tiny(model_type), read_structure(tiny(model_type))
    named = dict(model.named_parameters())
    assert [info.name for info in structure.parameters] == list(named)
    assert [info.shape for info in structure.parameters] == [tuple(p.shape) for p in named.values()]
    assert set(structure.by_name) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert structure.total == sum(p.numel() for p in model.parameters()) == sum(numbers(structure).values())
    assert set(numbers(structure)) == {"embeddings.tokens", *ARCHITECTURES[model_type][1]}


@every_architecture
def test_blocks_are_the_decoder_layers_in_their_order(model_type):
    structure = read_structure(tiny(model_type))
    assert structure.block_count == tiny_config(model_type).num_hidden_layers
    assert {info.block for info in structure.parameters} == {None, *range(structure.block_count)}
    for info in structure.parameters:
        prefix = f"{structure.blocks_path}.{info.block}."
        assert (info.block is not None) == info.name.startswith(f"{structure.blocks_path}.")
        assert info.block is None or info.name.startswith(prefix)


@every_architecture
def test_forward_ranks_follow_the_real_forward_pass(model_type):
    model, structure = tiny(model_type), read_structure(tiny(model_type))
    met: list[str] = []
    hooks = []
    for path, module in model.named_modules():
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        hooks.append(module.register_forward_pre_hook(lambda module, inputs, names=names: met.extend(names)))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None])
    for hook in hooks:
        hook.remove()
    first_met = list(dict.fromkeys(structure.by_name[name].name for name in met))
    ranks = [structure.by_name[name].forward_rank for name in first_met]
    assert ranks == sorted(ranks)
    assert len(first_met) > len(structure.parameters) / 2  # the rest is used without calling the module that holds it
    assert structure.by_name[first_met[0]].component == "embeddings.tokens"


@every_architecture
def test_meta_device_gives_the_same_structure(model_type):
    assert read_structure(on_meta(copy.deepcopy(tiny_config(model_type)))) == read_structure(tiny(model_type))


@every_architecture
def test_untied_structure_is_the_one_of_a_model_that_does_not_tie(model_type):
    config = copy.deepcopy(tiny_config(model_type))
    config.tie_word_embeddings = False
    foreseen, untied = read_structure(tiny(model_type), head="untied"), read_structure(on_meta(config))
    assert foreseen == untied
    assert untied.ties == []
    if not tiny_config(model_type).tie_word_embeddings:
        assert foreseen == read_structure(tiny(model_type))


@pytest.fixture(scope="module")
def gpt2():
    return on_meta(transformers.GPT2Config())


def test_gpt2_has_its_known_numbers(gpt2):
    structure = read_structure(gpt2)
    assert structure.total == 124_439_808
    assert numbers(structure, block=11) == {"attention": 2_362_368, "mlp": 4_722_432, "norms": 3_072}
    assert numbers(structure)["embeddings.tokens"] == 38_597_376
    assert numbers(structure)["embeddings.positions"] == 786_432
    assert numbers(structure)["final_norm"] == 1_536
    biases = [info for info in structure.parameters if info.is_bias]
    assert sum(info.numel for info in biases) == 102_144


def test_tied_head_is_one_tensor_with_two_names(gpt2):
    structure = read_structure(gpt2)
    assert structure.ties == [("transformer.wte.weight", "lm_head.weight")]
    tied = structure.by_name["lm_head.weight"]
    assert tied is structure.by_name["transformer.wte.weight"]
    assert (tied.name, tied.component, tied.forward_rank) == ("transformer.wte.weight", "embeddings.tokens", 0)


def test_untied_head_is_an_entry_of_its_own_at_the_end(gpt2):
    structure = read_structure(gpt2, head="untied")
    assert structure.total == 163_037_184
    head = structure.parameters[-1]
    assert (head.name, head.component, head.block, head.aliases) == ("lm_head.weight", "head", None, ())
    assert structure.by_name["transformer.wte.weight"].aliases == ()
    assert head.forward_rank > structure.by_name["transformer.ln_f.weight"].forward_rank
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight  # the model is as it was


def test_the_first_parameter_in_forward_order_is_where_backward_stops(gpt2):
    tied, untied = read_structure(gpt2), read_structure(gpt2, head="untied")
    head_and_norm = ["lm_head.weight", "transformer.ln_f.bias", "transformer.ln_f.weight"]
    assert tied.first_in_forward_order(head_and_norm) == "transformer.wte.weight"
    assert untied.first_in_forward_order(head_and_norm) == "transformer.ln_f.weight"
    assert tied.first_in_forward_order(["transformer.h.10.ln_1.bias", "transformer.h.2.mlp.c_proj.bias"]) == (
        "transformer.h.2.mlp.c_proj.bias"
    )
    assert tied.first_in_forward_order([]) is None


def test_head_of_another_value_is_refused(gpt2):
    with pytest.raises(RecipeError, match=r"'loose'.*'tied'.*'untied'"):
        read_structure(gpt2, head="loose")


def test_reading_leaves_the_model_alone():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config("llama"))).train()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    read_structure(model, head="untied")
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


def test_projections_of_opt_stand_with_embeddings_and_head():
    found = components(read_structure(tiny("opt")))
    assert found["model.decoder.project_in.weight"] == "embeddings.other"
    assert found["model.decoder.project_out.weight"] == "head"
    assert found["model.decoder.final_layer_norm.bias"] == "final_norm"  # registered before the blocks
    assert found["model.decoder.layers.2.final_layer_norm.bias"] == "norms"
    assert found["model.decoder.layers.2.fc1.weight"] == "mlp"


def test_norms_of_the_embeddings_are_no_final_norms():
    assert (
        components(read_structure(tiny("bloom")))["transformer.word_embeddings_layernorm.weight"] == "embeddings.other"
    )
    assert components(read_structure(tiny("bart")))["model.decoder.layernorm_embedding.weight"] == "embeddings.other"
    assert components(read_structure(tiny("lfm2")))["model.embedding_norm.weight"] == "final_norm"


def test_a_head_of_several_modules_is_head_throughout():
    found = components(read_structure(tiny("modernbert-decoder")))
    assert {name for name, component in found.items() if component == "head"} == {
        *("lm_head.dense.weight", "lm_head.norm.weight", "decoder.weight", "decoder.bias")
    }


def test_norms_inside_attention_and_mixers_are_norms():
    qwen3, stablelm = components(read_structure(tiny("qwen3"))), components(read_structure(tiny("stablelm")))
    assert qwen3["model.layers.0.self_attn.q_norm.weight"] == "norms"
    assert stablelm["model.layers.0.self_attn.q_layernorm.norms.3.weight"] == "norms"
    assert components(read_structure(tiny("cohere")))["model.layers.0.self_attn.k_norm.weight"] == "norms"  # 2-D
    assert components(read_structure(tiny("mamba2")))["backbone.layers.0.mixer.norm.weight"] == "norms"


def test_experts_and_routers_are_mlp_and_their_lists_are_no_blocks():
    mixtral, qwen = read_structure(tiny("mixtral")), components(read_structure(tiny("qwen2_moe")))
    assert mixtral.blocks_path == "model.layers"
    # 4 experts x (gate and up 2 x 48 x 32, down 32 x 48) and a router of 4 x 32
    assert numbers(mixtral, block=1)["mlp"] == 4 * 3 * 48 * 32 + 4 * 32
    assert qwen["model.layers.0.mlp.gate.weight"] == "mlp"
    assert qwen["model.layers.0.mlp.shared_expert_gate.weight"] == "mlp"


def test_blocks_of_a_hybrid_are_one_list_with_different_parts():
    jamba = read_structure(tiny("jamba"))
    parts = [set(numbers(jamba, block)) - {"norms", "mlp"} for block in range(6)]
    assert parts == [{"mixer"}, {"mixer"}, {"attention"}, {"mixer"}, {"mixer"}, {"mixer"}]
    assert [set(numbers(read_structure(tiny("nemotron_h")), block)) - {"norms"} for block in range(4)] == [
        {"mixer"},
        {"attention"},
        {"mlp"},
        {"mlp"},
    ]


def test_a_layer_shared_by_two_blocks_is_one_tensor_with_a_place_in_each():
    config = transformers.Zamba2Config(
        **{**SMALL, "num_hidden_layers": 6, "num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 16},
        layer_types=["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
        hybrid_layer_ids=[1, 4],
        mamba_d_state=4,
        n_mamba_heads=4,
        mamba_ngroups=1,
        mamba_headdim=16,
    )
    model = on_meta(config)
    shared = read_structure(model).by_name["model.layers.4.shared_transformer.self_attn.q_proj.weight"]
    assert shared.name == "model.layers.1.shared_transformer.self_attn.q_proj.weight"
    assert [(place.block, place.component) for place in shared.places] == [(1, "attention"), (4, "attention")]
    assert read_structure(model).total == sum(p.numel() for p in model.parameters())


def test_a_bigger_image_encoder_does_not_take_the_place_of_the_decoder():
    text = {"head_dim": 8, **SMALL, "max_position_embeddings": 256}
    model = on_meta(transformers.Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 2}))
    structure = read_structure(model)
    assert structure.blocks_path == "model.language_model.layers"
    found = components(structure)
    assert found["model.language_model.norm.weight"] == "final_norm"
    assert {component for name, component in found.items() if "language_model" not in name} == {"other", "head"}
    assert numbers(structure)["other"] > numbers(structure)["mlp"]


class FlatModel(nn.Module):
    """A model without an inner body: everything stands side by side."""

    def __init__(self):
        super().__init__()
        self.tokens, self.pos_emb = nn.Embedding(9, 4), nn.Parameter(torch.zeros(8, 4))
        self.input_norm, self.blocks_mixing = nn.LayerNorm(4, bias=False), nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2))
        self.norm, self.classifier = nn.LayerNorm(4), nn.Linear(4, 9)

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.classifier


def test_a_model_without_inner_body_is_read_too():
    structure = read_structure(FlatModel())
    assert (structure.model_name, structure.blocks_path, structure.block_count) == ("FlatModel", "blocks", 2)
    outside = {info.name: info.component for info in structure.parameters if info.block is None}
    assert outside == {
        "pos_emb": "embeddings.positions",
        "tokens.weight": "embeddings.tokens",
        "input_norm.weight": "embeddings.other",
        "blocks_mixing.weight": "other",
        "norm.weight": "final_norm",
        "norm.bias": "final_norm",
        "classifier.weight": "head",
        "classifier.bias": "head",
    }
    assert {"attention", "norms"} <= set(numbers(structure, block=1))


def test_a_model_that_names_no_output_embeddings_has_no_head(monkeypatch):
    monkeypatch.setattr(FlatModel, "get_output_embeddings", lambda self: None)
    assert "head" not in numbers(read_structure(FlatModel()))


def test_names_of_a_compiled_model_are_those_of_the_model():
    model = tiny("llama")
    assert read_structure(torch.compile(model)) == read_structure(model)


def test_lora_adapters_belong_to_the_module_that_they_adapt():
    import peft

    adapters = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config("gpt2"))), adapters)
    structure = read_structure(model)
    assert [info.name for info in structure.parameters] == [name for name, _ in named_weights(model)]
    assert structure.blocks_path == "base_model.model.transformer.h"
    assert set(read_structure(tiny("gpt2")).by_name) <= set(structure.by_name), "the base keeps its names"
    adapter = structure.by_name["transformer.h.2.attn.c_attn.lora_A.weight"]
    assert (adapter.component, adapter.block) == ("attention", 2)
    assert set(numbers(structure)) == {"embeddings.tokens", *ARCHITECTURES["gpt2"][1]}


def test_quantised_models_are_refused_in_words():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config("llama")))
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised \(model.layers.0.mlp.up_proj.weight is torch.int8\).*float32"):
        read_structure(model)
    projection.weight = nn.Parameter(torch.zeros(48, 32).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        read_structure(model)
    declared = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config("llama")))
    declared.is_quantized = True  # as transformers' quantizers set it, also where packed weights are buffers
    with pytest.raises(ModelError, match="quantised"):
        read_structure(declared)


def test_half_precision_is_no_quantisation():
    assert read_structure(on_meta(transformers.GPT2Config(dtype="bfloat16"))).total == 124_439_808


def test_two_parameters_over_one_memory_are_refused():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny_config("llama")))
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight and lm_head.weight .*tie_weights"):
        read_structure(model)


def test_a_wrapped_model_is_refused_with_advice():
    with pytest.raises(ModelError, match=r"DataParallel has no token embeddings.*without a DataParallel"):
        read_structure(nn.DataParallel(tiny("gpt2")))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_that_are_no_floating_point_numbers_are_refused_in_words_and_not_as_quantised(dtype):
    model = tiny_gpt2()
    model.transformer.h[0].table = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ModelError, match=rf"transformer\.h\.0\.table is {kind}\. .*floating-point parameters only.*as a buffer"
    ):
        read_structure(model)


def test_a_model_without_blocks_is_refused():
    model = FlatModel()
    model.blocks = nn.Sequential(*model.blocks)
    with pytest.raises(ModelError, match=r"FlatModel has no decoder blocks.*ModuleList"):
        read_structure(model)


@pytest.mark.slow
def test_every_causal_architecture_of_transformers_is_read():
    types = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    without_other = []
    read = 0
    for model_type in types:
        try:
            model = on_meta(AutoConfig.for_model(model_type))
        except (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError, StrictDataclassError):
            continue  # some configurations have no usable defaults
        structure = read_structure(model)
        assert [info.name for info in structure.parameters] == [name for name, _ in model.named_parameters()], (
            model_type
        )
        assert structure.total == sum(p.numel() for p in model.parameters()), model_type
        assert "embeddings.tokens" in numbers(structure), model_type
        if model_type != "xlm":  # keeps a list of attentions and a list of feed-forwards, and no blocks
            assert {"attention", "mixer", "mlp"} & set(numbers(structure, block=0)), model_type
        without_other += [model_type] if "other" not in numbers(structure) else []
        read += 1
    assert read >= 0.85 * len(types)
    assert len(without_other) >= 0.85 * read  # the rest: image encoders, second stacks, learned residual weights


@pytest.mark.parametrize(("kind", "named"), [("zamba2", "shared_transformer"), ("bert", "decoder.bias")])
def test_a_head_beside_other_ties_cannot_be_untied(kind, named):
    config = tiny_models.tiny_config(kind)
    config.is_decoder = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    read_structure(model)
    with pytest.raises(RecipeError, match=rf"{named}.* is tied to .* Leave head out"):
        read_structure(model, head="untied")


def test_a_tied_head_within_a_peft_model_can_be_untied():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"]))
    assert read_structure(model, head="untied").total == read_structure(model).total + 128 * 32


@pytest.mark.parametrize("kind", [*PAST_THE_MODULE])
def test_matrices_that_are_multiplied_past_their_module_get_no_adapter(kind):
    model = AutoModelForCausalLM.from_config(tiny_models.tiny_config(kind))
    plan = plan_lora(model, ["blocks[:]"])
    apply_plan(model, plan)
    adapted = {path.rpartition(".")[2] for path in plan.adapter.modules}
    assert adapted
    assert not adapted & set(PAST_THE_MODULE[kind])
    ids = torch.arange(3, 15)[None]
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    learners = dict(named_weights(model))
    # Of Zamba2's shared block each of its places computes with one of several adapters of its own.
    used = [name for name in plan.trainable if "adapter_list" not in name]
    assert [name for name in used if learners[name].grad is None] == []
