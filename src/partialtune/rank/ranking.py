"""A probe -> blocks and parts in order, the table of them, the selectors to paste, and a new recipe.

The order is that of the relative gradient norm, ||gradient|| / ||weights||, of which surgical fine-tuning finds that it
tells which layers to tune: Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts",
https://arxiv.org/abs/2210.11466, section 4 (Auto-RGN).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from partialtune.cost.advice import as_yaml
from partialtune.freeze.planned import PlannedParameter
from partialtune.freeze.recipe_plan import tokens_of_recipe
from partialtune.grammar.named_selectors import WORDS
from partialtune.model.conformance import check_conformance
from partialtune.model.layout import COMPONENTS
from partialtune.model.loading import empty_model, load_config, load_model, load_tokenizer
from partialtune.model.model_checks import check_finite, check_fit, check_ids
from partialtune.model.new_tokens import config_with, give_rows
from partialtune.rank.choice_cost import ChoiceCost, costs_of
from partialtune.rank.probe import Probe, draw_windows, probe
from partialtune.recipe.recipe import Recipe
from partialtune.tables import draw_table
from partialtune.training.training_data import prepare_data

# Components that the selector of the same word chooses: `other` and `embeddings.other` have none to paste.
PASTED = frozenset(COMPONENTS).intersection(WORDS)
BATCHES = 4
WINDOWS_A_BATCH = 8  # Trainer's default
USUAL_SHARE = 4  # one block in four is proposed where `top` is not given


@dataclass(frozen=True)
class Ranked:
    """A block, or a part of the model.

    Attributes:
        selector: What chooses it.
        parameters: Number of values.
        gradient_norm, weight_norm: Of all its values taken together.
        ratio: gradient_norm / weight_norm; None where every weight is 0.
        block: Its block, None outside the blocks.
        component: Its component, None for a whole block.
        cost: Of training it alone; None where that was not asked for or cannot be told.
    """

    selector: str
    parameters: int
    gradient_norm: float
    weight_norm: float
    ratio: float | None
    block: int | None
    component: str | None
    cost: ChoiceCost | None = None


@dataclass(frozen=True)
class Ranking:
    """Blocks and parts, each list with the largest ratio first.

    Attributes:
        model_name: For messages.
        windows, loss: As in the probe.
        blocks: Every block.
        parts: Every part of every block that a selector names, and what is outside the blocks.
        chosen: Indices of the blocks to train, ascending.
        full_step_seconds: Forward and backward of a batch where everything trains, as long as the probe took.
    """

    model_name: str
    windows: int
    loss: float
    blocks: tuple[Ranked, ...]
    parts: tuple[Ranked, ...]
    chosen: tuple[int, ...]
    full_step_seconds: float = 0.0

    @property
    def selectors(self) -> list[str]:
        """What to paste into a recipe: the chosen blocks, and the final norm where the model has one."""
        has_final_norm = any(part.component == "final_norm" for part in self.parts)
        return [f"blocks[{','.join(map(str, self.chosen))}]", *(["final_norm"] if has_final_norm else [])]

    def to_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps(..., allow_nan=False)`."""
        return {**asdict(self), "trainable": self.selectors}


def rank_recipe(recipe: Recipe, batches: int = BATCHES, top: int | None = None) -> Ranking:
    """Rank the blocks and parts of a recipe's base by their gradients on a few batches of its training text.

    Args:
        recipe: Its `trainable`, `schedule`, `block_sampling` and `method` do not matter.
        batches: Of `per_device_train_batch_size` windows each, drawn from the training windows by the recipe's seed.
        top: How many blocks to choose, see `rank`.

    Raises:
        InputError: If model or text cannot be read.
    """
    base, training = recipe.model, recipe.training
    batch_size, seed = training.get("per_device_train_batch_size", WINDOWS_A_BATCH), training.get("seed", 42)
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code)
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    new_tokens = tokens_of_recipe(base, tokenizer)
    grown = config_with(config, new_tokens)
    check_fit(base.model_name_or_path, grown, recipe.text.block_size, vocabulary=len(tokenizer))
    data = prepare_data(recipe.text, {}, tokenizer, training.get("data_seed", seed))
    check_ids(base.model_name_or_path, grown, data.largest_ids)
    windows = draw_windows(data.train, batches * batch_size, seed)
    model = load_model(base.model_name_or_path, config, base.model_revision, base.trust_remote_code)
    if new_tokens is not None:
        give_rows(model, new_tokens)
    check_finite(base.model_name_or_path, model)
    check_conformance(model, recipe.text.block_size)
    set_seed(seed)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    found = rank(probe(model, windows, batch_size, recipe.freeze.head), top, batch_size)
    return with_costs(found, recipe, empty_model(grown))


def with_costs(ranking: Ranking, recipe: Recipe, model: nn.Module) -> Ranking:
    """The same ranking, each entry with what training it alone costs.

    Args:
        ranking: Without costs.
        recipe: Its `block_size` and `head` count.
        model: On the meta device.
    """
    entries = [*ranking.blocks, *ranking.parts]
    costs = costs_of(model, [entry.selector for entry in entries], recipe.text.block_size, recipe.freeze.head)
    groups = (ranking.blocks, ranking.parts)
    priced = [tuple(replace(one, cost=costs[one.selector]) for one in group) for group in groups]
    return replace(ranking, blocks=priced[0], parts=priced[1])


