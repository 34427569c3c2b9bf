"""Memory forecast against measurement: policies on GPT-2's shape -> growth of a process that trains them.

    python tests/benchmarks/forecast.py --blocks 4 --batch_size 8
    python tests/benchmarks/forecast.py --whole llama-1.1b [--folder FOLDER]    # 7 GB of disk, 6 GB of memory
    python tests/benchmarks/forecast.py --table                                 # docs/costs.md's; nothing is trained

`--whole` writes a model of a shape with random weights, trains its last two blocks and final norm for two steps of 4 x
256 tokens by `partialtune train`, and compares the largest resident memory (VmHWM) of that command with `plan --json`.

Each policy trains for two steps with the package's own Trainer in a process of its own. Its growth is the largest
resident memory (ru_maxrss) less what was resident before there was a model. The forecast is that of `plan`: tensors
at their peak, the copies that the run keeps for its deltas, and what malloc keeps back. Beside it stand the tensors
alone, and the matrix products of a step against those that the Trainer counted.
"""

import argparse
import importlib
import json
import multiprocessing
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

POLICIES = (
    (["embeddings", "final_norm", "head"], "tied"),
    (["final_norm", "head"], "untied"),
    (["blocks[-2:]", "final_norm"], "tied"),
    (["norms"], "tied"),
    (["biases"], "tied"),
    (["all"], "tied"),
)
LIBRARIES = ("partialtune.cost.forecast", "partialtune.training.recipe_trainer", "partialtune.model.loading")
STEPS = 2  # the optimizer's state is there from the second on
FAST_PATHS = ("loss", "gelu", "casts")  # as a recipe has them that says nothing


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and a batch."""

    blocks: int = 4
    width: int = 768
    vocabulary: int = 50257
    batch_size: int = 8
    block_size: int = 256


@dataclass(frozen=True)
class Growth:
    """MB of 2^20 bytes, of one policy."""

    selectors: list[str]
    head: str
    tensors: float
    forecast: float
    measured: float
    products: float  # forecast / counted by the Trainer

    @property
    def ratio(self) -> float:
        return self.forecast / self.measured


def measure_each(shape: Shape, policies=POLICIES):
    """Yield the growth of each policy, measured one after another, each in a process of its own.

    The processes are forked from a new one that has done the imports and nothing else, so that these are no part of
    the growth. A fork server that other tests have started with other imports would not do: what is imported after
    the fork leaves room in the heap, and the growth is smaller.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for selectors, head in policies:
            yield pool.submit(_measure_in_fork, shape, selectors, head).result()


def _measure_in_fork(shape: Shape, selectors: list[str], head: str) -> Growth:
    for library in LIBRARIES:
        importlib.import_module(library)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (shape, selectors, head))


def measure(shape: Shape, selectors: list[str], head: str) -> Growth:
    """Train with one policy, then forecast it. The process is to end after this: its largest memory is taken."""
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    from partialtune.cost.dry_step import dry_step
    from partialtune.cost.forecast import FP32_BYTES, growth_of_process
    from partialtune.freeze.plan import plan_freeze
    from partialtune.training.recipe_trainer import attached_trainer
    from partialtune.training.settings import training_arguments

    sizes = {
        "n_layer": shape.blocks,
        "n_embd": shape.width,
        "n_head": shape.width // 64,
        "vocab_size": shape.vocabulary,
    }
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        empty = GPT2LMHeadModel(config)
    plan = plan_freeze(empty, selectors, head=head)
    ids = torch.randint(shape.vocabulary, (STEPS * shape.batch_size, shape.block_size)).tolist()
    windows = Dataset.from_dict({"input_ids": ids})
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(
            {
                "output_dir": folder,
                "max_steps": STEPS,
                "per_device_train_batch_size": shape.batch_size,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
            }
        )
        before = resident_mb()
        model = GPT2LMHeadModel(config)
        settings = {"model": model, "args": args, "train_dataset": windows}
        run = attached_trainer(plan=plan, delta_steps=STEPS, fast_paths=FAST_PATHS, **settings)
        run.train()
        measured = largest_mb() - before
    cost = dry_step(empty, plan, shape.batch_size, shape.block_size, optimizer=args.optim, fast_paths=FAST_PATHS)
    copies = FP32_BYTES * plan.trainable_parameters
    return Growth(
        selectors,
        head,
        tensors=(cost.memory.peak + copies) / 2**20,
        forecast=growth_of_process(cost, copies) / 2**20,
        measured=measured,
        products=(cost.products.total + cost.products.attention) / run.products.flops_per_step,
    )


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def largest_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# --- whole runs of known shapes


