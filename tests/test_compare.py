"""Comparisons: one ground, one table, figure and page; what has been run is not run again, what failed is told."""

import csv
import html.parser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chromium import Page, needs_chromium
from conftest import REPOSITORY, tiny_gpt2
from partialtune.cli import main
from partialtune.compare import children
from partialtune.compare.frontier import AXES, frontier_of, points_of, render_frontier
from partialtune.compare.policies import changed_words, read_policies, value_words
from partialtune.compare.rates import Trial, at_the_end_of_the_list, best_rate, write_training_text
from partialtune.compare.results import Spread, grouped, read_outcome, unique_names
from partialtune.compare.table import comparison_lines
from partialtune.errors import InputError, RecipeError
from partialtune.recipe.arguments import TextArguments
from partialtune.text.windows import split_text
from run_folder import write_run_folder

ATTACK = "<script>document.title = 'taken'</script>"
# policy -> selectors, which parameters that is, bits per byte after, change on further text, seconds a step, MB
POLICIES = {
    "full": (("all",), lambda p: True, 1.52, 0.21, 36.9, 10238),
    "blocks": (("blocks", "final_norm"), lambda p: p["block"] is not None, 1.54, 0.18, 33.0, 9000),
    "last_2_blocks": (("blocks[-2:]", "final_norm"), lambda p: (p["block"] or 0) > 0, 1.58, 0.09, 11.2, 4603),
    "last_block": (("blocks[-1]", "final_norm"), lambda p: p["block"] == 2, 1.61, 0.05, 9.5, 4200),
    "embeddings": (("embeddings",), lambda p: "embeddings" in p["component"], 1.613, 0.15, 24.2, 8033),
    "norms": (("norms",), lambda p: "norm" in p["component"], 1.70, 0.02, 20.0, 6400),
    "biases": (("biases",), lambda p: p["name"].endswith("bias"), 1.705, 0.03, 20.5, 6420),
    "final_norm": (("final_norm",), lambda p: p["component"] == "final_norm", 1.84, 0.0, 7.2, 3900),
}


def write_runs(folder, names=tuple(POLICIES), seeds=(0, 1), **changes):
    """Folders of finished runs, one for each policy and seed, and their paths."""
    paths = []
    for name in names:
        selectors, trains, after, change, seconds, memory = POLICIES[name]
        for seed in seeds:
            run = folder / f"{name}-seed{seed}"
            write_run_folder(
                run, blocks=3, width=16, steps=20, selectors=selectors, trains=trains,
                recipe={"seed": seed, **changes}, source=f"{ATTACK}.txt",
            )  # fmt: skip
            evaluation = json.loads((run / "evaluation.json").read_text())
            evaluation["validation"]["after"]["bits_per_byte"] = after + 0.004 * seed
            further = evaluation["python_docs"]
            further["after"]["bits_per_byte"] = further["before"]["bits_per_byte"] + change
            (run / "evaluation.json").write_text(json.dumps(evaluation))
            performance = json.loads((run / "performance.json").read_text())
            performance |= {"median_step_seconds": seconds, "peak_memory_mb": memory + seed}
            (run / "performance.json").write_text(json.dumps(performance))
            paths.append(str(run))
    return paths


def edit(file, change):
    """Rewrite a JSON or YAML file by what `change` does to its content."""
    is_yaml = file.suffix == ".yaml"
    content = yaml.safe_load(file.read_text()) if is_yaml else json.loads(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content) if is_yaml else json.dumps(content))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Sixteen finished runs, compared; the folder of the comparison."""
    folder = tmp_path_factory.mktemp("compare")
    paths = write_runs(folder / "runs")
    assert main(["compare", *paths, "--output_dir", str(folder / "out")]) == 0
    return folder / "out"
