"""Freezing must pay: `partialtune train` against the plain loop beside this file -> ratios of time and memory.

    python tests/benchmarks/speed.py [--jobs notebook full] [--precisions fp32 bf16] [--repeats 2] [--output FILE]

GPT-2's 124M shape with random weights, 16 x 256 tokens. Each measurement is a process of its own; plain and ours take
turns (A B A B) and medians are compared. Plain computes in fp32 with everything or the notebook's policy; ours in fp32
and in bf16. Seconds a step are plain's own and those of `performance.json`, peak memory is that of the whole process,
imports and evaluation included. Utilisation = matrix products that the policy needs / seconds / rate of such products
measured in the same round. The whole table takes about 25 minutes on 2 cores; what follows `--ours` is added to every
command of ours: `--ours --torch_compile true`. With `--beside ../other/src` each command of ours takes turns with that
of another checkout, such as the commit before a change, and a second table has their ratios.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAIN = Path(__file__).with_name("plain_loop.py")
BATCHES_OF_TEXT = 1  # an epoch: what is kept of a frozen prefix is met again from the second step on
BESIDE = ", beside"  # after the precision of what another checkout took
PRODUCT = (4096, 768, 3072)  # of the notebook's batch with a matrix of GPT-2's MLP: the rate that is measured


@dataclass(frozen=True)
class Job:
    """A row of the table: what trains, what it is compared with, and what ours / plain has to reach.

    Attributes:
        name: As `--jobs` has it.
        title: In the table.
        plain: Policy of the plain loop.
        recipe: Keys of our recipe.
        cached: Whether the frozen prefix is kept from step to step, so that its products are not needed.
        time: Largest ratio of seconds a step, by precision of ours.
        memory: Largest ratio of peak memory.
    """

    name: str
    title: str
    plain: str
    recipe: dict[str, Any]
    time: dict[str, float]
    memory: float
    cached: bool = False


JOBS = (
    Job(
        "notebook",
        "notebook's policy",
        plain="notebook",
        recipe={"trainable": ["embeddings", "final_norm", "head"]},
        time={"fp32": 0.75, "bf16": 0.25},
        memory=0.45,
    ),
    Job(
        "full",
        "full fine-tuning",
        plain="full",
        recipe={"method": "full"},
        time={"fp32": 0.75, "bf16": 0.35},
        memory=0.70,
    ),
    Job(
        "head",
        "untied head + final norm, cached",
        plain="full",
        recipe={"trainable": ["final_norm", "head"], "head": "untied"},
        time={"fp32": 0.20, "bf16": 0.08},
        memory=0.35,
        cached=True,
    ),
    Job(
        "last_2",
        "last 2 blocks + final norm, cached",
        plain="full",
        recipe={"trainable": ["blocks[-2:]", "final_norm"]},
        time={"fp32": 0.20, "bf16": 0.08},
        memory=0.35,
        cached=True,
    ),
    Job(
        "norms",
        "norms only",
        plain="full",
        recipe={"trainable": ["norms"]},
        time={"fp32": 0.55, "bf16": 0.20},
        memory=0.45,
    ),
)


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and a batch."""

    blocks: int = 12
    width: int = 768
    vocabulary: int = 50257
    batch_size: int = 16
    block_size: int = 256


@dataclass(frozen=True)
class Measurement:
    """One process.

    Attributes:
        job: Name of the job; of plain, its policy.
        precision: `plain`, or what ours computed in.
        step_seconds: Median seconds a step, the first not counted.
        peak_mb: Largest resident memory of the process, in 2^20 bytes.
        wall_seconds: From the command to the end of its process.
    """

    job: str
    precision: str
    step_seconds: float
    peak_mb: float
    wall_seconds: float


class Bench:
    """Runs jobs, each in a process of its own, on one folder of model and text."""

    def __init__(self, folder: Path, shape: Shape, steps: int, more_words: Sequence[str]) -> None:
        self.folder, self.shape, self.steps = folder, shape, steps
        self.more_words = list(more_words)
        self.products: dict[str, float] = run_here("make", shape, folder)

    def plain(self, policy: str) -> Measurement:
        words = [str(PLAIN), "--policy", policy, "--steps", str(self.steps), "--model", str(self.folder / "model")]
        words += ["--batch_size", str(self.shape.batch_size), "--block_size", str(self.shape.block_size)]
        output, peak, wall = run_process(words)
        return Measurement(policy, "plain", json.loads(output.splitlines()[-1])["median_step_seconds"], peak, wall)

    def ours(self, job: Job, precision: str, source: Path | None = None) -> Measurement:
        """A job of ours, by the package in the folder `source` of another checkout, or by the installed one."""
        recipe, run = self.folder / "recipe.yaml", self.folder / "run"
        recipe.write_text(json.dumps(self._recipe(job, precision, run)))  # JSON is YAML
        _, peak, wall = run_process(["-m", "partialtune", "train", str(recipe), *self.more_words], source)
        seconds = json.loads((run / "performance.json").read_text())["median_step_seconds"]
        shutil.rmtree(run)
        return Measurement(job.name, precision + BESIDE * (source is not None), seconds, peak, wall)

    def _recipe(self, job: Job, precision: str, run: Path) -> dict[str, Any]:
        """What the plain loop does, as a recipe; evaluation is kept small."""
        return {
            "model_name_or_path": str(self.folder / "model"),
            "text": str(self.folder / "text.txt"),
            "text_cleaning": "none",
            "validation_share": 0,
            "prompts": [],
            "dropout": 0,
            "block_size": self.shape.block_size,
            "per_device_train_batch_size": self.shape.batch_size,
            "max_steps": self.steps,
            "delta_steps": self.steps,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 0,
            "save_strategy": "no",
            "bf16": precision == "bf16",
            "output_dir": str(run),
            **({"prefix_cache": "memory"} if job.cached else {}),
            **job.recipe,
        }


