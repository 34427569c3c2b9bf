"""recipes/launch/Dockerfile: its steps are carried out here as a script, and the entry point starts the package.

No Docker is needed. Replaced are: the folders of the image (they lie in a temporary one), `apt-get`, `useradd` and
`chown` (recorded, not carried out), and the download of the requirements: the environment sees what is installed here,
so that pip finds each line of pyproject.toml there, in a version that it allows, or the step fails for want of an
index. What those need in turn is left out (PIP_NO_DEPS), as the tests run with it.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "recipes" / "launch" / "Dockerfile"
FOLDERS = ("/opt", "/data")  # of the image, of which each word may name one


def steps() -> list[tuple[str, str]]:
    """(instruction, its words) in order; a line that ends in a backslash goes on."""
    lines = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip() and not line.startswith("#")]


def test_versions_are_said_by_pyproject_alone():
    assert [name for name, _ in steps()].count("FROM") == 1
    installed = "\n".join(words for name, words in steps() if name == "RUN")
    assert not re.search(r"[=<>~]=", installed), "pyproject.toml says which versions"
    assert {"--no-cache-dir" in words for name, words in steps() if name == "RUN" and "pip install" in words} == {True}
    users = [words for name, words in steps() if name == "USER"]
    assert users
    assert not {"0", "root"} & set(users)


@pytest.mark.slow
def test_the_steps_build_an_environment_whose_entry_point_runs(tmp_path):
    stand_ins, recorded = tmp_path / "bin", tmp_path / "recorded"
    stand_ins.mkdir()
    for name in ("apt-get", "useradd", "chown"):
        (stand_ins / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{recorded}\n')
        (stand_ins / name).chmod(stat.S_IRWXU)
    (stand_ins / "python3").symlink_to(sys.executable)

    def here(words: str) -> str:
        words = re.sub(rf"(?<![\w.-])({'|'.join(FOLDERS)})\b", rf"{tmp_path}\1", words)
        return words.replace("rm -rf /var", "true /var")  # of apt-get

    folder, entry = tmp_path, []
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    environment |= {"PATH": f"{stand_ins}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1"}
    environment["PIP_NO_BUILD_ISOLATION"] = "0"  # which means: none
    for instruction, words in steps():
        words = here(words)
        if instruction == "RUN":
            done = subprocess.run(
                ["sh", "-c", words], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
            if "-m venv" in words:  # what an index would give lies here
                site = next((tmp_path / "opt" / "venv").glob("lib/python*/site-packages"))
                (site / "installed_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
        elif instruction == "COPY":
            *sources, target = shlex.split(words)
            for source in sources:
                place = folder / target / source if target.endswith("/") else folder / target
                copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy
                copy(REPOSITORY / source, place)
        elif instruction == "ENV":
            for pair in shlex.split(words):
                name, value = pair.split("=", 1)
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif instruction == "WORKDIR":
            folder = Path(words)
            folder.mkdir(parents=True, exist_ok=True)
        elif instruction == "ENTRYPOINT":
            entry = [word.strip('"') for word in words.strip("[]").split(", ")]
        else:
            assert instruction in ("FROM", "USER", "VOLUME"), f"{instruction} is not known to this test"

    did = recorded.read_text().splitlines()
    assert [line.split()[0] for line in did] == ["apt-get", "apt-get", "useradd", "chown"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (tmp_path / "opt" / "requirements.txt").read_text().splitlines() == project["dependencies"]
    version = subprocess.run([*entry, "--version"], cwd=folder, env=environment, capture_output=True, text=True)
    assert version.stdout == f"partialtune {project['version']}\n"
    ask = "import partialtune, partialtune.cache as c; print(partialtune.__file__, c.cache_root(), sep='\\n')"
    python = [str(tmp_path / "opt" / "venv" / "bin" / "python"), "-c", ask]
    package, cache = subprocess.run(
        python, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert Path(package).is_relative_to(site)
    assert Path(cache) == tmp_path / "data" / "cache" / "partialtune"
    assert (site / "partialtune" / "builtin" / "quickstart.yaml").is_file()
    assert folder == tmp_path / "data"
