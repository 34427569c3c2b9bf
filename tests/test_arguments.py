"""The dataclasses of a recipe's own keys: keys, help, defaults, and that they cost nothing to import."""

import subprocess
import sys
from dataclasses import MISSING
from typing import Literal

import pytest

from partialtune.grammar.values import describe_type
from partialtune.recipe.arguments import TextArguments, argument_fields, argument_types, default_of, recipe_help

KEYS_AND_DEFAULTS = {
    "model_name_or_path": MISSING,
    "model_revision": "main",
    "dropout": "model",
    "trust_remote_code": False,
    "new_tokens": [],
    "new_tokens_init": {},
    "text": MISSING,
    "text_cleaning": "auto",
    "text_column": "text",
    "block_size": 256,
    "window_stride": None,
    "window_sampling": "chunked",
    "validation_share": 0.1,
    "replay": {},
    "trainable": [],
    "schedule": [],
    "block_sampling": {},
    "part_learning_rates": {},
    "layer_decay": None,
    "head": "tied",
    "method": "partial",
    "lora": {},
    "lora_rank": 8,
    "lora_alpha": 16,
    "frozen_dtype": "auto",
    "frozen_quantization": None,
    "weight_decay_on": "matrices",
    "delta_steps": 10,
    "checkpoint_format": "full",
    "allow_failed_audit": False,
    "eval_texts": {},
    "sample_steps": None,
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
    "prefix_cache": "auto",
    "fast_paths": ["loss", "gelu", "casts"],
}


def test_keys_and_defaults_are_those_of_the_recipe_table():
    defaults = {key: default_of(entry) for key, entry in argument_fields().items()}
    prompts = defaults.pop("prompts")
    assert defaults == KEYS_AND_DEFAULTS
    assert len(prompts) == 3
    assert all(len(prompt) < 40 for prompt in prompts)


@pytest.mark.parametrize("key", argument_fields())
def test_every_key_has_a_help_sentence_and_a_default_that_keeps_its_own_bound(key):
    entry = argument_fields()[key]
    assert entry.metadata["help"].endswith(".")
    bound, default = entry.metadata.get("bound"), default_of(entry)
    if bound and default not in (MISSING, None):
        assert bound.holds(default)


def test_every_key_with_tokens_steps_or_a_share_says_its_unit():
    units = {
        "block_size": "Tokens",
        "window_stride": "Tokens",
        "delta_steps": "steps",
        "validation_share": "characters",
    }
    for key, unit in units.items():
        assert unit in argument_fields()[key].metadata["help"]


def test_windows_do_not_overlap_where_no_stride_is_said():
    assert TextArguments(text=["a.txt"], block_size=64).window_stride == 64
    assert TextArguments(text=["a.txt"], block_size=64, window_stride=16).window_stride == 16


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "true or false"),
        (int | None, "a whole number or null"),
        (bool | Literal["auto"], "true, false or auto"),
        (Literal["a", "b", "c"], "a, b or c"),
        (list[str], "a list, each entry text"),
        (dict[str, str], "a mapping {name: value}"),
        (dict | str | None, "a mapping {name: value}, text or null"),
    ],
)
def test_types_are_described_in_a_recipes_words(hint, words):
    assert describe_type(hint) == words


def test_help_lists_every_key_with_what_is_allowed_its_default_and_its_help():
    text = recipe_help()
    for key, entry in argument_fields().items():
        heading = next(line for line in text.splitlines() if line.startswith(f"  {key}: "))
        assert describe_type(argument_types()[key]) in heading
        assert "(required)" in heading or "(default: " in heading
        assert entry.metadata["help"].split(".")[0] in " ".join(text.split())
    assert "block_size: a whole number, 2 or more (default: 256)" in text
    assert "(default: [" not in text, "a list is shown as Python writes it"


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from partialtune.recipe.arguments import recipe_help; recipe_help(); "
        "print(sorted({'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
