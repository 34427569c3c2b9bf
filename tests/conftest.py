"""What several test files share: texts and a tokenizer to read, and tiny models."""

import gc
import os
import shutil
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


@pytest.fixture(scope="module", autouse=True)
def quick_runs(request):
    """Runs draw no figures, count no products for `performance.json` and continue no prompts while they train: half, a
    sixth and a sixth of a small run's time.

    They do in the modules with `WHOLE_RUNS = True`: those that look at figures or products, and those which together
    have every method and kind of model. `test_figures` draws every figure.
    """
    if getattr(request.module, "WHOLE_RUNS", False):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for page in ("figures", "report"):
            patch.setattr(f"partialtune.pages.{page}.render_figure", lambda *_, **__: b"not drawn")
        results = sys.modules.get("partialtune.recipe_run.write_results")  # to import it takes longer than to count
        if results:
            patch.setattr(results, "needed_products", lambda *_, **__: None)  # as where it is unknown
            patch.setattr("partialtune.recipe_run.while_training.Samples.look", lambda *_: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks():
    """No machine is switched off in tests: a run's 27 calls of fsync are a tenth of a small one's seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory):
    """The user's own cache is left alone, and what lies in it decides nothing."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIALTUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory, cache_of_the_session):
    """A `WarmProcess` for all tests; its log grows with each run."""
    from cluster import WarmProcess

    with WarmProcess(tmp_path_factory.mktemp("warm") / "log") as warm:
        warm.log.touch()
        yield warm


@pytest.fixture(scope="session")
def agents(tmp_path_factory, warm):
    """A `ForkServer`: real agents of torch, forked from the warm process."""
    from fork_server import ForkServer

    with ForkServer(warm, tmp_path_factory.mktemp("agents")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_kept_scores_or_states(cache_of_the_session):
    """A test that looks at how the base is scored does not find scores of another one. Texts are prepared once."""
    for kind in ("prepared/scores", "prefix"):
        shutil.rmtree(cache_of_the_session / kind, ignore_errors=True)


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
def in_this_process(monkeypatch):
    """Runs of a comparison in this process, which costs no imports; the list of commands that were run."""
    from partialtune.cli import main
    from partialtune.compare import run_queue, try_rates

    commands = []

    def run_here(command, log, look, *held):
        commands.append(command[2:])
        look()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        run = {"partialtune": main, "partialtune.compare.try_rates": try_rates.main}[command[2]]
        return run(command[3:])

    monkeypatch.setattr(run_queue, "run_child", run_here)
    return commands


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of runs are not drawn, in a module with `WHOLE_RUNS` either: for its tests that look at other things."""
    for page in ("figures", "report"):
        monkeypatch.setattr(f"partialtune.pages.{page}.render_figure", lambda *_, **__: b"not drawn")


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
