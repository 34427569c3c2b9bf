"""docs/real-model.md says what its file of results says; the command that fills the file goes on where it stopped."""

import dataclasses
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))

import smollm2_frontier as frontier
import smollm2_page as pages
from smollm2_frontier import Key, Row

from test_recipes import model_of

INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"


def row_of(key: Key, **figures) -> Row:
    before = {f"{text}_before": 1.0 for text in ("held_out", "choice", "python", "novel")}
    after = {f"{text}_after": 0.9 for text in ("held_out", "choice", "python", "novel")}
    known = {**before, **after, "trainable": 576, "total": 134_515_008, "run_seconds": 100.0, "inputs": "a"}
    return Row(key.policy, key.rate, key.seed, frontier.STEPS, **{**known, **figures})


def best_at(place: int):
    """Runs whose choice text scores best at this place of the five rates, all others worse with the distance."""

    def run(key: Key) -> Row:
        if key.policy not in frontier.POLICIES:
            return row_of(key)
        away = abs(frontier.POLICIES[key.policy].rates.index(key.rate) - place)
        return row_of(key, choice_after=0.9 + away / 100)

    return run


def test_the_tables_of_the_page_are_those_that_the_file_of_results_gives():
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.filled(page, pages.sections(frontier.RESULTS)) == page


def test_every_figure_of_the_page_is_one_that_the_command_draws(tmp_path):
    shown = set(re.findall(r"\]\((real-model-[\w-]+\.png)\)", pages.PAGE.read_text(encoding="utf-8")))
    drawn = pages.draw_figures(frontier.read_rows(frontier.RESULTS), {}, tmp_path)
    assert shown == {file.name for file in drawn}


def test_the_order_is_middle_rate_then_its_neighbours_then_seeds_then_blocks_and_the_notebook(tmp_path):
    file, ran = tmp_path / "results.csv", []
    policies, count = list(frontier.POLICIES), len(frontier.POLICIES)

    def run(key: Key) -> Row:
        ran.append(key)
        return best_at(2)(key)

    assert frontier.work_through(file, run, hours=1000, inputs="a") == 7 * count + frontier.BLOCKS + 1
    assert [key.policy for key in ran[:count]] == policies
    assert {key.rate for key in ran[:count]} == {policy.rates[2] for policy in frontier.POLICIES.values()}
    assert [key.seed for key in ran[3 * count : 5 * count]] == [1] * count + [2] * count
    assert [key.policy for key in ran[5 * count :][:3]] == ["block_00", "block_03", "block_06"]
    assert ran[5 * count + frontier.BLOCKS] == Key("notebook", 5e-5, 42)
    assert {key.rate for key in ran[-2 * count :]} == {
        r for p in frontier.POLICIES.values() for r in (p.rates[0], p.rates[4])
    }
    assert len(set(ran)) == len(ran)
    assert frontier.still_to_run(frontier.read_rows(file)) == []


def test_a_rate_at_the_edge_of_those_tried_has_its_outer_neighbour_tried_before_any_seed(tmp_path):
    file, ran = tmp_path / "results.csv", []

    def run(key: Key) -> Row:
        ran.append(key)
        return best_at(4)(key)

    frontier.work_through(file, run, hours=1000, inputs="a", only=["full"])
    rates = frontier.POLICIES["full"].rates
    assert [(key.rate, key.seed) for key in ran] == [
        *((rates[place], 0) for place in (2, 3, 4)),
        (rates[4], 1),
        (rates[4], 2),
        (rates[1], 0),
        (rates[0], 0),
    ]
    (summary,) = pages.summaries(frontier.read_rows(file))
    assert (summary.rate, summary.at_edge, len(summary.rows)) == (rates[4], True, 3)


def test_what_the_file_holds_is_left_out_and_a_torn_last_line_is_run_again(tmp_path):
    file, first = tmp_path / "results.csv", list(frontier.plan([]))[:3]
    for key in first:
        frontier.append_row(file, row_of(key))
    torn = file.read_bytes()[:-20]  # killed as the third line was written
    file.write_bytes(torn)
    assert [row.key for row in frontier.read_rows(file)] == first[:2]
    assert frontier.next_run(frontier.read_rows(file)) == first[2]
    frontier.append_row(file, row_of(first[2], held_out_after=0.123456789))
    rows = frontier.read_rows(file)
    assert [row.key for row in rows] == first
    assert rows[2].held_out_after == 0.123457
    assert rows[2] == dataclasses.replace(row_of(first[2]), held_out_after=0.123457)


