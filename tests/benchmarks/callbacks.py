"""What the proof costs: GPT-2's shape, trained with deltas and audit -> the callbacks' share of training time.

    python tests/benchmarks/callbacks.py --steps 20 --batch_size 16

Random weights and windows; one report in 10 steps, digests at the start and at the end. The share counts snapshot,
reports and audit against the optimizer steps alone. Each policy trains in a process of its own.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

POLICIES = (
    (["norms"], "tied"),
    (["blocks[-2:]", "final_norm"], "tied"),
    (["final_norm", "head"], "untied"),
    (["embeddings", "final_norm", "head"], "tied"),
    (["all"], "tied"),
)
DELTA_STEPS = 10
ALLOWED = 0.02


@dataclass(frozen=True)
class Cost:
    """Seconds of one policy: a step (median), snapshot, report (mean), audit with its digests; and the share."""

    selectors: list[str]
    step: float
    snapshot: float
    report: float
    audit: float
    share: float


def measure(policy: tuple[list[str], str], blocks: int, batch_size: int, block_size: int, steps: int, bf16: bool):
    """Train one policy for `steps` steps."""
    import numpy as np
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    from partialtune.freeze.plan import plan_freeze
    from partialtune.model.loading import quiet_libraries
    from partialtune.training.performance import performance
    from partialtune.training.recipe_trainer import attached_trainer
    from partialtune.training.settings import training_arguments

    quiet_libraries()
    model = GPT2LMHeadModel(GPT2Config(n_layer=blocks))
    plan = plan_freeze(model, policy[0], head=policy[1])
    ids = np.random.default_rng(0).integers(50257, size=(steps * batch_size, block_size))
    with tempfile.TemporaryDirectory() as folder:
        said = {"max_steps": steps, "per_device_train_batch_size": batch_size, "save_strategy": "no", "bf16": bf16}
        args = training_arguments({**said, "output_dir": folder, "disable_tqdm": True})
        windows = Dataset.from_dict({"input_ids": ids.tolist()})
        run = attached_trainer(plan=plan, delta_steps=DELTA_STEPS, model=model, args=args, train_dataset=windows)
        tuning = run.tuning
        snapshot = tuning.seconds
        audited, reported = tuning.audit_callback.seconds, tuning.delta_callback.seconds
        run.train()
        share = performance(args, run.timer, None, None, block_size, tuning.fast, tuning.seconds)["callback_share"]
    reports = -(-steps // DELTA_STEPS)
    report = (tuning.delta_callback.seconds - reported) / reports
    audit = tuning.audit_callback.seconds - audited
    return Cost(policy[0], run.timer.median(), snapshot, report, audit, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--policy", type=int, nargs="*", help="numbers of policies, from 0; all by default")
    known = parser.parse_args()
    chosen = range(len(POLICIES)) if known.policy is None else known.policy
    print(f"{known.blocks} blocks, {known.batch_size} x {known.block_size} tokens, {known.steps} steps")
    print(f"{'policy':<36}{'step s':>9}{'snapshot s':>12}{'report s':>10}{'audit s':>9}{'share':>8}")
    shape = (known.blocks, known.batch_size, known.block_size, known.steps, known.bf16)
    for number in chosen:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            cost = process.submit(measure, POLICIES[number], *shape).result()
        seconds = f"{cost.step:>9.2f}{cost.snapshot:>12.2f}{cost.report:>10.3f}{cost.audit:>9.2f}"
        verdict = "" if cost.share < ALLOWED else f"  over {ALLOWED:.0%}"
        print(f"{', '.join(cost.selectors):<36}{seconds}{cost.share:>8.2%}{verdict}", flush=True)


if __name__ == "__main__":
    main()
