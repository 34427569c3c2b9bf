"""A recipe as it is written: a YAML file and command-line words -> values that are not yet checked; and back to YAML.

In: a path, the words `--key value`, `--key=value`, `--key a b`, `--flag`, or values to write. Out: each key's value and
where it stands. Mistakes are collected as `Problem`s for one message; only a file that cannot be read any further (no
file, no UTF-8, no YAML, no mapping) raises here. Needs neither torch nor transformers.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_origin

import yaml

from partialtune import __version__
from partialtune.errors import RecipeError
from partialtune.files import write_whole
from partialtune.grammar.values import describe_type, union_members
from partialtune.net.addresses import without_secrets

# Decimal numbers alone: to YAML 1.1 010 is 8, and 1:30 is 90. All else is text, taken as written or refused.
WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
POINT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
MANY_VALUES = 100_000  # that aliases stand for: a few hundred bytes may stand for billions
# What YAML takes for its own syntax although a recipe means text: regex, selector with brackets, negation, glob.
UNQUOTED = re.compile(
    r"(?<![\w:/.])!?/[^\s,]+/(?=[\s,\]]|$)|!?[\w.]+\[[^\]]*\](?:\.\w+)?|![\w./]+|(?<![\w/.])\*[^\s,\]]*"
)
# YAML 1.1 wants a point and a signed exponent, 5.0e-5: PyYAML reads 5e-5 and 1.0e5 as text.
EXPONENT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
COMMAND_LINE = "command line"  # the origin of a value that a command-line word gives
ARGUMENT = "argument"  # of one that Python code gives beside a recipe
KEY = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
# A text in quotes, or a comment: what needs no (further) quotes.
QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"|(?:^|\s)#.*")


class _RecipeLoader(yaml.SafeLoader):
    """YAML without its dates (they are text here), and with 5e-5 and 1.0e5 for numbers."""


class _RecipeDumper(yaml.SafeDumper):
    """Block style with indented lists; a list that occurs twice is written twice, not as an anchor."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


# A mapping of its own: SafeLoader's is shared by everything in this process that reads YAML.
_OWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float")}
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", WHOLE, list("-+0123456789"))
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", POINT, list("-+.0123456789"))
for _yaml_class in (_RecipeLoader, _RecipeDumper):  # both: a text that would be read as a number is written in quotes
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


class Entry(NamedTuple):
    """The value of one key, and where it stands: "line 7", "command line", "argument", or "" in a mapping of values."""

    value: Any
    origin: str


class Problem(NamedTuple):
    """One mistake: its origin as in `Entry`, the key, and what is wrong and what to change."""

    origin: str
    key: str
    message: str


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's file as it was read: values as YAML gives them, the line of each key, duplicate keys as problems."""

    values: dict[Any, Any]
    lines: dict[str, int]
    problems: tuple[Problem, ...]

    def origin(self, key: Any) -> str:
        """Where a key stands: "line 7"."""
        return f"line {self.lines[key]}" if key in self.lines else ""


def read_recipe_file(path: Path) -> RecipeFile:
    """Read a recipe's YAML.

    Raises:
        RecipeError: If there is no such file, or it is no UTF-8, no YAML, empty, or no mapping.
    """
    text = _read_text(path)
    try:
        values, lines, problems = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{path} {error}") from error
    if values is None:
        raise RecipeError(
            f"{path} is empty. A recipe says at least model_name_or_path, text, trainable and output_dir."
        )
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        example = "`model_name_or_path: builtin:lilliput`, without a dash before the key"
        raise RecipeError(
            f"{path} holds {kind}; a recipe is a mapping of keys to values. Write lines such as {example}."
        )
    return RecipeFile(values, lines, problems)


def parse_yaml(text: str) -> tuple[Any, dict[str, int], tuple[Problem, ...]]:
    """YAML text -> its value, the lines of its top keys, its duplicate keys.

    Raises:
        ValueError: If it is none, or holds what no recipe means; says line, column, and which quotes would mend it.
    """
    try:
        loader = _RecipeLoader(text)
        node = loader.get_single_node()
        _check_aliases(node)
        lines, problems = _key_lines(node), tuple(_duplicate_keys(node))  # construct_document rewrites merged nodes
        return loader.construct_document(node) if node is not None else None, lines, problems
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = f"is no valid YAML. {_describe_yaml_error(error, text)}"
        raise ValueError(without_secrets(str(error) if isinstance(error, _ValueRefused) else said)) from error