def run_process(words: Sequence[str], source: Path | None = None) -> tuple[str, float, float]:
    """Run Python with `words`, packages in the folder `source` before those installed.

    Returns:
        What it printed, its largest resident memory in 2^20 bytes, the seconds from its start to its end.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | ({"PYTHONPATH": str(source.resolve())} if source else {})
        process = subprocess.Popen([sys.executable, *words], stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with exit code {process.returncode}.")
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
        return output.read(), usage.ru_maxrss * unit / 2**20, time.perf_counter() - started


def run_here(task: str, shape: Shape, folder: Path) -> Any:
    """Do a task of this file in a process of its own: this one stays small, since a child's peak starts from it."""
    words = [__file__, "--task", task, "--folder", str(folder)]
    for name, value in asdict(shape).items():
        words += [f"--{name}", str(value)]
    return json.loads(run_process(words)[0].splitlines()[-1])


# --- tasks in processes of their own


def make(shape: Shape, folder: Path) -> dict[str, float]:
    """Write a GPT-2 with random weights, its tokenizer and a text. Returns the needed products by job, and of plain."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from partialtune import load_text
    from partialtune.builtin import builtin_folder
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    torch.manual_seed(0)
    sizes = {"n_layer": shape.blocks, "n_embd": shape.width, "n_head": shape.width // 64}
    context = max(1024, shape.block_size)
    config = GPT2Config(**sizes, vocab_size=shape.vocabulary, n_positions=context, bos_token_id=0, eos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    text = load_text("builtin:python-docs")
    wanted = BATCHES_OF_TEXT * shape.batch_size * shape.block_size
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= wanted + shape.block_size // 2:
        raise SystemExit(f"The text has {len(spans):,} tokens; {BATCHES_OF_TEXT} batches take {wanted:,}.")
    (folder / "text.txt").write_text(text[: spans[wanted + shape.block_size // 2][0]])
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return {job.name: needed(config, shape, job) for job in JOBS}


def needed(config: Any, shape: Shape, job: Job) -> float:
    """Multiplications and additions of a step's matrix products with weights, less those of a cached prefix."""
    from partialtune.cost.forecast import needed_products
    from partialtune.freeze.plan import plan_freeze
    from partialtune.model.loading import empty_model

    model = empty_model(config)
    plan = plan_freeze(model, job.recipe.get("trainable", ["all"]), head=job.recipe.get("head", "tied"))
    return needed_products(model, plan, shape.batch_size, shape.block_size, prefix_cached=job.cached)


def rate(*_: Any) -> dict[str, float]:
    """Multiplications and additions a second of a matrix product, by precision: the best of a few."""
    import torch

    rows, inner, columns = PRODUCT
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.rand(rows, inner).to(dtype), torch.rand(inner, columns).to(dtype)
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - started)
        rates[name] = 2 * rows * inner * columns / min(seconds[1:])
    return rates


TASKS = {"make": make, "rate": rate}


# --- the table


def measure(
    bench: Bench, jobs: Sequence[Job], precisions: Sequence[str], beside: Path | None
) -> Iterator[Measurement | dict[str, float]]:
    """One round: the rate of a product, then plain's policies, each followed by those of ours it is compared with."""
    sources = [None] if beside is None else [beside, None]
    yield run_here("rate", bench.shape, bench.folder)
    for policy in dict.fromkeys(job.plain for job in jobs):
        yield bench.plain(policy)
        for job in jobs:
            if job.plain == policy:
                yield from (bench.ours(job, precision, source) for precision in precisions for source in sources)


