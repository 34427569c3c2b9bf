"""How the package is built: who imports whom, what a type checker sees, and one version of each linter everywhere."""

import ast
import re
import subprocess
import sys
from collections import Counter

import pytest
import yaml

import partialtune
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "partialtune"
MOST_LINES = 430  # of a module; most have fewer than 350

pytestmark = pytest.mark.contract


def test_imports_point_down_through_the_layers_of_pyproject():
    """In a process of its own: import-linter sets up logging anew, and loggers of other tests would fall silent."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_name_is_used_once_and_a_module_is_read_in_one_go():
    modules = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    named = Counter(path.name for path in modules)
    assert [name for name, count in named.items() if count > 1] == []
    long = {path.name for path in modules if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES}
    assert long == set()


def test_a_type_checker_sees_every_public_name_where_it_is():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(line.module, name.name, name.asname) for line in block.body for name in line.names}
    assert seen == {(getattr(partialtune, name).__module__, name, name) for name in partialtune.__all__}
    assert (PACKAGE / "py.typed").is_file()


def test_the_hooks_and_ci_run_the_same_versions_of_the_linters():
    ci = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pinned = {pin for hook in hooks for pin in hook.get("additional_dependencies", [])}
    assert set(re.findall(r"(?:ruff|mypy|import-linter)==[\d.]+", ci)) <= pinned


def test_what_contributing_names_is_there():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.toml|\.yaml))`", text))
    assert len(named) > 30
    assert {name for name in named if not any((folder / name).exists() for folder in (REPOSITORY, PACKAGE))} == set()
