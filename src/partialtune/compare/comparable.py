"""Whether recipes or runs can be compared: base, text, windows and seeds are the same, or the comparison stops.

Recipes are compared by what they say, finished runs by what they recorded: digests of texts and of the base's weights.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from partialtune.compare.outcomes import Outcome
from partialtune.compare.policies import Policy
from partialtune.errors import InputError
from partialtune.net.addresses import sources_without_secrets
from partialtune.training.resume_check import recipe_differences

# What must be the same. Of finished runs, the facts behind the first group are compared instead of the words.
BASE_AND_TEXT = (
    *("model_name_or_path", "model_revision", "trust_remote_code", "text", "text_column"),
    *("new_tokens", "new_tokens_init"),  # which make other windows, and other parameters of the base
)
TEXT_SETTINGS = ("text_cleaning", "block_size", "window_stride", "window_sampling", "validation_share", "eval_texts")
SEED_KEYS = ("seed", "data_seed")
# What may differ, since that may be what is compared, but is said beside the table.
LENGTH_KEYS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("bf16", "fp16", "early_stopping_patience", "early_stopping_threshold"),
)


def check_recipes(policies: Sequence[Policy], own_seeds: bool = True) -> None:
    """Stop unless all recipes have the same base, text, windows and seeds, and hold text out.

    Args:
        policies: The recipes.
        own_seeds: Whether they run with their own seeds, which must then be the same.

    Raises:
        InputError: Names what differs, recipe by recipe.
    """
    first = policies[0]
    for policy in policies:
        if policy.recipe.text.validation_share == 0:
            raise InputError(f"{policy.path}: validation_share is 0. A comparison is by held-out text; hold some out.")
    different, common = [], (*BASE_AND_TEXT, *TEXT_SETTINGS, *(SEED_KEYS if own_seeds else ()))
    for other in policies[1:]:
        named = {**first.recipe.values, **other.recipe.values}  # a default that neither names follows from another key
        for key in differing(first.recipe.values, other.recipe.values):
            if key not in common or key not in named:
                continue
            shown = (sources_without_secrets(policy.recipe.values) for policy in (first, other))
            mine, theirs = (values.get(key, "the default") for values in shown)
            different.append(f"  {key}: {mine} in {first.path}, {theirs} in {other.path}")
        # What is said, and not what follows from `seed`, which the comparison sets.
        said = [policy.recipe.values.get("data_seed") for policy in (first, other)]
        if not own_seeds and said[0] != said[1]:
            mine, theirs = ("none" if seed is None else seed for seed in said)
            different.append(f"  data_seed: {mine} in {first.path}, {theirs} in {other.path}")
    if different:
        raise InputError(
            "\n".join(
                [
                    "These recipes cannot be compared: base, text, windows and seeds must be the same.",
                    *different,
                    "Make them equal in the recipes, or for all with --KEY VALUE.",
                ]
            )
        )


def check_runs(outcomes: Sequence[Outcome]) -> None:
    """Stop unless all runs had the same base, text, tokenizer and windows.

    Raises:
        InputError: Names what differs, run by run.
    """
    different = []
    for first, other in ((outcomes[0], other) for other in outcomes[1:]):
        # `eval_texts` may be named otherwise and yet be the same: what was scored is compared below, by its sizes
        keys = [key for key in differing(first.values, other.values) if key in TEXT_SETTINGS and key != "eval_texts"]
        if first.seed == other.seed and first.data_seed != other.data_seed:
            keys.append("data_seed")
        what = [*keys, *unequal_facts(first, other)]
        if what:
            different.append(f"  {first.folder} and {other.folder} differ in {', '.join(what)}")
    if different:
        message = "These runs cannot be compared: base, text, tokenizer and windows must be the same."
        raise InputError(
            "\n".join(
                [
                    message,
                    *different,
                    "Compare runs of one text and base, or run the recipes again in another folder (--output_dir).",
                ]
            )
        )


def check_seeds(seeds: Mapping[str, Sequence[int]]) -> None:
    """Stop unless every policy ran with the same seeds.

    Args:
        seeds: Policy -> seeds of its runs.

    Raises:
        InputError: Names the seeds of each policy.
    """
    if len({tuple(sorted(own)) for own in seeds.values()}) > 1:
        lines = [f"  {name}: {', '.join(map(str, sorted(own)))}" for name, own in seeds.items()]
        raise InputError("\n".join(["These runs cannot be compared: they differ in their seeds.", *lines]))


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys in which two recipes are not the same run, a larger max_steps among them."""
    # both ways: `recipe_differences` lets the second recipe have the larger max_steps, as a run that goes on may
    return list(dict.fromkeys([*recipe_differences(a, b), *recipe_differences(b, a)]))


def unequal_facts(a: Outcome, b: Outcome) -> list[str]:
    """What two runs recorded differently, in words."""
    return [
        *(["the text (sha256)"] if a.facts["sources"] != b.facts["sources"] else []),
        *(["the number of windows"] if a.facts["windows"] != b.facts["windows"] else []),
        *(["the base's weights"] if unequal_base(a.digests, b.digests) else []),
        *[f"the scored text {name} or its tokens" for name in unequal_texts(a.texts, b.texts)],
    ]


def unequal_base(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether the bases differ: a parameter of both models began with other bits, or they have none in common."""
    # policies may differ in their parameters (an untied head, adapters): those that both have tell the base
    both = [name for name in a.keys() & b.keys() if a[name] and b[name]]
    return not both or any(a[name] != b[name] for name in both)


def unequal_texts(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Texts whose bytes or tokens differ; a run that failed scored none."""
    return [name for name in {**a, **b} if a and b and a.get(name) != b.get(name)]


def differing_lengths(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of length and precision in which the runs differ."""
    found = {key for a, b in pairwise(values) for key in differing(a, b)}
    return [key for key in LENGTH_KEYS if key in found]
