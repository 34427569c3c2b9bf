"""What freezing saves in TRL: SFTTrainer by hand against SFTTrainer with `attach` -> ratios of time and memory.

    python tests/benchmarks/trl_speed.py [--jobs llama gpt2] [--repeats 2] [--output FILE]

By hand, `requires_grad` is off but for the last two blocks and the final norm; with `attach` a plan says the same.
Random weights and tokens, each measurement in a process of its own, by hand and with `attach` in turn. Seconds a step
are medians from the second epoch on, from the end of one step to that of the next, with loading and digests in them.
Peak memory is that of the whole process.

The floor is what arithmetic needs: matrix products of a step with weights, less those of the frozen blocks, whose
states are kept / rate of such products measured in the same round. What softmax takes is not in it, nor the product
with all logits that TRL's own head computes once more in backward. The whole table takes about 6 minutes on 2 cores.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speed import rate, run_process

TRAINABLE = ["blocks[-2:]", "final_norm"]
BATCHES = 3  # of an epoch
WAYS = ("by hand", "attach")


@dataclass(frozen=True)
class Job:
    """A model and its batch.

    Attributes:
        title: In the table.
        family: `llama` or `gpt2`.
        time: Largest ratio of seconds a step, with `attach` over by hand; None where the floor is the measure.
        over_floor: Largest ratio of seconds a step to those of the floor; None where `time` is the measure.
    """

    title: str
    family: str
    blocks: int
    width: int
    vocabulary: int
    batch_size: int
    block_size: int
    time: float | None = None
    over_floor: float | None = None


JOBS = {
    "llama": Job("22 blocks, vocabulary 16 x width", "llama", 22, 512, 8192, 8, 256, time=0.5),
    "gpt2": Job("GPT-2, 124M", "gpt2", 12, 768, 50257, 8, 256, over_floor=1.15),
}


@dataclass(frozen=True)
class Measurement:
    """One process.

    Attributes:
        job: Name of the job.
        way: `by hand` or `attach`.
        step_seconds: Median seconds a step, from the second epoch on.
        first_epoch_seconds: Median seconds a step of the first epoch but for its first step.
        peak_mb: Largest resident memory of the process, in 2^20 bytes.
        loss: Of the last step, the same both ways.
        hits: Rows that started from kept states.
    """

    job: str
    way: str
    step_seconds: float
    first_epoch_seconds: float
    peak_mb: float
    loss: float
    hits: int


# --- tasks in processes of their own


def model_of(job: Job) -> Any:
    """The model with random weights, of the proportions of TinyLlama 1.1B (22 blocks of width 2,048) or GPT-2."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if job.family == "gpt2":
        sizes = {"n_layer": job.blocks, "n_embd": job.width, "n_head": job.width // 64}
        sizes |= {"vocab_size": job.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))
    config = LlamaConfig(
        num_hidden_layers=job.blocks,
        hidden_size=job.width,
        intermediate_size=job.width * 11 // 4,
        num_attention_heads=job.width // 64,
        num_key_value_heads=max(1, job.width // 512),
        vocab_size=job.vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(job: Job, way: str, settings: dict[str, Any], epochs: int, folder: Path) -> dict[str, Any]:
    """Train on random tokens. Returns the fields of a `Measurement`."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import partialtune as pt
    from partialtune.builtin import builtin_folder

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.ends.append(time.perf_counter())

    torch.manual_seed(0)
    rows = torch.randint(job.vocabulary, (BATCHES * job.batch_size, job.block_size))
    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available()}
    args = SFTConfig(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=job.batch_size,
        max_length=job.block_size,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **{**plain, **settings},
    )
    times = Times()
    trainer = SFTTrainer(
        model_of(job),
        args,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput")),
        callbacks=[times],
    )
    plan = pt.plan_freeze(trainer.model, TRAINABLE)
    if way == "attach":
        tuning = pt.attach(trainer, plan, delta_steps=10**9)
    else:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(name in plan.trainable)
    trainer.train()
    steps = [after - before for before, after in zip(times.ends, times.ends[1:], strict=False)]
    return {
        "step_seconds": statistics.median(steps[BATCHES:]),  # the first step of the second epoch waits for its loader
        "first_epoch_seconds": statistics.median(steps[: BATCHES - 1]),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        "hits": tuning.fast.hits if way == "attach" else 0,
    }


def needed(job: Job) -> dict[str, int | None]:
    """Multiplications and additions of a step's matrix products with weights, both ways."""
    import torch

    from partialtune.cost.forecast import needed_products
    from partialtune.freeze.plan import plan_freeze

    with torch.device("meta"):
        model = model_of(job)
    plan = plan_freeze(model, TRAINABLE)
    return {
        way: needed_products(model, plan, job.batch_size, job.block_size, prefix_cached=way == "attach") for way in WAYS
    }


# --- the table


class Bench:
    """Runs this file's tasks, each in a process of its own."""

    def __init__(self, settings: dict[str, Any], epochs: int, folder: Path) -> None:
        self.settings, self.epochs, self.folder = settings, epochs, folder

    def run(self, task: str, *words: str) -> tuple[Any, float]:
        """What a task gives, and the peak of its process. This one stays small: a child's peak starts from it."""
        settings = ["--settings", json.dumps(self.settings), "--epochs", str(self.epochs), "--folder", str(self.folder)]
        output, peak, _ = run_process([__file__, "--task", task, *words, *settings])
        return json.loads(output.splitlines()[-1]), peak

    def measure(self, job: str, way: str) -> Measurement:
        found, peak = self.run("train", "--jobs", job, "--way", way)
        return Measurement(job=job, way=way, peak_mb=peak, **found)


def measure(bench: Bench, jobs: Sequence[str]) -> Iterator[Measurement | dict[str, float]]:
    """One round: the rate of a product, then each job both ways."""
    yield bench.run("rate")[0]
    for job in jobs:
        yield from (bench.measure(job, way) for way in WAYS)


def row_of(name: str, found: Sequence[Any], products: dict[str, float], precision: str) -> dict[str, Any]:
    """A job's row of the table: medians over the rounds, their ratios, the floors, the target."""
    job = JOBS[name]

    def median(way: str, what: str) -> float:
        taken = [one for one in found if isinstance(one, Measurement) and (one.job, one.way) == (name, way)]
        return statistics.median(getattr(one, what) for one in taken)

    rate_here = statistics.median(one[precision] for one in found if isinstance(one, dict))
    seconds = {way: median(way, "step_seconds") for way in WAYS}
    floors = {way: products[way] / rate_here for way in WAYS}
    ratio, over_floor = seconds["attach"] / seconds["by hand"], seconds["attach"] / floors["attach"]
    met = ratio <= job.time if job.time is not None else over_floor <= job.over_floor
    return {
        "job": job.title,
        "by_hand_seconds": seconds["by hand"],
        "attach_seconds": seconds["attach"],
        "attach_first_epoch_seconds": median("attach", "first_epoch_seconds"),
        "time_ratio": ratio,
        "products_ratio": products["attach"] / products["by hand"],
        "floor_seconds": floors["attach"],
        "by_hand_floor_seconds": floors["by hand"],
        "over_floor": over_floor,
        "target": f"ratio {job.time}" if job.time is not None else f"x floor {job.over_floor}",
        "met": met,
        "by_hand_mb": median("by hand", "peak_mb"),
        "attach_mb": median("attach", "peak_mb"),
        "loss_apart": abs(median("attach", "loss") - median("by hand", "loss")),
    }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| job | s/step, by hand | first epoch | attach | ratio | of products | floor, s | x floor | target "
        "| MB, by hand | attach | losses apart |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['job']} | {row['by_hand_seconds']:.2f} | {row['attach_first_epoch_seconds']:.2f} "
            f"| {row['attach_seconds']:.2f} | {row['time_ratio']:.2f} | {row['products_ratio']:.2f} "
            f"| {row['floor_seconds']:.2f} | {row['over_floor']:.2f} "
            f"| {row['target']} {'met' if row['met'] else 'MISSED'} "
            f"| {row['by_hand_mb']:,.0f} | {row['attach_mb']:,.0f} | {row['loss_apart']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=2, help="rounds")
    parser.add_argument("--epochs", type=int, default=3, help="of each process")
    parser.add_argument("--settings", type=json.loads, default={}, help="of SFTConfig, as JSON: '{\"bf16\": true}'")
    parser.add_argument("--output", type=Path, help="write measurements and table as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=("train", "needed", "rate"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.task:
        job = JOBS[words.jobs[0]]
        tasks = {
            "train": lambda: train(job, words.way, words.settings, words.epochs, words.folder),
            "needed": lambda: needed(job),
            "rate": rate,
        }
        print("\n" + json.dumps(tasks[words.task]()))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(words.settings, words.epochs, Path(folder))
        products = {job: bench.run("needed", "--jobs", job)[0] for job in words.jobs}
        found: list[Any] = []
        for turn in range(words.repeats):
            for entry in measure(bench, words.jobs):
                print(f"round {turn + 1}: {entry}", file=sys.stderr, flush=True)
                found.append(entry)
    precision = "bf16" if words.settings.get("bf16") else "fp32"
    rows = [row_of(job, found, products[job], precision) for job in words.jobs]
    print(f"{words.settings}, {words.epochs} epochs of {BATCHES} batches, {words.repeats} rounds, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}\n\n{as_table(rows)}")
    if words.output:
        measured = [asdict(entry) if isinstance(entry, Measurement) else {"rate": entry} for entry in found]
        content = {"settings": words.settings, "table": rows, "products": products, "measured": measured}
        words.output.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
