"""Comparisons: one ground, one table, figure and page; what has been run is not run again, what failed is told."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from matplotlib.text import Text
from transformers import AutoTokenizer

from chromium import Page, needs_chromium
from cluster import wait_for
from conftest import REPOSITORY, tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.compare import run_queue
from partialtune.compare.comparable import check_recipes
from partialtune.compare.frontier import draw_frontier
from partialtune.compare.learning_rates import (
    RateTrial,
    Search,
    at_the_end_of_the_list,
    best_rate,
    keep_trial,
    progress_file,
)
from partialtune.compare.outcomes import Measures, Outcome, Row, Spread, grouped, read_outcome, unique_names
from partialtune.compare.policies import changed_words, read_policies, value_words
from partialtune.compare.presentation import comparison_lines, subtitle
from partialtune.compare.try_rates import StepsTaken
from partialtune.errors import InputError, Interrupted, RecipeError
from partialtune.files import lock
from partialtune.pages.figure_style import LIGHT
from partialtune.recipe.recipe import read_recipe
from partialtune.run_folder import locked
from partialtune.text.windows import split_text
from run_folder import write_run_folder

pytestmark = pytest.mark.usefixtures("undrawn")

FRONTIER = REPOSITORY / "recipes" / "frontier"
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


def read_json(folder, name="comparison.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


# --- the table


def test_a_policy_has_the_mean_and_the_standard_deviation_over_its_seeds(compared):
    policies = {policy["policy"]: policy for policy in read_json(compared)["policies"]}
    assert list(policies) == list(POLICIES)
    full = policies["full"]
    assert full["bits_per_byte_after"] == pytest.approx((1.52 + 1.524) / 2)
    assert full["bits_per_byte_after_sd"] == pytest.approx(statistics.stdev([1.52, 1.524]))
    assert full["change_python_docs"] == pytest.approx(0.21)
    assert (full["median_step_seconds"], full["peak_memory_mb"]) == (36.9, 10238.5)
    assert [run["seed"] for run in full["runs"]] == [0, 1]
    assert full["trainable_share"] == 1
    assert Spread.of([1.0]) == Spread(1.0, None)
    assert Spread.of([1.0, None]) is None


def test_the_csv_holds_the_same_figures_in_full(compared):
    with (compared / "comparison.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, policy in zip(rows, read_json(compared)["policies"], strict=True):
        assert row["policy"] == policy["policy"]
        assert float(row["bits_per_byte_after"]) == policy["bits_per_byte_after"]
        assert int(row["trainable_parameters"]) == policy["trainable_parameters"]
        assert row["frontier_time"] == str(policy["frontier_time"])


def test_runs_whose_bits_per_byte_are_withheld_are_shown_without_them(tmp_path, capsys):
    """Their tokenizer cannot write the text."""
    paths = write_runs(tmp_path / "runs", names=("final_norm", "full"))
    for path in paths:
        file = Path(path) / "evaluation.json"
        scores = json.loads(file.read_text())
        for name in scores.keys() - {"prompts"}:
            for side in ("before", "after"):
                scores[name][side]["bits_per_byte"] = None
        file.write_text(json.dumps(scores))
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[1].count("–") >= 2
    policies = json.loads((tmp_path / "out" / "comparison.json").read_text())["policies"]
    assert [policy["bits_per_byte_after"] for policy in policies] == [None, None]


def test_the_terminal_shows_the_best_policy_first_with_its_spread(tmp_path, capsys):
    paths = write_runs(tmp_path / "runs", names=("final_norm", "full"))
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 0
    best, cheapest, _, title, first, second, *_ = capsys.readouterr().out.splitlines()
    assert best.startswith("Best: full, ")
    assert best.endswith("1.5220 ± 0.0028 bits per byte of held-out text.")
    assert cheapest.startswith("Cheapest with 90% of its gain: ")
    assert "python_docs, change" in title
    assert first.startswith("full ")
    assert "1.5220 ± 0.0028" in first
    assert "+0.2100" in first
    assert second.startswith("final_norm")
    assert "0.0000" in second


def test_json_is_alone_on_stdout(tmp_path, capsys):
    paths = write_runs(tmp_path / "runs", names=("full", "norms"))
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_json(tmp_path / "out")


def test_the_frontier_of_a_cost_holds_what_nothing_cheaper_beats(compared):
    on = {
        key: {p["policy"] for p in read_json(compared)["policies"] if p[f"frontier_{key}"]}
        for key in ("parameters", "time", "memory")
    }
    assert on["parameters"] == {"final_norm", "norms", "last_block", "last_2_blocks", "blocks", "full"}
    assert on["time"] == {"final_norm", "last_block", "last_2_blocks", "blocks", "full"}
    assert "embeddings" not in on["memory"]


def test_runs_that_differ_in_their_seed_alone_are_one_policy_and_keep_short_names(tmp_path):
    paths = write_runs(tmp_path, names=("full", "norms"), seeds=(3, 1))
    rows = grouped([read_outcome(path) for path in paths])
    assert [(row.name, [run.seed for run in row.outcomes]) for row in rows] == [("full", [1, 3]), ("norms", [1, 3])]
    assert unique_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert unique_names([Path("/a/norms-lr1e-05-seed0"), Path("/a/full-lr0.1-seed0")]) == ["norms", "full"]
    assert unique_names([Path("/a/full-lr0.01-seed0"), Path("/a/full-lr0.1-seed0")]) == ["full-lr0.01", "full-lr0.1"]


# --- figure and page


def test_every_point_has_its_label_and_no_label_stands_on_another(compared, tmp_path):
    rows = grouped([read_outcome(run["folder"]) for p in read_json(compared)["policies"] for run in p["runs"]])
    canvas = draw_frontier(rows, subtitle(rows), LIGHT)
    assert len(canvas.axes) == 3
    for axes in canvas.axes:
        assert {label.get_text() for label in axes.texts} == set(POLICIES)
        boxes = [(label.get_window_extent(), Text.get_window_extent(label))[1] for label in axes.texts]
        for box, other in itertools.combinations(boxes, 2):
            assert not box.overlaps(other)


def test_the_figure_is_small_and_says_in_words_what_it_shows(compared):
    assert (compared / "frontier.png").stat().st_size < 150_000
    page = (compared / "comparison.html").read_text()
    alt = re.search(r'alt="([^"]+)"', page).group(1)
    assert "from 1.522 to 1.842" in alt
    assert "by seconds a step: final_norm, last_block, last_2_blocks, blocks, full" in alt


def test_the_page_shows_what_comes_from_recipes_and_runs_none_of_it(compared):
    page = (compared / "comparison.html").read_text()
    assert ATTACK not in page
    assert "&lt;script&gt;" in page
    assert page.count("<script") == 1
    assert "All audits passed, 16 runs" in page
    assert "1.888 → 1.522" in page
    for row in read_json(compared)["policies"]:
        assert f">{row['policy']}</td>" in page


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_complaint_or_request_and_its_tables_sort(compared, width):
    file = compared / "comparison.html"
    with Page(width=width) as page:
        page.open(file)
        assert page.complaints() == []
        assert page.requests() == [file.as_uri()]
        assert page.value("document.documentElement.scrollWidth") == width
        assert page.value("document.title") == "out · partialtune"
        names = "[...document.querySelectorAll('#policies tbody tr')].map(row => row.cells[0].textContent)"
        assert page.value(names)[0] == "full"
        page.value("document.querySelectorAll('#policies th button')[1].click()")
        assert page.value(names)[:2] == ["final_norm", "norms"]
        page.value("document.querySelectorAll('#policies th button')[1].click()")
        assert page.value(names)[-1] == "final_norm"
        assert page.complaints() == []


# --- failures and refusals


def test_a_damaged_plan_of_a_run_that_failed_is_named(tmp_path, capsys):
    paths = write_runs(tmp_path / "runs", names=("full", "norms"))
    (Path(paths[1]) / "exit.json").write_text(json.dumps({"code": 4, "reason": "Training diverged"}))
    (Path(paths[1]) / "freeze_plan.json").write_text("{}")
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 2
    assert "freeze_plan.json is damaged: it lists no parameters" in capsys.readouterr().err


def test_a_run_that_failed_is_told_with_its_reason_and_the_others_are_compared(tmp_path, capsys):
    paths = write_runs(tmp_path / "runs", names=("full", "norms"))
    diverged = Path(paths[1])
    (diverged / "exit.json").write_text(json.dumps({"code": 4, "reason": "Training diverged: loss is nan at step 3"}))
    for name in ("audit.json", "evaluation.json", "performance.json"):
        (diverged / name).unlink()
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 4
    out, err = capsys.readouterr()
    assert "1 of 2 failed (exit 4)" in out
    assert "1 of 4 runs failed" in err
    assert "full, seed 1: exit code 4. Training diverged: loss is nan at step 3" in err
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "1 of 4 runs failed" in page
    assert "loss is nan at step 3" in page
    full, norms = read_json(tmp_path / "out")["policies"]
    assert (full["bits_per_byte_after"], full["bits_per_byte_after_sd"]) == (1.52, None)
    assert norms["failed"] == 0

    edit(Path(paths[2]) / "audit.json", lambda audit: audit.update(passed=False))
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 3
    assert "norms, seed 0: exit code 3. the freeze audit failed" in capsys.readouterr().err


def set_sha256(recipe):
    recipe["run"]["sources"][0]["sha256"] = "0" * 64


def set_base(plan):
    for entry in plan["parameters"]:
        entry["sha256_before"] = "0" * 64


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("recipe.yaml", set_sha256, "the text (sha256)"),
        ("recipe.yaml", lambda recipe: recipe.update(block_size=128), "block_size"),
        ("recipe.yaml", lambda recipe: recipe.update(validation_share=0.2), "validation_share"),
        ("recipe.yaml", lambda recipe: recipe["run"]["windows"].update(training=559), "the number of windows"),
        ("freeze_plan.json", set_base, "the base's weights"),
        (
            "evaluation.json",
            lambda scores: scores["validation"]["before"].update(tokens=12749),
            "the scored text validation or its tokens",
        ),
        ("recipe.yaml", lambda recipe: recipe.update(seed=7), "they differ in their seeds"),
        ("recipe.yaml", lambda recipe: recipe.update(data_seed=7), "data_seed"),
    ],
)
def test_runs_on_different_ground_are_refused_and_nothing_is_written(tmp_path, capsys, file, change, named):
    paths = write_runs(tmp_path / "runs", names=("full", "norms"), seeds=(0,))
    edit(Path(paths[1]) / file, change)
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_finished_run_is_refused(tmp_path, capsys):
    full, norms = write_runs(tmp_path / "runs", names=("full", "norms"), seeds=(0,))
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["compare", full, str(tmp_path), *out]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert main(["compare", full, str(FRONTIER), *out]) == 2
    assert f"Its recipes are {FRONTIER}/*.yaml" in capsys.readouterr().err
    assert main(["compare", full, str(FRONTIER / "norms.yaml"), *out]) == 2
    assert "recipes (files) or runs (folders)" in capsys.readouterr().err
    (Path(norms) / "exit.json").write_text('{"code": 143, "reason": "SIGTERM"}')
    assert main(["compare", full, norms, *out]) == 2
    assert "ended with exit code 143 (SIGTERM)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_anything_but_a_comparison_is_not_touched(tmp_path, capsys):
    paths = write_runs(tmp_path / "runs", names=("full",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["compare", *paths, "--output_dir", str(tmp_path / "out")]) == 2
    assert "holds no comparison" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_wrong_options_are_reported_together(tmp_path, capsys):
    words = ["--seeds", "0", "0", "-1", "--learning_rates", "0", "x", "--seed", "3", "--trial_steps", "2"]
    recipe = str(FRONTIER / "norms.yaml")
    assert main(["compare", recipe, "--output_dir", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    for message in ("0 is said twice", "got '-1'", "got '0'", "got 'x'", "--seed: --seeds says it", "nothing to try"):
        assert message in err
    assert not (tmp_path / "out").exists()


def test_recipes_on_different_ground_and_wrong_selectors_are_refused_before_anything_runs(tmp_path, capsys):
    values = yaml.safe_load((FRONTIER / "norms.yaml").read_text())
    other = tmp_path / "other.yaml"
    out = ["--output_dir", str(tmp_path / "out")]
    for change, named in (
        ({"block_size": 128}, "block_size: 256 in"),
        ({"text": "elsewhere.txt"}, "text: ['builtin:python-docs'] in"),
        ({"seed": 5}, "seed: the default in"),
        ({"trainable": ["norms", "blocks[9]"]}, "blocks[9]"),
    ):
        other.write_text(yaml.safe_dump({**values, **change}))
        assert main(["compare", str(FRONTIER / "full.yaml"), str(other), *out]) == 2
        assert named in capsys.readouterr().err
    assert main(["compare", str(FRONTIER / "full.yaml"), *out, "--validation_share", "0"]) == 2
    assert "A comparison is by held-out text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_a_schedule_alone_is_planned_and_its_mistakes_stop_the_comparison_first(tmp_path, capsys):
    values = yaml.safe_load((FRONTIER / "norms.yaml").read_text())
    del values["trainable"]
    file, out = tmp_path / "later.yaml", tmp_path / "out"
    for start, selector, more, said in (
        (40, "blocks[9]", [], "blocks[9]"),
        (40, "blocks[1]", ["--learning_rates", "1e-3", "1e-2", "--trial_steps", "24"], "Raise --trial_steps"),
    ):
        later = [{"from_step": 0, "trainable": ["final_norm"]}, {"from_step": start, "trainable": [selector]}]
        file.write_text(yaml.safe_dump({**values, "schedule": later}))
        assert main(["compare", str(file), "--output_dir", str(out), *more]) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_seeds_of_recipes_may_differ_where_the_comparison_names_its_own(tmp_path):
    values = yaml.safe_load((FRONTIER / "norms.yaml").read_text())
    for seed in (1, 2):
        (tmp_path / f"{seed}.yaml").write_text(yaml.safe_dump({**values, "seed": seed}))
    policies = read_policies([str(tmp_path / f"{seed}.yaml") for seed in (1, 2)])
    check_recipes(policies, own_seeds=False)
    with pytest.raises(InputError) as refused:
        check_recipes(policies)
    assert "  seed: 1 in" in str(refused.value)
    assert "data_seed" not in str(refused.value), "which neither recipe names"


def test_seeds_of_the_order_must_be_the_same_whatever_the_comparison_names(tmp_path):
    values = yaml.safe_load((FRONTIER / "norms.yaml").read_text())
    for seed in (1, 2):
        (tmp_path / f"{seed}.yaml").write_text(yaml.safe_dump({**values, "data_seed": seed}))
    with pytest.raises(InputError, match="data_seed: 1 in"):
        check_recipes(read_policies([str(tmp_path / f"{seed}.yaml") for seed in (1, 2)]), own_seeds=False)
    (tmp_path / "1.yaml").write_text(yaml.safe_dump({**values, "data_seed": 42, "seed": 42}))
    (tmp_path / "2.yaml").write_text(yaml.safe_dump({**values, "seed": 42}))  # the order would follow other seeds
    with pytest.raises(InputError, match=r"data_seed: 42 in .*, none in"):
        check_recipes(read_policies([str(tmp_path / f"{seed}.yaml") for seed in (1, 2)]), own_seeds=False)
    (tmp_path / "1.yaml").write_text(yaml.safe_dump({**values, "seed": 1}))
    check_recipes(read_policies([str(tmp_path / f"{seed}.yaml") for seed in (1, 2)]), own_seeds=False)


def test_a_run_that_is_named_twice_is_refused(tmp_path, capsys):
    run = str(tmp_path)
    assert main(["compare", run, f"{run}/.", "--output_dir", str(tmp_path / "out")]) == 2
    assert "Named more than once" in capsys.readouterr().err


def test_recipes_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "norms.yaml").write_text((FRONTIER / "norms.yaml").read_text())
    named = read_policies([str(tmp_path / folder / "norms.yaml") for folder in ("a", "b")])
    assert [policy.name for policy in named] == ["a-norms", "b-norms"]
    with pytest.raises(RecipeError, match="Named more than once"):
        read_policies([str(FRONTIER / "norms.yaml")] * 2)


# --- runs of recipes

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny GPT-2 with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipes(tmp_path, base):
    """Two small recipes: names -> files."""
    (tmp_path / "text.txt").write_text(TEXT * 100, encoding="utf-8")
    common = {
        "model_name_or_path": str(base),
        "text": str(tmp_path / "text.txt"),
        "eval_texts": {"novel": str(tmp_path / "text.txt")},
        "block_size": 32,
        "output_dir": "unused",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "delta_steps": 1,
        "prompts": [],
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    files = {}
    for name, selectors in (("norms", ["norms"]), ("head", ["final_norm", "head"])):
        files[name] = str(tmp_path / f"{name}.yaml")
        policy = {"trainable": selectors, **({"head": "untied"} if name == "head" else {})}
        Path(files[name]).write_text(yaml.safe_dump({**common, **policy}))
    return files


@pytest.mark.slow
def test_recipes_run_with_the_rate_that_did_best_on_the_end_of_the_training_text(recipes, tmp_path, in_this_process):
    out = tmp_path / "out"
    words = ["--seeds", "0", "1", "--learning_rates", "1e-2", "1e-6", "1e30", "--trial_steps", "3"]
    assert main(["compare", *recipes.values(), "--output_dir", str(out), *words]) == 0
    norms, head = read_json(out)["policies"]
    for policy in (norms, head):
        assert policy["learning_rate"] == 1e-2
        low, good, far = policy["learning_rates_tried"]
        assert low["bits_per_byte"] > good["bits_per_byte"]
        assert far["bits_per_byte"] is None or far["bits_per_byte"] > good["bits_per_byte"]
        assert [run["seed"] for run in policy["runs"]] == [0, 1]
        assert policy["change_novel"] is not None
    assert (head["trainable_parameters"], norms["trainable_parameters"]) == (4096 * 32 + 64, 7 * 64)
    run = out / "runs" / "norms-lr0.01-seed1"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["seed"], recipe["learning_rate"], recipe["max_steps"]) == (1, 0.01, 4)

    # the held-out text is no part of what the trials see
    text = (tmp_path / "text.txt").read_text()
    assert (out / "rates" / "text" / "0.txt").read_text() == split_text(text, 0.1)[0]
    assert len(in_this_process) == 2 + 4

    in_this_process.clear()
    assert main(["compare", *recipes.values(), "--output_dir", str(out), *words]) == 0
    assert in_this_process == []  # nothing is repeated

    more = ["--seeds", "0", "1", "2", *words[3:6], "1e-3", *words[6:]]
    assert main(["compare", *recipes.values(), "--output_dir", str(out), *more]) == 0
    assert [command[0] for command in in_this_process] == [
        *["partialtune.compare.try_rates"] * 2,  # the new rate alone
        *["partialtune"] * 2,  # the new seed alone
    ]
    assert in_this_process[0][2] == "0.001"

    (tmp_path / "text.txt").write_text(text + "And so on.")
    assert main(["compare", *recipes.values(), "--output_dir", str(out), *words]) == 2


@pytest.mark.slow
def test_a_text_that_changed_between_two_calls_is_noticed_before_a_table_is_written(recipes, tmp_path, capsys):
    novel, out = tmp_path / "novel.txt", tmp_path / "out"
    novel.write_text(TEXT * 20, encoding="utf-8")
    words = [*recipes.values(), "--output_dir", str(out), "--eval_texts", f"{{novel: {novel}}}"]
    assert main(["compare", *words, "--seeds", "0"]) == 0
    table = (out / "comparison.json").read_bytes()
    novel.write_text(TEXT * 30, encoding="utf-8")
    assert main(["compare", *words, "--seeds", "0", "1"]) == 2
    assert "differ in the scored text novel or its tokens" in (said := capsys.readouterr().err)
    assert "in another folder (--output_dir)" in said
    assert (out / "comparison.json").read_bytes() == table


def test_a_policy_that_diverges_is_told_and_the_others_go_on(recipes, tmp_path, in_this_process, capsys):
    edit(Path(recipes["norms"]), lambda recipe: recipe.update(learning_rate=1e30))
    out = tmp_path / "out"
    command = ["compare", recipes["norms"], recipes["head"], "--output_dir", str(out)]
    assert main(command) == 4
    assert "1 of 2 runs failed" in capsys.readouterr().err
    norms, head = read_json(out)["policies"]
    assert norms["runs"][0]["code"] == 4
    assert "Training diverged" in norms["runs"][0]["reason"]
    assert head["bits_per_byte_after"] < head["bits_per_byte_before"]

    in_this_process.clear()
    assert main(command) == 4  # it would fail in the same way again
    assert in_this_process == []


def test_a_process_that_crashed_before_it_began_is_a_failed_run(recipes, tmp_path, monkeypatch, capsys):
    def crash(command, log, look):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("Traceback ...\nMemoryError: no memory left")
        return 1

    monkeypatch.setattr(run_queue, "run_child", crash)
    assert main(["compare", recipes["norms"], "--output_dir", str(tmp_path / "out")]) == 1
    assert "norms, seed 42: exit code 1. MemoryError: no memory left" in capsys.readouterr().err
    assert read_json(tmp_path / "out")["policies"][0]["bits_per_byte_after"] is None


@pytest.mark.slow
def test_a_comparison_of_longer_runs_is_not_made_of_shorter_ones(recipes, tmp_path, in_this_process, capsys):
    words = ["compare", recipes["norms"], "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert main([*words, "--max_steps", "6"]) == 2
    assert "ended after fewer max_steps" in capsys.readouterr().err
    assert len(in_this_process) == 1


def test_trials_that_crash_are_told_and_the_runs_go_on(recipes, tmp_path, monkeypatch, capsys):
    asked = []

    def crash_in_trials(command, log, look, *held):
        asked.append(command[2])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("Killed" if command[2].endswith("try_rates") else "Traceback ...\nMemoryError: none left")
        return 137

    monkeypatch.setattr(run_queue, "run_child", crash_in_trials)
    words = ["compare", *recipes.values(), "--learning_rates", "1e-3", "1e-2", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 1
    assert asked == ["partialtune.compare.try_rates"] * 2 + ["partialtune"] * 2
    rates = [policy["learning_rates_tried"] for policy in read_json(tmp_path / "out")["policies"]]
    assert {trial["failure"] for trials in rates for trial in trials} == {"exit code 137: Killed"}


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_repeats_nothing(recipes, tmp_path, warm):
    out = tmp_path / "out"
    words = ["compare", recipes["norms"], recipes["head"], "--output_dir", str(out)]
    begun = out / "runs" / "norms-seed42" / "recipe.yaml"
    comparison = warm.start(words)
    wait_for(begun.is_file, warm.parent, seconds=240)
    os.kill(comparison, signal.SIGKILL)  # its run goes on without it
    assert warm.end() == -signal.SIGKILL
    assert begun.is_file()
    assert main(words) == 0
    norms, head = read_json(out)["policies"]
    assert norms["failed"] == head["failed"] == 0
    logs = {path.stem: path.read_text() for path in (out / "logs").iterdir()}
    assert set(logs) == {"norms-seed42", "head-seed42"}
    for log in logs.values():
        assert log.count("Everything is in") == 1  # each ran once


def test_a_signal_is_passed_on_once_and_waited_for(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))\n"
        "print('ready', flush=True)\n"
        "time.sleep(0.5)\n"
        "time.sleep(0.5)\n"
        "print('saved', flush=True)\n"
    )
    log = tmp_path / "log"
    told = []

    def look():
        if not told and "ready" in log.read_text():
            told.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    run_queue.SECONDS_A_TICK, before = 0.05, run_queue.SECONDS_A_TICK
    try:
        with pytest.raises(Interrupted) as stopped:
            run_queue.run_child([sys.executable, str(script)], log, look)
    finally:
        run_queue.SECONDS_A_TICK = before
    assert stopped.value.exit_code == 143
    assert log.read_text().split() == ["ready", "told", "saved"]


def test_a_run_that_another_process_is_writing_is_waited_for(tmp_path):
    hold = (
        "import fcntl, sys, time\n"
        f"lock = open({str(tmp_path / '.lock')!r}, 'a')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(1)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    run_queue.wait_for_lock(tmp_path, "norms, seed 0")
    assert holder.wait() == 0  # it had ended


def test_a_second_comparison_in_a_folder_is_refused(recipes, tmp_path, capsys):
    with locked(tmp_path / "out"):
        assert main(["compare", *recipes.values(), "--output_dir", str(tmp_path / "out")]) == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_the_bar_moves_with_the_steps_of_the_rate_that_is_being_tried(recipes, tmp_path):
    policy, log = read_policies([recipes["norms"]])[0], tmp_path / "log"
    search = Search(policy, [1e-3, 1e-2], [tmp_path / "text.txt"], 0, None, tmp_path / "norms.json", log)
    assert search.steps_done(search.rates, 30) == 0
    steps = StepsTaken(progress_file(search.file), 1e-3)
    steps.on_step_end(None, SimpleNamespace(global_step=7), None)
    steps.on_step_end(None, SimpleNamespace(global_step=8), None)  # within the same second: the file stays
    assert search.steps_done(search.rates, 30) == 7
    keep_trial(search.file, read_recipe(policy.path, search.command(search.rates)[6:]).values, RateTrial(1e-3, 2.0))
    assert search.steps_done(search.rates, 30) == 30  # the step of a rate that has ended counts no more
    StepsTaken(progress_file(search.file), 1e-2).on_step_end(None, SimpleNamespace(global_step=9), None)
    assert search.steps_done(search.rates, 30) == 39
    assert search.steps_done([1e-2], 30) == 9
    progress_file(search.file).write_text("0.01")
    assert search.steps_done(search.rates, 30) == 30


@pytest.mark.slow
def test_trials_that_outlive_their_comparison_are_waited_for_and_not_made_twice(recipes, tmp_path):
    """The comparison's process is killed, the one that tries rates goes on: the next comparison takes what it finds."""
    trial = tmp_path / "trial.py"
    trial.write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1] + '.begun').touch()\n"
        "time.sleep(1)\n"
        "os.replace(sys.argv[1] + '.found', sys.argv[1])\n"
    )
    search = Search(
        read_policies([recipes["norms"]])[0],
        [1e-3, 1e-2],
        [tmp_path / "text.txt"],
        0,
        None,
        tmp_path / "rates" / "norms.json",
        tmp_path / "log",
    )

    def begin():
        with search.file.with_suffix(".lock").open("a") as held:
            lock(held, sys.exit)
            run_queue.run_child([sys.executable, str(trial), *command[3:]], tmp_path / "first.log", int, held)

    search.file.parent.mkdir()
    command = search.command(search.rates)
    _, _, _, file, rates, *recipe = command
    for rate in rates.split(","):  # what it will find: importing the package there would take most of this test
        values = read_recipe(recipe[0], recipe[1:]).values
        keep_trial(Path(f"{file}.found"), values, RateTrial(float(rate), 2.0))
    comparison = multiprocessing.get_context("fork").Process(target=begin)
    comparison.start()
    deadline = time.monotonic() + 120
    while not Path(f"{search.file}.begun").exists() and comparison.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    comparison.kill()
    comparison.join()
    with run_queue.RunQueue(8) as queue:
        assert [trial.bits_per_byte for trial in queue.search(search)] == [2.0, 2.0]
    assert not search.log.exists()  # nothing was tried again