def rank(probe: Probe, top: int | None = None, batch_size: int = 1) -> Ranking:
    """Order blocks and parts.

    Args:
        probe: Of the model on the recipe's text.
        top: How many blocks to choose; if None, a quarter of them, at least one.
        batch_size: Windows of a step.
    """
    plan = probe.plan
    count = min(top or max(1, round(plan.block_count / USUAL_SHARE)), plan.block_count)
    blocks = _ordered(probe, lambda p: None if p.block is None else (p.block, None))
    return Ranking(
        model_name=plan.model_name,
        windows=probe.windows,
        loss=probe.loss,
        blocks=blocks,
        parts=_ordered(probe, _part_of),
        chosen=tuple(sorted(entry.block for entry in blocks[:count] if entry.block is not None)),
        full_step_seconds=probe.window_seconds * batch_size,
    )


def _part_of(parameter: PlannedParameter) -> tuple[int | None, str] | None:
    return (parameter.block, parameter.component) if parameter.component in PASTED else None


def _ordered(
    probe: Probe, place_of: Callable[[PlannedParameter], tuple[int | None, str | None] | None]
) -> tuple[Ranked, ...]:
    members: dict[tuple[int | None, str | None], list[PlannedParameter]] = {}
    for parameter in probe.plan.parameters:
        place = place_of(parameter)
        if place is not None and not parameter.fixed:  # no selector adds it
            members.setdefault(place, []).append(parameter)
    entries = [_ranked(probe, *place, parameters) for place, parameters in members.items()]
    # Ratios are 0 or more: what has none, since all its weights are 0, comes last.
    return tuple(sorted(entries, key=lambda entry: -1 if entry.ratio is None else entry.ratio, reverse=True))


def _ranked(probe: Probe, block: int | None, component: str | None, parameters: Sequence[PlannedParameter]) -> Ranked:
    # The norm of a part is the root of the summed squares of its tensors' norms.
    gradient = math.hypot(*(probe.gradient_norms[parameter.name] for parameter in parameters))
    weights = math.hypot(*(probe.weight_norms[parameter.name] for parameter in parameters))
    return Ranked(
        selector=_selector(block, component),
        parameters=sum(parameter.numel for parameter in parameters),
        gradient_norm=gradient,
        weight_norm=weights,
        ratio=gradient / weights if weights else None,
        block=block,
        component=component,
    )


def _selector(block: int | None, component: str | None) -> str:
    if block is None:
        return str(component)
    return f"blocks[{block}]" if component is None else f"blocks[{block}].{component}"


def ranking_table(ranking: Ranking, most_parts: int = 12) -> str:
    """Blocks, then the parts that come first, then what to paste."""
    head = f"{ranking.model_name}: gradient over {ranking.windows} windows (loss {ranking.loss:.4f}), without a step"
    shown = ranking.parts[:most_parts]
    more = [f"... and {len(ranking.parts) - most_parts} more (--json lists them)"] if ranking.parts[most_parts:] else []
    paste = [f"To train the first {len(ranking.chosen)}:", f"  trainable: {as_yaml(ranking.selectors)}"]
    seconds = ranking.full_step_seconds
    # Measured by tests/benchmarks/rank.py --each; docs/what-may-learn.md has the figures.
    beware = "(on the bundled model the order of blocks told what training gains, that of parts did not)"
    tables = [_rows("block", ranking.blocks, seconds), "", _rows("part", shown, seconds), beware]
    return "\n".join([head, "", *tables, *more, *_about_costs(ranking), "", *paste])


def _about_costs(ranking: Ranking) -> list[str]:
    if not any(entry.cost for entry in ranking.blocks):
        return []
    return [
        "",
        "backward: the blocks that it runs through. step: arithmetic, times the "
        f"{ranking.full_step_seconds:.3g} s that a batch took with all gradients.",
        "kept: the same where the states behind the frozen blocks below are kept (prefix_cache).",
    ]


def _rows(kind: str, entries: Sequence[Ranked], full_seconds: float) -> str:
    header = (kind, "parameters", "||gradient||", "||weights||", "ratio", "backward", "step", "kept")
    rows = [
        (
            entry.selector,
            f"{entry.parameters:,}",
            f"{entry.gradient_norm:.4g}",
            f"{entry.weight_norm:.4g}",
            "-" if entry.ratio is None else f"{entry.ratio:.3e}",
            *_cost_cells(entry.cost, full_seconds),
        )
        for entry in entries
    ]
    return draw_table([header, *rows])


def _cost_cells(cost: ChoiceCost | None, full_seconds: float) -> tuple[str, str, str]:
    if cost is None:
        return "-", "-", "-"
    return (
        str(cost.backward_blocks),
        f"{cost.of_full * full_seconds:.3g} s",
        f"{cost.of_full_kept * full_seconds:.3g} s",
    )


def recipe_of(values: Mapping[str, Any], selectors: Sequence[str]) -> dict[str, Any]:
    """A recipe that trains what was chosen, and is otherwise the one that was ranked.

    Args:
        values: Of that recipe, flat.
        selectors: What was chosen.
    """
    left_out = (
        *("schedule", "method", "lora_rank", "lora_alpha", "lora", "block_sampling", "part_learning_rates"),
        *("new_tokens", "new_tokens_init", "resume_from_checkpoint", "prefix_cache"),
        *("push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo"),  # it is another model
    )
    kept = {key: value for key, value in values.items() if key not in left_out}
    return {**kept, "trainable": list(selectors), "output_dir": f"{values['output_dir'].rstrip('/')}-ranked"}
