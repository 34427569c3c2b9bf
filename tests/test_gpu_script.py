"""tests/gpu/run.sh, as far as it can be tried in a moment: `bash tests/gpu/run.sh --small` tries its steps on a CPU."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import REPOSITORY

FOLDER = REPOSITORY / "tests" / "gpu"


@pytest.fixture
def table(monkeypatch):
    """The module of that folder, which is no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import table

    yield table
    del sys.modules["table"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck, which is optional")
def test_shellcheck_has_nothing_to_say():
    check = subprocess.run(["shellcheck", str(FOLDER / "run.sh")], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def called(tmp_path: Path, *words: str, wheels: bool = False) -> tuple[subprocess.CompletedProcess, list[str]]:
    """run.sh of a copy of that folder with these words, and what it had Python do."""
    repository, log = tmp_path / "repository", tmp_path / "calls"
    shutil.copytree(FOLDER, repository / "tests" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    if wheels:
        (repository / "wheels").mkdir()
        (repository / "wheels" / "tokenizers-1-py3-none-any.whl").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@" >>"$CALLS"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(log), "PYTHONPATH": ""}
    command = ["bash", str(repository / "tests" / "gpu" / "run.sh"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done, log.read_text().splitlines() if log.exists() else []


def test_wheels_are_put_before_the_packages_of_a_machine_without_a_network_and_go_with_the_script(tmp_path):
    done, calls = called(tmp_path, str(tmp_path / "out"), wheels=True)
    assert done.returncode == 0, done.stderr
    installed, measured = calls
    assert "pip install" in installed
    assert "--no-index --no-deps" in installed
    assert installed.endswith("tokenizers-1-py3-none-any.whl")
    site = installed.split(" --target ")[1].split()[0]
    assert measured.split()[0] == f"{tmp_path}/repository/src:{site}"
    assert measured.endswith(f"--output {tmp_path}/out/gpu.md")
    assert not Path(site).parent.exists()  # models and runs are taken away with it


def test_a_trial_on_a_cpu_uses_what_is_installed_and_other_words_are_refused(tmp_path):
    done, calls = called(tmp_path / "small", "--small", str(tmp_path / "out"), wheels=True)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 1
    assert calls[0].endswith(f"--output {tmp_path}/out/gpu.md --small")
    done, calls = called(tmp_path / "fetch", "--fetch-wheels")
    assert done.returncode == 0
    assert calls[0].endswith("repository/wheels --python 3.12")
    done, calls = called(tmp_path / "wrong", "--smal")
    assert (done.returncode, calls) == (2, [])
    assert "usage" in done.stderr


def test_a_step_that_fails_or_takes_too_long_is_a_row_and_not_the_end(table, tmp_path, monkeypatch):
    written = []

    def fails(bed):
        raise table.Failed("exit code 4: a | b")

    def sleeps(bed):
        return bed.python("-c", "import time; time.sleep(60)")

    def crashes(bed):
        return bed.python("-c", "raise SystemExit('no | such device')")

    steps = {
        "one": (9, lambda bed: "fine"),
        "two": (9, fails),
        "three": (0.3, sleeps),
        "four": (9, crashes),
        "five": (9, lambda bed: bed.read("main", "audit.json")["passed"]),
        "six": (9, lambda bed: f"{bed.python('-c', 'print(3)')} steps"),
    }
    monkeypatch.setattr(table, "STEPS", steps)
    monkeypatch.setattr(table, "LEAST_SECONDS", 0)
    started = time.monotonic()
    assert table.run_all(table.Bed(tmp_path, small=True), lambda rows: written.append(list(rows))) == 4
    assert time.monotonic() - started < 30
    assert [len(rows) for rows in written] == [1, 2, 3, 4, 5, 6]
    assert [row[1] for row in written[-1]] == ["done", "FAILED", "FAILED", "FAILED", "FAILED", "done"]
    assert [row[2] for row in written[-1]][1:] == [
        "exit code 4: a / b",
        "its time was over",
        "exit code 1: no / such device",
        "the run `main` is not there",
        "3 steps",
    ]


def test_a_step_for_which_no_time_is_left_is_not_begun(table, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "STEPS", {"late": (9, lambda bed: pytest.fail("it was begun"))})
    monkeypatch.setattr(table, "ALL_SECONDS", 1.0)
    rows = []
    assert table.run_all(table.Bed(tmp_path, small=True), rows.extend) == 1
    assert rows[0][:3] == ("late", "FAILED", "not begun: the time is over")


def test_the_time_that_all_steps_may_take_together_is_under_eight_minutes(table):
    assert table.ALL_SECONDS < 8 * 60
    assert set(table.ONLY_ON_A_GPU) < set(table.STEPS)
