"""The lowest versions that pyproject.toml allows, as CI installs them."""

import re
import runpy
import tomllib

import pytest

from conftest import REPOSITORY

lowest = runpy.run_path(str(REPOSITORY / ".ci" / "lowest.py"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_dependency_has_a_floor_and_is_pinned_to_it():
    pinned = dict(pin.split("==") for pin in lowest["pins"](PROJECT))
    extras = [text for listed in PROJECT["optional-dependencies"].values() for text in listed]
    names = {re.match(r"[\w.-]+", text)[0] for text in (*PROJECT["dependencies"], *extras)} - {PROJECT["name"]}
    assert pinned.keys() == names
    for text in (*PROJECT["dependencies"], *extras):
        name, _, rest = text.partition(">=")
        assert name.startswith("partialtune[") or rest.split(",")[0] == pinned[name]


@pytest.mark.parametrize("text", ["peft", "peft<1", "peft==1.0"])
def test_a_dependency_without_a_floor_is_refused(text):
    with pytest.raises(ValueError, match=f"{text} has no floor"):
        lowest["pins"]({"name": "p", "dependencies": ["torch>=2.13"], "optional-dependencies": {"lora": [text]}})


def test_what_the_package_imports_from_outside_is_among_its_dependencies():
    """What only comes along with another library has no floor of its own and may go with its next version."""
    import ast
    import sys

    imported = set()
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    declared = {pin.partition("==")[0].replace("-", "_") for pin in lowest["pins"](PROJECT)} | {"yaml", "partialtune"}
    assert imported - set(sys.stdlib_module_names) <= declared
