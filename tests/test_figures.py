"""Figures: drawn from a finished run's files alone, and true to them."""

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import pytest
from PIL import Image

from partialtune.errors import InputError
from partialtune.pages.figure_style import WIDTH, spread
from partialtune.pages.figures import KINDS, describe_figures, draw_figures, render_figure
from partialtune.pages.heatmap import MOST_PANELS, chosen_steps, fitted
from partialtune.pages.heatmap_cells import heatmap_cells, lay_out
from partialtune.pages.insight_figures import ranks_by_kind, widest_shift
from partialtune.pages.run_files import read_deltas, read_run
from partialtune.pages.step_figures import by_component, delta_series, held_out_losses, learning_curves, running_mean
from run_folder import write_run_folder

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for
ALWAYS = ["loss.png", "deltas_heatmap.png", "deltas_over_steps.png"]
NOTEBOOK = [name for name in KINDS if name != "effective_ranks.png"]  # no block trains: nothing to show block by block


def last_two(parameter):
    return parameter["block"] in (10, 11) or parameter["component"] == "final_norm"


def biases(parameter):
    return parameter["name"].endswith("bias")


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return read_run(write_run_folder(tmp_path_factory.mktemp("runs") / "gulliver"))


def alts(run):
    return {figure.path.name: figure.alt for figure in describe_figures(run)}


def test_figures_of_1600_pixels_are_drawn_into_the_run_s_folder(tmp_path):
    run = write_run_folder(tmp_path / "run")
    paths = draw_figures(run)
    assert paths == [run / "figures" / name for name in NOTEBOOK]
    for path in paths:
        with Image.open(path) as image:
            assert image.width == 1600
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20, f"{path.name} is empty"


def test_drawing_leaves_the_caller_s_plot_settings_and_figures_alone(tmp_path):
    before = dict(mpl.rcParams)
    draw_figures(write_run_folder(tmp_path / "run", blocks=2, width=8, steps=20))
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1, "held_out": False},
        {"steps": 3, "losses": {1: math.nan, 2: math.inf, 3: -math.inf}, "held_out": False},
        {"blocks": 0},
        {"unmoved": ("transformer.wte.weight", "transformer.wpe.weight"), "trains": lambda p: p["block"] is None},
        {"selectors": (r"/.*\$x_1$/", "!/a{2}/"), "trains": biases},
    ],
    ids=["one step, nothing held out", "no finite loss", "no blocks", "parts that never moved", "dollar signs"],
)
def test_unusual_runs_are_drawn_too(tmp_path, settings):
    run = write_run_folder(tmp_path / "run", **{"blocks": 2, "width": 8, "steps": 20, **settings})
    assert [path.name for path in draw_figures(run) if path.name in ALWAYS] == ALWAYS


def test_a_run_without_log_and_deltas_says_so_in_its_figures(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=2, width=8, steps=5, held_out=False)
    (run / "trainer_state.json").write_text('{"log_history": []}')
    (run / "weight_deltas.jsonl").write_text("")
    draw_figures(run)
    (run / "insight.json").unlink()
    assert list(alts(read_run(run))) == ALWAYS
    assert "no loss was logged" in alts(read_run(run))["loss.png"]
    assert "no deltas were reported" in alts(read_run(run))["deltas_over_steps.png"]


def test_parts_that_a_model_lacks_have_no_cell(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=3, width=8, steps=5)
    plan = json.loads((run / "freeze_plan.json").read_text())
    gone = {"transformer.wpe.weight"} | {f"transformer.h.1.mlp.{part}" for part in ("c_fc.weight", "c_fc.bias")}
    gone |= {f"transformer.h.1.mlp.{part}" for part in ("c_proj.weight", "c_proj.bias")}
    plan["parameters"] = [parameter for parameter in plan["parameters"] if parameter["name"] not in gone]
    (run / "freeze_plan.json").write_text(json.dumps(plan))
    draw_figures(run)
    places = [(cell.group.block, cell.group.component) for cell in heatmap_cells(read_run(run))]
    assert (1, "mlp") not in places
    assert (1, "attention") in places
    assert (None, "embeddings.positions") not in places


