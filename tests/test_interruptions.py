"""Killed, terminated, interrupted: what goes on afterwards ends as if nothing had happened, to the bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml

from cluster import WarmProcess, fingerprint, kill, small_recipe
from hub_server import Account, Blob, HubServer
from partialtune.engine.checkpoint_files import ASIDE, checkpoints_in, damage_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_reader": Account("me", role="read")}) as hub:
        yield hub


@pytest.fixture(scope="module")
def warm(tmp_path_factory, hub):
    folder = tmp_path_factory.mktemp("warm")
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        warm = WarmProcess(folder / "log")
        warm.__enter__()
    yield warm
    warm.__exit__(None, None, None)


@pytest.fixture(scope="module")
def home(tmp_path_factory, warm):
    """A recipe, and `whole`: the run of it that was left alone."""
    folder = tmp_path_factory.mktemp("interruptions")
    recipe = small_recipe(folder)
    assert warm.run([*recipe, "--output_dir", str(folder / "whole")]) == 0, warm.log.read_text()
    return folder


def words_for(home: Path, run: Path, *more: str) -> list[str]:
    return ["train", str(home / "recipe.yaml"), "--output_dir", str(run), "--resume_from_checkpoint", "auto", *more]


def test_a_run_killed_three_times_also_while_saving_ends_with_the_same_bits(home, warm, tmp_path):
    run, rng = tmp_path / "run", random.Random(7)
    words = words_for(home, run)
    longest = (home / "whole" / "checkpoint-32").stat().st_mtime - (home / "whole" / "recipe.yaml").stat().st_mtime
    killed = [kill(warm, words, run, rng.uniform(0, longest / 3), in_save=number == 1) for number in range(3)]
    assert None not in killed, warm.log.read_text()
    assert killed[1].saving
    assert warm.run(words) == 0, warm.log.read_text()
    assert fingerprint(run) == fingerprint(home / "whole")
    assert not (run / ASIDE).exists()
    assert len(checkpoints_in(run)) == 3  # save_total_limit
    assert all(damage_of(checkpoint) == [] for checkpoint in checkpoints_in(run))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)],
    ids=lambda value: str(value),
)
def test_a_signal_ends_in_a_checkpoint_a_message_and_its_code_and_the_run_goes_on(home, warm, tmp_path, number, code):
    run, log_before = tmp_path / "run", warm.log.stat().st_size
    words = words_for(home, run)
    process = warm.start(words)
    wait_for_file(run / "checkpoint-4")
    os.kill(process, number)
    sent = time.monotonic()
    assert warm.end() == code
    assert time.monotonic() - sent < 30  # the grace that Kubernetes gives
    said = warm.log.read_text()[log_before:]
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert signal.Signals(number).name in last
    assert "--resume_from_checkpoint auto" in last
    assert json.loads((run / "exit.json").read_text())["code"] == code
    newest = checkpoints_in(run)[-1]
    assert damage_of(newest) == []
    assert warm.run(words) == 0, warm.log.read_text()
    ended, whole = fingerprint(run), fingerprint(home / "whole")
    assert (ended["weights"], ended["losses"]) == (whole["weights"], whole["losses"])
    insights = [json.loads((folder / "insight.json").read_text()) for folder in (run, home / "whole")]
    for insight in insights:  # nothing but the time that it took differs: "before" is the base in both
        assert [insight[part].pop("seconds") for part in ("effective_ranks", "moved_tokens", "learning_curves")]
    assert insights[0] == insights[1]


def test_a_signal_before_the_first_step_ends_with_143_and_the_reason_in_exit_json(home, warm, tmp_path):
    run = tmp_path / "run"
    process = warm.start(words_for(home, run, "--save_steps", "1"))
    wait_for_file(run / "recipe.yaml")  # its folder is begun; the base is being scored
    os.kill(process, signal.SIGTERM)
    assert warm.end() == 143
    assert "SIGTERM: stopped" in json.loads((run / "exit.json").read_text())["reason"]
    log_before = len(warm.log.read_text())
    words = ["train", str(home / "recipe.yaml"), "--output_dir", str(run), "--save_steps", "1"]  # no word of resuming
    assert warm.run(words) == 0, warm.log.read_text()
    assert "it starts again" in warm.log.read_text()[log_before:]
    assert fingerprint(run)["weights"] == fingerprint(home / "whole")["weights"]


def test_a_base_that_moved_on_the_hub_is_taken_at_the_commit_that_the_run_began_with(hub, home, warm, tmp_path):
    first, second = publish(hub, home / "base"), None
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = words_for(home, run, "--model_name_or_path", "me/tiny", "--max_steps", "8", "--schedule", "[]")
    process = warm.start(words)
    wait_for_file(run / "checkpoint-4")
    os.kill(process, signal.SIGKILL)
    warm.end()
    second = publish(hub, home / "base", swap=True)
    assert warm.run(words) == 0, warm.log.read_text()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["base_commit"] == first != second
    words = words_for(home, whole, "--model_name_or_path", "me/tiny", "--max_steps", "8", "--schedule", "[]")
    assert warm.run([*words, "--model_revision", first]) == 0
    assert fingerprint(run) == fingerprint(whole)


def publish(hub: HubServer, base: Path, swap: bool = False) -> str:
    """Put a base on the imitation of the Hub; `swap` gives it other weights. Its commit."""
    repository = hub.repositories.get("me/tiny") or hub.create("me/tiny")
    contents = {path.name: path.read_bytes() for path in base.iterdir()}
    if swap:
        weights = bytearray(contents["model.safetensors"])
        weights[-1] ^= 1
        contents["model.safetensors"] = bytes(weights)
    return repository.commit("main", {name: Blob(len(data), data) for name, data in contents.items()}, "a base")


def wait_for_file(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)