def measure_whole(name: str, folder: Path) -> str:
    """`partialtune plan` and `partialtune train` of a shape, each in a process of its own, in a line."""
    from speed import run_process
    from yardsticks import MODELS, Setting, recipe_of

    setting = Setting(name, "last_2", "fp32", batch=4, steps=STEPS)
    model, run, recipe = folder / name, folder / f"run-{name}", folder / f"{name}.yaml"
    run_process([str(MODELS), name, str(model), "--tokens", "1152"])
    recipe.write_text(json.dumps(recipe_of(setting, model, run)))
    forecast = json.loads(run_process(["-m", "partialtune", "plan", str(recipe), "--json"])[0])
    expected = forecast["fits"]["process_peak"] / 2**20
    measured = run_process(["-m", "partialtune", "train", str(recipe)])[1]
    training = json.loads((run / "performance.json").read_text())["peak_memory_mb"]
    return (
        f"{name}: forecast {expected:,.0f} MB, whole run {measured:,.0f} MB, forecast / measured "
        f"{expected / measured:.2f}; up to the end of training {training:,.0f} MB"
    )


TABLE_POLICIES = {
    "last 2 blocks, final norm": (["blocks[-2:]", "final_norm"], "tied"),
    "embeddings, final norm, head": (["embeddings", "final_norm", "head"], "tied"),
    "all": (["all"], "tied"),
}


def table(block_size: int = 256, batch_size: int = 4) -> str:
    """What the shapes of `random_models` need by the forecast, in Markdown. Frozen matrices stay as in the files."""
    import torch
    from random_models import SHAPES, empty

    from partialtune.cost.fits import GPUS
    from partialtune.cost.forecast import forecast
    from partialtune.freeze.plan import plan_freeze

    lines = [
        f"| shape, files | trains | parameters that train | CPU | GPU | {' | '.join(f'{g} GB' for g in GPUS)} |",
        f"|---|---|---:|---:|---:|{'---:|' * len(GPUS)}",
    ]
    for name, shape in SHAPES.items():
        model = empty(shape)
        held = None if shape.dtype == "float32" else getattr(torch, shape.dtype)
        for label, (selectors, head) in TABLE_POLICIES.items():
            plan = plan_freeze(model, selectors, head=head)
            found = forecast(
                model, plan, batch_size, block_size, optimizer="adamw_torch_fused", fast_paths=FAST_PATHS,
                base_dtype=None if label == "all" else held,
            )  # fmt: skip
            batches = " | ".join(f"{batch:,}" if batch else "-" for batch in found.fits.largest_batch.values())
            sizes = f"{found.fits.process_peak / 2**30:,.1f} | {found.fits.gpu_needed / 2**30:,.1f}"
            lines.append(
                f"| {name}, {shape.dtype} | {label} | {plan.trainable_parameters:,} of {plan.total_parameters:,} "
                f"| {sizes} | {batches} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--whole", metavar="SHAPE", help="of random_models.py: measure a whole run of it")
    parser.add_argument("--folder", type=Path, help="where `--whole` makes the model and finds it again")
    parser.add_argument("--table", action="store_true", help="the forecast of all these shapes, in Markdown")
    words = vars(parser.parse_args())
    whole, folder, wants_table = words.pop("whole"), words.pop("folder"), words.pop("table")
    if wants_table:
        print(table())
        return
    if whole:
        with tempfile.TemporaryDirectory() as temporary:
            print(measure_whole(whole, folder or Path(temporary)))
        return
    shape = Shape(**words)
    columns = f"{'tensors MB':>11} {'forecast':>12} {'measured':>12} {'ratio':>6} {'FLOPs':>6}"
    print(f"{shape}, {STEPS} steps\n{'trainable':44} {columns}")
    for growth in measure_each(shape):
        label = f"{', '.join(growth.selectors)} ({growth.head})"
        memory = f"{growth.tensors:11,.0f} {growth.forecast:12,.0f} {growth.measured:12,.0f} {growth.ratio:6.2f}"
        print(f"{label:44} {memory} {growth.products:6.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
