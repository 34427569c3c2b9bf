"""One variant, measured in a process of its own: a recipe's values on stdin -> a measurement as JSON on stdout.

It trains as `train` does, with the same Trainer and callbacks, on random weights and random token ids: seconds and
memory do not depend on either, and neither text nor weights have to be there. It writes to a temporary folder alone.
"""

import json
import logging
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed

from partialtune.bench.variants import plan_of, runnable
from partialtune.cost.forecast import needed_products, utilisation
from partialtune.errors import PartialtuneError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.conformance import check_conformance
from partialtune.model.loading import auto_class, quiet_libraries
from partialtune.recipe.recipe import Recipe
from partialtune.text.windows import chunked_windows
from partialtune.training.launch import one_device_a_process, use_all_cores
from partialtune.training.performance import performance
from partialtune.training.recipe_trainer import RecipeTrainer, make_trainer, prefix_phases
from partialtune.training.settings import compute_dtype, product_rate, training_arguments
from partialtune.training.training_data import RunData

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BATCHES = 1  # after it the next epoch begins: what is kept of a frozen prefix is met again in the second step


def measure(values: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train for a few steps.

    Args:
        values: Of a `Variant`.
        steps: Optimizer steps; the first warms up and is not counted.

    Returns:
        What `performance.json` holds, and beside it `trainable_parameters`, `total_parameters`, `tokens_per_step`,
        `precision`, `device`, `needed_flops` and `product_rate` (multiplications and additions, a second).
    """
    with tempfile.TemporaryDirectory(prefix="partialtune-bench-") as folder:
        recipe = runnable(values, steps, folder)
        args = training_arguments(recipe.training)
        one_device_a_process(args)
        empty, plan = plan_of(recipe)  # on the meta device: counts arithmetic without holding weights
        run = trained(recipe, plan, random_model(empty, recipe).to(args.device), args)
        return result_of(run, empty, recipe.text.block_size)


def random_model(empty: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """The model with random weights in fp32, in eval mode, as a pretrained one is loaded."""
    set_seed(0)
    model = auto_class(empty.config).from_config(
        empty.config, trust_remote_code=recipe.model.trust_remote_code, dtype=torch.float32
    )
    return model.eval()


def random_data(recipe: Recipe, args: TrainingArguments, vocabulary: int) -> RunData:
    """Windows of random token ids for `BATCHES` steps; no text is held out or scored."""
    size = recipe.text.block_size
    count = BATCHES * args.per_device_train_batch_size * args.gradient_accumulation_steps
    ids = np.random.default_rng(0).integers(vocabulary, size=count * size, dtype=np.int32)
    windows = chunked_windows([ids], size, stride=size)
    return RunData(sources=[], train=windows, held_out=None, scored={}, token_counts=np.bincount(ids), largest_ids={})


def trained(recipe: Recipe, plan: FreezePlan, model: PreTrainedModel, args: TrainingArguments) -> RecipeTrainer:
    """The Trainer of the recipe, after its steps."""
    data = random_data(recipe, args, model.config.get_text_config().vocab_size)
    conformance = check_conformance(model, recipe.text.block_size)
    prefix = prefix_phases(recipe, plan, model, args)
    run = make_trainer(recipe, plan=plan, model=model, args=args, data=data, prefix=prefix, conformance=conformance)
    run.train()
    return run


def result_of(run: RecipeTrainer, empty: PreTrainedModel, block_size: int) -> dict[str, Any]:
    """What was measured."""
    args, tuning, dtype = run.trainer.args, run.tuning, compute_dtype(run.trainer.args)
    plan = tuning.plan
    batch = (args.per_device_train_batch_size, block_size, args.gradient_accumulation_steps)
    needed = needed_products(empty, plan, *batch, prefix_cached=tuning.fast.starts_from_states)
    rate = product_rate(args.device, dtype)
    used = utilisation(needed, run.timer.median(), rate)
    counted = run.timer.counted()
    return {
        "counted_steps": len(counted),
        "fastest_step_seconds": min(counted),
        "slowest_step_seconds": max(counted),
        **performance(args, run.timer, run.products.flops_per_step, used, block_size, tuning.fast, tuning.seconds),
        "trainable_parameters": plan.trainable_parameters,
        "total_parameters": plan.total_parameters,
        "tokens_per_step": batch[0] * batch[1] * batch[2],
        "precision": PRECISIONS[dtype],
        "device": device_name(args.device),
        "needed_flops": needed,
        "product_rate": rate,
    }


def device_name(device: torch.device) -> str:
    """What computes, in words: the GPU's name, or the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def main() -> int:
    """Measure the variant on stdin. Only errors are logged: the parent process reports what was measured."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    quiet_libraries()
    use_all_cores()
    asked = json.load(sys.stdin)
    try:
        answer = measure(asked["values"], asked["steps"])
    except torch.OutOfMemoryError:
        answer = {"error": "out of memory"}
    except PartialtuneError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
