"""`partialtune bench`: recipes -> measurements, table or JSON, and the files that were asked for.

Each variant is measured in a process of its own, so that its peak memory is its own.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partialtune.bench.bench_figure import bench_figure
from partialtune.bench.bench_table import bench_json, bench_table, with_ratios
from partialtune.bench.variants import Variant, read_variants
from partialtune.errors import InputError
from partialtune.run_folder import write_json

logger = logging.getLogger(__name__)


def bench(
    recipes: Sequence[str], overrides: Sequence[str], steps: int, outputs: Sequence[str], as_json: bool = False
) -> str:
    """Measure recipes on this machine, and full fine-tuning on the same batch beside them.

    Args:
        recipes: Recipe files.
        overrides: `--key value` for all of them.
        steps: Optimizer steps of each.
        outputs: Files to write: JSON where the name ends in .json, a figure where it ends in .png.
        as_json: Whether JSON comes back in place of the table.

    Returns:
        What is to be printed.

    Raises:
        InputError: If a recipe, a number or a file's name is wrong. Nothing was measured or written then.
    """
    if steps < 2:
        raise InputError(f"--steps is {steps}. Take 2 or more: the first step warms up and is not counted.")
    files = [_checked(Path(name)) for name in outputs]
    rows = with_ratios(run_variants(read_variants(recipes, overrides), steps))
    content = bench_json(rows, steps)
    for file in files:
        if file.suffix == ".json":
            write_json(file, content)
        else:
            file.write_bytes(bench_figure(rows))
    return json.dumps(content, indent=2, allow_nan=False) if as_json else bench_table(rows, steps)


def _checked(file: Path) -> Path:
    if file.suffix not in (".json", ".png"):
        raise InputError(f"--output: {file} ends neither in .json nor in .png, the two kinds of file there are.")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"--output: {file.parent} is no folder that can be written to. Make it, or name another.")
    return file


def run_variants(variants: Sequence[Variant], steps: int) -> list[dict[str, Any]]:
    """Measure one after another.

    Args:
        variants: As `read_variants` gives them.
        steps: Optimizer steps of each; the first is not counted.

    Returns:
        For each variant its `label`, the number of its `full` one, and what `measure.measure` found; or, where it did
        not run, `error` in words.

    Raises:
        InputError: If none of them ran, or several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("bench measures one process on one device. Start it without a launcher: partialtune bench")
    results = []
    for number, variant in enumerate(variants, start=1):
        logger.info("%d of %d: %s, %d steps", number, len(variants), variant.label, steps)
        results.append({"label": variant.label, "full": variant.full, **run_variant(variant, steps)})
    if all("error" in result for result in results):
        raise InputError("\n".join(f"{result['label']}: {result['error']}" for result in results))
    return results


def run_variant(variant: Variant, steps: int) -> dict[str, Any]:
    """Measure one variant in a process of its own, whose progress is seen on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "partialtune.bench.measure"],
        input=json.dumps({"values": variant.values, "steps": steps}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"error": f"ended by {name}" + (", most likely out of memory" if name == "SIGKILL" else "")}
    if done.returncode:
        return {"error": f"failed with exit code {done.returncode}, see above"}
    return json.loads(done.stdout.splitlines()[-1])  # a model's own code may have printed before
