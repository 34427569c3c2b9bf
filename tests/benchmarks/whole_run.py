"""What a run costs beside its steps: seconds from the command to the first step, a whole run over its training alone.

    python tests/benchmarks/whole_run.py [--beside ../other/src] [--output FILE]

GPT-2's 124M shape with random weights and the notebook's policy as in recipes/gpt2/gulliver.yaml: 123 steps of 16 x 256
tokens, evaluations every 12 steps, three prompts, scores before and after, pages, from an empty cache. The text is
Python's reference, of as many windows as Gulliver's Travels has. A second run is ended at its first step: it finds the
scores of the base in the cache. 20 minutes on two fast cores, 50 on slow ones; with `--beside` as much again for
another checkout, such as the commit before a change, in turn. `--steps` trains a shorter run. That is another
measure: its evaluations take more windows, since few steps have few evaluations.

    training alone  = all steps together, without what happens between them
    share           = whole run / training alone
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from speed import Shape, run_here

STEPS, EVERY = 123, 12
TOKENS = 148_311  # of Gulliver's Travels with GPT-2's tokenizer: 579 windows, 57 of them held out
FIRST_STEP = b"training:"  # the bar of training; that of a scored text is called "training, before:"
GOALS = {"first step": 9.0, "share": 1.08}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seconds: From the command to its end.
        first_step: From the command to its first step.
        step: Its median step.
        training: All its steps together.
    """

    seconds: float
    first_step: float
    step: float
    training: float


def run(folder: Path, steps: int, cache: Path, source: Path | None, until_first_step: bool = False) -> Run:
    """Train by the command, with the package in `source` or the installed one."""
    recipe, output = folder / "recipe.yaml", folder / "run"
    values = {
        "model_name_or_path": str(folder / "model"),
        "text": str(folder / "whole.txt"),
        "text_cleaning": "none",
        "block_size": 256,
        "trainable": ["embeddings", "final_norm", "head"],
        "max_steps": steps,
        "eval_steps": EVERY,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-5,
        "weight_decay": 0.01,
        "output_dir": str(output),
    }
    recipe.write_text(json.dumps(values))  # JSON is YAML
    environment = os.environ | {"PARTIALTUNE_CACHE": str(cache)}
    if source is not None:
        environment["PYTHONPATH"] = str(source.resolve())
    started, first_step, shown = time.perf_counter(), None, b""
    words = [sys.executable, "-m", "partialtune", "train", str(recipe)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    while piece := os.read(process.stderr.fileno(), 4096):
        shown += piece
        if first_step is None and FIRST_STEP in shown:
            first_step = time.perf_counter() - started
            if until_first_step:
                process.kill()
    code, seconds, step, training = process.wait(), time.perf_counter() - started, 0.0, 0.0
    if first_step is None or (code and not until_first_step):
        raise SystemExit(f"train ended with exit code {code}:\n{shown.decode(errors='replace')[-3000:]}")
    if not until_first_step:
        found = json.loads((output / "performance.json").read_text())
        step, training = found["median_step_seconds"], found.get("training_seconds", math.nan)
    shutil.rmtree(output)
    return Run(seconds, first_step, step, training)


def write_text(folder: Path) -> None:
    """A text of as many tokens as Gulliver's Travels, of Python's reference, in a process of its own."""
    code = (
        "from transformers import AutoTokenizer; from partialtune import load_text; from partialtune.builtin import "
        "builtin_folder\n"
        "text = load_text('builtin:python-docs') * 2\n"
        "tokenizer = AutoTokenizer.from_pretrained(builtin_folder('builtin:lilliput'))\n"
        "spans = tokenizer(text, return_offsets_mapping=True)['offset_mapping']\n"
        f"open({str(folder / 'whole.txt')!r}, 'w').write(text[: spans[{TOKENS}][0]])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def measure(folder: Path, source: Path | None, steps: int) -> dict[str, float]:
    """The figures of one checkout."""
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        whole = run(folder, steps, cache, source)
        again = run(folder, steps, cache, source, until_first_step=True)
    return {
        "first step": whole.first_step,
        "first step, base known": again.first_step,
        "step": whole.step,
        "whole run": whole.seconds,
        "share": whole.seconds / whole.training,
        "beside training": whole.seconds - whole.training,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="folder `src` of another checkout")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    sources = {"this checkout": None, **({"beside": options.beside} if options.beside else {})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_here("make", Shape(), folder)
        write_text(folder)
        found = {}
        for title, source in sources.items():
            found[title] = measure(folder, source, options.steps)
            print(title, found[title], f"load {os.getloadavg()[0]:.1f}", flush=True)  # it takes long, and may be ended
    print(f"{'':26}" + "".join(f"{title:>16}" for title in found))
    for what in next(iter(found.values())):
        cells = "".join(f"{figures[what]:16.2f}" for figures in found.values())
        print(f"{what:26}{cells}" + (f"   goal {GOALS[what]:g}" if what in GOALS else ""))
    print(f"seconds; load {os.getloadavg()[0]:.1f}")
    if options.output:
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
