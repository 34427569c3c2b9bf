"""What several processes cost: seconds of a step on one and two processes, and the bytes that they send in it.

    python tests/benchmarks/scaling.py [--output scaling.json]

Strong scaling: the same global batch, on one process and on two, each pinned to a core of its own with one thread. The
runs are transformers' Trainer with `attach`, on a GPT-2 with random weights and random token ids; FSDP2 runs on gloo
(tests/fsdp_on_cpu.py). For each policy:

    alone    one process with the whole batch
    apart    two processes that do not know of each other, each with half: what this machine's two cores give at most
    DDP, FSDP2    two processes, each with half the batch

The share of the ideal is alone / (2 x seconds). Bytes are of one process in its last step, see tests/sent_bytes.py.
Then the rows of a frozen prefix that each process computes in over two epochs. Needs Linux, and two cores
that nothing else uses.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from two_processes import PRELOADED, as_rank, free_port

POLICIES = {
    "final norm": ["final_norm"],
    "last block": ["blocks[-1]", "final_norm"],
    "embeddings": ["embeddings", "final_norm"],  # and the head, which is tied to them
    "full": ["all"],
}
LAUNCHES = {"alone": 1, "apart": 2, "DDP": 2, "FSDP2": 2}
KEEP_PREFIX = ("alone", "DDP")
WARM_UP = 2  # steps


def train(words: argparse.Namespace, trainable: list[str], launch: str, rank: int, keep_prefix: bool) -> dict[str, Any]:
    """One process of a run, on a core of its own -> what it measured."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    gc.freeze()
    if launch == "FSDP2":
        from fsdp_on_cpu import let_accelerate_shard

        let_accelerate_shard()
    import numpy as np
    import torch
    from datasets import Dataset
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel
    from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers import default_data_collator as collate

    import partialtune as pt
    from sent_bytes import SentBytes

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    shape = {"n_layer": words.blocks, "n_embd": words.width, "n_head": words.width // 64, "n_positions": words.tokens}
    model = GPT2LMHeadModel(GPT2Config(**shape, vocab_size=words.vocabulary))
    plan = pt.plan_freeze(model, trainable)
    steps = WARM_UP + words.steps + 1
    rows = words.batch * (steps // 2 if keep_prefix else steps)
    ids = np.random.default_rng(0).integers(words.vocabulary, size=(rows, words.tokens)).tolist()
    seconds, sent = [], SentBytes()

    class Clock(TrainerCallback):
        """The last step is counted, and not timed: to count takes time."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == steps - 1:
                sent.__enter__()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.started)
            if state.global_step == steps:
                sent.__exit__(None, None, None)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=words.batch // LAUNCHES[launch],
            learning_rate=5e-5,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate, callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        prefix_cache = "memory" if keep_prefix else "off"
        # no report of the deltas on the way: it is no part of a step
        tuning = pt.attach(trainer, plan, prefix_cache=prefix_cache, delta_steps=10**6)
        trainer.train()
    runs_as = {
        "DDP": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "FSDP2": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
    }
    assert runs_as == {name: name == launch for name in runs_as}, runs_as
    assert tuning.audit.passed
    return {
        "seconds": seconds[WARM_UP:-1],
        "bytes": sent.by_kind(),
        "trainable": plan.trainable_parameters,
        "total": plan.total_parameters,
        "prefix_rows": {"computed": tuning.fast.misses, "found": tuning.fast.hits},
    }


def run(words: argparse.Namespace, trainable: list[str], launch: str, keep_prefix: bool = False) -> list[dict]:
    """All processes of a run, forked from one that has done the imports -> what each measured, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes, port = LAUNCHES[launch], free_port()
    of_one_run = 1 if launch in ("alone", "apart") else processes
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs = [(words, trainable, launch, rank, keep_prefix) for rank in range(processes)]
        futures = [
            pool.submit(as_rank, rank % of_one_run, of_one_run, port, train, job) for rank, job in enumerate(jobs)
        ]
        return [future.result() for future in futures]


def measure(words: argparse.Namespace) -> dict[str, Any]:
    """Every policy in every launch, then the rows of a prefix."""
    rows = []
    for policy in words.policies:
        alone = None
        for launch in words.launches:
            found = run(words, POLICIES[policy], launch)
            # by the slower of both: the other one waits for it
            seconds = max(statistics.median(one["seconds"]) for one in found)
            alone = seconds if launch == "alone" else alone
            share = alone / (LAUNCHES[launch] * seconds) if alone else None
            sizes = {"bytes": found[0]["bytes"], "trainable": found[0]["trainable"], "total": found[0]["total"]}
            rows.append({"policy": policy, "launch": launch, "seconds": seconds, "share_of_ideal": share, **sizes})
            print(row_of(rows[-1]), flush=True)
    prefix = {}
    for launch in KEEP_PREFIX:
        prefix[launch] = [one["prefix_rows"] for one in run(words, POLICIES["last block"], launch, keep_prefix=True)]
    return {"settings": vars(words), "rows": rows, "prefix_rows": prefix}


HEAD = """\
| policy | launch | s/step | of the ideal | trainable x 4 | all-reduce | reduce-scatter | all-gather |
|---|---|---|---|---|---|---|---|"""


def row_of(row: dict[str, Any]) -> str:
    """A line of the table; bytes in MB of 10^6."""
    share = "" if row["share_of_ideal"] is None else f"{row['share_of_ideal']:.0%}"
    kinds = ("all-reduce", "reduce-scatter", "all-gather")
    sizes = [4 * row["trainable"], *(row["bytes"].get(kind, 0) for kind in kinds)]
    cells = [row["policy"], row["launch"], f"{row['seconds']:.3f}", share, *(f"{size / 1e6:.3f}" for size in sizes)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows a step, of all processes")
    parser.add_argument("--steps", type=int, default=7, help=f"that are timed, after {WARM_UP}")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--output", type=Path, help="JSON of all that was measured")
    words = parser.parse_args()
    print(HEAD, flush=True)
    measured = measure(words)
    for launch, processes in measured["prefix_rows"].items():
        counts = [f"{one['computed']} computed, {one['found']} found" for one in processes]
        print(f"\nRows of a frozen prefix in over two epochs, {launch}: {'; '.join(counts)}.")
    if words.output:
        words.output.write_text(json.dumps(measured, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
