"""README and docs: short where they should be, and no command, recipe, link or option in them that is not there."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import partialtune
from conftest import REPOSITORY
from partialtune.cli.entry import make_parser
from partialtune.recipe.arguments import argument_fields, recipe_help
from partialtune.recipe.recipe import read_recipe, recipe_from_values

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
KEYS = argument_fields().keys() | {field.name for field in dataclasses.fields(TrainingArguments)}
RECIPE_COMMANDS = {"train", "plan", "rank", "bench", "compare"}  # which take `--key value` of a recipe, or recipes


def name_of(value):
    return str(value.relative_to(REPOSITORY)) if isinstance(value, Path) else re.sub(r"\W+", "-", str(value))[:60]


def code_of(page: Path) -> list[str]:
    """Lines of its shell blocks, and code within its sentences, which a line's end may part."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|shell)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]
    return [line for block in blocks for line in block.splitlines()] + inline


def commands(program: str) -> list:
    """What follows a program's name in every command of the pages."""
    found = {}
    for page in PAGES:
        for line in code_of(page):
            for command in re.split(r"&&|\|", line.partition(" #")[0]):
                place = re.search(rf"(?:^|[\s/]){program}\s+(.+)$", command.strip())
                if place:
                    found.setdefault(place[1].strip(), page)
    return [pytest.param(words, id=f"{page.name}-{name_of(words)}") for words, page in found.items()]


def test_the_readmes_first_two_shell_commands_are_the_main_job_and_the_tests():
    """`.ci/run` takes the second one, as a reader would."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```sh\n(.*?)^```", readme, re.M | re.S)[:2]
    (job,), (tests,) = first.splitlines(), second.splitlines()
    assert job.endswith("-m partialtune train recipes/quickstart.yaml")
    assert tests.endswith("python -m pytest -n 2 --dist loadscope")


def test_the_readme_is_read_in_five_minutes():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) < 1500


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_finds_it(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_recipe_and_test_that_is_named_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:recipes|tests|src|tools)/[\w./*-]+\w)", text))
    assert [path for path in sorted(named) if not list(REPOSITORY.glob(path))] == []


def test_every_test_that_a_table_rests_on_is_there():
    named = set(re.findall(r"`(tests/test_\w+\.py)::(\w+)`", " ".join(page.read_text("utf-8") for page in PAGES)))
    assert len(named) > 15
    missing = [name for file, name in named if f"def {name}(" not in (REPOSITORY / file).read_text("utf-8")]
    assert missing == []


@pytest.mark.parametrize("words", commands("partialtune"))
def test_every_command_is_one_of_the_command_line_with_options_that_it_has(words):
    command, *rest = [part for part in shlex.split(words) if part != "..."]
    if command.startswith("--"):
        return
    parser = make_parser()._subparsers._group_actions[0].choices[command]
    options = {part.partition("=")[0] for part in rest if part.startswith("--")}
    keys = options - set(parser._option_string_actions)
    if any(part.isupper() for part in rest) or len(rest) == len(options):  # told of, and not to be typed
        assert {key.removeprefix("--") for key in keys} <= KEYS
        return
    _, overrides = parser.parse_known_args(rest)
    assert command in RECIPE_COMMANDS or not overrides
    for recipe in [part for part in rest if part.startswith("recipes/") and "*" not in part]:
        read_recipe(REPOSITORY / recipe, overrides)


@pytest.mark.parametrize("words", commands(r"python[\d.]* (?=tests/benchmarks/)"))
def test_every_option_of_a_benchmark_is_one_that_it_has(words):
    file, *options = shlex.split(words)
    source = (REPOSITORY / file).read_text(encoding="utf-8")
    for option in [option for option in options if option.startswith("--")]:
        assert f'"{option}"' in source or "add_argument(f" in source, option


def test_the_keys_of_the_recipes_page_are_those_of_the_help():
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page.endswith(f"```text\n{recipe_help()}```\n"), "put what `partialtune train --help` prints there"


def test_the_recipe_of_the_readme_is_one():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    recipe = recipe_from_values(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    assert (recipe.training["max_steps"], recipe.freeze.trainable) == (123, ["blocks[-2:]", "final_norm"])


@pytest.mark.slow
def test_the_docs_are_built_without_a_warning_and_hold_every_public_name(tmp_path):
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(REPOSITORY / "docs")]
    built = subprocess.run([*words, str(tmp_path)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "reference.html").read_text(encoding="utf-8")
    assert [name for name in partialtune.__all__ if f'id="partialtune.{name}"' not in reference] == []
