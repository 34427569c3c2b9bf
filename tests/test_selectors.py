"""Selectors on GPT-2 at its true shape and on small models that lack parts, tie nothing, or share layers."""

import logging
import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import REPOSITORY
from partialtune.errors import RecipeError
from partialtune.grammar.named_selectors import BLOCK_PARTS, WORDS
from partialtune.grammar.selector_syntax import check_selector_syntax
from partialtune.model.selectors import resolve_selectors
from partialtune.model.structure import read_structure

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def structure_of(config, head: str = "tied"):
    with torch.device("meta"):
        return read_structure(AutoModelForCausalLM.from_config(config), head)


@pytest.fixture(scope="module")
def gpt2():
    return structure_of(transformers.GPT2Config(name_or_path="gpt2"))


@pytest.fixture(scope="module")
def untied_gpt2():
    return structure_of(transformers.GPT2Config(name_or_path="gpt2"), head="untied")


@pytest.fixture(scope="module")
def pythia():
    """No position embeddings, nothing tied, two norms and many biases in a block."""
    return structure_of(transformers.GPTNeoXConfig(**SMALL, name_or_path="pythia"))


@pytest.fixture(scope="module")
def jamba():
    """Blocks 4 and 12 of 16 have attention, the others a mixer."""
    return structure_of(transformers.JambaConfig(**{**SMALL, "num_hidden_layers": 16}, name_or_path="jamba"))


def count(structure, *selectors: str) -> int:
    return sum(structure.by_name[name].numel for name in resolve_selectors(structure, selectors))


def names(structure, *selectors: str) -> set[str]:
    return set(resolve_selectors(structure, selectors))


def blocks(structure, *selectors: str) -> set[int | None]:
    return {structure.by_name[name].block for name in resolve_selectors(structure, selectors)}


def problem_with(structure, *selectors: str) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve_selectors(structure, selectors)
    return str(caught.value)


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (["embeddings", "final_norm", "head"], 39_385_344),
        (["blocks[-2:]", "final_norm"], 14_177_280),
        (["norms"], 38_400),
        (["biases"], 102_144),
        (["blocks[-1].attention"], 2_362_368),
        (["blocks[-1].mlp"], 4_722_432),
        (["blocks[-1].norms"], 3_072),
        (["blocks[-1].biases"], 8_448),
        (["blocks[-1]"], 7_087_872),
        (["attention"], 12 * 2_362_368),
        (["mlp"], 12 * 4_722_432),
        (["embeddings"], 39_383_808),
        (["embeddings.tokens"], 38_597_376),
        (["head"], 38_597_376),
        (["embeddings.positions"], 786_432),
        (["final_norm"], 1_536),
        (["all"], 124_439_808),
        (["all", "!embeddings"], 124_439_808 - 39_383_808),
        (["norms", "!biases"], 19_200),
        (["biases", "!norms"], 102_144 - 19_200),
        ([r"/transformer\.h\.\d+\.ln_1\.weight/"], 12 * 768),
        (["/transformer.wpe.weight/", "!blocks[:]"], 786_432),
    ],
)
def test_gpt2_counts_are_the_known_ones(gpt2, selectors, expected):
    assert count(gpt2, *selectors) == expected


def test_untied_head_is_chosen_by_itself(untied_gpt2):
    assert count(untied_gpt2, "head", "final_norm") == 38_598_912
    assert count(untied_gpt2, "all") == 163_037_184
    assert names(untied_gpt2, "head") == {"lm_head.weight"}
    assert names(untied_gpt2, "embeddings", "!head", "!embeddings.positions") == {"transformer.wte.weight"}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("blocks[11]", {11}),
        ("blocks[-1]", {11}),
        ("blocks[-12]", {0}),
        ("blocks[-2:]", {10, 11}),
        ("blocks[:]", set(range(12))),
        ("blocks[8:99]", {8, 9, 10, 11}),
        ("blocks[::4]", {0, 4, 8}),
        ("blocks[:-9:-1]", {11, 10, 9, 8, 7, 6, 5, 4}),
        ("blocks[0,3:6,-1]", {0, 3, 4, 5, 11}),
        ("blocks[1,1,+1,0:2]", {0, 1}),
        (" blocks [ 0 , 3 : 6 , -1 ] . mlp ", {0, 3, 4, 5, 11}),
    ],
)
def test_block_indices_are_pythons(gpt2, selector, expected):
    assert blocks(gpt2, selector) == expected


