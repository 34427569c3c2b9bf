"""The command line: fast help, one message and exit 2 for bad input, nothing written, output that others can read."""

import json
import os
import subprocess
import sys
import time

import pytest

from conftest import REPOSITORY
from partialtune.cli import main

QUICKSTART = str(REPOSITORY / "recipes" / "quickstart.yaml")


def partialtune(*words, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "partialtune", *words], capture_output=True, text=True, timeout=300, **kwargs
    )


def test_help_takes_less_than_half_a_second_and_names_the_commands():
    partialtune("--help")  # byte code is compiled once
    times = []
    for _ in range(3):
        before = os.times()
        run = partialtune("--help")
        after = os.times()  # its processor time: it waits for nothing but other work on the machine
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert run.returncode == 0
    assert "train" in run.stdout
    assert "plan" in run.stdout
    assert min(times) < 0.5


def test_train_help_lists_the_keys_of_a_recipe():
    run = partialtune("train", "--help")
    assert run.returncode == 0
    assert all(key in run.stdout for key in ("block_size", "trainable", "validation_share", "head"))


def test_no_command_shows_the_help_and_exits_with_2(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_plan_prints_counts_ties_and_where_backward_stops(capsys):
    assert main(["plan", QUICKSTART]) == 0
    out = capsys.readouterr().out
    assert "tied: transformer.wte.weight is lm_head.weight" in out
    assert "backward reaches transformer.wte.weight" in out


def test_plan_json_is_json_alone_on_stdout():
    run = partialtune("plan", QUICKSTART, "--json")
    plan = json.loads(run.stdout)
    assert plan["trainable_parameters"] == sum(e["numel"] for e in plan["parameters"] if e["trainable"])
    assert plan["phases"][0]["backward_from"] == "transformer.wte.weight"


def test_the_command_line_wins_over_the_recipe(capsys):
    assert main(["plan", QUICKSTART, "--trainable", "blocks[-1].norms"]) == 0
    assert "blocks[-1].norms" in capsys.readouterr().out


@pytest.mark.slow
def test_the_wheel_holds_model_templates_and_quickstart_and_runs_from_an_empty_folder(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend builds the wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True, timeout=300)
    wheel = next(tmp_path.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = partialtune("--version", cwd=tmp_path, env=environment)
    assert where.returncode == 0
    (tmp_path / "text.txt").write_text("A module holds functions and classes. " * 200)
    words = ["--max_steps", "1", "--output_dir", "out", "--text", "text.txt", "--block_size", "32"]
    run = partialtune("train", "builtin:quickstart", *words, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert "transformers says" not in run.stderr  # nothing that we do ourselves is warned of
    assert (tmp_path / "out" / "report.html").is_file()
    code = "import partialtune; print(partialtune.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert found.stdout.startswith(str(tmp_path))


def test_a_misspelt_command_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian", "recipe.yaml"])
    assert ended.value.code == 2
    assert "there is no command 'trian'. Did you mean train?" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_looked_for_in_the_folder_of_recipes(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes" / "gpt2").mkdir(parents=True)
    (tmp_path / "recipes" / "gpt2" / "norms.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "norm.yaml"]) == 2
    assert "Did you mean recipes/gpt2/norms.yaml?" in capsys.readouterr().err
    assert main(["plan", "x.yaml"]) == 2
    assert "Those of the project are in recipes." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan recipe.yaml", "generate some/model", "verify builtin:lilliput some/model"])
def test_without_a_network_a_model_of_the_hub_is_one_line_at_once(command, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("partialtune.net.hub_client.constants.ENDPOINT", "https://hub.invalid")  # RFC 2606
    for name in ("https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    values = "{model_name_or_path: some/model, text: t, trainable: [all], output_dir: o}"
    (tmp_path / "recipe.yaml").write_text(values)
    started = time.monotonic()
    assert main(command.split()) == 2
    assert time.monotonic() - started < 10
    said = capsys.readouterr().err.strip()
    assert "some/model" in said
    assert "hub.invalid cannot be reached" in said
    assert len(said.splitlines()) == 1
    assert "thrown while requesting" not in caplog.text
