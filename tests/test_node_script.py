"""recipes/launch/node.sh and pytorchjob.yaml: a machine with all its GPUs, and pods of Kubernetes that run the same."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster import small_recipe, wait_for
from conftest import REPOSITORY

LAUNCH = REPOSITORY / "recipes" / "launch"
SCRIPT = LAUNCH / "node.sh"
DOCUMENTS = list(yaml.safe_load_all((LAUNCH / "pytorchjob.yaml").read_text(encoding="utf-8")))
OF_A_LAUNCHER = ("PET_", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck, which is optional")
def test_shellcheck_has_nothing_to_say():
    check = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


# ---- one machine, with stand-ins for torchrun and nvidia-smi --------------------------------------------------------

TORCHRUN = """\
#!/usr/bin/env bash
echo "$@" >"$BIN/words"
trap 'echo TERM >>"$BIN/signals"; touch "$BIN/end"' TERM
touch "$BIN/started"
while [ ! -e "$BIN/end" ]; do sleep 0.05; done
[ -z "$SAYS" ] || printf '{\\n  "code": %s,\\n  "reason": "x"\\n}\\n' "$SAYS" >"$RUN/exit.json"
exit "$CODE"
"""
GPUS = 'for n in 0 1 2; do echo "GPU $n: NVIDIA H200 (UUID: GPU-$n)"; done'


def machine(folder: Path, **commands: str) -> dict[str, str]:
    """An environment with stand-ins in the place of what a machine has; `partialtune` is installed unless said."""
    folder.mkdir(parents=True)
    for name, content in {"torchrun": TORCHRUN, "partialtune": "", "nvidia-smi": "exit 9", **commands}.items():
        (folder / name).write_text(content if content.startswith("#!") else f"#!/usr/bin/env bash\n{content}\n")
        (folder / name).chmod(stat.S_IRWXU)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OF_A_LAUNCHER)}
    path = os.pathsep.join([str(folder), "/usr/bin", "/bin"])
    return {**kept, "PATH": path, "BIN": str(folder), "RUN": str(folder.parent / "run"), "SAYS": "0", "CODE": "0"}


def start(environment: dict[str, str], *words: str, script: Path = SCRIPT) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# name: (exit.json from before, whether SIGTERM comes, what the run writes, its launcher's code) -> code of the script
ENDINGS = {
    "a run that is done": ((None, False, "0", 0), 0),
    "one that had saved, and is done now": ((143, False, "0", 0), 0),
    "one that saves when the machine is taken away": ((None, True, "143", 1), 143),
    "one that another machine's signal ended": ((None, False, "143", 1), 143),
    "one that is stopped before its first step": ((None, True, "", 1), 143),
    "one that is done when the signal comes": ((None, True, "0", 0), 0),
    "one that diverges when the signal comes": ((None, True, "4", 1), 4),
    "bad input, in the folder of one that had saved": ((143, False, "", 1), 1),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_script_ends_with_the_code_of_the_run_and_passes_a_signal_on_once(name, tmp_path):
    (before, signalled, says, launchers), code = ENDINGS[name]
    run = tmp_path / "run"
    run.mkdir()
    if before is not None:
        (run / "exit.json").write_text(json.dumps({"code": before, "reason": ""}, indent=2))
    environment = {**machine(tmp_path / "bin"), "SAYS": says, "CODE": str(launchers)}
    process = start(environment, "recipe.yaml", str(run), "--seed", "3")
    wait_for((tmp_path / "bin" / "started").exists, process)
    if signalled:
        process.send_signal(signal.SIGTERM)
    else:
        (tmp_path / "bin" / "end").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert (tmp_path / "bin" / "signals").exists() == signalled
    words = (tmp_path / "bin" / "words").read_text().split()
    assert words[-9:-7] == ["partialtune", "train"]
    assert words[-7:] == ["recipe.yaml", "--output_dir", str(run), "--resume_from_checkpoint", "auto", "--seed", "3"]


# what the machine has, and its variables -> processes
MACHINES = {
    "three GPUs": ({"nvidia-smi": GPUS}, {}, 3),
    "two of them visible": ({"nvidia-smi": GPUS}, {"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
    "three GPUs, none visible": ({"nvidia-smi": GPUS}, {"CUDA_VISIBLE_DEVICES": ""}, 1),
    "no GPU": ({}, {}, 1),
    "the word of Kubeflow's operator": ({"nvidia-smi": GPUS}, {"PET_NPROC_PER_NODE": "auto"}, 3),
    "a number of processes": ({"nvidia-smi": GPUS}, {"PET_NPROC_PER_NODE": "2"}, 2),
}


@pytest.mark.parametrize("name", MACHINES)
def test_there_is_one_process_for_each_gpu_that_is_visible(name, tmp_path):
    commands, variables, processes = MACHINES[name]
    environment = machine(tmp_path / "bin", **commands) | variables
    (tmp_path / "run").mkdir()
    (tmp_path / "bin" / "end").touch()
    process = start(environment, "recipe.yaml", str(tmp_path / "run"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    words = (tmp_path / "bin" / "words").read_text().split()
    assert words[words.index("--nproc-per-node") + 1] == str(processes)
    assert words[0] == "--standalone"
    assert ("one process on the CPU" in out) == (name in ("no GPU", "three GPUs, none visible"))


def test_without_the_package_an_environment_is_made_once_and_anew_where_a_machine_was_taken_away_meanwhile(tmp_path):
    script = tmp_path / "clone" / "recipes" / "launch" / "node.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    pip = '#!/usr/bin/env bash\necho "pip $@" >>"$BIN/installed"\nexit "$PIP"\n'
    writes = f'cat >"$4/bin/pip" <<"END"\n{pip}END\nchmod +x "$4/bin/pip"'
    makes = f'mkdir -p "$4/bin"; echo "$@" >>"$BIN/installed"; {writes}'
    environment = machine(tmp_path / "bin", python3=makes)
    (tmp_path / "bin" / "partialtune").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "bin" / "end").touch()
    codes = []
    for pip_fails in ("1", "0", "0"):
        process = start({**environment, "PIP": pip_fails}, "recipe.yaml", str(tmp_path / "run"), script=script)
        process.communicate(timeout=60)
        codes.append(process.returncode)
    assert codes == [1, 0, 0]
    clone, venv = tmp_path / "clone", tmp_path / "clone" / "build" / "venv"
    made = [f"-m venv --clear {venv}", f"pip install --quiet {clone}"]
    assert (tmp_path / "bin" / "installed").read_text().splitlines() == made * 2


def test_without_a_recipe_and_a_folder_the_script_says_what_it_needs(tmp_path):
    process = start(machine(tmp_path / "bin"), "recipe.yaml")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "OUTPUT_DIR" in out


# ---- the PyTorchJob -------------------------------------------------------------------------------------------------


def job() -> dict:
    (found,) = [document for document in DOCUMENTS if document["kind"] == "PyTorchJob"]
    return found


def test_a_pod_has_time_to_save_is_made_again_after_that_and_keeps_everything_on_the_volume():
    (claim,) = [document for document in DOCUMENTS if document["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert job()["apiVersion"] == "kubeflow.org/v1"
    replicas = job()["spec"]["pytorchReplicaSpecs"]
    assert {name: kind["replicas"] for name, kind in replicas.items()} == {"Master": 1, "Worker": 1}
    dockerfile = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    for kind in replicas.values():
        pod = kind["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert kind["restartPolicy"] == "ExitCode"  # again from 128 on, which 143 is
        assert pod["terminationGracePeriodSeconds"] >= 300
        assert container["name"] == "pytorch"
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/recipe"]["configMap"]["name"] == "partialtune-recipe"
        assert container["args"][1].startswith("/data/")
        assert container["command"] == ["bash", f"/opt/partialtune/{SCRIPT.relative_to(REPOSITORY)}"]
        user = pod["securityContext"]
        assert user["runAsNonRoot"]
        assert f"USER {user['runAsUser']}\n" in dockerfile
        assert user["fsGroup"] == user["runAsUser"]
    assert "VOLUME /data\n" in dockerfile
    assert "WORKDIR /opt/partialtune\n" in dockerfile
    assert "PARTIALTUNE_CACHE=/data/" in dockerfile
    assert "HF_HOME=/data/" in dockerfile


def injected(rank: int, port: int) -> dict[str, str]:
    """What the operator puts into a pod's environment; Kubeflow Trainer 2 sets the PET_ ones alone."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    size = {"WORLD_SIZE": "2", "RANK": str(rank), "PET_NNODES": "2", "PET_NODE_RANK": str(rank)}
    own = {"PET_NPROC_PER_NODE": "auto", "PYTHONUNBUFFERED": "1"}
    return {**address, **{f"PET_{name}": value for name, value in address.items()}, **size, **own}


