"""Muon, an optimizer for weight matrices: gradients of 2D parameters -> orthogonal updates of them."""

import math

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the weight matrices of the blocks.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the step size of Liu et al. 2025
    (arXiv:2502.16982). `torch.optim.Muon` iterates in bfloat16, which is tens of times slower on a CPU without it.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])  # Nesterov
                parts = 3 if weight.shape[1] == 3 * weight.shape[0] else 1  # query, key and value are three matrices
                update = torch.cat([orthogonal(part) for part in update.chunk(parts, dim=1)], dim=1)
                scale = 0.2 * math.sqrt(max(weight.shape[0], weight.shape[1] // parts))  # RMS of an AdamW update
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest orthogonal matrix, roughly: five quintic Newton-Schulz iterations (coefficients of Jordan et al.)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
