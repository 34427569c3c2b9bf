"""What several test files share: the optional data folder and tiny models."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"needs {SHARED_DATA}, which is optional")


def tiny_gpt2(seed: int = 0, **changes):
    """A GPT-2 of 3 blocks, 128 tokens of vocabulary and 64 of context, with its usual dropout, weights from `seed`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = {"n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 128, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**{**shape, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def some_windows(count: int = 24, block_size: int = 16, vocabulary: int = 128, seed: int = 0):
    """A dataset of windows of random token ids, `input_ids` (block_size,)."""
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(seed).integers(vocabulary, size=(count, block_size))
    return Dataset.from_dict({"input_ids": ids.tolist()})
