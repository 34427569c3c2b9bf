"""Real agents of torch that start their processes again, or lose a machine: the run goes on by itself."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster import fingerprint, small_recipe
from fork_server import Agent, ForkServer
from partialtune.errors import InputError
from partialtune.training.launch import store_after_restart
from two_processes import free_port

GO_ON = ["--resume_from_checkpoint", "auto"]
OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new one for each start


@pytest.fixture(scope="module")
def home(warm, tmp_path_factory):
    """A recipe with dropout, and `whole`: the run of two processes that was left alone."""
    folder = tmp_path_factory.mktemp("restarts")
    words = small_recipe(folder, schedule=[], eval_strategy="no", max_steps=48, save_steps=4, prompts=[])
    warm.start_all([*words, "--output_dir", str(folder / "whole")], 2)
    assert warm.end_all() == [0, 0], warm.log.read_text()
    return folder


def words_for(home: Path, run: Path) -> list[str]:
    return ["train", str(home / "recipe.yaml"), "--output_dir", str(run), *GO_ON]


def wait_for(condition: Callable[[], bool], agent: Agent) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert agent.client.poll() is None, agent.said()
        assert time.monotonic() < end, agent.said()
        time.sleep(0.005)


def record(run: Path) -> dict:
    return yaml.safe_load((run / "recipe.yaml").read_text())["run"]


def agents_started(agents: ForkServer, launch: str, words: list[str], folder: Path) -> list[Agent]:
    """Agents of two processes in all, which may start them again."""
    address = f"127.0.0.1:{free_port()}"
    options = ["--nproc_per_node", "2", "--max-restarts", "1"]
    if launch == "accelerate's":
        options += ["--rdzv_backend", "static", "--rdzv_endpoint", address]
    if launch != "two machines":
        return [agents.agent(options, words, folder / "log")]
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "2", "--local-addr", "127.0.0.1"]
    options += ["--rdzv_backend", "c10d", "--rdzv_id", "two", "--rdzv_endpoint", address]
    return [agents.agent(options, words, folder / f"log {number}", environment=OWN_STORES) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun's own", "accelerate's", "two machines"])
def test_when_one_of_two_processes_is_killed_both_are_started_again_and_end_with_the_bits_of_an_undisturbed_run(
    launch, agents, home, tmp_path
):
    run = tmp_path / "run"
    started = agents_started(agents, launch, words_for(home, run), tmp_path)
    wait_for((run / "checkpoint-8").is_dir, started[0])
    processes = [process for agent in started for process in agent.processes()]
    assert len(processes) == 2
    os.kill(processes[1], signal.SIGKILL)
    assert [agent.end() for agent in started] == [0] * len(started), [agent.said() for agent in started]
    said = "".join(agent.said() for agent in started)
    # The agent names the killed process, or the other one, which ends of that before the agent looks again.
    assert re.search(r"failed \(exitcode: (-9|1)\)", said), said
    assert said.count("Going on from") == 1, said
    assert (record(run)["processes"], record(run)["distributed"]) == (2, "MULTI_CPU")
    assert fingerprint(run) == fingerprint(home / "whole")
    assert json.loads((run / "audit.json").read_text())["passed"] is True


@pytest.mark.slow
def test_of_one_to_two_machines_one_comes_later_and_is_lost_again_and_each_step_has_as_many_windows(
    agents, home, tmp_path
):
    run, options = tmp_path / "run", ["--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3"]
    options += ["--rdzv_backend", "c10d", "--rdzv_id", "elastic", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    options += ["--rdzv_conf", "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=6"]
    options += ["--local-addr", "127.0.0.1"]
    words = [*words_for(home, run), "--max_steps", "200", "--gradient_accumulation_steps", "2"]
    words += ["--dataloader_drop_last", "true"]  # on two processes the end of the epoch does not come out even
    first = agents.agent(options, words, tmp_path / "first", environment=OWN_STORES)  # the port is its own
    wait_for((run / "checkpoint-4").is_dir, first)
    assert not list(run.glob("checkpoint-*/rng_state_*.pth"))
    other = agents.agent(options, words, tmp_path / "other", environment=OWN_STORES)
    wait_for(lambda: any(run.glob("checkpoint-*/rng_state_1.pth")), first)
    assert "SIGTERM: saving a checkpoint after this step" in first.said()
    other.lose_machine()
    assert first.end() == 0, first.said()
    assert other.end() == -signal.SIGKILL
    for change in ("the checkpoint is of 1, and now there are 2", "the checkpoint is of 2, and now there are 1"):
        assert change in first.said()
    assert (record(run)["processes"], record(run)["accumulation"]) == (1, 2)
    assert json.loads((run / "checkpoint-200" / "origin.json").read_text())["windows"]["windows a step"] == 8
    reports = [json.loads(line)["step"] for line in (run / "weight_deltas.jsonl").open()]
    assert set(range(4, 201, 4)) <= set(reports)  # and one where SIGTERM came
    assert reports == sorted(reports)
    assert json.loads((run / "audit.json").read_text())["passed"] is True


def test_processes_of_several_machines_that_are_started_again_are_told_how_to_launch(monkeypatch):
    started = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="c10d, on all machines with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        store_after_restart(60)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # a new store for each start
    assert store_after_restart(60) == {}
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert store_after_restart(60) == {}
