"""A tiny config of every model type that transformers calls a causal language model, of about 10^5 weights.

Each field that a config class declares gets a small value here. Some types need values of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, CONTEXT, BLOCKS = 99, 64, 3

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), CONTEXT),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), BLOCKS),
    **dict.fromkeys(("num_decoder_layers", "max_window_layers"), BLOCKS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    **dict.fromkeys(("word_embed_proj_dim",), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "v_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "dim_ff", "d_inner", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("feed_forward_size", "block_ff_dim", "prefix_dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "num_shared_experts", "num_dense_layers", "zero_expert_num"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "loop_gate_rank"), 8),
    **dict.fromkeys(("gated_norm_rank", "hc_lowrank", "adapter_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 4),
    **dict.fromkeys(("index_topk",), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("depth", "num_codebooks"), 1),
    **dict.fromkeys(("mm_embed_dim", "ext_pw_out_channel", "depthwise_separable_out_channel"), 32),
    **dict.fromkeys(("nemo_conv_channels", "output_channels"), 32),
    **dict.fromkeys(("mlp_dim",), 16),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "backbone_hidden_size", "hidden_size_global"), 32),
    **dict.fromkeys(("input_size", "output_proj_dims", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 32),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCABULARY),
    **dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),  # so small a model hardly depends on its input otherwise
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise", "jitter_noise"), 0.0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MLA = {"num_key_value_heads": 4, "head_dim": 4}  # one key head a query head; its rotary part is head_dim
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

DOTS_3 = {
    "num_key_value_heads": 4,
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads", "qk_nope_head_dim")},
    **{f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim")},
}

# What does not fit together otherwise. A part's own values are under its name.
OWN: dict[str, dict[str, Any]] = {
    "axk2": MLA,
    "blt": {
        "encoder_hash_byte_group_vocab": 99,
        "encoder_hash_byte_group_size": [3, 4],
        "cross_attn_k": 2,
        "vocab_size": 260,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260},
        "decoder_config": {"vocab_size": 260},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v32": MLA,
    "dots3_note": {"text_config": DOTS_3, "vision_config": {"mlp_layer_types": ["dense"] * 3}},
    "dots3_note_text": DOTS_3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": {"qk_layernorm": True}},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm_moe_dsa": MLA,
    "gpt2": {"n_inner": None},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "jamba": {"num_hidden_layers": 6, "attn_layer_offset": 2, "attn_layer_period": 4, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "longcat_flash": {**MLA, "num_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "moshi": {"audio_vocab_size": 99},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1}},
    "qwen3_next": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "rwkv": {"rescale_every": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of `model_type` with small values throughout."""
    return _small(CONFIG_MAPPING[model_type], OWN.get(model_type, {}))


def _small(config_class: type[PretrainedConfig], own: Mapping[str, Any]) -> PretrainedConfig:
    values = {field.name: SMALL[field.name] for field in dataclasses.fields(config_class) if field.name in SMALL}
    parts = getattr(config_class, "sub_configs_defaults", None) or getattr(config_class, "sub_configs", {})
    for part, declared in parts.items():
        part_class = getattr(declared, "config_class", declared)
        if part_class is AutoConfig:
            part_class = CONFIG_MAPPING[declared.model_type]
        values[part] = _small(part_class, own.get(part, {})).to_dict()
    return config_class(**{**values, **{name: value for name, value in own.items() if name not in parts}})
