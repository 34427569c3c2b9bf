"""The yardstick: a plain PyTorch loop that fine-tunes a model -> seconds a step and peak memory, one line of JSON.

    python tests/benchmarks/plain_loop.py --policy notebook --steps 3 [--model FOLDER] [--bf16]

As a notebook has it: weights in fp32, eval mode (no dropout), AdamW over all parameters, the model's own loss, nothing
clipped; with `--bf16` under autocast. Token ids are random: the arithmetic does not depend on them. Without --model the
weights are random too.
"""

import argparse
import json
import resource
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

POLICIES = ("full", "notebook", "last_2")  # everything; all but the blocks; the last two blocks and the final norm


def freeze_by_hand(model: torch.nn.Module, policy: str) -> None:
    """Set `requires_grad` as a notebook does, on a GPT-2 or a model built as Llama is."""
    body = model.get_decoder()
    blocks, final_norm = (body.h, body.ln_f) if hasattr(body, "h") else (body.layers, body.norm)
    if policy == "notebook":
        blocks.requires_grad_(False)
    elif policy == "last_2":
        model.requires_grad_(False)
        blocks[-2:].requires_grad_(True)
        final_norm.requires_grad_(True)


def train(
    model: torch.nn.Module, policy: str, steps: int, batch_size: int, block_size: int, bf16: bool = False
) -> list[float]:
    """Train on random token ids.

    Returns:
        Seconds of each step.
    """
    freeze_by_hand(model, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        X = torch.randint(model.config.vocab_size, (batch_size, block_size))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
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
    parser.add_argument("--bf16", action="store_true", help="products under autocast")
    parser.add_argument("--model", help="folder of a model; GPT-2's 124M shape with random weights if not said")
    words = parser.parse_args()
    torch.manual_seed(0)
    if words.model:
        model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32)
    else:
        model = GPT2LMHeadModel(GPT2Config())
    model.eval()
    seconds = train(model, words.policy, words.steps, words.batch_size, words.block_size, words.bf16)
    result = {"policy": words.policy, "median_step_seconds": statistics.median(seconds[1:] or seconds)}
    print(json.dumps({**result, "peak_memory_mb": round(peak_mb()), "seconds": seconds}))


if __name__ == "__main__":
    main()
