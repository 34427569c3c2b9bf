"""Arithmetic of a training step: operations as they are dispatched -> its matrix products by what they are for.

torch's own `FlopCounterMode` counts by module, and does not tell what a product is for: that is found here from the
operands. The formulas are torch's (`flop_registry`), and for what it has none, those at the end of this module.
`_overloadpacket` (an operation without its overload, as the registry has it) has no public name; torch's counter uses
it as well. `test_products_are_those_that_torch_counts_in_a_real_step` (tests/test_forecast.py) compares the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from partialtune.cost.memory import MemoryLedger

aten = torch.ops.aten


@dataclass(frozen=True)
class Products:
    """Multiplications and additions of matrix products: 2 x m x k x n for (m, k) times (k, n).

    Attributes:
        forward: Of activations with weights, forward. The product with a tied head counts; the lookup of an
            embedding is no product.
        recomputed: The same once more, during backward, where activation checkpointing asks for it. Those with matrices
            held in 16 bits are made without a graph, and count to `backward_activations`.
        backward_activations: Backward, to the gradients of activations.
        backward_weights: Backward, to the gradients of the weights that train.
        attention: Of activations with each other (queries with keys, the result with values; a state-space mixer's),
            forward and backward. Kept beside: no counter sees them where attention is one fused operation.
        prefix: Those of `forward` in the blocks below the first trainable parameter: the same for a window in every
            epoch, so that it is enough to compute them once.
    """

    forward: int = 0
    recomputed: int = 0
    backward_activations: int = 0
    backward_weights: int = 0
    attention: int = 0
    prefix: int = 0

    @property
    def backward(self) -> int:
        return self.recomputed + self.backward_activations + self.backward_weights

    @property
    def total(self) -> int:
        """All products with weights, without attention's own."""
        return self.forward + self.backward


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class ProductCounter:
    """Counts products by purpose, from what their operands are: weights, or activations that have met a weight.

    Args:
        ledger: Gives each storage its number.
        weights: The parameters of the model.
        head: Weight (V, D) of the language model's head, if it has one. What it gives are logits. A product with
            logits, or with what came of them, is one of their gradient, also where it is taken in forward, as
            `fast.head_loss` does.
    """

    def __init__(self, ledger: MemoryLedger, weights: Sequence[torch.Tensor], head: torch.Tensor | None) -> None:
        self.counts = dict.fromkeys(Products.__dataclass_fields__, 0)
        self._number = ledger.number
        self._weights = {self._number(weight) for weight in weights}
        self._factors: set[int] = set()  # activations that were multiplied by a weight
        self._heads = set() if head is None else {self._number(head)}  # the weight, its casts and views
        self._vocabulary = 0 if head is None else head.shape[0]
        self._logits: set[int] = set()
        self.in_prefix = False  # whether what is computed lies in a block below all that trains

    def see(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any, backward: bool) -> None:
        """Take note of one operation.

        Args:
            func, args, kwargs, result: The operation as it was dispatched, and what came of it.
            backward: Whether it belongs to the backward pass.
        """
        packet = func._overloadpacket
        formula = FORMULAS.get(packet) or flop_registry.get(packet)
        inputs = args[1:] if packet is aten.copy_ else args  # of which the first is written
        read = (inputs, {key: value for key, value in kwargs.items() if key != "out"})
        operands = {self._number(leaf) for leaf in tensors_in(read) if leaf.is_floating_point()}
        if formula is None:
            if operands & self._logits:
                some = packet is aten.index_select  # the columns of rows of a head that train
                self._logits.update(self._number(leaf) for leaf in tensors_in(result) if some or self._is_wide(leaf))
            if operands and operands <= self._weights and packet is not aten.embedding:  # a cast, a copy, a view
                self._weights.update(self._number(leaf) for leaf in tensors_in(result))
                if operands <= self._heads:
                    self._heads.update(self._number(leaf) for leaf in tensors_in(result))
            return
        flops = formula(*args, **kwargs, out_val=result)
        purpose = self._purpose(packet, operands, backward or bool(operands & self._logits))
        self.counts[purpose] += flops
        if self.in_prefix and purpose == "forward":
            self.counts["prefix"] += flops
        if operands & self._weights:
            self._factors |= operands - self._weights
            if purpose == "forward" and operands & self._heads:
                self._logits.update(self._number(leaf) for leaf in tensors_in(result) if self._is_wide(leaf))

    def of_logits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor that was seen holds logits, or what came of them one by one, as wide as they are."""
        return self._is_wide(tensor) and self._number(tensor) in self._logits

    def _is_wide(self, tensor: torch.Tensor) -> bool:
        # A slice of the vocabulary lies in rows of the whole width: products in or with 16 bits fill one after another.
        return tensor.ndim > 1 and self._vocabulary in (tensor.shape[-1], tensor.stride(-2))

    def _purpose(self, packet: Any, operands: set[int], backward: bool) -> str:
        if "attention" in str(packet):  # one fused operation, whose result is a factor of the next product
            return "attention"
        if operands & self._weights:
            if not backward:
                return "forward"
            return "recomputed" if torch.is_grad_enabled() and not operands & self._logits else "backward_activations"
        return "backward_weights" if backward and operands & self._factors else "attention"


def _fused_attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    """Queries (B, H, T, D) with keys (B, h, S, D), the result with values (B, h, S, E)."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _fused_attention_backward(grad, query, key, value, *args, out_val=None, **kwargs) -> int:
    """Two products for each of the two of forward, as without fusion; that it computes scores again does not count."""
    return 2 * _fused_attention(query, key, value)


def _grouped_product(rows, matrices, *args, out_val=None, **kwargs) -> int:
    """Rows (m, k) sorted by expert, each with its expert's (k, n); or (k, m) with (m, n), one (k, n) an expert."""
    return 2 * rows.shape[-2] * rows.shape[-1] * matrices.shape[-1]


# What torch's own registry has no formula for. Also for `FlopCounterMode(custom_mapping=FORMULAS)`.
FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_attention_backward,
    aten._grouped_mm: _grouped_product,
}
for _formula in FORMULAS.values():
    _formula._get_raw = True  # they take the tensors; to others FlopCounterMode gives shapes
