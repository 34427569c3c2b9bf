"""What the processes of a run send: bytes handed to torch.distributed, by kind of operation."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Every collective passes PyTorch's dispatcher under one of these names, whoever calls it: DDP from C++, FSDP2 from
# Python, Trainer and accelerate. The argument counts that is whole on each process after it, or was before it.
COUNTED = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::scatter_": ("scatter", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::barrier": ("barrier", None),
}


class SentBytes(TorchDispatchMode):
    """Counts, while it is entered, in this process.

    Of an all-reduce the bytes of the tensor; of an all-gather those of what is gathered, of a reduce-scatter those of
    what is reduced, of a broadcast those of what is spread. On a ring of n processes each sends 2 (n - 1) / n times the
    bytes of an all-reduce and (n - 1) / n times those of the other two: on two processes once, and a half.

    Attributes:
        calls: (kind, bytes, element type) of each operation, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        name = function._schema.name
        if name.startswith("c10d::"):
            kind, place = COUNTED[name]  # a KeyError is an operation that nobody has thought of
            tensors = [] if place is None else _tensors(args[place])
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls.append((kind, size, str(tensors[0].dtype).removeprefix("torch.") if tensors else ""))
        return function(*args, **(kwargs or {}))

    def by_kind(self, dtype: str = "float32") -> dict[str, int]:
        """Bytes by kind of operation, of tensors of one type: weights and gradients are of floating point."""
        sizes: Counter[str] = Counter()
        for kind, size, of in self.calls:
            if of == dtype and size:
                sizes[kind] += size
        return dict(sizes)


def _tensors(argument: Any) -> list:
    if isinstance(argument, list | tuple):
        return [tensor for one in argument for tensor in _tensors(one)]
    return [argument]
