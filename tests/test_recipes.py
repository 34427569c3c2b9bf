"""Every recipe of the repository is valid, and the numbers in its header are those of its plan."""

import copy
import re

import pytest
import yaml
from transformers import GPT2Config, LlamaConfig, LlavaConfig, OlmoeConfig

from conftest import REPOSITORY
from partialtune.freeze.plan import plan_freeze
from partialtune.freeze.recipe_plan import plan_of_recipe
from partialtune.model.loading import empty_model, load_config
from partialtune.model.new_tokens import NewToken, NewTokens, give_rows
from partialtune.recipe.recipe import read_recipe

RECIPES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if "launch" not in path.parts)
COUNTS = re.compile(r"Trains ([\d,]+) of ([\d,]+) parameters \((\d+\.\d+)%\)")


SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
ON_THE_HUB = {  # shapes that are known without the network
    "openai-community/gpt2": GPT2Config(),
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "allenai/OLMoE-1B-7B-0924": OlmoeConfig(intermediate_size=1024),
    "llava-hf/llava-1.5-7b-hf": LlavaConfig(
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096).to_dict()
    ),
}


TOKENS_OF = {"openai-community/gpt2": 50_257}


def model_of(name, new_tokens=()):
    """The model's shape without weights, with rows for new tokens."""
    model = empty_model(copy.deepcopy(ON_THE_HUB.get(name)) or load_config(name))
    if new_tokens:  # the tokenizer is on the Hub, and gives the ids after its own
        tokens = tuple(NewToken(token, TOKENS_OF[name] + place) for place, token in enumerate(new_tokens))
        give_rows(model, NewTokens(tokens, TOKENS_OF[name]))
    return model


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY / "recipes")))
def test_a_recipe_is_valid_and_its_header_tells_the_truth(path):
    header = path.read_text(encoding="utf-8")
    if "frozen_quantization" in header:
        pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    recipe = read_recipe(path)
    header = header[: header.index("model_name_or_path")].replace("\n#", "")
    command = f"-m partialtune train {path.relative_to(REPOSITORY)}"
    assert command in header, "a recipe opens with its command"
    model = model_of(recipe.model.model_name_or_path, recipe.model.new_tokens)
    plan = plan_of_recipe(model, recipe.freeze, recipe.freeze.schedule)
    trainable, total, percent = COUNTS.search(header).groups()
    assert int(trainable.replace(",", "")) == plan.trainable_parameters
    assert int(total.replace(",", "")) == plan.total_parameters
    share = 100 * plan.trainable_parameters / plan.total_parameters
    assert percent == (f"{share:.1f}" if share >= 0.1 else f"{share:.2f}")
    passed = re.search(r"Backward passes (\d+) of (\d+) blocks", header)
    if passed:
        assert (int(passed[1]), int(passed[2])) == (plan.block_count - plan.phases[0].first_block, plan.block_count)
    context = re.search(r"block_size: .*# \S+ allows ([\d,]+)", path.read_text(encoding="utf-8"))
    if context:
        assert int(context[1].replace(",", "")) == model.config.get_text_config().max_position_embeddings


def test_the_notebooks_policy_trains_39_385_344_of_124_439_808():
    for name in ("gulliver", "notebook"):
        recipe = read_recipe(REPOSITORY / "recipes" / "gpt2" / f"{name}.yaml")
        plan = plan_freeze(model_of("openai-community/gpt2"), recipe.freeze.trainable)
        assert (plan.trainable_parameters, plan.total_parameters) == (39_385_344, 124_439_808)
        assert recipe.training["max_steps"] == 123
        assert recipe.training["per_device_train_batch_size"] == 16
        assert recipe.training["learning_rate"] == 5e-5
        assert recipe.training["weight_decay"] == 0.01
        assert recipe.text.block_size == 256


def test_the_quickstart_in_the_package_is_the_one_in_recipes():
    from partialtune.builtin import builtin_recipe

    assert yaml.safe_load(builtin_recipe("builtin:quickstart").read_text()) == yaml.safe_load(
        (REPOSITORY / "recipes" / "quickstart.yaml").read_text()
    )


KNOWN = {  # of GPT-2: recipe -> what trains
    "attention": 12 * 2_362_368,
    "mlp": 12 * 4_722_432,
    "norms": 38_400,
    "biases": 102_144,
    "positions": 786_432,
    "last_1_block": 7_087_872 + 1_536,
    "last_2_blocks": 14_177_280,
    "prefix_on_disk": 14_177_280,
    "last_4_blocks": 4 * 7_087_872 + 1_536,
    "head_only": 38_598_912,
    "full": 124_439_808,
    "lora": 442_368,
    "lora_and_norms": 442_368 + 38_400,
}


def test_the_recipes_for_gpt2_are_all_there_with_the_known_right_answers():
    for name, trainable in KNOWN.items():
        recipe = read_recipe(REPOSITORY / "recipes" / "gpt2" / f"{name}.yaml")
        plan = plan_of_recipe(model_of("openai-community/gpt2"), recipe.freeze)
        assert plan.trainable_parameters == trainable, name
        untied = recipe.freeze.head == "untied"
        adapters = 442_368 if name in ("lora", "lora_and_norms") else 0
        assert plan.total_parameters == (163_037_184 if untied else 124_439_808 + adapters), name
    gradual = read_recipe(REPOSITORY / "recipes" / "gpt2" / "gradual_unfreezing.yaml")
    assert len(gradual.freeze.schedule) > 1
