"""What a module says of itself: class first, the attribute that holds it where the class says nothing."""

import pytest
from torch import nn

from partialtune.model.layout import is_norm, role_in_block, says_embedding, says_final, says_position


def module_called(name: str, **children: nn.Module) -> nn.Module:
    module = type(name, (nn.Module,), {})()
    for attribute, child in children.items():
        module.add_module(attribute, child)
    return module


@pytest.mark.parametrize(
    ("class_name", "attribute", "role"),
    [
        ("GPT2Attention", "attn", "attention"),
        ("Qwen3MoeAttention", "self_attn", "attention"),  # Moe is the model's name
        ("RecurrentGemmaAttention", "temporal_block", "attention"),
        ("KimiDeltaAttention", "self_attn", "attention"),
        ("JetMoeMoE", "mlp", "mlp"),
        ("xLSTMFeedForward", "ffn", "mlp"),
        ("RecurrentGemmaMlp", "mlp_block", "mlp"),
        ("MixtralSparseMoeBlock", "mlp", "mlp"),
        ("GraniteMoeHybridMambaLayer", "mamba", "mixer"),
        ("Qwen3NextGatedDeltaNet", "linear_attn", "mixer"),
        ("RecurrentGemmaRecurrentBlock", "temporal_block", "mixer"),
        ("Linear", "fc1", "mlp"),
        ("Sequential", "ffn", "mlp"),
        ("ModuleList", "self_attn", "attention"),
        ("BertIntermediate", "intermediate", "mlp"),
        ("RobertaPreLayerNormIntermediate", "intermediate", "mlp"),
        ("ZambaAttentionDecoderLayer", "shared_transf", None),  # holds attention and an mlp
        ("DbrxNormAttentionNorm", "norm_attn_norm", None),  # holds attention and norms
        ("DeepseekV4HyperConnection", "attn_hc", None),
        ("Linear", "linear", None),
    ],
)
def test_the_last_word_of_the_class_says_the_role(class_name, attribute, role):
    assert role_in_block(attribute, module_called(class_name)) == role


def test_a_norm_is_called_so_and_holds_nothing_else():
    assert is_norm(nn.LayerNorm(4))
    assert is_norm(module_called("LlamaRMSNorm"))
    assert is_norm(module_called("MptNorm", dropout=nn.Dropout()))
    assert not is_norm(module_called("RobertaPreLayerNormAttention", query=nn.Linear(4, 4)))
    assert not is_norm(type("NormalizedLinear", (nn.Linear,), {})(4, 4))
    assert not is_norm(type("InklingNormedEmbedding", (nn.Embedding,), {})(4, 4))
    assert not is_norm(nn.Linear(4, 4))


def test_names_are_read_by_whole_words():
    assert all(map(says_position, ["wpe.weight", "embed_positions.weight", "pos_emb", "OPTLearnedPositionalEmbedding"]))
    assert not any(map(says_position, ["compose.weight", "wpen", "postnorm.weight"]))
    assert all(map(says_embedding, ["embeddings.LayerNorm.weight", "mask_emb", "layernorm_embedding.bias"]))
    assert not any(map(says_embedding, ["assembly.weight", "embedder_free"]))
    assert all(map(says_final, ["ln_f", "norm_f", "final_layer_norm", "out_norm", "ln_out"]))
    assert not any(map(says_final, ["norm", "ffn_norm", "layernorm_without"]))
