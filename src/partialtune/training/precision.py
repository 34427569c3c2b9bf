"""How fast this machine multiplies matrices in each precision, and `bf16: auto`, which takes the faster one."""

import logging
import time

import torch
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

CPU_SHAPE = (1024, 768, 3072)  # rows x width x width of an MLP: GPT-2's, a quarter of a batch
GPU_SHAPE = (8192, 4096, 4096)  # what does not fill a GPU says nothing of its speed
WORTH_IT = 1.2  # casts and the fp32 copies cost too: less than this speed-up of the product is none


def bf16_pays() -> bool:
    """Whether this machine multiplies matrices clearly faster in bf16 than in fp32. Takes about 0.2 s."""
    # a CUDA build names cuda as its accelerator on a machine without a GPU too
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rates = {dtype: product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    chosen = ratio >= WORTH_IT
    logger.info(
        "bf16: auto -> %s: a product of %d x %d x %d is %.2f times as fast in bf16 as in fp32 on %s, %.0f against "
        "%.0f GFLOP/s (it pays from %.1f times on)",
        "true" if chosen else "false",
        *shape_for(device),
        ratio,
        device.type,
        rates[torch.bfloat16] / 1e9,
        rates[torch.float32] / 1e9,
        WORTH_IT,
    )
    return chosen


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """What a run multiplies matrices in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def shape_for(device: torch.device) -> tuple[int, int, int]:
    """(m, k, n) of the product (m, k) x (k, n) that is timed on a device."""
    return CPU_SHAPE if device.type == "cpu" else GPU_SHAPE


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Multiplications and additions a second of a matrix product: the best of `repeats`, after one that warms up."""
    rows, inner, columns = shape_for(device)
    left, right = (torch.randn(*size, device=device).to(dtype) for size in ((rows, inner), (inner, columns)))
    times = []
    for _ in range(repeats + 1):
        started = _now(device)
        left @ right
        times.append(_now(device) - started)
    return 2 * rows * inner * columns / min(times[1:])


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