def rows_of(jobs: Sequence[Job], precisions: Sequence[str], found: Sequence[Any], products: dict[str, float]):
    """One row of the table a job and precision: medians over the rounds, their ratios, the targets."""
    rates = [entry for entry in found if isinstance(entry, dict)]

    def median(name: str, precision: str, what: str) -> float:
        taken = [entry for entry in found if isinstance(entry, Measurement)]
        return statistics.median(
            getattr(entry, what) for entry in taken if (entry.job, entry.precision) == (name, precision)
        )

    def utilisation(job: str, seconds: float, precision: str) -> float:
        return products[job] / seconds / statistics.median(entry[precision] for entry in rates)

    for job in jobs:
        plain = {what: median(job.plain, "plain", what) for what in ("step_seconds", "peak_mb")}
        for precision in precisions:
            ours = {what: median(job.name, precision, what) for what in ("step_seconds", "peak_mb", "wall_seconds")}
            time_ratio = ours["step_seconds"] / plain["step_seconds"]
            memory_ratio = ours["peak_mb"] / plain["peak_mb"]
            yield {
                "job": job.title,
                "precision": precision,
                "plain_step_seconds": plain["step_seconds"],
                "step_seconds": ours["step_seconds"],
                "time_ratio": time_ratio,
                "time_target": job.time[precision],
                "time_met": time_ratio <= job.time[precision],
                "plain_peak_mb": plain["peak_mb"],
                "peak_mb": ours["peak_mb"],
                "memory_ratio": memory_ratio,
                "memory_target": job.memory,
                "memory_met": memory_ratio <= job.memory,
                "utilisation": utilisation(job.name, ours["step_seconds"], precision),
                "plain_utilisation": utilisation(job.plain, plain["step_seconds"], "fp32"),
                "wall_seconds": ours["wall_seconds"],
            }


def beside_table(jobs: Sequence[Job], precisions: Sequence[str], found: Sequence[Any]) -> str:
    """What each job takes here over what it takes by the other checkout, medians over the rounds."""

    def ratio(name: str, precision: str, what: str) -> float:
        of = {
            source: statistics.median(
                getattr(entry, what)
                for entry in found
                if isinstance(entry, Measurement) and (entry.job, entry.precision) == (name, precision + source)
            )
            for source in ("", BESIDE)
        }
        return of[""] / of[BESIDE]

    lines = ["| job | precision | time a step here / there | peak memory | whole command |", "|---|---|---|---|---|"]
    for job in jobs:
        for precision in precisions:
            shown = [ratio(job.name, precision, what) for what in ("step_seconds", "peak_mb", "wall_seconds")]
            lines.append(f"| {job.title} | {precision} | " + " | ".join(f"{one:.3f}" for one in shown) + " |")
    return "\n".join(lines)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| job | precision | s/step, plain | ours | ratio | target | MB, plain | ours | ratio | target "
        "| utilisation, plain | ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = {what: "met" if row[f"{what}_met"] else "MISSED" for what in ("time", "memory")}
        lines.append(
            f"| {row['job']} | {row['precision']} | {row['plain_step_seconds']:.2f} | {row['step_seconds']:.2f} "
            f"| {row['time_ratio']:.2f} | {row['time_target']:.2f} {met['time']} | {row['plain_peak_mb']:,.0f} "
            f"| {row['peak_mb']:,.0f} | {row['memory_ratio']:.2f} | {row['memory_target']:.2f} {met['memory']} "
            f"| {row['plain_utilisation']:.2f} | {row['utilisation']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=names, default=names)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=4, help="of each process; the first warms up")
    parser.add_argument("--repeats", type=int, default=2, help="rounds")
    parser.add_argument("--output", type=Path, help="write measurements and table as JSON")
    parser.add_argument("--beside", type=Path, help="src folder of another checkout, measured in turn with this one")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where model, text and runs go, default: a temporary folder")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="words for every command of ours; last")
    words = parser.parse_args()
    shape = Shape(**{name: getattr(words, name) for name in asdict(Shape())})
    if words.task:
        print(json.dumps(TASKS[words.task](shape, words.folder)))
        return
    jobs = [job for job in JOBS if job.name in words.jobs]
    with tempfile.TemporaryDirectory(dir=words.folder) as folder:
        bench, found = Bench(Path(folder), shape, words.steps, words.ours), []
        for turn in range(words.repeats):
            for entry in measure(bench, jobs, words.precisions, words.beside):
                print(f"round {turn + 1}: {entry}", file=sys.stderr, flush=True)
                found.append(entry)
        rows = list(rows_of(jobs, words.precisions, found, bench.products))
    print(f"{shape}, {words.steps} steps, {words.repeats} rounds, load {os.getloadavg()[0]:.1f}\n\n{as_table(rows)}")
    if words.beside:
        print("\n" + beside_table(jobs, words.precisions, found))
    if words.output:
        measured = [asdict(entry) if isinstance(entry, Measurement) else {"rate": entry} for entry in found]
        content = {"shape": asdict(shape), "steps": words.steps, "ours": words.ours, "table": rows}
        words.output.write_text(json.dumps({**content, "products": bench.products, "measured": measured}, indent=2))


if __name__ == "__main__":
    main()