def test_frozen_cells_are_exactly_zero_and_trained_ones_hold_the_relative_delta_of_the_group(notebook):
    cells = {(cell.group.block, cell.group.component): cell for cell in heatmap_cells(notebook)}
    frozen = [cell for (block, _), cell in cells.items() if block is not None]
    assert len(frozen) == 36
    assert all(cell.state == "frozen" and cell.relative == 0.0 for cell in frozen)
    lines = [notebook.deltas.last[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")]
    distance = math.hypot(*(line["l2_delta"] for line in lines))
    norm = math.hypot(*(line["l2_delta"] / line["relative_delta"] for line in lines))
    assert cells[None, "final_norm"].relative == pytest.approx(distance / norm, rel=1e-12)


def test_a_part_of_a_group_that_trains_is_told_from_the_whole(tmp_path):
    run = read_run(
        write_run_folder(tmp_path / "run", blocks=2, width=8, steps=20, selectors=("biases",), trains=biases)
    )
    states = {cell.group.label: cell.state for cell in heatmap_cells(run)}
    assert states["block 0 attention"] == "partly"
    assert states["embeddings.tokens"] == "frozen"


def test_a_frozen_part_that_changed_is_not_drawn_as_zero(tmp_path):
    run = read_run(write_run_folder(tmp_path / "run", changed=("transformer.h.3.attn.c_attn.weight",), steps=20))
    states = {cell.group.label: cell.state for cell in heatmap_cells(run)}
    assert states["block 3 attention"] == "changed"
    assert states["block 4 attention"] == "frozen"
    assert "frozen, but changed in 1 block" in alts(run)["deltas_heatmap.png"]
    assert "the frozen part changed" in alts(run)["deltas_over_steps.png"]


@pytest.mark.parametrize("blocks", [1, 12, 96, 200])
def test_cells_of_the_heat_map_lie_side_by_side_within_the_figure(tmp_path, blocks):
    run = read_run(write_run_folder(tmp_path / "run", blocks=blocks, width=8, steps=1, untied=True))
    cells = heatmap_cells(run)
    boxes, rows, height = lay_out(cells)
    assert rows == ["attention", "mlp", "norms"]
    assert all(box.left >= 0 and box.left + box.width <= WIDTH + 1e-9 for box in boxes)
    assert all(box.top >= 0 and box.top + box.height <= height for box in boxes)
    columns = sorted({(round(box.left, 6), round(box.left + box.width, 6)) for box in boxes})
    assert len(columns) == blocks + 4
    assert all(right <= left + 1e-5 for (_, right), (left, _) in pairwise(columns))


def test_held_out_losses_start_before_the_first_step_and_end_with_the_run(notebook):
    losses = held_out_losses(notebook)
    assert losses[0] == (0, 5.385)
    assert losses[-1] == (123, 4.6)
    assert [step for step, _ in losses[1:-1]] == list(range(12, 121, 12))


def test_lines_start_at_zero_and_the_frozen_part_stays_there(notebook):
    series = delta_series(notebook)
    assert [line.label for line in series] == ["embeddings.tokens", "embeddings.positions", "final_norm"]
    assert all(line.steps[0] == 0 and line.values[0] == 0.0 for line in series)
    assert all(
        earlier < later for line in series for earlier, later in zip(line.values[:-1], line.values[1:], strict=True)
    )
    assert "the frozen part stays at exactly 0" in alts(notebook)["deltas_over_steps.png"]


def test_many_groups_become_one_line_a_component(tmp_path):
    run = read_run(write_run_folder(tmp_path / "run", selectors=None, trains=lambda p: True, untied=True, steps=20))
    labels = {line.label for line in delta_series(run)}
    assert labels == {
        "embeddings.tokens", "embeddings.positions", "attention, 12 blocks", "mlp, 12 blocks", "norms, 12 blocks",
        "final_norm", "head",
    }  # fmt: skip
    assert sum(map(len, by_component(run.groups()).values())) == len(run.plan["parameters"])


def test_alt_texts_say_what_the_figures_show(notebook):
    said = alts(notebook)
    assert "held-out loss 5.385 at step 0 and 4.600 at step 123" in said["loss.png"]
    assert "frozen, exactly 0 in 12 blocks" in said["deltas_heatmap.png"]
    assert "embeddings.tokens" in said["deltas_over_steps.png"]
    assert "python_docs 1.749 → 1.793 (+2.5%) on 16 windows" in said["learning_curves.png"]
    assert "at 8 steps" in said["deltas_over_time.png"]
    assert "median 2.0% for tokens that occur 0 times" in said["moved_tokens.png"]
    assert "58.0% became likelier, by +1.13 bits" in said["next_token_shift.png"]
    assert all(len(figure.reading) > 60 for figure in describe_figures(notebook))


def test_small_multiples_show_evenly_spaced_reports_from_the_first_to_the_last():
    assert chosen_steps([10, 20]) == [10, 20]
    steps = chosen_steps(range(10, 1010, 10))
    assert (len(steps), steps[0], steps[-1]) == (MOST_PANELS, 10, 1000)
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 10


@pytest.mark.parametrize("blocks", [0, 4, 96])
def test_the_cells_of_a_panel_fill_its_frame(tmp_path, blocks):
    run = read_run(write_run_folder(tmp_path / "run", blocks=blocks, width=8, steps=20))
    boxes, _, _ = lay_out(heatmap_cells(run))
    frame = replace(boxes[0], left=3.0, top=2.0, width=1.7, height=0.9)
    inside = fitted(boxes, frame)
    assert min(box.left for box in inside) == pytest.approx(3.0)
    assert max(box.left + box.width for box in inside) == pytest.approx(4.7)
    assert min(box.top for box in inside) == pytest.approx(2.0)
    assert max(box.top + box.height for box in inside) == pytest.approx(2.9)


def test_panels_hold_the_deltas_of_their_own_step(notebook):
    early, late = ({c.group.label: c.relative for c in heatmap_cells(notebook, step)} for step in (10, 123))
    assert 0 < early["final_norm"] < late["final_norm"]
    assert late["final_norm"] == {c.group.label: c.relative for c in heatmap_cells(notebook)}["final_norm"]


def test_a_curve_of_the_held_out_text_begins_with_its_score_before_training(notebook):
    curves = {curve.name: curve for curve in learning_curves(notebook)}
    assert list(curves) == ["validation", "training", "python_docs"]
    assert (curves["validation"].steps[0], curves["validation"].values[0]) == (0, pytest.approx(1.8879, abs=1e-4))
    assert curves["validation"].learnt
    assert not curves["python_docs"].learnt
    assert (curves["validation"].sampled, curves["training"].sampled) == (None, 16)


def test_ranks_of_one_kind_of_matrix_are_a_line_over_the_blocks(tmp_path):
    run = read_run(write_run_folder(tmp_path / "run", blocks=11, width=8, steps=5, trains=lambda p: True))
    kinds = ranks_by_kind(run)
    assert list(kinds) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert all(list(blocks) == list(range(11)) for blocks in kinds.values())
    draw_figures(run.folder)
    assert "attn.c_attn" in alts(run)["effective_ranks.png"]


def test_the_histogram_of_shifts_reaches_as_far_as_they_do():
    edges = [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert widest_shift(edges, [0, 1, 5, 5, 0, 0]) == 2.0
    assert widest_shift(edges, [0, 1, 5, 5, 1, 0]) == 3.0


def test_a_run_from_before_there_was_insight_has_its_other_figures(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=2, width=8, steps=20)
    (run / "insight.json").unlink()
    assert {"moved_tokens.png", "next_token_shift.png"}.isdisjoint(path.name for path in draw_figures(run))


def test_the_dark_figure_has_a_dark_ground(notebook):
    for figure in describe_figures(notebook):
        for dark, most in ((True, lambda level: level < 60), (False, lambda level: level > 240)):
            with Image.open(io.BytesIO(render_figure(notebook, figure, dark))) as image:
                assert most(image.convert("L").getpixel((1, 1)))


def test_labels_are_moved_apart_in_their_order():
    assert spread([0.0, 0.01, 0.5], gap=0.1) == pytest.approx([0.0, 0.1, 0.5])
    close = spread([0.99, 0.98, 0.97, 0.0], gap=0.1)
    assert close == pytest.approx([1.0, 0.9, 0.8, 0.0])
    assert spread([], gap=0.1) == []


def test_the_running_mean_takes_fewer_values_at_the_start():
    assert running_mean([4.0, 2.0, 3.0, 1.0], window=2) == [4.0, 3.0, 2.5, 2.0]


def test_a_step_that_was_reported_twice_counts_with_its_later_lines():
    line = {"step": 10, "name": "a", "l2_delta": 1.0, "relative_delta": 0.1, "max_abs_delta": 0.5}
    deltas = read_deltas(
        "\n".join(json.dumps(entry) for entry in (line, {**line, "l2_delta": 2.0, "relative_delta": 0.2}))
    )
    assert deltas.steps == (10,)
    assert deltas.l2_delta(["a"], 10) == 2.0
    assert deltas.relative_delta(["a"], 10) == pytest.approx(0.2)


def test_a_relative_delta_is_unknown_where_every_norm_before_was_zero():
    line = {"step": 1, "name": "bias", "l2_delta": 1.0, "relative_delta": None, "max_abs_delta": 0.5}
    deltas = read_deltas(json.dumps(line))
    assert deltas.relative_delta(["bias"], 1) is None
    assert deltas.l2_delta(["bias"], 1) == 1.0


def test_a_folder_that_is_no_finished_run_is_refused_by_name_of_what_it_lacks(tmp_path):
    (tmp_path / "recipe.yaml").write_text("text: a.txt\n")
    with pytest.raises(InputError, match=r"no freeze_plan\.json, audit\.json"):
        draw_figures(tmp_path)


READ = ("recipe.yaml", "freeze_plan.json", "audit.json", "evaluation.json", "performance.json", "insight.json")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("content", ['{"validation": ', "null", "[]", "1", '"x"'])
def test_a_damaged_file_is_named(tmp_path, name, content):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1)
    (run / name).write_text(content)
    with pytest.raises(InputError, match=rf"{re.escape(name)} is damaged"):
        draw_figures(run)


def test_a_plan_without_parameters_is_damaged(tmp_path):
    run = write_run_folder(tmp_path / "run", blocks=1, width=8, steps=1)
    (run / "freeze_plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"freeze_plan\.json is damaged: it lists no parameters"):
        draw_figures(run)


def test_the_modules_load_without_matplotlib():
    code = "import sys, partialtune.pages.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
