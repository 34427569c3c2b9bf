"""`partialtune bench`: recipes -> measurements, table or JSON, and the files that were asked for."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from partialtune.bench.figure import bench_figure
from partialtune.bench.run import run_variants
from partialtune.bench.table import bench_json, bench_table, with_ratios
from partialtune.bench.variants import read_variants
from partialtune.errors import InputError
from partialtune.run_folder import write_json


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
