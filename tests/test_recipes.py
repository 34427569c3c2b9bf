"""Every recipe of the repository is valid, and the numbers in its header are those of its plan."""

import re

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import REPOSITORY
from partialtune.freeze.methods import plan_of_recipe
from partialtune.freeze.plan import plan_freeze
from partialtune.model.loading import empty_model, load_config
from partialtune.recipe.reading import read_recipe

RECIPES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if "launch" not in path.parts)
COUNTS = re.compile(r"Trains ([\d,]+) of ([\d,]+) parameters \((\d+\.\d+)%\)")


def model_of(name):
    """The model's shape without weights; GPT-2's is known without the network."""
    if name == "openai-community/gpt2":
        with torch.device("meta"):
            return GPT2LMHeadModel(GPT2Config())
    return empty_model(load_config(name))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY / "recipes")))
def test_a_recipe_is_valid_and_its_header_tells_the_truth(path):
    recipe = read_recipe(path)
    header = path.read_text(encoding="utf-8")
    header = header[: header.index("model_name_or_path")].replace("\n#", "")
    command = f"-m partialtune train {path.relative_to(REPOSITORY)}"
    assert command in header, "a recipe opens with its command"
    model = model_of(recipe.model.model_name_or_path)
    plan = plan_of_recipe(model, recipe.freeze, recipe.freeze.schedule)
    trainable, total, percent = COUNTS.search(header).groups()
    assert int(trainable.replace(",", "")) == plan.trainable_parameters
    assert int(total.replace(",", "")) == plan.total_parameters
    share = 100 * plan.trainable_parameters / plan.total_parameters
    assert percent == (f"{share:.1f}" if share >= 0.1 else f"{share:.2f}")


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