def _key_lines(node: yaml.Node | None) -> dict[str, int]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {str(key_node.value): key_node.start_mark.line + 1 for key_node, _ in node.value}


def _read_text(path: Path) -> str:
    try:
        # -sig: a byte order mark that an editor put in would become part of the first key
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {path}. {_nearby_recipes(path)}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path} is a folder; a recipe is one YAML file. {_recipes_in(path)}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = f"byte 0x{error.object[error.start]:02x} in line {line}"
        raise RecipeError(f"{path} is not UTF-8 ({byte}). Save the recipe as UTF-8 text.") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}. Give a YAML file that you may read.") from error


def _nearby_recipes(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist either; paths are relative to {Path.cwd()}."
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(str(path.parent / name) for name in near)}?"
    below = {entry.name: entry for entry in sorted((path.parent / "recipes").rglob("*.y*ml"), reverse=True)}
    named = difflib.get_close_matches(path.name, below, n=3, cutoff=0.7)
    if named:
        return f"Did you mean {' or '.join(str(below[name]) for name in named)}?"
    if below:
        return f"Those of the project are in {path.parent / 'recipes'}."
    return _recipes_in(path.parent)


def _recipes_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    if not names:
        return f"{folder.resolve()} holds no .yaml file."
    return f"{folder.resolve()} holds {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}."


class _ValueRefused(ValueError):
    """Valid YAML that no recipe means; its message goes on from the name of the file."""


def _check_aliases(node: yaml.Node | None) -> None:
    """Raises ValueError where aliases stand for so many values that reading them would never end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 1  # of one that holds itself
            inside = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
            sizes[id(node)] = 1 + sum(map(size, inside))
        return sizes[id(node)]

    values = size(node)
    if values > MANY_VALUES and values > 100 * len(sizes):
        raise _ValueRefused(
            f"has aliases (*name) that repeat each other until they stand for {values:,} values; allowed are "
            f"{MANY_VALUES:,}. Write the values out."
        )


def _duplicate_keys(
    node: yaml.Node | None, above: str = "", visited: frozenset[int] = frozenset()
) -> Iterator[Problem]:
    """Keys that a mapping holds twice, at any depth: YAML forbids them, PyYAML lets the last one win."""
    # An anchor may stand inside what it names (`a: &a [*a]`): such a node holds itself.
    if id(node) in visited or not isinstance(node, yaml.CollectionNode):
        return
    visited = visited | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value, start=1):
            yield from _duplicate_keys(entry, f"{above}entry {index}.", visited)
        return
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first_lines:
            where = f"lines {first_lines[key]} and {line}" if line != first_lines[key] else f"line {line}"
            yield Problem(f"line {line}", f"{above}{key}", f"said twice, in {where}. Keep one of them.")
        first_lines.setdefault(key, line)
        if above or key != "run":  # `run` records what a run did, and is not read
            yield from _duplicate_keys(value_node, f"{above}{key}.", visited)


def _describe_yaml_error(error: Exception, text: str) -> str:
    """What PyYAML found, with line, column, the line itself, and the quotes that it wants where they would mend it."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if (
        not isinstance(error, yaml.MarkedYAMLError) or mark is None
    ):  # a character that YAML forbids, or too deep a nesting
        number = text.count("\n", 0, getattr(error, "position", 0)) + 1
        return f"Line {number}: {' '.join(str(error).split())}. Take that out, or put it in quotes."
    problem = str(error.problem).replace("could not determine a constructor for the tag", "YAML takes for a tag:")
    number, line, hint = _suspect(error, text.splitlines())
    shown = f"\n    line {number}: {line.strip()}\n  {hint or _other_hint(problem)}"
    return f"Line {mark.line + 1}, column {mark.column + 1}: {problem.removeprefix('but ')}.{shown}"


