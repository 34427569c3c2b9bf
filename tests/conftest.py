"""What several test files share: texts and a tokenizer to read, and tiny models."""

import gc
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

# Before torch is imported: it takes as many threads as there are cores, in each of pytest-xdist's workers, and those of
# one wait busily for those of the other: 3.5 times the processor time. Processes that tests start inherit it.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

REPOSITORY = Path(__file__).resolve().parents[1]
EXCERPTS = Path(__file__).parent / "data"  # of real files: what tests/data/README.md tells
WHOLE_FILES = REPOSITORY.parent / "shared" / "data"  # the same files in full, where somebody has them
SOURCES = [EXCERPTS, WHOLE_FILES] if WHOLE_FILES.is_dir() else [EXCERPTS]


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """A script that starts the tests in the background, `pytest &`, has its shell let them ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Trainer looks for garbage in each run, among the millions of objects that all imports left: most of the time of
    a small run. What is there when the tests of a module begin stays, so it need not be looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """A run that believes that accelerate started it takes all cores, for good."""
    yield
    torch = sys.modules.get("torch")
    if torch and torch.get_num_threads() > THREADS:
        torch.set_num_threads(THREADS)


def pytest_configure(config):
    # pytest-xdist hands out modules in the order of their number of tests, where it has this option; see below
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Modules with many slow tests first, so that no worker of pytest-xdist is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of runs are not drawn, which is half of a small run's time: for tests that look at other things.

    What the fixtures of a module run is drawn all the same, and `test_figures` draws every figure.
    """
    for module in ("figures", "report"):
        monkeypatch.setattr(f"partialtune.pages.{module}.render_figure", lambda *_, **__: b"not drawn")


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
