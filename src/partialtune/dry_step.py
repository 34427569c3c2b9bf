"""One training step without values: model on the meta device + plan -> its matrix products and its memory.

Real autograd runs forward, backward and the optimizer on fake tensors, which have shapes, dtypes and a device but no
data. So backward stops where it will stop, kept tensors live as long as they will, for any architecture.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialtune.errors import ModelError
from partialtune.flops import ProductCounter, Products
from partialtune.memory import Memory, MemoryLedger
from partialtune.plan import FreezePlan, apply_plan

logger = logging.getLogger(__name__)


def dry_step(
    model: nn.Module,
    plan: FreezePlan,
    batch_size: int,
    block_size: int,
    accumulation: int = 1,
    bf16: bool = False,
    optimizer: str = "adamw_torch",
) -> tuple[Products, Memory]:
    """Take one optimizer step of `plan` without values, with the kernels that PyTorch has for a CPU.

    Args:
        model: Causal language model, on the meta device or not; it is not touched.
        plan: What trains.
        batch_size: Windows of one forward pass on one process.
        block_size: Tokens per window.
        accumulation: Forward passes of one optimizer step.
        bf16: Whether products run in bf16 (autocast), as `bf16: true` has it.
        optimizer: `optim` of the recipe.

    Returns:
        The products of the whole step, and its memory.

    Raises:
        ModelError: If the model computes something that depends on values.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = without_values(model, fake)
    apply_plan(twin, plan)
    twin.config.use_cache = False  # as Trainer has it
    twin.train()
    meter = StepMeter(fake, twin, logits_shape=(batch_size * (block_size - 1), twin.config.get_text_config().vocab_size))
    trainable = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    input_ids = torch.zeros(batch_size, block_size, dtype=torch.long)
    try:
        with meter:
            if accumulation > 1:  # gradients of the passes before are there already
                for parameter in trainable:
                    parameter.grad = torch.zeros_like(parameter)
            loss = _loss(twin, input_ids, bf16)
            meter.phase = "backward"
            loss.backward()
            meter.ledger.assign([p.grad for p in trainable if p.grad is not None], "gradients")
            meter.phase = "optimizer"
            meter.ledger.optimizer_starts()
            stepping = OPTIMIZERS[optimizer](trainable)
            stepping.step()
        return Products(**meter.products.counts).times(accumulation), meter.ledger.memory()
    finally:
        pass


def _loss(model: nn.Module, input_ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Forward as Trainer runs it; what only the outputs hold is gone when this returns."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = model(input_ids=input_ids, labels=input_ids)
    widened = outputs.logits.float()  # accelerate widens what a model under autocast returns
    return outputs.loss


def without_values(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy of `model` whose parameters and buffers are fake tensors on the CPU. Ties are kept."""
    twins: dict[int, torch.Tensor] = {}
    with fake:
        for buffer in model.buffers():
            twins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        for parameter in model.parameters():
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            twins[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, twins)


class StepMeter(TorchDispatchMode):
    """Shows every operation of a step to the product counter and every result to the memory ledger."""

    def __init__(self, fake: FakeTensorMode, model: nn.Module, logits_shape: tuple[int, int]) -> None:
        super().__init__()
        weights = [*model.parameters(), *model.buffers()]
        self.phase = "forward"
        self.ledger = MemoryLedger()
        self.ledger.assign(weights, "weights")
        self.products = ProductCounter(self.ledger, weights)
        self._fake, self._logits_shape = fake, logits_shape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        run = self._fake.__torch_dispatch__ if FakeTensor in types else _run
        result = run(func, types, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if outputs:
            for output in outputs:
                self.ledger.number(output, "logits" if self._is_logits(output) else "activations")
            self.products.see(func, args, kwargs, result, backward=self.phase == "backward")
        return result

    def _is_logits(self, tensor: torch.Tensor) -> bool:
        rows, vocabulary = self._logits_shape
        return tensor.ndim > 1 and tensor.shape[-1] == vocabulary and tensor.numel() >= rows * vocabulary


def _run(func, types, args, kwargs):
    return func(*args, **kwargs)


def _adafactor(parameters):
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1.0, scale_parameter=False, relative_step=False)


# As Trainer makes them of `optim`, as far as memory goes.
OPTIMIZERS = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adafactor": _adafactor,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
