"""The largest Llama-like model that trains its last two blocks and final norm in a part of a GPU: forecast, then tried.

    python tests/gpu/largest.py 16|all [--small]

Frozen matrices are held in bf16; a step is one window of 1,024 tokens. By the forecast of `plan` the model has as
many blocks as fit. Then it trains three steps, in which PyTorch gets no more memory than that. In 16 GB it
is `audited`: every frozen weight is digested before and after. On the whole device it is trained without: to digest 100
GB takes longer than there is. Without a GPU the room is 8 MB, and the model tiny.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from partialtune import apply_plan, audited, plan_freeze
from partialtune.cost.fits import GB, GPU_RESERVE, GPU_SHARE_LOST
from partialtune.cost.forecast import forecast
from partialtune.model.loading import empty_model

TRAINABLE = ["blocks[-2:]", "final_norm"]
LLAMA = {"model_type": "llama", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 0}
WIDE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
NARROW = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Task:
    """What has to fit where.

    Attributes:
        config: Of the model, without its number of blocks.
        tokens: Of the one window of a step.
        room: Bytes for tensors.
        audit: Whether it is proved that what is frozen kept every bit.
    """

    config: dict
    tokens: int
    room: float
    audit: bool


def forecast_bytes(task: Task, blocks: int) -> int:
    """Tensors of a step on a GPU."""
    model = empty_model(AutoConfig.for_model(**task.config, num_hidden_layers=blocks))
    plan = plan_freeze(model, TRAINABLE)
    fast = ("gelu", "casts", "loss")
    return forecast(model, plan, 1, task.tokens, fast_paths=fast, base_dtype=torch.bfloat16).fits.gpu


def most_blocks(task: Task) -> int:
    """By the forecast, which grows evenly with the blocks."""
    few, more = (forecast_bytes(task, blocks) for blocks in (4, 6))
    each = (more - few) / 2
    return 4 + int((task.room - few) // each)


def train(task: Task, blocks: int, device: torch.device) -> tuple[int, float]:
    """Three steps on random weights and tokens; the number of parameters, and seconds of the last step."""
    torch.manual_seed(0)
    with device:
        config = AutoConfig.for_model(**task.config, num_hidden_layers=blocks)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plan = plan_freeze(model, TRAINABLE, frozen_dtype="auto")
    apply_plan(model, plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    ids = torch.randint(task.config["vocab_size"], (1, task.tokens), device=device)
    fast = ("gelu", "casts", "loss")
    with (
        audited(model, plan, optimizer, fast_paths=fast, prefix_cache="off") if task.audit else nullcontext() as tuning
    ):
        model.train()
        for _ in range(3):
            started = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if tuning is not None:
                tuning.step()
            value = loss.item()  # waits for the device
            seconds = time.perf_counter() - started
    if not value < 100:
        raise SystemExit(f"The loss is {value}.")
    if tuning is not None and not tuning.audit.passed:
        raise SystemExit("The audit did not pass.")
    return plan.total_parameters, seconds


def main() -> None:
    transformers_logging.set_verbosity_error()
    share, small = sys.argv[1], "--small" in sys.argv
    cuda = torch.cuda.is_available() and not small
    device = torch.device("cuda" if cuda else "cpu")
    size = torch.cuda.get_device_properties(0).total_memory if cuda else 8 * 2**20
    if cuda and share != "all":
        size = min(size, int(share) * GB)
    room = size * (1 - GPU_SHARE_LOST) - (GPU_RESERVE if cuda else 0)
    task = Task({**LLAMA, **(WIDE if cuda else NARROW)}, 1024 if cuda else 32, room, audit=share != "all")
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (size - GPU_RESERVE) / total))
    blocks = most_blocks(task)
    parameters, seconds = train(task, blocks, device)
    peak = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}" if cuda else "unknown"
    print(
        f"{parameters:,} parameters ({blocks} blocks) in {size / GB:.2f} GB train: forecast "
        f"{forecast_bytes(task, blocks) / 2**20:,.0f} MB of tensors, measured {peak}; {seconds:.3f} s/step, "
        f"{'audit passed' if task.audit else 'not audited'}"
    )


if __name__ == "__main__":
    main()