def test_no_run_is_begun_that_would_end_too_late(tmp_path):
    file, now = tmp_path / "results.csv", [0.0]

    def run(key: Key) -> Row:
        now[0] += 100
        return row_of(key)

    ran = frontier.work_through(file, run, hours=0.1, only=["full"], inputs="a", clock=lambda: now[0])
    assert ran == 3  # 360 seconds; a fourth run of 100 would end at 400
    assert frontier.work_through(file, run, hours=0.02, only=["full"], inputs="a", clock=lambda: now[0]) == 0


def test_a_file_of_another_base_is_refused(tmp_path):
    file = tmp_path / "results.csv"
    frontier.append_row(file, row_of(Key("full", 1e-4, 0), inputs="another"))
    with pytest.raises(SystemExit, match="another base, text or length"):
        frontier.work_through(file, best_at(2), hours=1, inputs="a")


def test_a_difference_is_called_one_only_where_welchs_test_finds_it():
    # t = 2.45 with 4 degrees of freedom: beyond twice the standard error, and within the 2.78 of chance
    assert not pages.differ([1.0, 1.1, 0.9], [1.2, 1.3, 1.1])
    assert pages.differ([1.0, 1.0], [1.1, 1.1])
    assert pages.differ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9])
    assert not pages.differ([1.0, 1.1, 0.9], [1.05, 1.2, 0.95])
    assert pages.differ([1.0], [2.0, 2.1]) is None
    runs = [
        row_of(Key(name, 3e-4, seed), held_out_after=0.9 + seed / 100)
        for name in ("full", "last_2")
        for seed in (0, 1, 2)
    ]
    assert pages.claims(runs) in (
        "- The gain of *everything* is not told apart from that of *last 2 blocks*.",
        "- The gain of *last 2 blocks* is not told apart from that of *everything*.",
    )


def test_a_rank_correlation_has_the_interval_of_bonett_and_wright():
    low, high = pages.interval(0.5, 30)
    assert (low, high) == (pytest.approx(0.1477, abs=5e-4), pytest.approx(0.7393, abs=5e-4))
    blocks = [row_of(Key(f"block_{at:02}", frontier.BLOCK_RATE, 0), held_out_after=0.9 - at / 1000) for at in range(10)]
    ranks = {at: (at, -at, 1.0) for at in range(10)}
    lines = pages.correlation_table(blocks, ranks).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        "+1.00 (+1.00 to +1.00)",
        "-1.00 (-1.00 to -1.00)",
        "–",
        "+1.00 (+1.00 to +1.00)",
    ]


def test_a_token_with_a_bar_or_a_backtick_breaks_no_table():
    assert pages._shown(' a|b`<"') == '<code>" a&#124;b`&lt;\\""</code>'


def test_the_notebooks_policy_has_as_many_parameters_as_eight_blocks():
    from partialtune.freeze.recipe_plan import plan_of_recipe
    from partialtune.recipe.recipe import recipe_from_values

    counts = {}
    for name in ("embeddings", "last_8", "first_2", "middle_2", "rows"):
        values = {**Key(name, 1e-4, 0).recipe(), "model_name_or_path": INSTRUCT, "text": "x", "output_dir": "x"}
        freeze = recipe_from_values(values).freeze
        counts[name] = plan_of_recipe(model_of(INSTRUCT), freeze, freeze.schedule).trainable_parameters
    assert counts == {
        "embeddings": 28_312_128,
        "last_8": 28_321_344,
        "first_2": 7_080_768,
        "middle_2": 7_080_768,
        "rows": 4096 * 576 + 576,
    }


@pytest.mark.slow
def test_the_command_killed_within_a_run_goes_on_with_it(tmp_path):
    words = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / "smollm2_frontier.py"), "--only", "final_norm"]
    words += ["--model", "builtin:lilliput", "--text", str(REPOSITORY / "recipes/frontier/voyage_to_lilliput.txt")]
    words += ["--results", str(tmp_path / "results.csv"), "--work", str(tmp_path / "work"), "--precision", "fp32"]
    killed = subprocess.Popen(words, start_new_session=True)
    recipe = tmp_path / "work" / "run" / "recipe.yaml"
    while not recipe.is_file():
        assert killed.poll() is None
        time.sleep(0.1)
    killed.send_signal(signal.SIGTERM)  # the run that it has begun ends with it
    assert killed.wait(60) == 128 + signal.SIGTERM
    assert not (tmp_path / "results.csv").exists()
    subprocess.run([*words, "--runs", "1"], check=True)
    (row,) = frontier.read_rows(tmp_path / "results.csv")
    assert row.key == Key("final_norm", frontier.POLICIES["final_norm"].rates[2], 0)
    assert row.held_out_after < row.held_out_before
    assert (row.trainable, row.failure) == (384, "")
    assert row.step_seconds > 0
    assert row.peak_mb > 0
    assert not (tmp_path / "work" / "run").exists()
