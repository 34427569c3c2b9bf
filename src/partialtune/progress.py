"""Progress on stderr: one bar style for every long stage, drawn by one process, sparing where nobody watches."""

import os
import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20  # where stderr is a file or a pipe, each refresh is a line of its own


def progress_bar(total: int | None, description: str | None, unit: str, **settings: Any) -> tqdm:
    """A bar that the first process of a run draws.

    Args:
        total: Units until it is full, None where that is unknown.
        description: What is going on.
        unit: What is counted.
        settings: Further arguments of `tqdm`.
    """
    watched = sys.stderr.isatty()
    defaults = {
        "disable": os.environ.get("RANK", "0") != "0",
        "mininterval": 0.2 if watched else SECONDS_BETWEEN_LINES,
        "dynamic_ncols": watched,
    }
    return tqdm(total=total, desc=description, unit=f" {unit}", **{**defaults, **settings})
