"""The wheels that a machine without a network needs beside PyTorch -> a folder, by pip, in the versions installed here.

    python tests/gpu/wheels.py wheels [--python 3.12]

Walks the requirements of the installed partialtune. What is large and comes with nearly every image that has PyTorch is
left out: the folder has to travel.
"""

import argparse
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

THERE = {"torch", "numpy", "pandas", "pyarrow", "matplotlib"}  # with what only they need
GLIBC = (17, 24, 26, 27, 28, 31, 34)  # pip takes each platform literally


def needed(name: str, found: dict[str, str]) -> None:
    """Add `name` and what it needs to `found`, name -> version, but for what is there."""
    name = canonicalize_name(name)
    if name in found or name in THERE:
        return
    package = distribution(name)
    found[name] = package.version
    for text in package.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine")
    options = parser.parse_args()
    found: dict[str, str] = {}
    needed("partialtune", found)
    del found["partialtune"]
    platforms = ["manylinux1_x86_64", "manylinux2014_x86_64", *(f"manylinux_2_{glibc}_x86_64" for glibc in GLIBC)]
    target = ["--python-version", options.python, "--implementation", "cp"]
    for platform in platforms:
        target += ["--platform", platform]
    for wheel in options.folder.glob("*.whl"):  # two versions of one package stop the install
        wheel.unlink()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *target]
    pins = [f"{name}=={version}" for name, version in found.items()]
    subprocess.run([*pip, "--dest", str(options.folder), *pins], check=True)
    size = sum(wheel.stat().st_size for wheel in options.folder.glob("*.whl"))
    print(f"{len(pins)} wheels, {size / 2**20:.1f} MB, in {options.folder}")


if __name__ == "__main__":
    main()