# --- small parts


def test_words_of_a_run_win_over_those_of_the_comparison():
    words = changed_words(
        ["--seed", "1", "--num_train_epochs", "2", "--prompts", "a b", "c"], {"seed": 2, "max_steps": 5, "text": ["x"]}
    )
    assert words == ["--seed=2", "--prompts", "a b", "c", "--max_steps=5", "--text=x"]
    assert [value_words(value) for value in (True, [], {}, ["a", "b"], 1e-05)] == [
        *(["true"], ["[]"], ["{}"], ["a", "b"], ["1e-05"]),
    ]


def test_the_best_rate_has_the_fewest_bits_and_says_where_the_list_ends():
    trials = [RateTrial(1e-4, 2.0), RateTrial(1e-3, 1.8), RateTrial(1e-2, None, "diverged")]
    assert best_rate(trials) == 1e-3
    assert at_the_end_of_the_list(1e-3, trials) == ""
    assert at_the_end_of_the_list(1e-4, trials) == "smallest"
    assert at_the_end_of_the_list(1e-2, trials) == "largest"
    assert best_rate([RateTrial(1e-2, None, "diverged"), RateTrial(1e-3, None, "diverged")]) == 1e-3


def policy(name, seconds, *after):
    """A row of runs with these scores, one a seed."""
    measures = [Measures(seconds, 600.0, 3.0, one, {}, 1.0, 0.1) for one in after]
    runs = [Outcome(Path(name), {"seed": n}, 100, 10, {}, {}, {}, one, 0, "") for n, one in enumerate(measures)]
    return Row(name, runs)


def test_a_comparison_opens_with_the_best_policy_and_the_cheapest_that_gains_nearly_as_much():
    rows = [
        policy("norms", 0.01, 2.8),
        policy("head", 0.05, 2.09),
        policy("full", 0.2, 2.0, 2.02),
        policy("all", 0.3, 2.05),
    ]
    best, cheapest, empty, *table = comparison_lines(rows).splitlines()
    assert best == "Best: full, 3.000 -> 2.0100 ± 0.0141 bits per byte of held-out text."
    assert cheapest == "Cheapest with 90% of its gain: head, 0.0500 s a step."
    assert empty == ""
    assert [line.split()[0] for line in table] == ["policy", "full", "all", "head", "norms"]
    worse = comparison_lines([policy("full", 0.2, 3.5)]).splitlines()
    assert worse[:2] == ["Best: full, 3.000 -> 3.5000 bits per byte of held-out text.", ""]
