"""What a command does not need is not imported, and weights are not read before they are needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, tiny_gpt2

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "pandas", "matplotlib", "evaluate", "peft", "yaml")


def imported_by(code: str) -> list[list[str]]:
    """Runs code that calls `note()`; for each call the top-level modules that were imported by then."""
    preamble = "import json, sys\ndef note(): print(json.dumps([n for n in sys.modules if '.' not in n]), flush=True)\n"
    run = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["bench", "--help"], ["--version"]])
def test_a_help_text_imports_no_heavy_library(words):
    (modules,) = imported_by(
        f"from partialtune.cli import main\ntry: main({words!r})\nexcept SystemExit: note()\nelse: raise AssertionError"
    )
    assert "partialtune" in modules
    assert not set(HEAVY) & set(modules)


def test_plan_imports_nothing_for_texts_or_figures_and_train_draws_only_at_its_end():
    recipe = str(REPOSITORY / "recipes" / "quickstart.yaml")
    plan, train = imported_by(
        f"from partialtune.cli import main\nassert main(['plan', {recipe!r}]) == 0\nnote()\n"
        "import partialtune.recipe_run.train\nnote()"
    )
    assert "torch" in plan
    assert not {"datasets", "pyarrow", "pandas", "matplotlib", "evaluate", "tensorboard"} & set(plan)
    assert "datasets" in train
    assert not {"matplotlib", "evaluate", "tensorboard"} & set(train)


def test_a_push_and_the_pages_of_a_run_are_made_without_torch():
    pushed, shown = imported_by("import partialtune.hub.push\nnote()\nimport partialtune.pages.report\nnote()")
    assert "huggingface_hub" in pushed
    assert not {"torch", "transformers", "datasets", "matplotlib"} & {*pushed, *shown}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_weights_are_mapped_from_their_file_and_not_copied(tmp_path):
    from partialtune.model.loading import load_config, load_model

    def private_mb() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    tiny_gpt2(n_embd=512, n_layer=6, vocab_size=40_000).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert size > 100
    config = load_config(str(tmp_path))
    before = private_mb()
    model = load_model(str(tmp_path), config)
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())  # every page is read
    assert total == total
    assert private_mb() - before < 0.2 * size
