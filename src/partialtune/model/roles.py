"""What a module is in a decoder, by its own word: class and attribute name -> norm, attention, mlp, mixer, or nothing.

There is no table of model names here. Implementations name their classes for what they do (`GPT2Attention`,
`MixtralSparseMoeBlock`, `JambaMambaMixer`); where a class is only a container or a matrix (`ModuleList`,
`Sequential`, `Linear`), the attribute that holds it says it (`self_attn`, `ffn`, `fc1`).
"""

import re
from collections.abc import Iterable

from torch import nn

# The last word counts: in Qwen3MoeAttention, RecurrentGemmaMlp and xLSTMFeedForward an earlier one is the model's name.
CLASS_WORDS = re.compile(
    r"(?P<attention>Attention|Attn)"
    r"|(?P<mixer>Mamba|Mixer|SSM|Delta|ShortConv|Recurrent|LSTM)"
    r"|(?P<mlp>MLP|Mlp|MoE|Moe|FeedForward|FFN|Experts?|Router)"
    r"|(?P<neither>Norm|DecoderLayer|Residual)"
)
ATTRIBUTES = {
    "attention": re.compile(r"(self_|cross_)?(attn|attention)"),
    "mixer": re.compile(r"mixer|mamba|ssm"),
    "mlp": re.compile(r"mlps?|ffn|feed_forward|fc_?(\d|in|out)|intermediate|output|experts|router"),
}


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation: its class says so, and no module below it holds parameters.

    The second half keeps out RobertaPreLayerNormAttention, an attention of a model with Norm in its name.
    """
    if isinstance(module, nn.Linear | nn.Embedding) or "norm" not in type(module).__name__.lower():
        return False
    return not holds_parameters(module.children())


def holds_parameters(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules, or a module below one, has a parameter."""
    return any(next(module.parameters(), None) is not None for module in modules)


def role_in_block(attribute: str, module: nn.Module) -> str | None:
    """The part of a block that a module is: "attention", "mlp", "mixer", or None where neither class nor name says.

    What calls itself attention is attention, also a linear one (KimiDeltaAttention). Other modules that mix tokens are
    mixers: Mamba, gated DeltaNet, recurrences, short convolutions. A module named for a norm that is none, and a whole
    decoder layer inside a block (Zamba's shared one), are containers: what they hold has to be asked.
    """
    words = [match.lastgroup for match in CLASS_WORDS.finditer(type(module).__name__)]
    if words and words[-1] != "neither":
        return words[-1]
    return next((role for role, names in ATTRIBUTES.items() if names.fullmatch(attribute)), None)


def says_position(text: str) -> bool:
    """Whether a dotted name or a class name speaks of positions: `wpe`, `embed_positions`, `...PositionalEmbedding`."""
    return bool(re.search(r"(?:^|[._])(?:pos|positions?|wpe)(?:[._]|$)|Position", text))


def says_embedding(text: str) -> bool:
    """Whether a dotted name speaks of embeddings: `embeddings.LayerNorm`, `word_embeddings_layernorm`, `mask_emb`."""
    return bool(re.search(r"(?:^|[._])(?:emb|embed|embeddings?)(?:[._]|$)", text))


def says_final(text: str) -> bool:
    """Whether a norm's name says that it comes last: `ln_f`, `final_layer_norm`, `out_norm`, `ln_out`."""
    return bool(re.search(r"(?:^|_)(?:f|final|out|output)(?:_|$)", text))