def test_block_1_is_not_block_10(gpt2, jamba):
    assert all(name.startswith("transformer.h.1.") for name in names(gpt2, "blocks[1]"))
    assert all(name.startswith("model.layers.1.") for name in names(jamba, "blocks[1]"))
    assert all(name.startswith("transformer.h.10.") for name in names(gpt2, "blocks[10]"))
    assert len(names(gpt2, "blocks[1]")) == len(names(gpt2, "blocks[10]")) == 12


def test_parts_of_one_block_add_up_to_it(gpt2, jamba):
    assert names(gpt2, "blocks[3]") == names(gpt2, *(f"blocks[3].{part}" for part in ("attention", "mlp", "norms")))
    assert names(jamba, "blocks[3]") == names(jamba, *(f"blocks[3].{part}" for part in ("mixer", "mlp", "norms")))
    assert names(gpt2, "blocks[3].biases") == {name for name in names(gpt2, "blocks[3]") if name.endswith(".bias")}


def test_norms_and_biases_take_in_the_final_norm_and_no_other_outer_parameter(gpt2):
    final_norm = {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert names(gpt2, "norms", "!blocks[:]") == final_norm
    assert names(gpt2, "biases", "!blocks[:]") == {"transformer.ln_f.bias"}
    bloom = structure_of(transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4))
    assert names(bloom, "norms", "biases", "!blocks[:]") == final_norm  # not its word_embeddings_layernorm
    gptj = structure_of(transformers.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))
    assert names(gptj, "head") == {"lm_head.weight", "lm_head.bias"}
    assert names(gptj, "biases", "!blocks[:]") == {"transformer.ln_f.bias"}


def test_mixers_and_attention_of_a_hybrid_are_chosen_apart(jamba):
    assert blocks(jamba, "attention") == {4, 12}
    assert blocks(jamba, "mixer") == set(range(16)) - {4, 12}
    assert blocks(jamba, "blocks[3:6].mixer") == {3, 5}


def test_what_was_chosen_comes_with_the_first_selector_that_chose_it_in_the_models_order(gpt2):
    chosen = resolve_selectors(gpt2, ["final_norm", " norms ", "!blocks[1:]", "embeddings.positions", "all", "!biases"])
    assert list(chosen) == [info.name for info in gpt2.parameters if not info.is_bias]
    assert chosen["transformer.ln_f.weight"] == "final_norm"
    assert chosen["transformer.h.0.ln_1.weight"] == "norms"
    assert chosen["transformer.h.1.ln_1.weight"] == "all"  # the norm was taken away in between
    assert chosen["transformer.wpe.weight"] == "embeddings.positions"


def test_order_matters(gpt2):
    assert names(gpt2, "norms", "!blocks[0]", "blocks[0].norms") == names(gpt2, "norms")
    assert names(gpt2, "norms", "blocks[0].norms", "!blocks[0]") < names(gpt2, "norms")


def test_taking_away_before_anything_was_added_is_said(gpt2, caplog):
    with caplog.at_level(logging.WARNING):
        assert names(gpt2, "!biases", "final_norm") == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert "!biases takes nothing away" in caplog.text


def test_a_regex_matches_whole_names_and_every_name_of_a_tie(gpt2):
    assert names(gpt2, r"/lm_head\.weight/") == {"transformer.wte.weight"}
    assert names(gpt2, "all", r"!/lm_head\..*/") == names(gpt2, "all") - {"transformer.wte.weight"}
    assert names(gpt2, r"/transformer\.h\.1\..*/") == names(gpt2, "blocks[1]")
    said = problem_with(gpt2, "/ln_f/")
    assert "/ln_f/ matches no parameter" in said
    assert "transformer.ln_f.weight" in said
    assert count(gpt2, re.search(r"/\.\*ln_f\.\*/", said)[0]) == 1_536  # what it proposes works


def test_a_regex_that_matches_nothing_gets_the_nearest_names(gpt2):
    said = problem_with(gpt2, r"/transformer\.h\.3\.atn\.c_attn\.weight/")
    assert "transformer.h.3.attn.c_attn.weight" in said


