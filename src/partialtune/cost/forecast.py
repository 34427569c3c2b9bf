"""What a recipe will cost: model on the meta device + plan + batch -> arithmetic, memory, advice; and once it has run,
how much of what the machine can multiply it made use of: needed products / seconds / rate of a product."""

import textwrap
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from partialtune.cost.advice import advise
from partialtune.cost.draw_costs import cost_of_draws
from partialtune.cost.dry_step import Cost, dry_step
from partialtune.cost.flops import Products
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.tables import draw_table

FP32_BYTES = 4
PRODUCTS = {
    "forward": "forward",
    "recomputed": "forward again, for activation checkpointing",
    "backward_activations": "backward for activations",
    "backward_weights": "backward for weights",
    "total": "together",
    "attention": "beside them: attention's own, both ways",
}
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits, their logarithms and gradients",
    "peak": "at most at one time, tensors alone",
    "copies": "beside it: start values, for the deltas",
    "process": "on a CPU a process grows by about",
}
# What the first step brings whatever the model: threads and their stacks, kernels compiled for this processor.
FIRST_STEP_BYTES = 22 * 2**20


@dataclass(frozen=True)
class Forecast:
    """What one optimizer step costs on one process, and what it would cost if everything trained.

    Attributes:
        batch_size: Windows of one forward pass.
        block_size: Tokens per window.
        accumulation: Forward passes of one step.
        cost: Of the plan.
        full: Of full fine-tuning: the model as it is, everything trains, on the same batch.
        copies: Bytes of the start values of what trains. The run keeps them on the host, for its deltas.
        copies_full: The same where everything trains.
        advice: Sentences that apply to this plan.
        average_draw: Products of a step on average over the draws, where blocks learn in turn; `cost` is then that of
            the draw that costs most.
    """

    batch_size: int
    block_size: int
    accumulation: int
    cost: Cost
    full: Cost
    copies: int
    copies_full: int
    advice: tuple[str, ...]
    average_draw: int | None = None

    def to_json(self) -> dict[str, Any]:
        """`flops`: multiplications and additions of a step. `memory`: bytes. `advice`: sentences."""
        flops, memory = self.cost.products, self.cost.memory
        return {
            "flops": {
                **_with_total(flops),
                **({} if self.average_draw is None else {"average_draw": self.average_draw}),
                "full": _with_total(self.full.products),
                "of_full": flops.total / self.full.products.total,
                "tokens": self.batch_size * self.block_size * self.accumulation,
            },
            "memory": {
                **asdict(memory),
                "copies": self.copies,
                "process": growth_of_process(self.cost, self.copies),
                "full": {
                    **asdict(self.full.memory),
                    "copies": self.copies_full,
                    "process": growth_of_process(self.full, self.copies_full),
                },
                "of_full": memory.peak / self.full.memory.peak,
            },
            "advice": list(self.advice),
        }


def growth_of_process(cost: Cost, copies: int) -> int:
    """Bytes by which a process on a CPU grows beyond the started interpreter with its libraries."""
    return cost.memory.resident + copies + FIRST_STEP_BYTES


def forecast(
    model: nn.Module,
    plan: FreezePlan,
    batch_size: int,
    block_size: int,
    accumulation: int = 1,
    bf16: bool = False,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
    fast_paths: Collection[str] = (),
) -> Forecast:
    """Find out what a step of `plan` costs, without weights.

    Counted are the operations that PyTorch has for a CPU, and the tensors that live at one time; beside them what a
    process on a CPU grows by, with what malloc keeps back. Of a schedule it is the last phase; of blocks that learn in
    turn the draw that costs most.

    Args:
        model: Causal language model, best on the meta device. It is not touched.
        plan: What trains.
        batch_size: Windows of one forward pass on one process.
        block_size: Tokens per window.
        accumulation: Forward passes of one optimizer step.
        bf16: Whether products run in bf16.
        optimizer: `optim` of the recipe.
        checkpointing: `activation_checkpointing` of the recipe.
        fast_paths: Of the recipe. Full fine-tuning is counted with the same.

    Raises:
        ModelError: If the model cannot take a step without its weights.
    """

    def costing(other: FreezePlan) -> Cost:
        return dry_step(model, other, batch_size, block_size, accumulation, bf16, optimizer, checkpointing, fast_paths)

    everything = plan_freeze(model, ["all"])
    draws = cost_of_draws(plan, costing)
    cost = costing(plan) if draws is None else draws.largest
    # A step without values takes seconds for a large model: it is not taken twice where the plan trains everything.
    is_full = plan.trainable == everything.trainable and draws is None
    full = cost if is_full else costing(everything)
    said = () if draws is None else (draws.words(),)
    return Forecast(
        batch_size=batch_size,
        block_size=block_size,
        accumulation=accumulation,
        cost=cost,
        full=full,
        copies=FP32_BYTES * plan.trainable_parameters,
        copies_full=FP32_BYTES * everything.trainable_parameters,
        advice=(*said, *advise(model, plan, cost, full, batch_size, accumulation, costing)),
        average_draw=None if draws is None else draws.average,
    )


