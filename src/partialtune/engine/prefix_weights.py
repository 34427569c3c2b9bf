"""The weights that kept states were computed with: their digest, and a watch that notices when they change.

In:  a model, and how many of its first blocks are frozen.
Out: a digest that each key of a kept state begins with.
"""

import hashlib
import logging
from collections.abc import Mapping

import torch
from torch import nn

from partialtune.model.digests import bit_sums
from partialtune.model.packed_weights import PackedWeight
from partialtune.model.parameters import named_weights, persistent_buffers, plain_name
from partialtune.model.row_parameters import rows_by_matrix
from partialtune.model.structure import decoder_blocks, read_structure

logger = logging.getLogger(__name__)

Mark = tuple[int, int, int]


def prefix_digest(model: nn.Module, blocks: int, sha256: Mapping[str, str]) -> bytes:
    """A digest of all weights and stored buffers that the first `blocks` blocks compute with, and what is before them.

    Final norm and head are not among them: another run may have others, and starts from the same states.

    Args:
        model: The model itself.
        blocks: Number of blocks.
        sha256: By name of each parameter, and of each persistent buffer where there are any.
    """
    structure = read_structure(model)
    behind = tuple(
        plain_name(f"{structure.blocks_path}.{number}.") for number in range(blocks, len(decoder_blocks(model)))
    )
    after = {
        info.name
        for info in structure.parameters
        if info.forward_rank > structure.block_count and info.component in ("final_norm", "head")
    }
    names = [name for name, _ in (*named_weights(model), *persistent_buffers(model)) if name not in after]
    # A packed matrix has the digest of the base's values, and computes with others: its own bytes count beside it.
    packed = {name: f" {w.kind} {w.packed_sha256}" for name, w in named_weights(model) if isinstance(w, PackedWeight)}
    parts = [f"{name} {sha256.get(name)}{packed.get(name, '')}" for name in names if not name.startswith(behind)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


class PrefixWeights:
    """Frozen weights and buffers of a prefix, looked at before each pass.

    They can change within a phase: a user loads others, merges an adapter or moves the model. An operation in place
    counts up a tensor's `_version`, and what takes its place lies elsewhere. Only a write past both (`tensor.data`,
    numpy) is not seen here; the audit finds it.

    Args:
        model: The model itself.
        blocks: Number of blocks, at least 1.
        digest: Of the weights as they are now, see `prefix_digest`.

    Attributes:
        digest: Of the weights as they were at the last look.
    """

    def __init__(self, model: nn.Module, blocks: int, digest: bytes) -> None:
        self.digest = self._first = digest
        later = {module for block in decoder_blocks(model)[blocks:] for module in block.modules()}
        # Of a head of which rows learn now: they change its matrix.
        learning = {key for key, trained in rows_by_matrix(model).items() if trained.parameter.requires_grad}
        # Of a module its own dictionaries: a parameter that is put in the place of another one is found in them.
        self._places = [
            (f"{name}.{key}", held, key)
            for name, module in model.named_modules()
            if module not in later
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
            if tensor is not None
            and not tensor.requires_grad  # final norm and head, which may learn, are behind
            and id(tensor) not in learning
        ]
        self._marks = self._look()
        # Those of buffers are known from the start: DDP writes them anew in each pass, the same values.
        self._sums = self._sums_of(
            {name for name, held, key in self._places if not isinstance(held[key], nn.Parameter)}
        )
        self._changed: dict[str, str] = {}

    def _look(self) -> list[Mark | None]:
        return [_mark(held.get(key)) for _, held, key in self._places]

    def have_changed(self) -> bool:
        """Whether their values are other ones than at the last look. `digest` is then a new one."""
        marks = self._look()
        if marks == self._marks:
            return False
        touched = {place[0] for place, old, new in zip(self._places, self._marks, marks, strict=True) if old != new}
        self._marks = marks
        sums = self._sums_of(touched)
        other = {key: total for key, total in sums.items() if self._sums.get(key) != total}
        self._sums.update(sums)
        if not other:
            return False
        self._changed.update(other)
        words = "\n".join(f"{key} {total}" for key, total in sorted(self._changed.items()))
        self.digest = hashlib.blake2b(self._first + words.encode(), digest_size=16).digest()
        logger.warning("Weights of the frozen prefix changed (%s): its kept states are dropped.", _some(sorted(other)))
        return True

    def _sums_of(self, keys: set[str]) -> dict[str, str]:
        found = {name: held.get(key) for name, held, key in self._places if name in keys}
        there = {name: tensor.detach() for name, tensor in found.items() if tensor is not None}
        sums = bit_sums(there.items())
        words = {name: f"{sums[name]} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in there.items()}
        return {name: words.get(name, "gone") for name in found}


def _mark(tensor: torch.Tensor | None) -> Mark | None:
    if tensor is None:
        return None
    try:
        return id(tensor), tensor.data_ptr(), tensor._version
    except RuntimeError:  # made in inference mode, which counts no versions, or a class of tensors without memory
        return id(tensor), 0, 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
