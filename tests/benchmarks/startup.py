"""How long it takes until something happens: `--help`, `plan`, and `train` from the command to its first step.

    python tests/benchmarks/startup.py [--repeats 3]

GPT-2's 124M shape with random weights, 16 x 256 tokens, a text of 32 windows. Figures are medians over whole commands;
`train` is ended when its first step begins, which its progress bar shows. The scores before training are shown apart:
they are the model's own time, here for 28 windows, in a run for up to 32 and the held-out text (`whole_run.py` has a
run of that size). Likewise prompts are left out and the frozen prefix is not kept.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import Shape, run_here

LIMITS = {"help": 0.3, "plan": 5.0, "train, to the first step, without scores": 15.0}  # seconds


def seconds_of(words: list[str]) -> float:
    """Seconds of a whole command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "partialtune", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_to_the_first_step(recipe: Path, cache: Path) -> dict[str, float]:
    """From the command to the first step; with the scores before it, and without. The cache is to be empty: the base's
    scores would be taken from it."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "partialtune", "train", str(recipe)]
    environment = os.environ | {"PARTIALTUNE_CACHE": str(cache)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    shown, scoring = b"", None
    while b"training:" not in shown:
        piece = os.read(process.stderr.fileno(), 4096)
        if not piece:
            raise SystemExit(f"train ended before its first step:\n{shown.decode()}")
        shown += piece
        if scoring is None and b", before:" in shown:
            scoring = time.perf_counter()
        if b"training, before: 100%" in shown:
            scored = time.perf_counter()
            shown = shown.replace(b"training, before: 100%", b"")
    whole = time.perf_counter() - started
    process.kill()
    process.wait()
    return {
        "train, to the first step, without scores": whole - (scored - scoring),
        "train, to the first step": whole,
    }


def write_recipe(folder: Path, run: int) -> Path:
    recipe = folder / "recipe.yaml"  # JSON is YAML
    values = {
        "model_name_or_path": str(folder / "model"),
        "text": str(folder / "text.txt"),
        "block_size": 256,
        "per_device_train_batch_size": 16,
        "trainable": ["blocks[-2:]", "final_norm"],
        "prefix_cache": "off",
        "prompts": [],
        "max_steps": 2,
        "output_dir": str(folder / f"run-{run}"),
    }
    recipe.write_text(json.dumps(values))
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_here("make", Shape(), folder)
        seconds_of(["--help"])  # byte code is compiled once
        for run in range(repeats):
            recipe = write_recipe(folder, run)
            found = {"help": seconds_of(["--help"]), "plan": seconds_of(["plan", str(recipe)])}
            for what, seconds in {**found, **seconds_to_the_first_step(recipe, folder / f"cache-{run}")}.items():
                figures.setdefault(what, []).append(seconds)
    for what, seconds in figures.items():
        limit = f"limit {LIMITS[what]:g} s" if what in LIMITS else ""
        print(f"{what:44} {statistics.median(seconds):7.2f} s  {limit}")
    print(f"medians of {repeats}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
