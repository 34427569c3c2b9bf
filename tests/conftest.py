"""What several test files share: texts and a tokenizer to read, and tiny models."""

import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXCERPTS = Path(__file__).parent / "data"  # of real files: what tests/data/README.md tells
WHOLE_FILES = REPOSITORY.parent / "shared" / "data"  # the same files in full, where somebody has them
SOURCES = [EXCERPTS, WHOLE_FILES] if WHOLE_FILES.is_dir() else [EXCERPTS]


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A script that starts the tests in the background, `pytest &`, has its shell let them ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=SOURCES, ids=lambda folder: "whole" if folder == WHOLE_FILES else "excerpt")
def texts(request):
    """A folder of real Project Gutenberg files: `gulliver`, `gutenberg_styles`, `books`."""
    return request.param


def gpt2_tokenizer(texts: Path = EXCERPTS):
    """GPT-2's tokenizer beside whole files; beside the excerpts the same with 2,000 of its 50,000 merges, the first."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer

    if texts != EXCERPTS:
        return GPT2Tokenizer.from_pretrained(texts / "gpt2_tokenizer")
    lines = (EXCERPTS / "gpt2_merges.txt").read_text("utf-8").splitlines()[1:]
    letters = [chr(number) for number in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += sorted(set(ByteLevel.alphabet()) - set(letters))
    merges = [tuple(line.split()) for line in lines]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    return GPT2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


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
