"""What a recipe will cost: model on the meta device + plan + batch -> arithmetic, memory, advice; and once it has run,
how much of what the machine can multiply it made use of: needed products / seconds / rate of a product."""

import textwrap
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from partialtune.cost.advice import advise
from partialtune.cost.draw_costs import cost_of_draws, in_draw
from partialtune.cost.dry_step import Cost, dry_step
from partialtune.cost.fits import LIBRARIES_BYTES, Fits, fits
from partialtune.cost.flops import Products
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.proof.start_copies import IN_MEMORY_UP_TO
from partialtune.tables import draw_table
from partialtune.terminal import WIDTH

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
        fits: What the whole run fits in.
        held: Why frozen matrices are held as they are: `its files are in bfloat16`.
    """

    batch_size: int
    block_size: int
    accumulation: int
    cost: Cost
    full: Cost
    copies: int
    copies_full: int
    advice: tuple[str, ...]
    fits: Fits
    average_draw: int | None = None
    held: str = ""

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
            "frozen": {"held_as": self.cost.narrow or {"float32": None}, "reason": self.held},
            "fits": self.fits.to_json(),
            "advice": list(self.advice),
        }


def growth_of_process(cost: Cost, copies: int) -> int:
    """Bytes by which a process on a CPU grows beyond the started interpreter with its libraries."""
    return sum(_growth(cost, copies).values())


def _growth(cost: Cost, copies: int) -> dict[str, int]:
    return {
        "tensors of a step": cost.memory.resident + FIRST_STEP_BYTES,
        "start values": copies if copies <= IN_MEMORY_UP_TO else 0,  # more of them lie in a file
        "unrounded values": cost.unrounded,
    }


def _pages(plan: FreezePlan, base_dtype: torch.dtype | None) -> int:
    """Bytes of the base's files that stay mapped beside what is made of them: what is widened to train, or packed."""
    size = FP32_BYTES if base_dtype is None else base_dtype.itemsize
    widened = 0 if base_dtype is None else plan.trainable_parameters
    return size * (widened + sum(parameter.numel for parameter in plan.parameters if parameter.quantized))


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
    base_dtype: torch.dtype | None = None,
    held: str = "",
    prefix_cache: str = "off",
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
        base_dtype: 16-bit dtype in which frozen matrices are held; None for fp32. See `held_dtype`.
        held: Why they are held so, in words.
        prefix_cache: Of the recipe.

    Raises:
        ModelError: If the model cannot take a step without its weights.
    """

    def costing(other: FreezePlan, windows: int = batch_size) -> Cost:
        settings = (accumulation, bf16, optimizer, checkpointing, fast_paths, base_dtype)
        return dry_step(model, other, windows, block_size, *settings)

    everything = plan_freeze(model, ["all"])
    draws = cost_of_draws(plan, costing)
    cost = costing(plan) if draws is None else draws.largest
    # A step without values takes seconds for a large model: it is not taken twice where the plan trains everything.
    is_full = plan.trainable == everything.trainable and draws is None
    full = cost if is_full else costing(everything)
    said = () if draws is None else (draws.words(),)
    copies = FP32_BYTES * plan.trainable_parameters
    largest = plan if draws is None else in_draw(plan, plan.phase_at(draws.first_step))
    text_config = model.config.get_text_config()
    fit = fits(
        cost,
        lambda windows: costing(largest, windows),
        batch_size,
        block_size,
        vocabulary=text_config.vocab_size,
        process={"libraries": LIBRARIES_BYTES, **_growth(cost, copies), "pages of files": _pages(plan, base_dtype)},
        bf16=bf16,
    )
    if prefix_cache != "off" and draws is None and any(phase.first_block for phase in plan.phases):
        window = block_size * text_config.hidden_size * (2 if bf16 else FP32_BYTES)
        fit = replace(fit, prefix_cache=prefix_cache, prefix_window=window)
    return Forecast(
        batch_size=batch_size,
        block_size=block_size,
        accumulation=accumulation,
        cost=cost,
        full=full,
        copies=copies,
        copies_full=FP32_BYTES * everything.trainable_parameters,
        advice=(*said, *advise(model, plan, cost, full, batch_size, accumulation, costing)),
        fits=fit,
        average_draw=None if draws is None else draws.average,
        held=held,
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


def forecast_table(forecast: Forecast, width: int = WIDTH) -> str:
    """Arithmetic and memory beside those of full fine-tuning, then the advice, in lines of `width` columns."""
    values = forecast.to_json()
    passes = f" x {forecast.accumulation} passes" if forecast.accumulation > 1 else ""
    batch = f"a step of {forecast.batch_size} x {forecast.block_size} tokens{passes}"
    products = _rows(PRODUCTS, values["flops"], 1e9)
    memory = _rows(MEMORY, values["memory"], 2**20)
    tables = draw_table(
        [
            ("matrix products, GFLOP", "this plan", "full", "of full"),
            *products,
            ("", "", "", ""),
            ("memory, MB, each at its largest", "this plan", "full", "of full"),
            *memory,
        ]
    )
    advice = [textwrap.fill(f"- {sentence}", width, subsequent_indent="  ") for sentence in forecast.advice]
    head = f"{batch[0].upper()}{batch[1:]}:\n{tables}"
    sections = [head, _frozen_words(forecast) + forecast.fits.words(width), "\n".join(advice)]
    return "\n\n".join(section for section in sections if section)


def _frozen_words(forecast: Forecast) -> str:
    """How frozen matrices are held, a line; empty where the forecast was not told."""
    because = f" ({forecast.held})" if forecast.held else ""
    held = [f"{count:,} values of matrices stay in {name}" for name, count in forecast.cost.narrow.items()]
    if held:
        return f"Frozen: {', '.join(held)}, 2 bytes each{because}.\n"
    return f"Frozen weights are held in float32{because}.\n" if forecast.held else ""


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
