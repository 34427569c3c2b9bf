"""Trainer's arguments: what the recipe says of them, what is ruled out, what `bf16: auto` becomes, and what follows
from the length of the run.
"""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import IntervalStrategy, TrainingArguments

from partialtune.distributed import decided_by_main
from partialtune.errors import RecipeError
from partialtune.metrics import best_model_metric

logger = logging.getLogger(__name__)

LOG_EVERY_STEP_UP_TO = 200  # steps of a run whose loss is logged at each of them
LED_BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedules that look at the held-out loss
EVALUATIONS = 10  # per run, where held-out text exists
CPU_SHAPE = (1024, 768, 3072)  # rows x width x width of an MLP: GPT-2's, a quarter of a batch
GPU_SHAPE = (8192, 4096, 4096)  # a product that does not fill a GPU does not show its speed
WORTH_IT = 1.2  # casts and the fp32 copies cost too: less than this speed-up of the product is none


def training_arguments(given: Mapping[str, Any]) -> TrainingArguments:
    """Trainer's arguments from what the recipe says, with what this package rules out switched off.

    Args:
        given: Fields of `TrainingArguments` that the recipe names; `bf16` may be "auto", which is measured here.

    Raises:
        RecipeError: If transformers refuses them.
    """
    on_cpu = not torch.accelerator.is_available()
    settings = {"use_cpu": on_cpu, "disable_tqdm": False, "log_level_replica": "error", **given}
    if settings.get("bf16") == "auto":
        settings["bf16"] = decided_by_main(lambda: bf16_pays())  # processes may measure differently
    if settings.get("load_best_model_at_end") and settings.get("save_strategy", "steps") == "steps":
        settings.setdefault(
            "eval_strategy", "steps"
        )  # `suit_length` sets it, but after TrainingArguments has checked it
        settings.setdefault("eval_steps", settings.get("save_steps", 500))
    if settings.get("lr_scheduler_type") in LED_BY_EVALUATIONS:
        settings.setdefault("eval_strategy", "steps")  # likewise
        settings.setdefault("eval_steps", 500)
    if settings.get("metric_for_best_model"):  # transformers knows of names that end in loss alone which way is better
        metric = best_model_metric(settings["metric_for_best_model"])
        settings.setdefault("greater_is_better", metric is not None and metric.better == "higher")
    settings |= {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it would average non-finite losses away
        "push_to_hub": False,  # Trainer's own pushing fails silently
        "activation_checkpointing_kwargs": {  # the other kind wants gradients at every block's input
            "use_reentrant": False,
            **(given.get("activation_checkpointing_kwargs") or {}),
        },
    }
    try:
        return TrainingArguments(**settings)
    except ValueError as error:  # a recipe's values were tried before; these are those that a trial or `bench` changed
        raise RecipeError(f"TrainingArguments, transformers says: {' '.join(str(error).split())}") from error


def data_seed(args: TrainingArguments) -> int:
    """What decides the windows that are drawn, and their order."""
    return args.seed if args.data_seed is None else args.data_seed


def suit_length(
    args: TrainingArguments, given: Mapping[str, Any], windows: int, held_out: bool, stops_early: bool = False
) -> None:
    """Set how often to log and to evaluate by the length of the run, where the recipe does not set it.

    Args:
        args: Changed in place.
        given: Fields that the recipe names.
        windows: Training windows of an epoch.
        held_out: Whether there is held-out text to evaluate on.
        stops_early: Whether the recipe asks for early stopping, which saves whenever it evaluates.
    """
    steps = run_length(args, windows)
    if "logging_steps" not in given:
        args.logging_steps = 1 if steps <= LOG_EVERY_STEP_UP_TO else 10
    if held_out and given.get("eval_strategy", "steps") == "steps":
        args.eval_strategy = IntervalStrategy.STEPS
        saves_as_it_evaluates = stops_early and args.load_best_model_at_end and "save_steps" not in given
        follows_saves = args.load_best_model_at_end and not saves_as_it_evaluates
        args.eval_steps = given.get("eval_steps") or (
            args.save_steps if follows_saves else max(1, steps // EVALUATIONS)
        )
        if saves_as_it_evaluates:
            args.save_steps = args.eval_steps


def windows_a_step(args: TrainingArguments) -> int:
    """Windows of one optimizer step on all processes together: the global batch."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def run_length(args: TrainingArguments, windows: int) -> int:
    """Optimizer steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_an_epoch(args, windows))


def steps_an_epoch(args: TrainingArguments, windows: int) -> int:
    """Optimizer steps of one pass over the training windows.

    Raises:
        RecipeError: If they fill no batch and the last, smaller one is dropped.
    """
    batches = windows / (args.per_device_train_batch_size * args.world_size)
    whole_batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    if whole_batches == 0:
        raise RecipeError(
            f"dataloader_drop_last: {windows} windows fill no batch of {args.per_device_train_batch_size} on each of "
            f"{args.world_size} devices, so that nothing would train. Lower per_device_train_batch_size."
        )
    return max(1, math.ceil(whole_batches / args.gradient_accumulation_steps))


def evaluation_steps(args: TrainingArguments, windows: int) -> int | None:
    """Optimizer steps between two evaluations during training, None for none."""
    if args.eval_strategy == IntervalStrategy.NO:
        return None
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return steps_an_epoch(args, windows)
    return max(1, int(args.eval_steps if args.eval_steps >= 1 else args.eval_steps * run_length(args, windows)))


def warn_of_patience(args: TrainingArguments, patience: int | None, windows: int) -> None:
    """Log where a run is too short for its `early_stopping_patience` to end it.

    Args:
        args: As `suit_length` left them.
        patience: The recipe's; None for none.
        windows: Training windows of an epoch.
    """
    often = evaluation_steps(args, windows)
    if patience is None or often is None:
        return
    evaluations = run_length(args, windows) // often
    if evaluations <= patience:
        logger.warning(
            "early_stopping_patience is %d, and the run evaluates %d times, every %d steps: it never stops early. "
            "Lower it, or eval_steps.",
            patience,
            evaluations,
            often,
        )


def bf16_pays() -> bool:
    """Whether this machine multiplies matrices clearly faster in bf16 than in fp32. Takes about 0.2 s."""
    # a CUDA build names cuda as its accelerator on a machine without a GPU too
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rates = {dtype: product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    chosen = ratio >= WORTH_IT
    logger.info(
        "bf16: auto -> %s: a product of %d x %d x %d is %.2f times as fast in bf16 as in fp32 on %s, %.0f against "
        "%.0f GFLOP/s (it pays from %.1f times on)",
        "true" if chosen else "false",
        *shape_for(device),
        ratio,
        device.type,
        rates[torch.bfloat16] / 1e9,
        rates[torch.float32] / 1e9,
        WORTH_IT,
    )
    return chosen


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """What a run multiplies matrices in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def shape_for(device: torch.device) -> tuple[int, int, int]:
    """(m, k, n) of the product (m, k) x (k, n) that is timed on a device."""
    return CPU_SHAPE if device.type == "cpu" else GPU_SHAPE


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Multiplications and additions a second of a matrix product: the best of `repeats`, after one that warms up."""
    rows, inner, columns = shape_for(device)
    left, right = (torch.randn(*size, device=device).to(dtype) for size in ((rows, inner), (inner, columns)))
    times = []
    for _ in range(repeats + 1):
        started = _now(device)
        left @ right
        times.append(_now(device) - started)
    return 2 * rows * inner * columns / min(times[1:])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
