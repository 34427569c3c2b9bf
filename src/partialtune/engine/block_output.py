"""What a decoder block gives: states (B, T, D), alone or at the head of a tuple, and the form in which it gave them."""

from typing import Any, NamedTuple

import torch
from torch import nn

from partialtune.errors import ModelError


class Form(NamedTuple):
    """What a block gives beside its states' values.

    Attributes:
        dtype: Of the states.
        tail: What follows them where it gives a tuple.
        kept: In which dtype they are kept: under bf16 autocast in bf16, else in their own.
    """

    dtype: torch.dtype
    tail: tuple[None, ...] | None
    kept: torch.dtype

    def to_words(self) -> str:
        """`float32 bfloat16 1`: the dtypes, and how much follows the states in a tuple, -1 where there is none."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kept)]
        return f"{' '.join(dtypes)} {-1 if self.tail is None else len(self.tail)}"

    @classmethod
    def from_words(cls, words: str) -> "Form":
        """What `to_words` gave."""
        dtype, kept, tail = words.split()
        return cls(getattr(torch, dtype), None if int(tail) < 0 else (None,) * int(tail), getattr(torch, kept))


def block_output(model: nn.Module, output: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, Form]:
    """States (B, T, D) in what a block gave for `input_ids` (B, T), and the form that it gave them in.

    Raises:
        ModelError: If it gives anything else, or more, to those behind it. Gemma 3n's blocks give (4, B, T, D): four
            streams, of which the rows of a batch are not the first axis.
    """
    name, tail = type(model).__name__, None
    if isinstance(output, tuple):
        if any(part is not None for part in output[1:]):
            raise ModelError(
                f"{name}: its blocks give more than their states to the next one, so that the frozen ones cannot be "
                f"left out. Say prefix_cache: off."
            )
        tail, output = output[1:], output[0]
    wanted = f"({', '.join(map(str, input_ids.shape))}, width)"
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"{name}: its blocks give a {type(output).__name__}, where states {wanted} are kept.")
    if output.dim() != 3 or output.shape[:2] != input_ids.shape or not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        raise ModelError(f"{name}: its blocks give {kind} {tuple(output.shape)}, where states {wanted} are kept.")
    kind = output.device.type
    low = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return output, Form(output.dtype, tail, torch.bfloat16 if low else output.dtype)
