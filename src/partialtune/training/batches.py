"""Windows of tokens -> batches for the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset


def collate_windows(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Windows -> a batch: `input_ids` and `labels`, int64 (B, T), and their numbers `window`, int64 (B,), if they have.

    The model shifts the labels by one.

    The first token of a window is context and no target. It says so itself, since Trainer divides the summed loss by
    the number of labels, and for GPT-2 counts the first ones too: its losses would come out (T - 1) / T too small.
    """
    input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    labels = input_ids.clone()
    labels[:, 0] = -100
    batch = {"input_ids": input_ids, "labels": labels}
    if "window" in rows[0]:
        batch["window"] = torch.tensor([row["window"] for row in rows])
    return batch


def numbered(windows: Dataset, first: int) -> Dataset:
    """Windows with a column `window` that counts from `first`."""
    return windows.add_column("window", np.arange(first, first + len(windows)))
