"""`partialtune bench`: recipes are checked first, measured beside full fine-tuning, and nothing else is written."""

import json
import subprocess

import pytest
import yaml

from partialtune.bench import bench as command
from partialtune.bench.bench import run_variant, run_variants
from partialtune.bench.bench_figure import bench_figure, seconds_by_part
from partialtune.bench.bench_table import bench_json, bench_table, with_ratios
from partialtune.bench.measure import measure
from partialtune.bench.variants import FULL, Variant, last_phase, read_variants
from partialtune.cli import main
from partialtune.errors import InputError
from partialtune.freeze.plan import plan_freeze
from partialtune.training.performance import PARTS

PNG = b"\x89PNG\r\n"


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, gives its path."""

    def write(name="recipe.yaml", **changes) -> str:
        values = {
            "model_name_or_path": "builtin:lilliput",
            "text": "no/such/text.txt",  # which is never read
            "block_size": 16,
            "per_device_train_batch_size": 2,
            "trainable": ["blocks[-1]", "final_norm"],
            "prefix_cache": "off",
            "output_dir": str(tmp_path / "run"),
            **changes,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


def found(label="a.yaml", full=1, seconds=2.0, memory=1000.0, **changes):
    """A measurement, made up."""
    shares = {"data": 0.01, "forward": 0.4, "backward": 0.5, "optimizer": 0.05, "callbacks": 0.04}
    measured = {"median_step_seconds": seconds, "tokens_per_second": 4096 / seconds, "peak_memory_mb": memory}
    counts = {"trainable_parameters": 10, "total_parameters": 40, "tokens_per_step": 4096, "utilisation": 0.61}
    counts |= {"counted_steps": 10, "fastest_step_seconds": seconds - 0.5, "slowest_step_seconds": seconds + 1}
    words = {"precision": "fp32", "device": "cpu, 2 threads", "time_shares": shares}
    return {"label": label, "full": full, **measured, **counts, **words, **changes}


THREE = [
    found(),
    found(FULL, seconds=4.0, memory=4000.0, trainable_parameters=40),
    {"label": "c.yaml", "full": 1, "error": "out of memory"},
]


# --- what is measured


def test_full_fine_tuning_on_the_same_batch_is_measured_once_after_the_recipes(recipe):
    paths = [recipe("a.yaml"), recipe("b.yaml", trainable=["norms"]), recipe("c.yaml", block_size=32)]
    variants = read_variants(paths, [])
    assert [variant.label for variant in variants] == [*paths, FULL, FULL]
    assert [variant.full for variant in variants] == [3, 3, 4, 3, 4]
    assert [variant.values["block_size"] for variant in variants] == [16, 16, 32, 16, 32]
    assert all("trainable" not in variant.values for variant in variants[3:])


def test_a_recipe_that_trains_everything_is_the_one_beside_the_others(recipe):
    paths = [recipe("a.yaml"), recipe("full.yaml", trainable=None, method="full")]
    variants = read_variants(paths, [])
    assert [variant.label for variant in variants] == paths
    assert [variant.full for variant in variants] == [1, 1]


def test_where_the_run_would_decide_whether_its_prefix_is_kept_both_are_measured(recipe):
    path = recipe("a.yaml", prefix_cache="auto")
    variants = read_variants([path, recipe("embeddings.yaml", trainable=["embeddings"], prefix_cache=None)], [])
    assert [variant.label for variant in variants[:2]] == [path, f"{path}, prefix kept"]
    assert [variant.values["prefix_cache"] for variant in variants[:2]] == ["off", "memory"]
    assert len(variants) == 4  # the embeddings have no block below them
    assert {variant.full for variant in variants} == {3}
    random = read_variants([recipe("b.yaml", prefix_cache="auto", window_sampling="random")], [])
    assert len(random) == 3
    noisy = read_variants([recipe("c.yaml", prefix_cache="auto", neftune_noise_alpha=5.0)], [])
    assert len(noisy) == 2


def test_with_the_prefix_kept_its_products_are_neither_done_nor_counted_as_needed(recipe):
    own, kept, _ = read_variants([recipe(prefix_cache="auto")], [])
    whole, above = measure(own.values, steps=3), measure(kept.values, steps=3)
    assert (whole["prefix_cache"], above["prefix_cache"]) == ("off", "memory")
    prefix = 3 * 2 * (2 * 16) * 12 * 192**2  # blocks x products x tokens x matrices of a block
    assert whole["needed_flops"] - above["needed_flops"] == prefix
    attention = 3 * 2 * (2 * 2 * 16 * 16 * 192)  # blocks x products x windows, tokens, tokens, width
    assert whole["flops_per_step"] - above["flops_per_step"] == prefix + attention


def test_what_only_says_where_and_how_long_makes_no_other_full_fine_tuning(recipe):
    paths = [recipe("a.yaml", max_steps=7), recipe("b.yaml", output_dir="elsewhere", save_strategy="no")]
    assert len(read_variants(paths, [])) == 3


def test_what_a_step_does_not_depend_on_makes_no_other_full_fine_tuning(recipe):
    paths = [recipe("a.yaml", learning_rate=1e-3, seed=1), recipe("b.yaml", learning_rate=5e-5, validation_share=0)]
    assert len(read_variants(paths, [])) == 3


def test_words_of_the_command_line_hold_for_every_recipe(recipe):
    variants = read_variants([recipe("a.yaml"), recipe("b.yaml")], ["--block_size", "24"])
    assert {variant.values["block_size"] for variant in variants} == {24}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["blocks[9]"]}, "blocks[9] is out of range"),
        ({"block_sise": 16}, "block_size"),
        ({"block_size": 4096}, "context of"),
        ({"model_name_or_path": "./nowhere"}, "there is no folder"),
    ],
)
def test_a_wrong_recipe_stops_the_bench_before_any_is_measured(recipe, monkeypatch, changes, message):
    monkeypatch.setattr(command, "run_variant", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError) as caught:
        command.bench([recipe("a.yaml"), recipe("wrong.yaml", **changes)], [], steps=2, outputs=[])
    assert message in str(caught.value)


def test_of_a_schedule_the_last_phase_is_measured_from_the_first_step_on(recipe):
    from conftest import tiny_gpt2

    schedule = [{"from_step": 5, "trainable": ["blocks[-1]"]}, {"from_step": 9, "trainable": ["blocks[-2]"]}]
    plan = plan_freeze(tiny_gpt2(), ["final_norm"], schedule=schedule)
    last = last_phase(plan)
    assert [phase.from_step for phase in last.phases] == [0]
    assert last.phases[0].trainable == plan.phases[-1].trainable
    assert {parameter.from_step for parameter in last.parameters if parameter.trainable} == {0}
    assert last.backward_from == plan.backward_from


# --- one measurement


GRADUAL = [{"from_epoch": 0, "trainable": ["final_norm"]}, {"from_epoch": 2, "trainable": ["blocks[-1]"]}]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "max_steps": 500, "warmup_steps": 0.1},
        {"trainable": [], "schedule": GRADUAL},
        {"method": "lora", "trainable": ["attention"], "prefix_cache": None},
    ],
    ids=["plain", "accumulated", "schedule", "lora"],
)
def test_a_measurement_needs_neither_text_nor_weights_and_leaves_nothing(recipe, tmp_path, monkeypatch, changes):
    monkeypatch.setattr("partialtune.model.loading.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    variant = read_variants([recipe(**changes)], [])[0]
    before = sorted(tmp_path.rglob("*"))
    result = measure(variant.values, steps=3)
    assert sorted(tmp_path.rglob("*")) == before
    tokens = 2 * 16 * changes.get("gradient_accumulation_steps", 1)
    assert result["tokens_per_step"] == tokens
    assert result["tokens_per_second"] == pytest.approx(tokens / result["median_step_seconds"])
    counts = {"lora": 4 * (8 * (192 + 576) + 8 * (192 + 192))}
    assert result["trainable_parameters"] == counts.get(changes.get("method"), 444_864 + 384)
    assert sum(result["time_shares"].values()) == pytest.approx(1)
    expected = result["needed_flops"] / result["median_step_seconds"] / result["product_rate"]
    assert result["utilisation"] == pytest.approx(expected)
    assert result["precision"] == "fp32"
    assert result["device"].startswith("cpu")
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("returncode", "message"), [(-9, "ended by SIGKILL, most likely out of memory"), (1, "failed with exit code 1")]
)
def test_a_process_that_ends_early_is_an_entry_and_not_the_end_of_the_bench(monkeypatch, returncode, message):
    ended = subprocess.CompletedProcess([], returncode, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    assert message in run_variant(Variant("a.yaml", 0, {}), steps=2)["error"]


def test_where_nothing_ran_the_reasons_are_the_error(monkeypatch):
    monkeypatch.setattr(command, "run_variant", lambda *_: {"error": "out of memory"})
    with pytest.raises(InputError, match=r"a\.yaml: out of memory\nmethod: full: out of memory"):
        run_variants([Variant("a.yaml", 1, {}), Variant(FULL, 1, {})], steps=2)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process on one device"):
        run_variants([Variant("a.yaml", 0, {})], steps=2)


# --- what is shown


def test_the_table_sets_each_variant_beside_full_and_says_what_did_not_run():
    table = bench_table(with_ratios(THREE), steps=11)
    own, full, failed = table.splitlines()[1:4]
    shown = ["a.yaml", "25%", "2", "1.5–3", "50%", "2,048", "1,000", "25%", "61%"]
    assert own.split() == [*shown, "1%", "40%", "50%", "5%", "4%"]
    assert full.split()[:6] == ["method:", "full", "100%", "4", "3.5–5", "100%"]
    assert failed == "c.yaml: out of memory"
    assert "cpu, 2 threads, fp32, median of 10 steps" in table
    assert "of the whole process" in table
    assert "--steps" not in table


def test_no_ratio_is_shown_where_fewer_than_three_steps_were_counted():
    rows = with_ratios([{**row, "counted_steps": 2} for row in THREE])
    assert [row["of_full"] for row in rows] == [{"time": None, "memory": None}] * 3
    table = bench_table(rows, steps=3)
    assert table.splitlines()[1].split()[:7] == ["a.yaml", "25%", "2", "1.5–3", "2,048", "1,000", "61%"]
    assert "of full: takes 3 counted steps or more, here 2: --steps 4." in table
    assert bench_figure(rows).startswith(PNG)


def test_on_a_gpu_the_table_says_whose_memory_it_is():
    rows = [{**row, "device": "NVIDIA H100"} for row in with_ratios(THREE)]
    assert "of tensors on the GPU" in bench_table(rows, steps=11)


def test_the_json_holds_ratios_and_is_null_where_nothing_is_known():
    content = bench_json(with_ratios([*THREE, {**found("d.yaml", full=2)}]), steps=11)
    assert content["results"][0]["of_full"] == {"time": 0.5, "memory": 0.25}
    assert content["results"][2]["of_full"] == {"time": None, "memory": None}
    assert content["results"][3]["of_full"] == {"time": None, "memory": None}  # its full fine-tuning did not fit
    assert all("full" not in result for result in content["results"])
    json.dumps(content, allow_nan=False)


def test_the_parts_in_the_figure_add_up_to_the_median_step_and_callbacks_come_on_top():
    parts = seconds_by_part(found())
    assert set(parts) == set(PARTS)
    assert sum(parts.values()) - parts["callbacks"] == pytest.approx(2.0)


def test_the_figure_is_a_png_also_with_what_did_not_run():
    assert bench_figure(with_ratios(THREE)).startswith(PNG)


# --- the command


def test_the_command_writes_what_was_asked_for_and_prints_json_alone(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_variant", lambda variant, steps: measure(variant.values, steps))
    monkeypatch.chdir(tmp_path)
    path, figure, data = recipe(), tmp_path / "bench.png", tmp_path / "bench.json"
    capsys.readouterr()
    assert main(["bench", path, "--steps", "2", "--json", "--output", str(figure), "--output", str(data)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(data.read_text())
    assert [result["label"] for result in printed["results"]] == [path, FULL]
    assert [result["counted_steps"] for result in printed["results"]] == [1, 1]
    first = printed["results"][0]
    assert first["fastest_step_seconds"] == first["median_step_seconds"] == first["slowest_step_seconds"]
    assert figure.read_bytes().startswith(PNG)
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.yaml", "bench.png", "bench.json"}


@pytest.mark.slow
def test_each_variant_is_measured_in_a_process_of_its_own(recipe):
    path = recipe(trainable=None, method="full")
    (result,) = run_variants(read_variants([path], []), steps=2)
    assert result["label"] == path
    assert result["trainable_parameters"] == result["total_parameters"]
    assert result["peak_memory_mb"] > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "Take 2 or more"),
        (["--output", "bench.pdf"], "neither in .json nor in .png"),
        (["--output", "nowhere/bench.png"], "no folder that can be written to"),
        (["--learning_rate", "-1"], "learning_rate"),
    ],
)
def test_bad_words_are_refused_before_anything_is_measured(recipe, monkeypatch, capsys, words, message):
    monkeypatch.setattr(command, "run_variant", lambda *_: pytest.fail("measured"))
    assert main(["bench", recipe(), *words]) == 2
    assert message in capsys.readouterr().err
