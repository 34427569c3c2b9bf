"""Copies of the start of what trains: in memory, or in a file without a name where they are large."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from partialtune.words import gigabytes

logger = logging.getLogger(__name__)

# Bytes of all copies together. In a file, a report of the deltas finds them in the system's cache of it, which it gives
# to others when they need it.
IN_MEMORY_UP_TO = 10**8
ALIGNMENT = 64  # bytes: a tensor begins where any dtype may


class MemoryCopies(dict[str, torch.Tensor]):
    """Real copies on the CPU. Never views: on a CPU `parameter.data` is the live tensor."""

    def __setitem__(self, name: str, values: torch.Tensor) -> None:
        super().__setitem__(name, values.detach().to("cpu", copy=True))


class TensorInFile(NamedTuple):
    """Where in the file a tensor lies, and what it is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class FileCopies(MutableMapping[str, torch.Tensor]):
    """Copies in a file that has no name: the system frees it with the process, however that ends.

    Each read maps one tensor, for as long as that lives, so that memory holds no more than the tensors in use.

    Args:
        folder: On the disk to use. A system's folder for temporary files may itself lie in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (it lives as long as the copies)
        self._tensors: dict[str, TensorInFile] = {}

    def __setitem__(self, name: str, values: torch.Tensor) -> None:
        """Written and not mapped: a disk that fills up is then an error here, where a mapped write ends the process."""
        end = self._file.seek(0, os.SEEK_END)
        self._file.write(bytes(-end % ALIGNMENT))
        flat = values.detach().cpu().contiguous().reshape(-1)
        tensor = TensorInFile(self._file.tell(), values.shape, values.dtype)
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._file.flush()
        self._tensors[name] = tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        offset, shape, dtype = self._tensors[name]
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)  # nothing cannot be mapped
        mapped = np.memmap(self._file, np.uint8, mode="c", offset=offset, shape=(size,))  # c: a write stays in memory
        return torch.from_numpy(mapped).view(dtype).view(shape)

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def room_for_copies(size: int, folder: Path | None) -> MutableMapping[str, torch.Tensor]:
    """An empty mapping that copies what is put into it.

    Args:
        size: Bytes of all that will be put into it. Up to `IN_MEMORY_UP_TO` they are kept in memory.
        folder: Where the file may lie, made if missing; None for memory in any case.
    """
    if folder is None or size <= IN_MEMORY_UP_TO:
        return MemoryCopies()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        logger.warning(
            "The start of what trains takes %s, and %s has %s left: it is kept in memory.",
            gigabytes(size),
            folder,
            gigabytes(free),
        )
        return MemoryCopies()
    logger.info("The start of what trains, %s, is kept in a file without a name in %s.", gigabytes(size), folder)
    return FileCopies(folder)