def test_adding_or_removing_any_name_of_a_tie_moves_the_tensor(gpt2):
    tied = {"transformer.wte.weight"}
    assert names(gpt2, "head") == names(gpt2, "embeddings.tokens") == tied
    assert names(gpt2, "all", "!head") == names(gpt2, "all", "!embeddings.tokens") == names(gpt2, "all") - tied
    assert names(gpt2, "all", "!head", "!embeddings.tokens") == names(gpt2, "all") - tied
    assert names(gpt2, "embeddings", "!embeddings.tokens") == {"transformer.wpe.weight"}
    assert names(gpt2, "head", "!/.*weight/", "final_norm") == names(gpt2, "final_norm")  # both names are taken away


@pytest.mark.parametrize(
    "selectors",
    [
        ["head", "!embeddings"],
        ["head", "!embeddings.tokens", "norms"],
        ["embeddings", "!head"],
        ["embeddings.tokens", "final_norm", "!head"],
        ["all", "!head", "embeddings"],
        ["head", "embeddings", "!head"],
        ["embeddings", r"!/lm_head\.weight/"],
    ],
)
def test_asking_for_one_name_of_a_tie_without_the_other_offers_to_untie(gpt2, untied_gpt2, selectors):
    said = problem_with(gpt2, *selectors)
    assert "head: untied" in said
    assert "transformer.wte.weight" in said
    assert "lm_head.weight" in said
    assert "38,597,376" in said
    assert names(untied_gpt2, *selectors)  # two tensors: nothing to contradict


def test_a_model_that_does_not_tie_has_no_such_conflict(pythia):
    assert names(pythia, "embeddings", "!head") == {"gpt_neox.embed_in.weight"}


def test_a_layer_shared_by_two_blocks_answers_in_both():
    shared = structure_of(
        transformers.Zamba2Config(
            **{**SMALL, "num_hidden_layers": 6, "intermediate_size": 48},
            layer_types=["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
            hybrid_layer_ids=[1, 4],
            num_mem_blocks=1,
            mamba_d_state=4,
            n_mamba_heads=4,
            mamba_ngroups=1,
            mamba_headdim=16,
        )
    )
    attention = {f"model.layers.1.shared_transformer.self_attn.{x}_proj.weight" for x in "qkvo"}
    assert names(shared, "blocks[4].attention") == names(shared, "blocks[1].attention") == attention
    assert names(shared, "blocks[1].attention", "!blocks[4].mlp") == attention
    assert not names(shared, "all", "!blocks[4]") & attention


def test_an_index_out_of_range_is_said_as_the_style_asks(gpt2):
    assert problem_with(gpt2, "blocks[12]") == (
        "blocks[12] is out of range: gpt2 has 12 blocks, 0 to 11. The last one is blocks[11] or blocks[-1]."
    )
    assert problem_with(gpt2, "!blocks[0,-13].mlp").startswith("blocks[-13] (in !blocks[0,-13].mlp) is out of range")


@pytest.mark.parametrize("selector", ["blocks[5:5]", "blocks[12:]", "blocks[0,8:4]", "!blocks[-2:-4].norms"])
def test_a_slice_without_blocks_is_an_error(gpt2, selector):
    said = problem_with(gpt2, selector)
    assert "holds no block" in said
    assert "12 blocks, 0 to 11" in said


@pytest.mark.parametrize(
    ("model", "selector", "expected"),
    [
        (
            "pythia",
            "embeddings.positions",
            ["pythia has no position embeddings", "It has embeddings.tokens, attention"],
        ),
        ("pythia", "!mixer", ["!mixer matches no parameter", "pythia has no mixer", "head and blocks[0] to blocks[2]"]),
        (
            "gpt2",
            "blocks[0:2].mixer",
            ["blocks 0 to 1 of gpt2 have attention, mlp, norms, biases", "none of its blocks"],
        ),
        ("jamba", "blocks[0].attention", ["block 0 of jamba has mlp, mixer, norms", "attention is in blocks 4, 12"]),
        ("jamba", "blocks[4].mixer", ["mixer is in blocks 0 to 3, 5 to 11, 13 to 15"]),
    ],
)
def test_a_part_that_the_model_lacks_is_an_error_that_says_what_it_has(request, model, selector, expected):
    said = problem_with(request.getfixturevalue(model), selector)
    for part in expected:
        assert part in said


def test_a_model_without_biases_or_final_norm_says_so():
    llama = structure_of(transformers.LlamaConfig(**SMALL))
    assert "LlamaForCausalLM has no biases" in problem_with(llama, "biases")
    openai_gpt = structure_of(transformers.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4))
    assert "has no final norm" in problem_with(openai_gpt, "final_norm")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("atention", "Did you mean attention?"),
        ("!embeding", "Did you mean !embeddings?"),
        ("Head", "Did you mean head?"),
        ("lm_head", "Did you mean head?"),
        ("wte", "Did you mean embeddings.tokens?"),
        ("ln_f", "Did you mean final_norm?"),
        ("xyz", "Selectors are embeddings, embeddings.tokens"),
        ("", "Selectors are embeddings"),
        ("!", "Selectors are embeddings"),
        ("!!head", "unknown selector '!!head'"),
        ("embeddings.other", "unknown selector 'embeddings.other'"),
        ("transformer.ln_f.weight", r"'/transformer\.ln_f\.weight/'"),
        ("blocks", "Blocks are written blocks[11]"),
        ("block[3]", "Blocks are written blocks[11]"),
        ("h.3", "Blocks are written blocks[11]"),
        ("blocks.attention", "attention alone is that of every block"),
        ("blocks[3", "Blocks are written"),
        ("blocks[[3]]", "Blocks are written"),
        ("blocks[]", "'' is neither an index nor a slice"),
        ("blocks[1,]", "'' is neither an index nor a slice"),
        ("blocks[1 2]", "'1 2' is neither an index nor a slice"),
        ("blocks[1.5]", "'1.5' is neither"),
        ("blocks[a]", "'a' is neither"),
        ("blocks[1:2:3:4]", "'1:2:3:4' is neither"),
        ("blocks[::0]", "the step of a slice cannot be 0"),
        ("blocks[-1].attn", "Did you mean attention?"),
        ("blocks[-1].head", "Its parts are attention, mlp, router, experts, mixer, norms, biases"),
        ("blocks[-1].", "a block has no part ''"),
        ("blocks[-1].mlp.biases", "a block has no part 'mlp.biases'"),
        ("/", "between two slashes"),
        ("//", "between two slashes"),
        ("!/abc", "between two slashes"),
        ("/a(/", "cannot be read as a regular expression"),
        (3, "selector 3 is not text"),
        (["blocks[1]"], "is not text"),
    ],
)
def test_what_is_not_in_the_grammar_is_said_without_a_model(gpt2, selector, expected):
    assert expected in check_selector_syntax(selector)
    assert problem_with(gpt2, "norms", selector) == check_selector_syntax(selector)


