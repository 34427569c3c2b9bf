"""`bf16: auto`: a matrix product is timed in fp32 and in bf16, and the faster one is taken."""

import logging
import time

import torch

logger = logging.getLogger(__name__)

SHAPE = (1024, 768, 3072)  # rows x width x width of an MLP: GPT-2's, a quarter of a batch
WORTH_IT = 1.2  # casts and the fp32 copies cost too: less than this speed-up of the product is none


def bf16_pays(repeats: int = 3) -> bool:
    """Whether this machine multiplies matrices clearly faster in bf16 than in fp32. Takes about 0.2 s."""
    # a CUDA build names cuda as its accelerator on a machine without a GPU too
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    seconds = {dtype: _best_time(device, dtype, repeats) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = ratio >= WORTH_IT
    logger.info(
        "bf16: auto -> %s: a product of %d x %d x %d is %.2f times as fast in bf16 as in fp32 on %s (pays from %.1f)",
        "true" if chosen else "false",
        *SHAPE,
        ratio,
        device.type,
        WORTH_IT,
    )
    return chosen


def _best_time(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    rows, inner, columns = SHAPE
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        (left @ right).sum().item()
        times.append(time.perf_counter() - started)
    return min(times[1:])
