"""What insight costs on GPT-2's shape: seconds and memory of each part, policy by policy, beside one training step.

    python tests/benchmarks/insight.py            # --step: a training step beside it

Random weights, a random text of 132,000 tokens, GPT-2's 124M shape. Growth is the largest resident memory (ru_maxrss)
that a part adds to what the model, the copies of what trains and everything before it took.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

POLICIES = {"notebook": ["embeddings", "final_norm", "head"], "last two blocks": ["blocks[-2:]"], "full": ["all"]}
TOKENS = 132_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--policy", choices=POLICIES, help="measure one, in this process")
    parser.add_argument("--step", action="store_true", help="a training step for comparison; takes 8 GB")
    said = parser.parse_args()
    if said.policy:
        measure(said.policy, said.blocks, said.step)
        return
    for policy in POLICIES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--policy", policy], check=True)


def measure(policy: str, blocks: int, step: bool) -> None:
    """Print a line for each part."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from partialtune.freeze.apply import apply_plan
    from partialtune.freeze.plan import plan_freeze
    from partialtune.insight.effective_rank import effective_ranks
    from partialtune.insight.moved_tokens import moved_tokens, token_counts
    from partialtune.insight.next_token_shift import next_token_shift
    from partialtune.model.loading import load_tokenizer
    from partialtune.proof.snapshot import take_snapshot
    from partialtune.scoring.evaluation import ScoredText, evenly_spaced, score_text
    from partialtune.text.windows import chunked_windows

    tokenizer = load_tokenizer("builtin:lilliput", "main", False)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=blocks))
    plan = plan_freeze(model, POLICIES[policy])
    apply_plan(model, plan)
    before = take_snapshot(model, plan).copies
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    ids = np.random.default_rng(0).integers(len(tokenizer), size=TOKENS).astype(np.int32)
    windows = chunked_windows([ids], 256, 256)
    print(f"{policy}: {plan.trainable_parameters:,} parameters, {peak_mb():,.0f} MB before")
    counts = told("token counts", lambda: token_counts([ids]))
    found = told("effective ranks", lambda: effective_ranks(model, plan, before))
    print(f"    {len(found['matrices'])} matrices, {len(found['left_out'])} left out")
    told("moved tokens", lambda: moved_tokens(model, plan, before, counts, tokenizer))
    nats = np.random.default_rng(0).exponential(size=(64, 255)).astype(np.float32)
    watched = np.array(windows.with_format("numpy")[:64]["input_ids"])
    told("next-token shift", lambda: next_token_shift(watched, nats, nats[::-1], tokenizer))
    sample = ScoredText(evenly_spaced(windows, 16), TOKENS, 4 * TOKENS)
    told("one point of one curve, 16 windows", lambda: score_text(model, sample, 8, None))
    if step:
        batch = torch.from_numpy(watched[:16]).long()
        told("for comparison: forward and backward of 16 windows", lambda: model(batch, labels=batch).loss.backward())


def told(what: str, part: Callable[[], Any]) -> Any:
    """What `part` returns; how long it took and what memory it added is printed."""
    memory, started = peak_mb(), time.perf_counter()
    result = part()
    print(f"  {what:<52}{time.perf_counter() - started:8.2f} s  +{peak_mb() - memory:6,.0f} MB", flush=True)
    return result


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main()
