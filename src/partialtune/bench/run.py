"""Variants -> measurements, each in a process of its own, so that its peak memory is its own."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from partialtune.bench.variants import Variant
from partialtune.errors import InputError

logger = logging.getLogger(__name__)


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
    return json.loads(done.stdout.splitlines()[-1])
