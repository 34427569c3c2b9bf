"""A run's folder: may the run start there, its lock, and the JSON files that it holds."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from partialtune.errors import RecipeError, UploadIncomplete
from partialtune.files import lock, write_whole
from partialtune.net.addresses import without_secrets
from partialtune.recipe.reading import same_run

RECIPE_FILE = "recipe.yaml"
EXIT_FILE = "exit.json"
LOCK_FILE = ".lock"
DELTA_FILE = "delta.json"
VALUES_FILE = "delta.safetensors"
STATE_FILE = "trainer_state.json"  # Trainer's; written after the first step, and at the end


class Standing(Enum):
    """What an output folder means for a run that wants to use it."""

    NEW = "absent or empty"
    UNSTARTED = "holds this run, interrupted before its first optimizer step"
    BEGUN = "holds this run, not finished"
    FINISHED = "holds this run, finished"


def standing_of(folder: Path, values: Mapping[str, Any], resume: str | None) -> Standing:
    """Look at an output folder without touching it.

    Args:
        folder: The recipe's `output_dir`.
        values: The recipe, flat.
        resume: The recipe's `resume_from_checkpoint`.

    Raises:
        RecipeError: If it holds anything but this run, or this run without leave to go on, or cannot be written.
    """
    check_writable(folder)
    if not folder.is_dir() or all(_is_left_by_a_start(path.name) for path in folder.iterdir()):
        return Standing.NEW
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(
            f"output_dir: {folder} is not empty and holds no run of partialtune. "
            f"Name another folder: --output_dir {folder}-2. Nothing was touched."
        )
    earlier, is_ours = _flat_recipe(folder / RECIPE_FILE)
    different = same_run(earlier, values)
    if different:
        raise RecipeError(
            f"output_dir: {folder} holds a run of another recipe; they differ in {', '.join(different)}. "
            f"Name another folder: --output_dir {folder}-2. Nothing was touched."
        )
    if is_finished(folder) and not _goes_further(earlier, values):
        return Standing.FINISHED
    if is_ours and not _has_taken_a_step(folder):
        return Standing.UNSTARTED
    if resume is None:
        raise RecipeError(
            f"output_dir: {folder} holds this run, begun and not finished. Go on with it: "
            f"--resume_from_checkpoint auto; or name another folder: --output_dir {folder}-2. Nothing was touched."
        )
    return Standing.BEGUN


def check_writable(folder: Path, name: str = "output_dir") -> None:
    """Stop where a folder cannot be made or written.

    Args:
        folder: It need not exist.
        name: What messages call it.

    Raises:
        RecipeError: If it is a file, lies below one, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{name}: {folder} is a file. Name a folder.")
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise RecipeError(f"{name}: {folder} lies under {nearest}, which is a file. Name a folder.")
    effective = os.access in os.supports_effective_ids
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=effective):
        raise RecipeError(f"{name}: {nearest} is not writable. Name a folder that is.")


def _is_left_by_a_start(name: str) -> bool:
    """Whether a run leaves a file of this name before it has written its recipe."""
    return name in (LOCK_FILE, EXIT_FILE) or name.startswith(f".{RECIPE_FILE}.")


def _has_taken_a_step(folder: Path) -> bool:
    """Whether a run's folder holds anything that only an optimizer step leaves, or a state that cannot be read."""
    state = folder / STATE_FILE
    if any(folder.glob("checkpoint-*")):
        return True
    try:
        return state.exists() and read_json(state)["global_step"] != 0
    except (OSError, ValueError, KeyError, TypeError):
        return True


def recorded_sources(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the texts of the run in a folder, as `recipe.yaml` keeps them under `run`."""
    record = _recipe(folder / RECIPE_FILE).get("run")
    sources = record.get("sources") if isinstance(record, dict) else None
    entries = [entry for entry in sources if isinstance(entry, dict)] if isinstance(sources, list) else []
    pairs = [(entry.get("name"), entry.get("sha256")) for entry in entries]
    return {name: sha256 for name, sha256 in pairs if isinstance(name, str) and isinstance(sha256, str)}


def _flat_recipe(file: Path) -> tuple[dict[str, Any], bool]:
    """A run's recipe, and whether a run wrote it: then it has the key `run`."""
    values = _recipe(file)
    return {key: value for key, value in values.items() if key != "run"}, "run" in values


def _recipe(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"output_dir: {file} cannot be read ({error}). Name another folder.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"output_dir: {file} is no recipe. Name another folder.")
    return values


def _goes_further(earlier: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return int(values.get("max_steps", -1)) > int(earlier.get("max_steps", -1))


def exit_code_of(folder: Path) -> int | None:
    """The code in a run's `exit.json`, None where there is none: it is written last, and taken away by what goes on."""
    try:
        return int(read_json(folder / EXIT_FILE)["code"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end; a push that did not can follow at any time."""
    return exit_code_of(folder) in (0, UploadIncomplete.exit_code)


@contextmanager
def locked(folder: Path, name: str = "output_dir") -> Iterator[None]:
    """Hold the folder's lock, which the system releases with the process.

    Args:
        folder: Made where it is missing.
        name: What messages call it.

    Raises:
        RecipeError: If another process holds it: a run, a push or a comparison.
    """

    def busy() -> None:
        raise RecipeError(
            f"{name}: another run is writing to {folder}, or a push is reading it. Wait for it, or name another."
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise RecipeError(
            f"{name}: nothing can be written in {folder} ({error.strerror}). Name another folder."
        ) from error
    with file:
        lock(file, busy)
        yield


def write_json(file: Path, content: Any) -> None:
    """Write UTF-8 JSON, indent 2, no NaN; aside and renamed, so that a reader never meets half a file."""
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(file: Path) -> Any:
    """A file's JSON.

    Raises:
        ValueError: If it holds none, or lists within lists that are deeper than Python's stack.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file.name} holds lists or mappings that are nested too deeply") from error


def begin_writing(folder: Path) -> None:
    """Take away the exit code of an earlier process: from here on the run is not finished."""
    (folder / EXIT_FILE).unlink(missing_ok=True)


def write_exit(folder: Path, code: int, reason: str) -> None:
    """Leave the exit code where a scheduler finds it: launchers turn every failure into 1."""
    write_json(folder / EXIT_FILE, {"code": code, "reason": without_secrets(reason)})


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta checkpoint."""
    return (folder / DELTA_FILE).is_file()
