"""What stands in for a cluster in tests: SLURM's commands, and runs whose processes are forked from a warm one."""

import hashlib
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialtune.engine.checkpoint_files import newest_whole_checkpoint

# Starts the command once a node on this machine and hands signals on to every process of it, as slurmstepd does.
SRUN = """\
#!{python}
import os, signal, subprocess, sys
import psutil

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)

def pass_on(number, frame):
    for process in psutil.Process().children(recursive=True):
        process.send_signal(number)

signal.signal(signal.SIGUSR1, pass_on)
signal.signal(signal.SIGTERM, pass_on)
nodes = [
    subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": str(node)}})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
sys.exit(max(node.wait() != 0 for node in nodes))
"""
SCONTROL = """\
#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >>"$REQUESTS"; fi
"""


def slurm(folder: Path, nodes: int = 2, **commands: str) -> dict[str, str]:
    """An environment with stand-ins for `srun` and `scontrol`, or what `commands` puts in their place.

    What scontrol was asked for is in `folder`/requests.
    """
    scripts = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL, **commands}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in scripts.items():
        (folder / name).write_text(content)
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "requests").touch()
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]"}
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, **job, "PATH": path, "REQUESTS": str(folder / "requests")}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 180) -> None:
    """Wait until something holds, as long as a process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


WARM = """\
import gc, importlib, json, os, sys, traceback
import torch, transformers, datasets
import evaluate, pydantic, torch.distributed.fsdp, transformers.models.gpt2.modeling_gpt2  # as runs do later: 0.8 s
import annotated_types, pydantic.fields, pydantic.types, rich.console, rich.table, torch.utils.serialization.config
import peft, pytest, torch.distributed.algorithms.ddp_comm_hooks, torch.distributed.checkpoint.state_dict
import accelerate.commands.launch, fsdp_on_cpu  # for the functions that a run calls first: 0.3 s in each process
import fork_server, torch.distributed.run
import partialtune.recipe_run.train, partialtune.recipe_run.run_recipe, partialtune.cli
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from partialtune.pages import card, figures, html, report
from partialtune.recipe_run import write_results
from partialtune.scoring import evaluation
torch.set_num_threads(1)
for name in ("report.html.j2", "report_insight.html.j2", "macros.html.j2", "report.css", "report.js"):
    html.html_environment().get_template(name)  # compiles it
card._environment().get_template("card.md.j2")
evaluation.metric_class()
get_checkpoint_conversion_mapping("gpt2")  # compiles 1,000 expressions, of all architectures
os.fsync = lambda descriptor: None  # no machine is switched off: 27 of them are a tenth of a small run's seconds
gc.collect()
gc.freeze()  # what was imported is not searched for garbage in each run
figures.render_figure = report.render_figure = lambda *_, **__: b"not drawn"  # half of a small run's time
write_results.needed_products = lambda *_, **__: None  # not counted, a sixth of it

