"""Selectors that are one word: word -> which parameters it chooses. A new one is one row in the table below.

Everything else reads the table: the parser (`selector_syntax`) which words there are, `model/selectors` what they
choose and what an error offers in their place. Neither a model nor torch is needed, since a recipe's selectors are
checked before anything is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Candidate(Protocol):
    """One name of a parameter, and what a row may ask about it. It gets `model.layout.Place`."""

    @property
    def name(self) -> str:
        """Full dotted name: `model.layers.3.mlp.gate.weight`."""

    @property
    def block(self) -> int | None:
        """Index of the decoder block, None outside the blocks."""

    @property
    def component(self) -> str:
        """Part of the model, one of `model.layout.COMPONENTS`. Each parameter belongs to exactly one."""

    @property
    def is_bias(self) -> bool:
        """Whether it is added and not multiplied, by its name."""

    @property
    def tower(self) -> str:
        """ "vision", "projector" or "language" in a model of several towers; "" in others, and of what is none."""

    @property
    def mixture(self) -> str:
        """ "router" or "experts" inside the mlp of a mixture of experts; "" elsewhere."""


@dataclass(frozen=True)
class NamedSelector:
    """A row of the table.

    Attributes:
        word: As a recipe has it.
        chooses: Whether it chooses a parameter by this one of its names. A tied parameter has several names, and is
            chosen where one of them is.
        has_rows: Whether rows of it may be chosen: `embeddings.tokens[-4:]`. Those of `experts` are single experts.
        may_follow_blocks: Whether it may also stand behind blocks: `blocks[-1].attention`. It then chooses inside these
            blocks what `chooses` says.
        of_language: Whether it is a part of a language model, so that it may stand behind `language.`.
        in_words: What an error says that a model does not have; the word itself where it is empty.
        also_written: Names that one architecture or another has for it (`wte`, `ffn`). An error offers the word in
            their place.
    """

    word: str
    chooses: Callable[[Candidate], bool]
    may_follow_blocks: bool = False
    of_language: bool = True
    has_rows: bool = False
    in_words: str = ""
    also_written: tuple[str, ...] = ()


def _components(*names: str) -> Callable[[Candidate], bool]:
    return lambda place: place.component in names


def _bias(place: Candidate) -> bool:
    """Biases inside blocks and that of the final norm; not that of a head (GPT-J), nor of what is beside embeddings."""
    return place.is_bias and (place.block is not None or place.component == "final_norm")


# In the order in which messages list them. Compare components and names as a whole, never by a part of their text:
# "norm" is in `input_layernorm`, and "h.1" in `h.10`.
NAMED_SELECTORS = (
    NamedSelector("embeddings", _components("embeddings.tokens", "embeddings.positions", "embeddings.other")),
    NamedSelector(
        "embeddings.tokens",
        _components("embeddings.tokens"),
        has_rows=True,
        also_written=("wte", "embed_tokens", "word_embeddings", "tokens"),
    ),
    NamedSelector(
        "embeddings.positions",
        _components("embeddings.positions"),
        has_rows=True,
        in_words="position embeddings",
        also_written=("wpe", "embed_positions", "positions"),
    ),
    NamedSelector("attention", _components("attention"), may_follow_blocks=True, also_written=("attn", "self_attn")),
    NamedSelector(  # with routers and experts
        "mlp",
        _components("mlp"),
        may_follow_blocks=True,
        also_written=("ffn", "feed_forward", "moe", "shared_expert", "shared_experts"),
    ),
    NamedSelector(
        "router",
        lambda place: place.mixture == "router",
        may_follow_blocks=True,
        in_words="router (mixture of experts)",
        also_written=("gate", "gating"),
    ),
    NamedSelector(  # without shared experts, which every token passes: they are mlp alone
        "experts",
        lambda place: place.mixture == "experts",
        may_follow_blocks=True,
        has_rows=True,
        in_words="experts (mixture of experts)",
        also_written=("expert",),
    ),
    NamedSelector(
        "mixer",
        _components("mixer"),
        may_follow_blocks=True,
        in_words="mixer (state-space block)",
        also_written=("mamba", "ssm"),
    ),
    NamedSelector(  # inside attention too
        "norms",
        _components("norms", "final_norm"),
        may_follow_blocks=True,
        also_written=("ln", "layernorm", "layernorms"),
    ),
    NamedSelector("biases", _bias, may_follow_blocks=True),
    NamedSelector(
        "final_norm",
        _components("final_norm"),
        in_words="final norm with parameters",
        also_written=("ln_f", "norm_f", "final_layernorm"),
    ),
    NamedSelector("head", _components("head"), has_rows=True, also_written=("lm_head", "embed_out", "output")),
    NamedSelector(
        "vision",
        lambda place: place.tower == "vision",
        of_language=False,
        in_words="vision tower",
        also_written=("vision_tower", "vision_model", "visual", "image", "encoder"),
    ),
    NamedSelector(
        "projector",
        lambda place: place.tower == "projector",
        of_language=False,
        in_words="projector between a vision tower and the language model",
        also_written=("multi_modal_projector", "mm_projector", "connector", "merger", "aligner"),
    ),
    NamedSelector(
        "language",
        lambda place: place.tower == "language",
        of_language=False,
        in_words="other tower than its language model, whose parts are named without `language.`",
        also_written=("language_model", "text_model"),
    ),
    NamedSelector("all", lambda place: True, of_language=False),
)

NAMED = {row.word: row for row in NAMED_SELECTORS}
WORDS = tuple(NAMED)
WITH_ROWS = tuple(row.word for row in NAMED_SELECTORS if row.has_rows)
BLOCK_PARTS = tuple(row.word for row in NAMED_SELECTORS if row.may_follow_blocks)
LANGUAGE_PARTS = tuple(row.word for row in NAMED_SELECTORS if row.of_language)
WORD_FOR = {written: row.word for row in NAMED_SELECTORS for written in row.also_written}
