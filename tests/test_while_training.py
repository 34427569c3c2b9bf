"""While it trains: samples of the prompts and a page that can be watched, and not a bit of the training is changed."""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from chromium import Page, needs_chromium
from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.pages import report
from partialtune.pages.report import write_report
from partialtune.pages.report_tables import sample_history
from partialtune.pages.run_files import read_run
from partialtune.recipe_run import while_training
from partialtune.recipe_run.train import recorded_end
from partialtune.recipe_run.while_training import words_of
from partialtune.run_folder import locked
from partialtune.scoring.prompts import continue_prompts, probe_prompts

WHOLE_RUNS = True  # what `quick_runs` in conftest.py looks for: samples are taken
PROMPTS = ["It was", "The child had not been the"]
STEPS = [0, 2, 4, 6]
REFRESH = re.compile(r'<meta http-equiv="refresh" content="(\d+)">')


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A small recipe with dropout as words of the command line; it evaluates and saves every second step."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "text.txt").write_text("It was a fine day, and the child went on to the next.\n" * 200)
    values = {
        "model_name_or_path": str(folder / "base"),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm", "embeddings"],
        "output_dir": str(folder / "run"),
        "max_steps": 6,
        "eval_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "prompts": PROMPTS,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """The same run with samples and pages, and without: their folders, and the pages that were written meanwhile."""
    folder, pages = tmp_path_factory.mktemp("runs"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partialtune.pages.figures.render_figure", lambda *_, **__: b"not drawn")
        patch.setattr("partialtune.pages.report.render_figure", lambda *_, **__: b"not drawn")
        assert main(["train", recipe, "--output_dir", str(folder / "without"), "--sample_steps", "0"]) == 0

        def keep(*args, **kwargs):
            pages.append(report.write_report(*args, **kwargs).read_text())

        patch.setattr(while_training, "FIRST_PAGE_SECONDS", 0.0)
        patch.setattr(while_training, "PAGE_SHARE", 1e9)
        patch.setattr(while_training, "write_report", keep)
        out = ["--output_dir", str(folder / "with"), "--report_to", "tensorboard", "--save_total_limit", "3"]
        assert main(["train", recipe, *out]) == 0
    return folder / "with", folder / "without", pages


def test_a_run_with_samples_and_pages_has_the_bits_of_one_without(runs):
    shown, plain, pages = runs
    assert len(pages) == 2
    assert not (plain / "samples.jsonl").exists()
    for name in ("model.safetensors", "weight_deltas.jsonl"):
        assert (shown / name).read_bytes() == (plain / name).read_bytes(), name
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt"):
        one, other = (
            torch.load(run / "checkpoint-6" / name, map_location="cpu", weights_only=False) for run in (shown, plain)
        )
        assert str(one) == str(other), name
    states = torch.load(shown / "checkpoint-6" / "rng_state.pth", weights_only=False)
    others = torch.load(plain / "checkpoint-6" / "rng_state.pth", weights_only=False)
    assert torch.equal(states["cpu"], others["cpu"])
    assert states["python"] == others["python"]
    losses = [[e["loss"] for e in read(run, "trainer_state.json")["log_history"] if "loss" in e] for run in runs[:2]]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    scores = [read(run, "evaluation.json") for run in runs[:2]]
    assert scores[0] == scores[1]


def test_each_evaluation_adds_a_line_a_prompt_and_the_ends_are_the_continuations_of_the_evaluation(runs):
    shown, *_ = runs
    found = rows(shown)
    assert [(row["step"], row["prompt"]) for row in found] == [(step, one) for step in STEPS for one in PROMPTS]
    evaluated = {entry["prompt"]: entry for entry in read(shown, "evaluation.json")["prompts"]}
    for row in found:
        entry = evaluated[row["prompt"]]
        if row["step"] in (0, 6):
            assert row["continuation"] == entry["continuation_before" if row["step"] == 0 else "continuation_after"]
    assert len({row["continuation"] for row in found}) > 2  # it learns
    assert read(shown, "performance.json")["samples_seconds"] > 0
    log = json.dumps(read(shown, "trainer_state.json")["log_history"])
    assert "continuation" not in log
    assert "sample" not in log.replace("samples_per_second", "")


def test_the_page_of_a_run_that_goes_on_says_so_and_loads_itself_again_and_the_last_does_not(runs):
    shown, _, pages = runs
    for step, page in zip((2, 4), pages, strict=True):
        assert REFRESH.search(page).group(1) == "30"
        assert f"Still training: step {step} of 6" in page
        assert f'<td class="number">{step}</td>' in page or f" to {step}</td>" in page  # a sample of that step
        assert "Audit passed" not in page
        assert re.search(r"written \d+ \w+ \d{4}, \d\d:\d\d:\d\d UTC", page)
        assert "<h2>Loss</h2>" in page
    last = (shown / "report.html").read_text()
    assert not REFRESH.search(last)
    assert "Audit passed" in last
    assert "Still training" not in last
    assert last.index("<h2>One prompt") < last.index("<h2>What it learnt") < last.index("<h2>What it wrote while")


@pytest.fixture
def killed(runs, recipe, tmp_path):
    """The folder of the run as a kill at its fifth step would have left it, with half a line of a sample."""
    shown, *_ = runs
    folder = tmp_path / "killed"
    shutil.copytree(shown, folder)
    kept = {"recipe.yaml", "freeze_plan.json", "weight_deltas.jsonl", "samples.jsonl", "report.html"}
    for path in folder.iterdir():
        if path.is_file() and path.name not in kept:
            path.unlink()
    shutil.rmtree(folder / "checkpoint-6")
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "prompt": "It')
    return folder


@pytest.mark.usefixtures("undrawn")
def test_a_killed_run_has_a_page_that_says_how_far_it_came(killed, capsys):
    (killed / "report.html").unlink()
    assert main(["report", str(killed)]) == 0
    assert capsys.readouterr().out.strip() == str(killed / "report.html")
    page = (killed / "report.html").read_text()
    assert "Not finished: step 4 of 6" in page  # as in its newest checkpoint
    assert "resume_from_checkpoint auto" in page
    assert "without a word" in page
    assert "Audit passed" not in page
    assert not REFRESH.search(page)
    assert not (killed / "README.md").exists()  # a card is of a model that is finished
    with locked(killed):
        assert main(["report", str(killed)]) == 0
    page = (killed / "report.html").read_text()
    assert "Still training: step 4 of 6" in page
    assert REFRESH.search(page)


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_has_each_step_once_and_a_page_that_cannot_be_written_ends_nothing(
    killed, runs, recipe, monkeypatch, caplog
):
    shown, *_ = runs
    monkeypatch.setattr(while_training, "FIRST_PAGE_SECONDS", 0.0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(while_training, "write_report", full)
    shutil.rmtree(killed / "checkpoint-4")
    words = ["--save_total_limit", "3", "--resume_from_checkpoint", "auto"]
    assert main(["train", recipe, "--output_dir", str(killed), *words]) == 0
    assert (killed / "samples.jsonl").read_bytes() == (shown / "samples.jsonl").read_bytes()
    assert (killed / "model.safetensors").read_bytes() == (shown / "model.safetensors").read_bytes()
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert said.count("report.html could not be written: OSError: [Errno 28] No space left on device.") == 1
    assert "Step 4 of 6, the most probable continuations:\n  'It was' -> '" in said
    assert "Audit passed" in (killed / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_ends_by_an_error_leaves_no_page_that_says_it_goes_on(killed):
    write_report(killed, training=True)
    assert REFRESH.search((killed / "report.html").read_text())
    with pytest.raises(RuntimeError), recorded_end(killed):
        raise RuntimeError("The sky fell")
    page = (killed / "report.html").read_text()
    assert "Not finished: step 4 of 6" in page
    assert "The sky fell." in page
    assert not REFRESH.search(page)
    before = (killed / "report.html").stat().st_mtime_ns
    with pytest.raises(RuntimeError), recorded_end(killed):
        raise RuntimeError("Again")
    assert (killed / "report.html").stat().st_mtime_ns == before  # no page that is not of a run which went on


@pytest.mark.usefixtures("undrawn")
def test_more_steps_of_a_finished_run_show_no_verdict_of_the_shorter_one(runs, tmp_path):
    shown, *_ = runs
    shutil.copytree(shown, tmp_path / "run")
    (tmp_path / "run" / "exit.json").unlink()
    page = write_report(tmp_path / "run", training=True).read_text()
    assert "Still training: step 6 of 6" in page
    assert "Audit passed" not in page
    assert "One prompt, before and after" not in page


def test_continuing_prompts_leaves_modes_random_numbers_and_settings_as_they_were(recipe):
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    model = tiny_gpt2(vocab_size=len(tokenizer))
    model.train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    settings, weights = model.generation_config, {k: v.clone() for k, v in model.state_dict().items()}
    found = continue_prompts(model, tokenizer, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert found == [probe.continuation for probe in probe_prompts(model, tokenizer, PROMPTS)]
    assert continue_prompts(model, tokenizer, PROMPTS[:1]) == found[:1]


def test_the_log_shows_three_prompts_and_the_end_of_a_long_one():
    words = words_of(1200, 5000, ["a", "b" * 50, "c", "d", "e"], ["1\n2", "2", "3", "4", "5"])
    assert words.splitlines() == [
        "Step 1,200 of 5,000, the most probable continuations:",
        "  'a' -> '1\\n2'",
        f"  {'...' + 'b' * 40!r} -> '2'",
        "  'c' -> '3'",
        "  and 2 more in samples.jsonl",
    ]


@pytest.mark.parametrize("steps", ["-1", "1.5", "often"])
def test_sample_steps_is_a_number_of_steps(recipe, steps, capsys):
    assert main(["train", recipe, "--sample_steps", steps]) == 2
    assert "sample_steps" in capsys.readouterr().err


def test_a_history_of_many_steps_is_five_rows_of_changes(runs):
    run = read_run(runs[0])
    run.samples.clear()
    run.samples["It was"] = {step: f" text {step // 100}" for step in range(0, 2001, 10)}
    ((prompt, shown),) = sample_history(run)
    assert prompt == "It was"
    assert [steps for steps, _ in shown] == ["0 to 90", "500 to 590", "1,000 to 1,090", "1,500 to 1,590", "2,000"]
    assert shown[-1][1] == " text 20"


@needs_chromium
def test_the_page_of_a_run_that_goes_on_is_readable_in_a_browser(killed):
    lines = [
        json.dumps({"step": step, "prompt": one, "continuation": f" {step} and the other" * 7}) + "\n"
        for step in range(0, 60, 10)
        for one in PROMPTS
    ]
    (killed / "samples.jsonl").write_text("".join(lines))
    page = write_report(killed, training=True)
    for width, height in ((1280, 900), (390, 844)):
        with Page(width=width, height=height) as browser:
            browser.open(page)
            assert browser.complaints() == []
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.getElementById('samples').getBoundingClientRect().height") <= height
            assert browser.value("document.querySelector('.samples').getBoundingClientRect().right") <= width
            assert browser.value("document.querySelectorAll('#learning img').length") >= 1
            assert browser.value("document.getElementById('stale').hidden") is True


@needs_chromium
def test_a_page_that_was_not_written_again_for_long_says_that_the_run_may_have_been_killed(killed):
    page = write_report(killed, training=True)
    text = page.read_text()
    page.write_text(re.sub(r'data-written="(\d+)"', lambda found: f'data-written="{int(found[1]) - 1260}"', text))
    with Page() as browser:
        browser.open(page)
        assert browser.complaints() == []
        said = browser.value("document.getElementById('stale').innerText")
    assert said.startswith("It was last written 21 minutes ago.")


# ---- several processes ----------------------------------------------------------------------------------------------


SMALL = ("--dropout", "0", "--learning_rate", "5e-5")
SAMPLED = ("--sample_steps", "3")


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory, warm):
    """The samples of a run on one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    warm.start_all(["train", recipe, "--output_dir", str(out), *SMALL, *SAMPLED], 1)
    assert warm.end_all() == [0], warm.log.read_text()[-3000:]
    return rows(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MULTI_CPU", "FSDP"])
def test_two_processes_write_the_samples_of_one_and_train_to_the_same_bits_without(recipe, tmp_path, warm, alone, kind):
    """Under DDP the main process continues the prompts while the other waits; of shards both gather the weights."""
    first = ["fsdp_on_cpu:let_accelerate_shard"] if kind == "FSDP" else []
    for name, more in {"sampled": SAMPLED, "quiet": ["--sample_steps", "0"]}.items():
        words = [*SMALL, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / name)]
        warm.start_all(["train", recipe, *words, *more], 2, first)
        assert warm.end_all() == [0, 0], warm.log.read_text()[-3000:]
        record = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())["run"]
        assert (record["distributed"], record["processes"]) == (kind, 2)
    assert [row["step"] for row in alone] == [0, 0, 3, 3, 6, 6]
    assert rows(tmp_path / "sampled") == alone
    assert not (tmp_path / "quiet" / "samples.jsonl").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sampled", "quiet")]
    assert weights[0] == weights[1]