def needed_products(
    model: nn.Module,
    plan: FreezePlan,
    batch_size: int,
    block_size: int,
    accumulation: int = 1,
    prefix_cached: bool = False,
) -> int | None:
    """Multiplications and additions that one optimizer step of `plan` cannot do without, on one process.

    Products with weights alone, forward and backward; what activation checkpointing computes twice counts once, and
    attention's own products, which no counter sees where they are fused, do not count.

    Args:
        model: Causal language model, best on the meta device. It is not touched.
        plan: What trains.
        batch_size: Windows of one forward pass.
        block_size: Tokens per window.
        accumulation: Forward passes of one step.
        prefix_cached: Whether the frozen blocks below all that trains are computed once and kept.

    Returns:
        None where it is unknown: it changes from phase to phase, or the model takes no step without its weights.
    """
    if plan.changes_on_the_way:
        return None
    try:
        products = dry_step(model, plan, batch_size, block_size, accumulation).products
    except (ModelError, RecipeError):  # it decides by values, or has other parameters than its config says
        return None
    return products.total - products.prefix * prefix_cached


def utilisation(needed: int | None, step_seconds: float | None, rate: float) -> float | None:
    """Share of the machine's rate of products that a run makes use of.

    utilisation(needed=2_000, step_seconds=4.0, rate=1_000.0) -> 0.5

    Args:
        needed: As `needed_products` finds it.
        step_seconds: Median seconds a step.
        rate: Multiplications and additions a second, as `precision.product_rate` measures it.
    """
    return needed / step_seconds / rate if needed and step_seconds else None


def forecast_table(forecast: Forecast) -> str:
    """Arithmetic and memory beside those of full fine-tuning, then the advice."""
    values = forecast.to_json()
    passes = f" x {forecast.accumulation} passes" if forecast.accumulation > 1 else ""
    batch = f"a step of {forecast.batch_size} x {forecast.block_size} tokens{passes}"
    products = _rows(PRODUCTS, values["flops"], 1e9)
    memory = _rows(MEMORY, values["memory"], 2**20)
    tables = draw_table(
        [
            (f"matrix products of {batch}, GFLOP", "this plan", "full", "of full"),
            *products,
            ("", "", "", ""),
            (f"memory of {batch}, MB (each at its largest)", "this plan", "full", "of full"),
            *memory,
        ]
    )
    advice = [textwrap.fill(f"- {sentence}", 120, subsequent_indent="  ") for sentence in forecast.advice]
    lines = tables.splitlines()
    return "\n".join([*lines, "", *advice] if advice else lines)


def _rows(labels: dict[str, str], values: dict[str, Any], unit: float) -> list[tuple[str, ...]]:
    """A row for each of `labels` that is not nothing in both columns."""
    sizes = [(label, values[key], values["full"][key]) for key, label in labels.items()]
    return [
        (f"  {label}", _cell(own, unit), _cell(full, unit), f"{own / full:.0%}" if full else "")
        for label, own, full in sizes
        if own or full
    ]


def _cell(value: int, unit: float) -> str:
    scaled = value / unit
    return f"{scaled:,.0f}" if scaled >= 100 or not scaled else f"{scaled:,.3g}"


def _with_total(products: Products) -> dict[str, int]:
    return {**asdict(products), "total": products.total}
