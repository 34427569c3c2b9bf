"""The yardstick: a plain PyTorch loop that fine-tunes GPT-2 -> seconds a step and peak memory, one line of JSON.

    python tests/benchmarks/plain_loop.py --policy notebook --steps 3 [--model FOLDER]

As a notebook has it: fp32, eval mode (no dropout), AdamW over all parameters, the model's own loss, nothing clipped.
Token ids are random: the arithmetic does not depend on them. Without --model the weights are random too.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

POLICIES = ("full", "notebook")  # everything trains; all blocks frozen: embeddings, final norm and tied head train


def train(model: torch.nn.Module, policy: str, steps: int, batch_size: int, block_size: int) -> list[float]:
    """Train on random token ids.

    Returns:
        Seconds of each step.
    """
    if policy == "notebook":
        for parameter in model.transformer.h.parameters():
            parameter.requires_grad = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        X = torch.randint(model.config.vocab_size, (batch_size, block_size))
        loss = model(X, labels=X).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - started)
    return seconds


def peak_mb() -> float:
    """Largest resident memory of this process, in 2^20 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICIES, default="full")
    parser.add_argument("--steps", type=int, default=3, help="the first warms up and counts only where it is alone")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--model", help="folder of a GPT-2; GPT-2's 124M shape with random weights if not said")
    words = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(words.model) if words.model else GPT2LMHeadModel(GPT2Config())
    model.eval()
    seconds = train(model, words.policy, words.steps, words.batch_size, words.block_size)
    result = {"policy": words.policy, "median_step_seconds": statistics.median(seconds[1:] or seconds)}
    print(json.dumps({**result, "peak_memory_mb": round(peak_mb()), "seconds": seconds}))


if __name__ == "__main__":
    main()