def _suspect(error: yaml.MarkedYAMLError, lines: list[str]) -> tuple[int, str, str]:
    """(number, line, hint) of the line that quotes would mend: where the parser stopped, or up to five above it."""
    stop = min(error.problem_mark.line, max(len(lines) - 1, 0))
    start = error.context_mark.line if error.context_mark else stop
    # Of a bracket that is never closed PyYAML complains lines later: hence the lines above, too.
    for number in dict.fromkeys([stop, *range(max(start, stop - 5), stop)]):
        hint = _quoting_hint(lines[number]) if lines else ""
        if hint:
            return number + 1, lines[number], hint
    return stop + 1, lines[stop] if lines else "", ""


def _quoting_hint(line: str) -> str:
    bare = QUOTED.sub(" ", line)
    found = [match.group().rstrip(":") for match in UNQUOTED.finditer(bare)]
    if not found:
        return ""
    quoted = ", ".join("'" + word.replace("'", "''") + "'" for word in dict.fromkeys(found))
    return f"In YAML these want single quotes: {quoted}"


def _other_hint(problem: str) -> str:
    if "mapping values are not allowed" in problem:
        return (
            "A text that holds a colon and a blank wants quotes: 'like: this'. Keys of one level start in one column."
        )
    if "\\t" in problem:
        return "Indent with blanks; YAML takes no tabs."
    return "Put quotes around texts that hold any of : # [ ] { } , & * ! | > ' \" % @ or begin with - or ?."


def write_recipe_file(path: Path, values: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Write values in the order given, and `run` as the last key. The file is there as a whole or not at all."""
    document = {**values, "run": dict(run)}
    text = yaml.dump(document, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=120)
    header = (
        f"# Written by partialtune {__version__}. `run` tells what happened and is ignored by `partialtune train`.\n"
    )
    write_whole(path, (header + text).encode())


# --- words of the command line


class Words(tuple[str, ...]):
    """The words that follow one key on the command line; `word_value` reads them once the key's type is known."""

    __slots__ = ()


def group_words(words: Sequence[str]) -> tuple[dict[str, Words], list[Problem]]:
    """Sort command-line words by their key; dashes within a key count as underscores.

    group_words(["--max-steps", "5", "--prompts", "a b", "c"]) -> ({"max_steps": ("5",), "prompts": ("a b", "c")}, [])
    """
    words_of: dict[str, Words] = {}
    problems: list[Problem] = []
    key = None
    for word in words:
        match = KEY.fullmatch(word)
        if match:
            key, value = match.group(1).replace("-", "_"), match.group(2)
            if key in words_of:
                problems.append(Problem(COMMAND_LINE, key, "said twice. Keep one; a list is --key a b."))
            words_of[key] = Words(() if value is None else (value,))
        elif key is None or word.startswith("--"):
            problems.append(_stray(word))
        else:
            words_of[key] = Words((*words_of[key], word))
    return words_of, problems


def _stray(word: str) -> Problem:
    message = "is no key and belongs to none. Write --key value; a value that begins with -- is --key='--value'."
    return Problem(COMMAND_LINE, f"`{word}`", message)


def word_value(words: Sequence[str], hint: Any) -> Any:
    """The value that the words of one key stand for, not yet converted to the key's type.

    Raises:
        ValueError: If there are too few or too many words, or a word is no YAML; says what to write.
    """
    kinds = [get_origin(member) or member for member in union_members(hint)]
    if not words:
        if bool in kinds:
            return True
        raise ValueError(f"got no value; allowed: {describe_type(hint)}. Write --key value.")
    if len(words) > 1:
        if list in kinds:
            return list(words)
        raise ValueError(_too_many(words, hint))
    word = words[0]
    if NoneType in kinds and word in ("null", "~"):
        return None
    is_list = list in kinds and word.startswith("[") and word.endswith("]")
    is_mapping = dict in kinds and (str not in kinds or word.startswith("{"))
    return _yaml_word(word) if is_list or is_mapping else word


def _too_many(words: Sequence[str], hint: Any) -> str:
    dashed = [word for word in words if re.match(r"-[A-Za-z]", word)]
    advice = f" Keys have two dashes: -{dashed[0]}." if dashed else " Put quotes around a value with blanks."
    return f"got {len(words)} words ({' '.join(words)}); allowed: {describe_type(hint)}, in one word.{advice}"


def _yaml_word(word: str) -> Any:
    try:
        value, _, problems = parse_yaml(word)
    except ValueError as error:
        raise ValueError(f"{error}") from error
    if problems:
        raise ValueError(f"{problems[0].key} is said twice. Keep one of them.")
    return value