@pytest.mark.slow
def test_two_pods_train_together_and_when_one_is_evicted_both_save_and_end_with_143(tmp_path):
    words = small_recipe(tmp_path, max_steps=4000, logging_steps=500, eval_strategy="no", save_steps=20, schedule=[])
    run = tmp_path / "data" / "outputs" / "run"
    here = {"/recipe/recipe.yaml": words[1], "/data/outputs/run": str(run), "/opt/partialtune": str(REPOSITORY)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OF_A_LAUNCHER)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment["CUDA_VISIBLE_DEVICES"] = ""
    pods = []
    for rank, kind in enumerate(("Master", "Worker")):
        (container,) = job()["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]["containers"]
        command = [*container["command"], *container["args"]]
        for there, local in here.items():
            command = [word.replace(there, local) for word in command]
        pod = environment | injected(rank, port)
        pods.append(subprocess.Popen(command, env=pod, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    wait_for((run / "checkpoint-20").is_dir, pods[0])
    pods[1].send_signal(signal.SIGTERM)
    outs = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [143, 143], outs
    record = yaml.safe_load((run / "recipe.yaml").read_text())["run"]
    assert (record["processes"], record["distributed"]) == (2, "MULTI_CPU")
    assert json.loads((run / "exit.json").read_text())["code"] == 143
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert sorted(path.name for path in newest.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert (newest / "complete.json").is_file()
    assert "saving a checkpoint after this step" in outs[1]
    assert "saving a checkpoint after this step" not in outs[0]
