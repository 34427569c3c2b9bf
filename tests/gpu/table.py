"""The steps of run.sh, one after the other, each with a time limit -> a Markdown table.

A step that fails is a row that says so, and the table is written anew after each: what there is stays, whatever
happens later. Models have random weights, since seconds and memory do not depend on them; on a CPU it is the bundled
model.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ALL_SECONDS = 465.0  # of the 8 minutes; the rest is for installing wheels
LEAST_SECONDS = 5.0  # with less left a step is not begun
GB = 2**30

# Writes the base and a text to the folder of its argument, and says what is here.
PREPARE = """\
import json, pathlib, shutil, sys
import torch, transformers
folder, small = pathlib.Path(sys.argv[1]), sys.argv[2] == "small"
if small:
    from partialtune import load_text
    from partialtune.builtin import builtin_folder
    shutil.copytree(builtin_folder("builtin:lilliput"), folder / "base")
    (folder / "text.txt").write_text(load_text("builtin:python-docs")[:15_000])
else:
    from random_models import SHAPES, write_model_and_text
    (folder / "base").mkdir()
    write_model_and_text(SHAPES["gpt2"], 60_000, folder / "base")
    shutil.move(folder / "base" / "text.txt", folder / "text.txt")
cuda = torch.cuda.is_available()
name = torch.cuda.get_device_name(0) if cuda else f"CPU, {torch.get_num_threads()} threads"
size = torch.cuda.get_device_properties(0).total_memory if cuda else None
print(json.dumps({"device": name, "bytes": size, "torch": torch.__version__, "transformers": transformers.__version__}))
"""


class Failed(Exception):
    """A step did not come to its end; the message goes into the table."""


@dataclass
class Bed:
    """Where the steps run and what they know of each other.

    Attributes:
        work: A folder for models and runs.
        small: Whether it is a trial on a CPU.
        end: By `time.monotonic`, of the present step.
        machine: What `PREPARE` found.
        runs: Finished runs by name.
        said: What the last process wrote to stderr.
    """

    work: Path
    small: bool
    end: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    said: str = ""

    @property
    def steps(self) -> int:
        """Of the main job and of what is compared with it."""
        return 6 if self.small else 123

    def python(self, *words: str, given: str | None = None) -> str:
        """Run Python with these words until the step's time is over; what it prints on stdout."""
        left = self.end - time.monotonic()
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        benchmarks = [str(REPOSITORY / "tests" / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(benchmarks)
        try:
            done = subprocess.run(
                [sys.executable, *words],
                input=given,
                capture_output=True,
                text=True,
                timeout=max(left, 0.1),
                env=environment,
                cwd=self.work,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed("its time was over") from error
        self.said = done.stderr
        sys.stderr.write(done.stderr[-2000:])
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["nothing"]
            raise Failed(f"exit code {done.returncode}: {said[-1][:200]}")
        return done.stdout

    def train(self, name: str, recipe: str, steps: int, *more: str) -> Path:
        """A run of a recipe of recipes/gpt2, with our base and text; its folder."""
        folder = self.work / name
        size = ["--block_size", "64", "--per_device_train_batch_size", "4"] if self.small else []
        base = ["--model_name_or_path", str(self.work / "base"), "--text", str(self.work / "text.txt")]
        file = REPOSITORY / "recipes" / "gpt2" / f"{recipe}.yaml"
        words = [*base, "--output_dir", str(folder), "--max_steps", str(steps), *size, *more]
        self.python("-m", "partialtune", "train", str(file), *words)
        self.runs[name] = folder
        return folder

    def read(self, name: str, file: str) -> dict[str, Any]:
        """A JSON file of a run that was made."""
        if name not in self.runs:
            raise Failed(f"the run `{name}` is not there")
        return json.loads((self.runs[name] / file).read_text(encoding="utf-8"))


def speed(figures: dict[str, Any]) -> str:
    """`0.0612 s/step, 66,928 tokens/s, peak 5,058 MB` of a performance.json."""
    return (
        f"{figures['median_step_seconds']:.4f} s/step, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"peak {figures['peak_memory_mb']:,.0f} MB"
    )


def largest_difference(bed: Bed, one: str, other: str) -> str:
    """Of two runs' final weights, in words."""
    from safetensors.torch import load_file

    files = [bed.runs[name] / "model.safetensors" for name in (one, other)]
    first, second = (load_file(str(file)) for file in files)
    if first.keys() != second.keys():
        raise Failed("the two files hold different tensors")
    apart = max((first[name] - second[name]).abs().max().item() for name in first)
    return "weights bit-identical" if apart == 0 else f"weights {apart:.1e} apart at most"


# ---- the steps ------------------------------------------------------------------------------------------------------


def prepare(bed: Bed) -> str:
    bed.machine = json.loads(
        bed.python("-c", PREPARE, str(bed.work), "small" if bed.small else "gpt2").splitlines()[-1]
    )
    size = bed.machine["bytes"]
    return f"{bed.machine['device']}" + (f", {size / GB:.1f} GB" if size else "")


def main_job(bed: Bed) -> str:
    started = time.monotonic()
    steps = bed.steps
    bed.train("main", "gulliver", steps, "--save_strategy", "steps", "--save_steps", str(steps // 2))
    seconds = time.monotonic() - started
    scores = bed.read("main", "evaluation.json")["validation"]
    losses = " -> ".join(f"{scores[when]['loss']:.4f}" for when in ("before", "after"))
    return f"{speed(bed.read('main', 'performance.json'))}; held-out loss {losses}; whole run {seconds:.0f} s"


def proof(bed: Bed) -> str:
    audit = bed.read("main", "audit.json")
    if not audit["passed"]:
        raise Failed(f"the audit did not pass: {str(audit)[:200]}")
    words = ["--trainable", "embeddings", "final_norm", "head"]
    bed.python("-m", "partialtune", "verify", str(bed.work / "base"), str(bed.runs["main"]), *words)
    frozen = audit["frozen"]
    return f"{frozen['parameters']:,} frozen parameters, {len(frozen['changed'])} of them changed; `verify` agrees"


def resume(bed: Bed) -> str:
    """What a run has left that is killed after its first checkpoint goes on, and is compared with the main job."""
    bed.read("main", "exit.json")
    checkpoint, killed = f"checkpoint-{bed.steps // 2}", bed.work / "resumed"
    killed.mkdir()
    shutil.copytree(bed.runs["main"] / checkpoint, killed / checkpoint)
    for name in ("recipe.yaml", "freeze_plan.json", "weight_deltas.jsonl"):
        shutil.copy(bed.runs["main"] / name, killed / name)
    saves = ["--save_strategy", "steps", "--save_steps", str(bed.steps // 2)]
    bed.train("resumed", "gulliver", bed.steps, *saves, "--resume_from_checkpoint", "auto")
    if not re.search(rf"Going on from .*{checkpoint}\b", bed.said):  # from the beginning it would be equal too
        raise Failed("it began anew")
    return f"from step {bed.steps // 2} on: {largest_difference(bed, 'main', 'resumed')}"


def bf16(bed: Bed) -> str:
    bed.train("bf16", "gulliver", bed.steps, "--bf16", "true", *(["--use_cpu", "true"] if bed.small else []))
    losses = [bed.read(name, "evaluation.json")["validation"]["after"]["loss"] for name in ("main", "bf16")]
    return f"{speed(bed.read('bf16', 'performance.json'))}; held-out loss {losses[1] - losses[0]:+.4f} from fp32's"


def prefix_cache(bed: Bed) -> str:
    steps = 4 if bed.small else 40
    for kept in ("off", "memory"):
        bed.train(f"prefix-{kept}", "last_2_blocks", steps, "--prefix_cache", kept)
    seconds = {kept: bed.read(f"prefix-{kept}", "performance.json") for kept in ("off", "memory")}
    if seconds["memory"]["prefix_cache"] != "memory":
        raise Failed("nothing was kept")
    apart = largest_difference(bed, "prefix-off", "prefix-memory")
    return f"{steps} steps; off {speed(seconds['off'])}; kept {speed(seconds['memory'])}; {apart}"


def fast_paths(bed: Bed) -> str:
    bed.train("plain", "gulliver", bed.steps, "--fast_paths", "[]")
    found = {name: bed.read(name, "performance.json") for name in ("plain", "main")}
    used = ", ".join(found["main"]["fast_paths"]) or "none"
    if found["plain"]["fast_paths"]:
        raise Failed("the plain path was not plain")
    apart = largest_difference(bed, "plain", "main")
    return f"plain {speed(found['plain'])}; with {used} {speed(found['main'])}; {apart}"


def bench(precision: str) -> Callable[[Bed], str]:
    def measured(bed: Bed) -> str:
        recipes = ["gulliver"] if bed.small else ["gulliver", "last_2_blocks"]
        files = [str(REPOSITORY / "recipes" / "gpt2" / f"{name}.yaml") for name in recipes]
        words = ["--model_name_or_path", str(bed.work / "base"), "--bf16", str(precision == "bf16").lower()]
        size = ["--block_size", "64", "--per_device_train_batch_size", "4"] if bed.small else []
        steps = "2" if bed.small else "12"
        out = bed.python("-m", "partialtune", "bench", *files, "--steps", steps, "--json", *words, *size)
        rows = json.loads(out)["results"]
        return "; ".join(f"{Path(row['label']).stem} {row.get('error') or bench_words(row)}" for row in rows)

    return measured


def bench_words(row: dict[str, Any]) -> str:
    used = f", {row['utilisation']:.0%} of {row['product_rate'] / 1e12:.3g} TFLOP/s" if row["utilisation"] else ""
    return f"{speed(row)}{used}"


def memory(bed: Bed) -> str:
    file = REPOSITORY / "recipes" / "gpt2" / "gulliver.yaml"
    size = ["--block_size", "64", "--per_device_train_batch_size", "4"] if bed.small else []
    base = ["--model_name_or_path", str(bed.work / "base"), "--text", str(bed.work / "text.txt")]
    out = bed.python("-m", "partialtune", "plan", str(file), "--json", *base, *size)
    forecast = json.loads(out)["fits"]["process_peak" if bed.machine["bytes"] is None else "gpu"] / 2**20
    measured = bed.read("main", "performance.json")["peak_memory_mb"]
    return f"forecast {forecast:,.0f} MB, measured {measured:,.0f} MB ({measured / forecast - 1:+.0%})"


def largest(share: str) -> Callable[[Bed], str]:
    def tried(bed: Bed) -> str:
        words = [str(Path(__file__).with_name("largest.py")), share, *(["--small"] if bed.small else [])]
        return bed.python(*words).splitlines()[-1]

    return tried


# name -> seconds at most, and what it does
STEPS: dict[str, tuple[float, Callable[[Bed], str]]] = {
    "device": (60, prepare),
    "main job: `gpt2/gulliver.yaml`": (90, main_job),
    "its proof": (40, proof),
    "resume, compared with the main job": (60, resume),
    "bf16": (70, bf16),
    "fast paths, compared with the plain path": (70, fast_paths),
    "prefix cache: `gpt2/last_2_blocks.yaml`": (70, prefix_cache),
    "memory of the main job": (30, memory),
    "`bench`, fp32": (90, bench("fp32")),
    "largest model, 16 GB of the device": (120, largest("16")),
    "largest model, the whole device": (90, largest("all")),
    "`bench`, bf16": (90, bench("bf16")),
}
ONLY_ON_A_GPU = ("largest model, the whole device", "`bench`, bf16")  # what a step before them has tried on a CPU


def run_all(bed: Bed, write: Callable[[list[tuple[str, str, str, str]]], None]) -> int:
    """Every step; how many did not come to their end. `write` gets the rows after each."""
    rows, failed, end = [], 0, time.monotonic() + ALL_SECONDS
    for name, (limit, step) in STEPS.items():
        if bed.small and name in ONLY_ON_A_GPU:
            continue
        started = time.monotonic()
        bed.end = min(started + limit, end)
        try:
            if bed.end - started < LEAST_SECONDS:
                raise Failed("not begun: the time is over")
            outcome, figures = "done", step(bed)
        except (Failed, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            outcome, figures = "FAILED", str(error) if isinstance(error, Failed) else repr(error)
            failed += 1
        figures = re.sub(r"\s+", " ", figures.replace("|", "/")).strip()
        rows.append((name, outcome, figures, f"{time.monotonic() - started:.0f}"))
        print(" | ".join(rows[-1]), flush=True)
        write(rows)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--output", type=Path, required=True, help="the table")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    options = parser.parse_args()
    bed = Bed(options.work, options.small)

    def write(rows: list[tuple[str, str, str, str]]) -> None:
        machine = bed.machine or {"device": "unknown", "torch": "unknown", "transformers": "unknown"}
        shape = (
            "the bundled model, tiny sizes" if bed.small else "GPT-2's shape (124M), random weights, 16 x 256 tokens"
        )
        lines = [
            f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}; {shape}; "
            f"{bed.steps} steps where it is not said. "
            f"MB are 2^20 bytes, peaks those of tensors on a GPU (`torch.cuda.max_memory_allocated`), of the whole "
            f"process on a CPU.",
            "",
            "| step | outcome | figures | s |",
            "|---|---|---|---:|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return 1 if run_all(bed, write) else 0


if __name__ == "__main__":
    sys.exit(main())