@pytest.mark.parametrize(
    "selector",
    [
        "embeddings",
        " embeddings . tokens ",
        "! head",
        "all",
        "mixer",
        "blocks[99]",
        "blocks[-2:].mixer",
        "!/a|b/",
        "/[/]/",
    ],
)
def test_what_is_in_the_grammar_passes_without_a_model(selector):
    assert check_selector_syntax(selector) is None


def test_all_problems_of_a_list_come_at_once(gpt2):
    said = problem_with(gpt2, "blocks[12]", "atention", "mixer", "embeddings", "!head").splitlines()
    assert [line.split()[0] for line in said] == ["blocks[12]", "unknown", "mixer", "embeddings"]


def test_nothing_trainable_is_an_error(gpt2):
    assert "nothing would train" in problem_with(gpt2)
    assert "norms, biases, final_norm, head and blocks[0] to blocks[11]" in problem_with(gpt2)
    assert "nothing is left to train" in problem_with(gpt2, "norms", "!norms")
    with pytest.raises(RecipeError, match="nothing is left"):
        resolve_selectors(gpt2, ["head", "!head"], allow_empty=True)
    assert resolve_selectors(gpt2, [], allow_empty=True) == {}


def test_one_string_is_a_list_of_one(gpt2):
    assert resolve_selectors(gpt2, "final_norm") == resolve_selectors(gpt2, ["final_norm"])


def test_the_readmes_table_names_selectors_that_there_are():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = text.partition("| selector | parameters |")[2].partition("\n\n")[0]
    written = set(re.findall(r"`([a-z_.]+)`", table))
    assert {word for word in written if not word.startswith(".")} <= set(WORDS)
    assert {word[1:] for word in written if word.startswith(".")} <= set(BLOCK_PARTS)
