"""`compare` on one frozen prefix: five learning rates, two seeds, the last two blocks; shared states against none.

    python tests/benchmarks/compare_prefix.py [--steps 200] [--rates 5] [--seeds 2] [--batch 2] [--beside ../other/src]

SmolLM2-135M's shape with random weights, windows of 256 tokens, each of them met once in a run (one epoch): 5 trials
and 2 runs. The comparison is made twice, each time from an empty cache: first with PARTIALTUNE_PREFIX_SHARED=0, so that
every run and trial computes the prefix of its windows, then as it is by default. With `--beside` a third time, by the
package of another checkout, such as the commit before a change. Trials and the weights of all runs have to have the
same bits. Seconds are those of the whole command; those of the processor, of all its processes, depend less on what
else the machine does. Two to three hours on 2 cores; `--steps 20 --batch 1` about twenty minutes.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_models import SHAPES, Shape, write_model_and_text

GOAL = 0.5  # of the time without sharing
TOKENS = 256  # of a window
HELD_OUT = 0.1


@dataclass(frozen=True)
class Comparison:
    """One `compare` command.

    Attributes:
        seconds: From the command to its end.
        processor: Seconds of the processor, of all its processes.
        trials: Learning rate -> bits per byte.
        weights: Run -> sha256 of its model file.
    """

    seconds: float
    processor: float
    trials: dict[float, float]
    weights: dict[str, str]


def recipe_of(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """The recipe that is compared: one epoch of the text that `write_text` writes."""
    return {
        "model_name_or_path": str(folder / "model"),
        "text": str(folder / "whole.txt"),
        "text_cleaning": "none",
        "block_size": TOKENS,
        "validation_share": HELD_OUT,
        "trainable": ["blocks[-2:]", "final_norm"],
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "save_strategy": "no",
        "prompts": [],
        "output_dir": "unused",
    }


def write_text(folder: Path, windows: int) -> None:
    """A text of so many training windows, of Python's reference, in a process of its own."""
    tokens = int(windows * TOKENS / (1 - HELD_OUT) * 1.15)  # trials train on nine tenths of it, in one epoch as well
    code = (
        "from transformers import AutoTokenizer; from partialtune import load_text\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder / 'model')!r})\n"
        "text = load_text('builtin:python-docs')\n"
        "spans = tokenizer(text, return_offsets_mapping=True)['offset_mapping']\n"
        f"often, rest = divmod({tokens}, len(spans))\n"
        f"open({str(folder / 'whole.txt')!r}, 'w').write(text * often + text[: spans[rest][0]])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def compare(folder: Path, name: str, rates: int, seeds: int, environment: dict[str, str]) -> Comparison:
    """Run the command, with a cache of its own that is empty at first."""
    out = folder / name
    words = [sys.executable, "-m", "partialtune", "compare", str(folder / "last_2.yaml"), "--output_dir", str(out)]
    words += ["--seeds", *map(str, range(seeds)), "--learning_rates"]
    words += [repr(1e-4 * (number + 1)) for number in range(rates)]
    before, began = processor_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        subprocess.run(words, check=True, env={**os.environ, "PARTIALTUNE_CACHE": cache, **environment})
    seconds, processor = time.perf_counter() - began, processor_seconds() - before
    file = out / "rates" / "last_2.yaml"
    tried = json.loads(file.read_text())["trials"] if file.is_file() else []  # one rate needs no trial
    weights = {run.name: digest(run / "model.safetensors") for run in sorted((out / "runs").iterdir())}
    trials = {trial["learning_rate"]: trial["bits_per_byte"] for trial in tried}
    return Comparison(seconds, processor, trials, weights)


def processor_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def table(found: dict[str, Comparison]) -> str:
    """Seconds of each comparison, its share of the first one's, and whether trials and weights have the same bits."""
    first = next(iter(found.values()))
    lines = [f"{'':28}{'seconds':>10}{'ratio':>8}{'processor':>12}{'ratio':>8}   same bits"]
    for name, one in found.items():
        ratios = one.seconds / first.seconds, one.processor / first.processor
        same = f"trials {one.trials == first.trials}, weights {one.weights == first.weights}"
        cells = f"{one.seconds:10.1f}{ratios[0]:8.2f}{one.processor:12.1f}{ratios[1]:8.2f}"
        lines.append(f"{name:28}{cells}   {same}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run and trial")
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--blocks", type=int, help="of the model, where it is not to be as deep as SmolLM2-135M")
    parser.add_argument("--beside", type=Path, help="folder `src` of another checkout")
    options = parser.parse_args()
    shape = SHAPES["smollm2"]
    if options.blocks:
        shape = Shape({**shape.config, "num_hidden_layers": options.blocks}, shape.dtype)
    environments = {"each for itself": {"PARTIALTUNE_PREFIX_SHARED": "0"}, "shared": {}}
    if options.beside:
        environments["beside"] = {"PYTHONPATH": str(options.beside.resolve())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        write_model_and_text(shape, 1000, folder / "model")
        write_text(folder, options.steps * options.batch)
        (folder / "last_2.yaml").write_text(json.dumps(recipe_of(folder, options.steps, options.batch)))  # JSON is YAML
        found = {}
        for title, environment in environments.items():
            found[title] = compare(folder, title.split()[0], options.rates, options.seeds, environment)
            print(table(found), flush=True)
    print(f"goal of shared {GOAL:g}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
