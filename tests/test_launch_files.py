"""recipes/launch: each file starts what it says, and the SLURM script queues a job again only where it may."""

import json
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster import fingerprint, slurm, small_recipe, wait_for
from conftest import REPOSITORY
from fork_server import PARTIALTUNE, client
from fork_server import TORCHRUN as AGENT
from test_launch import resolved

LAUNCH = REPOSITORY / "recipes" / "launch"
SCRIPT = LAUNCH / "multi_node.sbatch"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "cpu_two_processes", "multi_node"])
def test_a_configuration_resolves_to_what_its_comments_say(name):
    args = resolved(config=LAUNCH / f"{name}.yaml")
    others = {"cpu_two_processes": (1, 2), "multi_node": (2, 8)}
    assert (args.num_machines, args.num_processes) == others.get(name, (1, 4))
    assert args.mixed_precision == "no"
    assert bool(args.use_fsdp) == (name == "fsdp2")
    assert bool(args.multi_gpu) == (name != "fsdp2")
    assert not args.use_deepspeed
    if name == "fsdp2":
        assert str(args.fsdp_version) == "2"
        assert args.fsdp_state_dict_type == "SHARDED_STATE_DICT"


def test_machine_rank_and_address_win_over_the_file_for_several_machines():
    args = resolved("--machine_rank", "1", "--main_process_ip", "10.0.0.7", config=LAUNCH / "multi_node.yaml")
    assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "10.0.0.7", 29500)


# ---- the SLURM script, with stand-ins for srun and scontrol ---------------------------------------------------------


def test_bash_can_parse_the_script():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck, which is optional")
def test_shellcheck_has_nothing_to_say():
    check = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def test_what_slurm_is_asked_for_leaves_time_to_save_and_allows_to_queue_again():
    asked = [line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)


def job(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


FAKE = """\
#!/usr/bin/env bash
echo "$@" >"$RUN/words"
{trap}
touch "$RUN/started"
while [ ! -e "$RUN/end" ]; do sleep 0.05; done
{write}
exit {code}
"""
# name: (exit.json from before, whether the limit comes near, what the run writes, its launcher's code) -> queued again
ENDINGS = {
    "a run that was done": ((None, False, 0, 0), False),
    "one that saved when the limit came near": ((None, True, 143, 1), True),
    "one that saved for another reason": ((None, False, 143, 1), False),
    "one that was done when the limit came near": ((None, True, 0, 0), False),
    "one that diverged when the limit came near": ((None, True, 4, 1), False),
    "one that was stopped before it began": ((None, True, None, 1), False),
    "one stopped before it began, in the folder of one that had saved": ((143, True, None, 1), False),
    "a second one that saved": ((143, True, 143, 1), True),
    "one whose launcher says 143, and nothing else": ((None, True, None, 143), False),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_job_is_queued_again_only_after_its_own_signal_and_the_runs_word(name, tmp_path):
    (before, near, code, launchers), again = ENDINGS[name]
    run = tmp_path / "run"
    run.mkdir()
    if before is not None:
        (run / "exit.json").write_text(json.dumps({"code": before, "reason": ""}, indent=2))
    write = (
        f"""printf '{{\\n  "code": {code},\\n  "reason": "x"\\n}}\\n' >"$RUN/exit.json\"""" if code is not None else ""
    )
    fake = FAKE.format(trap="trap 'touch \"$RUN/end\"' USR1", write=write, code=launchers)
    environment = {**slurm(tmp_path / "bin", srun=fake), "RUN": str(run)}
    process = job(tmp_path, environment, "recipe.yaml", str(run), "--seed", "3")
    wait_for((run / "started").exists, process)
    if near:
        process.send_signal(signal.SIGUSR1)
    else:
        (run / "end").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == launchers, out
    requests = (tmp_path / "bin" / "requests").read_text().split("\n")[:-1]
    assert requests == ([f"requeue {environment['SLURM_JOB_ID']}"] if again else []), out
    words = (run / "words").read_text().split()
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv_endpoint") + 1].startswith("127.0.0.1:")
    assert words[-7:] == ["recipe.yaml", "--output_dir", str(run), "--resume_from_checkpoint", "auto", "--seed", "3"]


def test_without_a_recipe_and_a_folder_the_script_says_what_it_needs(tmp_path):
    process = job(tmp_path, slurm(tmp_path / "bin"), "recipe.yaml")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "OUTPUT_DIR" in out


TORCHRUN = """\
#!/usr/bin/env bash
words=()
while [ $# -gt 0 ]; do
  if [ "$1 $2" = "-m partialtune" ]; then words+=(--no-python {process}) && shift 2; else words+=("$1") && shift; fi
done
exec {agent} "${{words[@]}}"
"""


@pytest.mark.slow
def test_two_torchrun_agents_save_when_the_limit_comes_near_and_the_jobs_second_start_goes_on_to_the_same_bits(
    tmp_path, warm, agents
):
    words = small_recipe(tmp_path, max_steps=120, logging_steps=500, eval_strategy="no", save_steps=20, schedule=[])
    environment, run = slurm(tmp_path / "bin"), tmp_path / "run"
    process = job(tmp_path, environment, str(tmp_path / "recipe.yaml"), str(run))
    wait_for((run / "checkpoint-20").is_dir, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    record = yaml.safe_load((run / "recipe.yaml").read_text())["run"]
    assert (record["processes"], record["distributed"]) == (2, "MULTI_CPU"), out
    assert json.loads((run / "exit.json").read_text())["code"] == 143, out
    assert (tmp_path / "bin" / "requests").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert sorted(path.name for path in newest.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert (newest / "complete.json").is_file()
    # SLURM starts the same script again, under the same number
    forked = TORCHRUN.format(
        process=shlex.join(client(agents.path, PARTIALTUNE)), agent=shlex.join(client(agents.path, AGENT))
    )
    again = slurm(tmp_path / "second", torchrun=forked) | {"SLURM_RESTART_COUNT": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = job(tmp_path, again, str(tmp_path / "recipe.yaml"), str(run))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert (tmp_path / "second" / "requests").read_text() == ""
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert newest.name in out  # from there it went on
    warm.start_all([*words, "--output_dir", str(tmp_path / "whole")], 2)
    assert warm.end_all() == [0, 0], warm.log.read_text()
    ended, whole = fingerprint(run), fingerprint(tmp_path / "whole")
    assert (ended["weights"], ended["losses"]) == (whole["weights"], whole["losses"])
