"""The fields of `transformers.TrainingArguments` as its source declares them, read without importing it.

The import takes seconds, since torch comes with it. A misspelt `--key` or a value that no key of that name can have is
found in a tenth of a second here. In: the installed transformers' source. Out: types and defaults by key, the same as
`key_rules.recipe_types` and `training_defaults` give after the import.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from partialtune.recipe.arguments import argument_types
from partialtune.recipe.key_rules import ALIASES, REFUSED, TRAINING_TYPES, without_enums

PLAIN = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list, "Any": Any}
# Where the enumerations are declared that the annotations name.
ENUM_FILES = ("trainer_utils.py", "training_args.py", "debug_utils.py")


def declared_arguments() -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(type, default) by key, for every key that a recipe may hold; None where the source has another shape.

    A type that the source does not say by itself (choices that are computed) is None, and so is not checked. A default
    that is no literal is left out.
    """
    package = find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0])
    try:
        trees = {name: ast.parse((folder / name).read_text(encoding="utf-8")) for name in ENUM_FILES}
    except (OSError, SyntaxError):
        return None
    fields = list(_fields(trees["training_args.py"]))
    if not any(name == "learning_rate" for name, _, _ in fields):
        return None
    known = {**PLAIN, "Literal": Literal, **{name: enum for tree in trees.values() for name, enum in _enums(tree)}}
    types, defaults = argument_types(), {}
    for name, annotation, value in fields:
        default, has_choices = _default(value)
        if default is not MISSING:
            defaults[name] = default
        if name not in REFUSED and name not in ALIASES:
            types[name] = None if has_choices else _type(annotation, known)
            types[name] = TRAINING_TYPES.get(name, types[name])
    return types, defaults


def _fields(tree: ast.Module) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Name, annotation and value of each field of TrainingArguments."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id, line.annotation, line.value


def _enums(tree: ast.Module) -> Iterator[tuple[str, type[Enum]]]:
    """Enumerations whose members are literals."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
            members = {
                ast.unparse(line.targets[0]): line.value.value
                for line in node.body
                if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
            }
            yield node.name, Enum(node.name, members)  # type: ignore[misc]  # made at run time


def _type(annotation: ast.expr, known: Mapping[str, Any]) -> Any:
    """An annotation as a type, enumerations as the Literal of their values; None where it names anything else."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    try:
        return without_enums(_built(annotation, known))
    except (KeyError, TypeError):
        return None


def _built(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """Names of types, `|` and brackets -> the type.

    Raises:
        KeyError: If a name is not known.
        TypeError: If there is anything else in it.
    """
    match node:
        case ast.Name(id=name):
            return known[name]
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _built(left, known) | _built(right, known)
        case ast.Subscript(value=value, slice=inner):
            return _built(value, known)[_built(inner, known)]
        case ast.Tuple(elts=elements):
            return tuple(_built(element, known) for element in elements)
    raise TypeError(ast.dump(node))


def _default(value: ast.expr | None) -> tuple[Any, bool]:
    """A field's default, MISSING where it is no literal; and whether its metadata list choices."""
    if value is None:
        return MISSING, False
    has_choices = "'choices'" in ast.unparse(value)
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    try:
        return (MISSING if value is None else ast.literal_eval(value)), has_choices
    except ValueError:
        return MISSING, has_choices