def run(job, rank):
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(job["processes"]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ["MASTER_PORT"] = str(job["port"])
    os.environ |= job["environment"]
    if job["nodes"]:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
        os.environ["PARTIALTUNE_CACHE"] = job["nodes"][rank]["cache"]
        os.chdir(job["nodes"][rank]["folder"])
    code = 1
    try:
        for module, function in (name.split(":") for name in job["first"]):
            getattr(importlib.import_module(module), function)()
        code = partialtune.cli.main(job["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    job, children = json.loads(line), []
    if "serve" in job:
        between = os.fork()
        if not between:
            if not os.fork():  # nobody's child: the loop below waits for its own
                fork_server.serve(job["serve"])
            os._exit(0)
        os.waitpid(between, 0)
        continue
    for rank in range(job["processes"]):
        children.append(os.fork())
        if not children[-1]:
            run(job, rank)
    print(json.dumps(children), flush=True)
    codes = dict(os.wait() for _ in children)
    print(json.dumps([os.waitstatus_to_exitcode(codes[child]) for child in children]), flush=True)
"""


@dataclass(frozen=True)
class Node:
    """What a machine of a cluster sees as its own."""

    folder: Path
    cache: Path


class WarmProcess:
    """Runs of `partialtune`, each a process of its own on one thread, forked where everything is imported already.

    Importing takes eight seconds, a small run two: most tests share the one of the fixture `warm`. One with an
    `environment` of its own (what libraries read when they are imported) is used as a context manager.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.environment = os.environ if environment is None else environment

    def __enter__(self) -> "WarmProcess":
        environment = {**self.environment, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
        self.parent = subprocess.Popen(
            [sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.parent.stdin.close()
        self.parent.wait(timeout=60)
        self.parent.stdout.close()

    def start_all(
        self,
        words: Sequence[str],
        processes: int,
        first: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        nodes: Sequence["Node"] = (),
    ) -> list[int]:
        """Start a run of several processes, which find each other as those of a launcher do; their ids by rank.

        `first` are functions that each of them calls before, as `module:function` of this folder; `environment` are
        variables that a launcher sets. Each of `nodes` has one process, its own working directory and cache.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"log": str(self.log), "words": list(words), "processes": processes, "port": port}
        job |= {"first": list(first), "environment": dict(environment or {})}
        job["nodes"] = [{"folder": str(node.folder), "cache": str(node.cache)} for node in nodes]
        self.parent.stdin.write(json.dumps(job) + "\n")
        self.parent.stdin.flush()
        return json.loads(self.parent.stdout.readline())

    def end_all(self) -> list[int]:
        """Wait for the end of the run that was started; exit codes by rank, negative for a signal."""
        return json.loads(self.parent.stdout.readline())

    def start(self, words: Sequence[str]) -> int:
        """Start a run of one process; its id."""
        return self.start_all(words, 1)[0]

    def end(self) -> int:
        """Wait for its end; its exit code."""
        return self.end_all()[0]

    def run(self, words: Sequence[str]) -> int:
        """Start it and wait for its end; its exit code."""
        self.start(words)
        return self.end()


def limit_file_sizes() -> None:
    """Let no file of this process have more bytes than `FILE_BYTES` says, as on a disk that is full."""
    size = int(os.environ["FILE_BYTES"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---- runs that are killed -------------------------------------------------------------------------------------------


def small_recipe(folder: Path, **changes: Any) -> list[str]:
    """Words that train a tiny model with dropout, in two phases, with evaluation and a checkpoint every other step."""
    import yaml
    from transformers import AutoTokenizer

    from conftest import tiny_gpt2
    from partialtune.builtin import builtin_folder

    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    tiny_gpt2(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    words = ("times", "wisdom", "belief", "light", "hope", "despair", "winter", "spring")
    text = " ".join(
        f"It was the age of {words[n % 8]} {n}, it was the season of {words[n * 5 % 7]}." for n in range(300)
    )
    (folder / "text.txt").write_text(text)
    values = {
        "model_name_or_path": str(folder / "base"),
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1]", "final_norm"],
        "schedule": [{"from_step": 16, "trainable": ["embeddings"]}],
        "output_dir": str(folder / "run"),
        "max_steps": 32,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "prompts": ["It was"],
        "save_steps": 2,
        "save_total_limit": 3,
        "delta_steps": 4,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return ["train", str(folder / "recipe.yaml")]


@dataclass(frozen=True)
class Killed:
    """A run that was killed.

    Attributes:
        seconds: When, counted from the moment at which it began to write in its folder.
        checkpoint: From where it goes on, None for the beginning.
        saving: Whether a checkpoint was being written.
    """

    seconds: float
    checkpoint: str | None
    saving: bool


def kill(warm: WarmProcess, words: Sequence[str], run: Path, seconds: float, in_save: bool = False) -> Killed | None:
    """Start a run and kill it.

    Args:
        warm: Forks it.
        words: Of the command line.
        run: Its folder.
        seconds: When, counted from the moment at which it begins to write there.
        in_save: Whether to wait from then on for the next save, and kill in it.

    Returns:
        None if it had ended before.
    """
    left = {file: file.stat().st_mtime_ns for file in unfinished(run)}  # of an earlier kill, until the next save
    begun = run / "freeze_plan.json"
    begun.unlink(missing_ok=True)  # written again when the run goes on
    process = warm.start(words)
    end = time.monotonic() + 120
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.002)
    started = time.monotonic()
    with suppress(ProcessLookupError):  # it has ended
        while time.monotonic() < started + seconds or (in_save and not is_saving(run, left)):
            assert time.monotonic() < end
            os.kill(process, 0)
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)
    passed = time.monotonic() - started
    if warm.end() >= 0:
        return None
    newest = newest_whole_checkpoint(run)
    return Killed(passed, newest.name if newest else None, is_saving(run, left))


def unfinished(run: Path) -> list[Path]:
    """Files of a checkpoint that is being written, or was when its process was killed."""
    return list((run / ".unfinished").glob("*/*"))


def is_saving(run: Path, left: dict[Path, int]) -> bool:
    """Whether a file of an unfinished checkpoint was written since `left` was looked at."""
    with suppress(FileNotFoundError):  # it was finished meanwhile
        return any(left.get(file) != file.stat().st_mtime_ns for file in unfinished(run))
    return False


def fingerprint(run: Path) -> dict[str, Any]:
    """What has to be equal, to the bit: the final weights, the history of the deltas, and the losses."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [[entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss")]
    return {
        "weights": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "deltas": hashlib.sha256((run / "weight_deltas.jsonl").read_bytes()).hexdigest(),
        "losses": losses,
    }
