"""pyproject.toml -> pip constraints that hold every dependency at its floor: `numpy>=2.0` -> `numpy==2.0`.

python3.11 .ci/lowest.py >constraints.txt
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
FLOOR = re.compile(r"([\w.-]+)\s*>=\s*([\w.]+)")


def requirements(project: Mapping[str, Any]) -> Iterator[str]:
    """Every requirement in the table `project`, of its extras too, but for the package's own extras."""
    for listed in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (text for text in listed if not text.startswith(f"{project['name']}["))


def pins(project: Mapping[str, Any]) -> list[str]:
    """`name==floor` for every requirement.

    Raises:
        ValueError: If one has no floor: nobody would know the lowest version that was run.
    """
    found = []
    for text in requirements(project):
        floor = FLOOR.match(text)
        if not floor:
            raise ValueError(f"pyproject.toml: {text} has no floor. Write {text}>=VERSION, the lowest that was run.")
        found.append(f"{floor[1]}=={floor[2]}")
    return found


if __name__ == "__main__":
    print(*pins(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]), sep="\n")
