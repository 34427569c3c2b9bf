"""Routers, experts, mixers and the towers of vision-language models: found in the module tree, chosen by a word."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, JambaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from conftest import REPOSITORY
from partialtune.errors import RecipeError
from partialtune.freeze.plan import plan_freeze
from partialtune.grammar.named_selectors import BLOCK_PARTS, WORDS
from partialtune.grammar.selector_syntax import check_selector_syntax
from partialtune.model.layout import COMPONENTS
from partialtune.model.selectors import choose
from partialtune.model.structure import ModelStructure, read_structure
from tiny_models import tiny_config

VISION_LANGUAGE = ("llava", "gemma3", "qwen2_5_vl")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")


def empty(model_type: str) -> nn.Module:
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    with torch.device("meta"):
        return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(tiny_config(model_type))


@pytest.fixture(scope="module")
def structures():
    """By model type, each read once."""
    known: dict[str, ModelStructure] = {}

    def of(model_type: str) -> ModelStructure:
        if model_type not in known:
            known[model_type] = read_structure(empty(model_type))
        return known[model_type]

    return of


def names(structure: ModelStructure, *selectors: str) -> set[str]:
    return set(choose(structure, selectors))


def problem_with(structure: ModelStructure, *selectors: str) -> str:
    with pytest.raises(RecipeError) as caught:
        choose(structure, selectors)
    return str(caught.value)


def within(structure: ModelStructure, *prefixes: str) -> set[str]:
    return {info.name for info in structure.parameters if info.name.startswith(prefixes)}


# ---- towers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "vision", "projector"),
    [
        ("llava", "model.vision_tower.", "model.multi_modal_projector."),
        ("gemma3", "model.vision_tower.", "model.multi_modal_projector."),
        ("qwen2_5_vl", ("model.visual.blocks.", "model.visual.patch_embed."), "model.visual.merger."),
        ("qwen3_vl", "model.visual.", ("model.visual.merger.", "model.visual.deepstack_merger_list.")),
        ("llama4", "vision_model.", "multi_modal_projector."),
        ("idefics3", "model.vision_model.", "model.connector."),
        ("llava_next", "model.vision_tower.", ("model.multi_modal_projector.", "model.image_newline")),
        ("gemma4_unified", (), "model.embed_vision."),
        ("git", "git.image_encoder.", "git.visual_projection."),
    ],
)
def test_each_tower_is_chosen_by_its_word_and_all_of_them_are_the_model(structures, model_type, vision, projector):
    structure = structures(model_type)
    joins = within(structure, *([projector] if isinstance(projector, str) else projector))
    sees = within(structure, *([vision] if isinstance(vision, str) else vision)) - joins
    assert names(structure, "projector") == joins
    if sees:
        assert names(structure, "vision") == sees
    hears = {info.name for info in structure.parameters if "audio" in info.name}
    assert names(structure, "language") == names(structure, "all") - sees - joins - hears
    assert {structure.by_name[name].component for name in sees | joins} == {"other"}


@pytest.mark.parametrize("model_type", VISION_LANGUAGE)
def test_words_without_a_prefix_mean_the_language_model(structures, model_type):
    structure = structures(model_type)
    assert structure.blocks_path == "model.language_model.layers"
    for selector in ("blocks[-2:]", "attention", "mlp", "norms", "embeddings", "final_norm", "head", "blocks[0].mlp"):
        chosen = names(structure, selector)
        assert chosen == names(structure, f"language.{selector}")
        assert all(name.startswith(("model.language_model.", "lm_head.")) for name in chosen)
    assert names(structure, "language", "!language.blocks[:]") == {
        info.name
        for info in structure.parameters
        if info.name.startswith(("model.language_model.", "lm_head.")) and info.block is None
    }
    vision = r"/model\.vis.*\.0\..*/"
    assert names(structure, vision)
    assert not names(structure, vision) & names(structure, "language")
    assert names(structure, "all") == {info.name for info in structure.parameters}


def test_backward_passes_the_whole_language_model_where_the_projector_trains(structures):
    for model_type in VISION_LANGUAGE:
        plan = plan_freeze(empty(model_type), ["projector", "blocks[-1]"])
        assert plan.phases[0].first_block == 0
        assert plan_freeze(empty(model_type), ["language.blocks[-1]"]).phases[0].first_block == 2


@pytest.mark.parametrize(
    ("model_type", "selector", "words"),
    [
        ("llama", "language", "has no other tower than its language model"),
        ("llama", "language.blocks[-1]", "has no other tower than its language model"),
        ("llama", "vision", "has no vision tower"),
        ("llama", "projector", "has no projector"),
        ("llama", "router", "has no router (mixture of experts)"),
        ("llama", "experts[0]", "has no experts (mixture of experts)"),
        ("llava", "router", "It has embeddings.tokens, attention, mlp, norms, final_norm, head, vision, projector"),
        ("llava", "language.mixer", "has no mixer"),
        ("mixtral", "mixer", "It has embeddings.tokens, attention, mlp, router, experts, norms, final_norm, head and"),
        ("mixtral", "projector", "has no projector"),
        ("llama", "blocks[0].router", "block 0 of LlamaForCausalLM has attention, mlp, norms; router is in none"),
        ("gemma4_assistant", "projector", "has no projector"),  # a projection, and nothing that sees
    ],
)
def test_a_part_that_a_model_lacks_is_refused_with_what_it_has(structures, model_type, selector, words):
    said = problem_with(structures(model_type), selector)
    assert words in said
    assert "It has" in said or "of its blocks" in said


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("language.vision", "Behind language. stand embeddings,"),
        ("language.all", "unknown selector 'language.all'"),
        ("language.", "unknown selector 'language.'"),
        ("language.atention", "Did you mean language.attention?"),
        ("vision_tower", "Did you mean vision?"),
        ("multi_modal_projector", "Did you mean projector?"),
        ("gate", "Did you mean router?"),
        ("expert", "Did you mean experts?"),
        ("experts[]", "Experts are written experts[3]"),
        ("experts[a]", "Experts are written experts[3]"),
        ("blocks[0].experts[1.5]", "Experts are written experts[3]"),
        ("router[0]", "unknown selector 'router[0]'"),
        ("blocks[0].mlp[0]", "a block has no part 'mlp[0]'"),
    ],
)
def test_what_is_not_in_the_grammar_is_said_without_a_model(selector, words):
    assert words in (check_selector_syntax(selector) or "")


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "router", "experts"),
    [
        ("mixtral", r".*\.mlp\.gate\.weight", r".*\.mlp\.experts\.(gate_up|down)_proj"),
        ("qwen3_moe", r".*\.mlp\.gate\.weight", r".*\.mlp\.experts\.(gate_up|down)_proj"),
        ("gpt_oss", r".*\.mlp\.router\.(weight|bias)", r".*\.mlp\.experts\.(gate_up|down)_proj(_bias)?"),
        ("qwen2_moe", r".*\.mlp\.gate\.weight", r".*\.mlp\.experts\.(gate_up|down)_proj"),  # with a shared expert
        ("dbrx", r".*\.ffn\.router\.layer\.weight", r".*\.ffn\.experts\.mlp\.(w1|v1|w2)"),
        ("jetmoe", r".*\.mlp\.router\.layer\.weight", r".*\.mlp\.(input|output)_linear\.weight"),
        ("nemotron_h", r".*\.mixer\.gate\.weight", r".*\.mixer\.experts\.(up|down)_proj"),
        ("afmoe", r".*\.mlp\.(router\.gate\.weight|expert_bias)", r".*\.mlp\.experts\.(gate_up|down)_proj"),
    ],
)
def test_routers_and_experts_are_parts_of_the_mlps(structures, model_type, router, experts):
    structure = structures(model_type)
    every = [info.name for info in structure.parameters]
    assert names(structure, "router") == {name for name in every if re.fullmatch(router, name)} != set()
    assert names(structure, "experts") == {name for name in every if re.fullmatch(experts, name)} != set()
    assert names(structure, "router", "experts") <= names(structure, "mlp")
    assert {structure.by_name[name].component for name in names(structure, "router", "experts")} == {"mlp"}
    assert {info.component for info in structure.parameters} <= set(COMPONENTS)
    last = max(structure.by_name[name].block for name in names(structure, "router"))
    assert names(structure, f"blocks[{last}].router") == {
        name for name in names(structure, "router") if structure.by_name[name].block == last
    }


@pytest.mark.parametrize("model_type", MIXTURES)
def test_single_experts_are_slices_of_all_their_tensors(structures, model_type):
    structure = structures(model_type)
    for selector, slices in (
        ("experts[3]", ((3, 4),)),
        ("experts[-1]", ((3, 4),)),
        ("experts[0,2:4]", ((0, 1), (2, 4))),
        ("experts[::2]", ((0, 1), (2, 3))),
        ("experts[:]", None),
    ):
        chosen = choose(structure, [selector])
        assert chosen.keys() == names(structure, "experts")
        assert {one.rows for one in chosen.values()} == {slices}
    in_last = choose(structure, ["blocks[-1].experts[1]", "!blocks[-1].experts[2]"])
    assert in_last.keys() == names(structure, "blocks[-1].experts")
    assert {one.rows for one in in_last.values()} == {((1, 2),)}
    without = choose(structure, ["experts", "!experts[1]"])
    assert {one.rows for one in without.values()} == {((0, 1), (2, 4))}
    plan = plan_freeze(empty(model_type), ["experts[3]"])
    assert plan.trainable_parameters * 4 == plan_freeze(empty(model_type), ["experts"]).trainable_parameters


def test_an_expert_out_of_range_is_said_as_of_a_block(structures):
    said = problem_with(structures("mixtral"), "experts[9]")
    assert said == (
        "experts[9] is out of range: MixtralForCausalLM has 4 experts in a block, 0 to 3. "
        "The last one is experts[3] or experts[-1]."
    )
    assert "experts[-5] (in !blocks[0].experts[0,-5]) is out of range" in problem_with(
        structures("mixtral"), "experts", "!blocks[0].experts[0,-5]"
    )
    assert "the slice 4: holds no expert" in problem_with(structures("mixtral"), "experts[4:]")


def test_experts_side_by_side_in_one_matrix_are_chosen_together_or_refused(structures):
    assert names(structures("dbrx"), "experts")
    said = problem_with(structures("dbrx"), "experts[0]")
    assert "the experts of DbrxForCausalLM cannot be told apart" in said
    assert "Choose `experts`, all of them" in said


class OwnMixture(nn.Module):
    """A causal language model's tree with a module for each expert, as code that is not transformers' has it."""

    def __init__(self):
        super().__init__()

        def block() -> nn.Module:
            made = nn.Module()
            made.self_attn, made.mlp = nn.Linear(4, 4), nn.Module()
            made.mlp.gate = nn.Linear(4, 3, bias=False)
            made.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(3))
            made.mlp.shared_experts = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
            return made

        self.tokens, self.norm, self.lm_head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.lm_head


def test_experts_that_are_modules_of_their_own_are_chosen_whole():
    structure = read_structure(OwnMixture())
    chosen = choose(structure, ["blocks[1].experts[-1,0]"])
    assert chosen.keys() == within(structure, "blocks.1.mlp.experts.0.", "blocks.1.mlp.experts.2.")
    assert {one.rows for one in chosen.values()} == {None}
    assert names(structure, "router") == within(structure, "blocks.0.mlp.gate.", "blocks.1.mlp.gate.")
    assert "experts[3] is out of range" in problem_with(structure, "experts[3]")
    assert not names(structure, "experts") & within(structure, "blocks.0.mlp.shared_experts.")


# ---- the table in docs/selectors.md ----------------------------------------------------------------------------------


def rows_of_the_table() -> list[tuple[str, str]]:
    """(selector, model) of every example in the table."""
    text = (REPOSITORY / "docs" / "selectors.md").read_text(encoding="utf-8")
    lines = text.partition("|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
    found = []
    for line in lines:
        examples, _, model = line.strip("| ").split(" | ")
        found += [(example, model.strip()) for example in re.findall(r"`([^`]+)`", examples)]
    return found


@pytest.fixture(scope="module")
def models_of_the_table(structures):
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    with torch.device("meta"):
        gpt2 = read_structure(AutoModelForCausalLM.from_config(GPT2Config()))
        jamba = read_structure(AutoModelForCausalLM.from_config(JambaConfig(**small, num_hidden_layers=6)))
    return {"GPT-2": gpt2, "Jamba": jamba, "Mixtral": structures("mixtral"), "LLaVA": structures("llava")}


@pytest.mark.parametrize(("selector", "model"), rows_of_the_table())
def test_every_example_of_the_table_chooses_something(models_of_the_table, selector, model):
    structure = models_of_the_table[model]
    if selector.startswith("!"):
        assert choose(structure, ["all", selector]) != choose(structure, ["all"])
    else:
        assert choose(structure, [selector])


def test_the_table_has_every_word_and_every_part_of_blocks():
    written = {selector for selector, _ in rows_of_the_table()}
    assert set(WORDS) <= written
    assert {part for part in BLOCK_PARTS if any(re.fullmatch(rf"blocks\[.*\]\.{part}", one) for one in written)} == set(
        BLOCK_PARTS
    )


def test_the_readme_links_the_table():
    assert "(docs/selectors.md)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
