"""docs/real-model.md says what its file of results says; the command that fills the file goes on where it stopped."""

import dataclasses
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "benchmarks"))

import smollm2_figures as figures
import smollm2_frontier as frontier
import smollm2_page as pages
import smollm2_statistics as stats
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


def test_every_figure_of_the_page_draws_what_the_file_of_results_gives():
    shown = set(re.findall(r"\]\((real-model-[\w-]+\.png)\)", pages.PAGE.read_text(encoding="utf-8")))
    rows = frontier.read_rows(frontier.RESULTS)
    drawn = {figures.FRONTIER: figures.frontier_digest(rows), figures.BLOCKS_FIGURE: figures.blocks_digest(rows)}
    assert shown == drawn.keys()
    for name, digest in drawn.items():
        with Image.open(pages.PAGE.with_name(name)) as picture:
            assert picture.info[figures.DIGEST] == digest, f"{name} is older than the file of results: --write"


def test_a_figure_says_what_it_draws(tmp_path):
    rows = [row_of(Key("full", 3e-4, seed), held_out_after=0.9 + seed / 100) for seed in (0, 1)]
    rows += [row_of(Key("block_03", frontier.BLOCK_RATE, 0))]
    others = [*rows[:2], row_of(Key("block_03", frontier.BLOCK_RATE, 0), python_after=0.8)]
    for file in figures.draw_figures(rows, tmp_path):
        with Image.open(file) as picture:
            digest = {figures.FRONTIER: figures.frontier_digest, figures.BLOCKS_FIGURE: figures.blocks_digest}[
                file.name
            ]
            assert picture.info[figures.DIGEST] == digest(rows)
    assert figures.frontier_digest(others) == figures.frontier_digest(rows)
    assert figures.blocks_digest(others) != figures.blocks_digest(rows)


def test_the_order_is_middle_rate_then_its_neighbours_then_seeds_then_blocks_and_the_notebook(tmp_path):
    file, ran = tmp_path / "results.csv", []
    policies, count = list(frontier.POLICIES), len(frontier.POLICIES)

    def run(key: Key) -> Row:
        ran.append(key)
        return best_at(2)(key)

    assert frontier.work_through(file, run, hours=1000, inputs="a") == 7 * count + 2 * frontier.BLOCKS + 1
    assert [key.policy for key in ran[:count]] == policies
    assert {key.rate for key in ran[:count]} == {policy.rates[2] for policy in frontier.POLICIES.values()}
    assert [key.seed for key in ran[3 * count : 5 * count]] == [1] * count + [2] * count
    assert [key.policy for key in ran[5 * count :][:3]] == ["block_00", "block_03", "block_06"]
    assert ran[5 * count + frontier.BLOCKS] == Key("notebook", 5e-5, 42)
    assert [key.seed for key in ran if key.policy == "block_03"] == [0, 1]
    assert {key.rate for key in ran[-2 * count :]} == {
        r for p in frontier.POLICIES.values() for r in (p.rates[0], p.rates[4])
    }
    assert len(set(ran)) == len(ran)
    assert frontier.still_to_run(frontier.read_rows(file)) == []


def test_a_rate_that_is_hardly_worse_gets_all_seeds_too(tmp_path):
    file, ran = tmp_path / "results.csv", []
    low, middle, high = frontier.POLICIES["full"].rates[1:4]

    def run(key: Key) -> Row:
        ran.append(key)
        return row_of(key, choice_after={middle: 0.9, high: 0.95, low: 0.902}.get(key.rate, 1.0))

    frontier.work_through(file, run, hours=1000, inputs="a", only=["full"])
    assert [(key.rate, key.seed) for key in ran[3:7]] == [(middle, 1), (middle, 2), (low, 1), (low, 2)]
    table = pages.close_table(frontier.read_rows(file)).splitlines()
    assert [line.split(" | ")[1:3] for line in table[2:]] == [[f"**{middle:g}**", "3"], [f"{low:g}", "3"]]


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
    (summary,) = stats.summaries(frontier.read_rows(file))
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


def three(policy: str, *scores: float) -> list[Row]:
    rate = frontier.POLICIES[policy].rates[2]
    return [row_of(Key(policy, rate, seed), held_out_after=1 - score) for seed, score in enumerate(scores)]


def test_a_difference_is_taken_seed_by_seed():
    # apart by 0.1, 0.1 and 0.13: mean 0.11, standard error 0.01, t = 11 with 2 degrees of freedom; p from a table of t
    found = stats.difference(three("full", 0.3, 0.5, 0.73), three("last_2", 0.2, 0.4, 0.6))
    assert found.mean == pytest.approx(0.11)
    assert found.half == pytest.approx(0.04303, abs=1e-5)
    assert found.chance == pytest.approx(0.0082, abs=5e-5)
    assert stats.difference(three("full", 0.3, 0.5), three("last_2", 0.2, 0.4, 0.6)) is None
    assert stats.difference(three("full", 0.3, 0.5, 0.7), three("full", 0.3, 0.5, 0.7)).chance == 1


def test_of_several_comparisons_holm_takes_the_smallest_first_and_stops():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert stats.holm([0.02, 0.02]) == [True, True]
    assert stats.holm([0.03, 0.03]) == [False, False]
    assert stats.holm([]) == []


def test_only_what_is_different_is_bold():
    rows = [*three("full", 0.3, 0.5, 0.7), *three("last_2", 0.1999, 0.4, 0.6001), *three("head", 0.25, 0.6, 0.69)]
    lines = {line.split(" | ")[0]: line for line in pages.difference_table(rows).splitlines()}
    assert "| **-0.1000 ± 0.0002** |" in lines["| last 2 blocks"]
    assert "| +0.0133 ± 0.1930 |" in lines["| head, untied"]
    assert "all 2 comparisons" in pages.difference_table(rows)


def test_a_rank_correlation_has_the_interval_of_bonett_and_wright():
    low, high = stats.interval(0.5, 30)
    assert (low, high) == (pytest.approx(0.1477, abs=5e-4), pytest.approx(0.7393, abs=5e-4))
    blocks = [
        row_of(Key(f"block_{at:02}", frontier.BLOCK_RATE, seed), held_out_after=0.9 - at / 1000)
        for at in range(10)
        for seed in (0, 1)
    ]
    ranks = {at: (at, -at, 1.0) for at in range(10)}
    lines = pages.correlation_table(blocks, ranks).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        "+1.00 (+1.00 to +1.00)",
        "-1.00 (-1.00 to -1.00)",
        "–",
        "+1.00 (+1.00 to +1.00)",
        *["–"] * 3,  # given the number, nothing is left
        "+1.00 (+1.00 to +1.00)",
    ]


def test_what_a_score_tells_beyond_the_number_of_the_block_is_the_partial_correlation():
    one, other, given = [1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5], [1, 2, 3, 4, 6, 5]
    # ranks: r = 29/35 of one and other, 33/35 of one and given, 31/35 of other and given
    expected = (29 / 35 - 33 / 35 * 31 / 35) / ((1 - (33 / 35) ** 2) * (1 - (31 / 35) ** 2)) ** 0.5
    assert stats.correlation_words(one, other, given).startswith(f"{expected:+.2f} (")


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
