"""A run's folder: whether it can be written, its lock, and the small files in it: recipe, exit code, JSON."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from partialtune.errors import RecipeError, UploadIncomplete
from partialtune.files import lock, write_whole
from partialtune.net.addresses import without_secrets

RECIPE_FILE = "recipe.yaml"
EXIT_FILE = "exit.json"
LOCK_FILE = ".lock"
SAMPLES_FILE = "samples.jsonl"  # {step, prompt, continuation} of each prompt, while the run trains
DELTA_FILE = "delta.json"
VALUES_FILE = "delta.safetensors"
STATE_FILE = "trainer_state.json"  # Trainer's; written after the first step, and at the end


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


def is_left_by_a_start(name: str) -> bool:
    """Whether a run leaves a file of this name before it has written its recipe."""
    return name in (LOCK_FILE, EXIT_FILE) or name.startswith(f".{RECIPE_FILE}.")


def has_taken_a_step(folder: Path) -> bool:
    """Whether a run's folder holds anything that only an optimizer step leaves, or a state that cannot be read."""
    if any(folder.glob("checkpoint-*")):
        return True
    try:
        if not (folder / STATE_FILE).exists():
            return False
        state = read_json(folder / STATE_FILE)
    except (OSError, ValueError):
        return True
    return not isinstance(state, dict) or state.get("global_step") != 0


def recorded_recipe(folder: Path) -> dict[str, Any]:
    """The recipe in a run's folder, flat; where a run has written it, with what it recorded under the key `run`.

    Raises:
        RecipeError: If it cannot be read.
    """
    file = folder / RECIPE_FILE
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"output_dir: {file} cannot be read ({error}). Name another folder.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"output_dir: {file} is no recipe. Name another folder.")
    return values


def recorded_sources(folder: Path, replayed: bool = False) -> dict[str, str]:
    """Name -> sha256 of the texts of the run in a folder, as `recipe.yaml` keeps them under `run`.

    Args:
        folder: Of the run.
        replayed: Those that were replayed, and not those that it trained on.
    """
    record = recorded_recipe(folder).get("run")
    record = record.get("replay") if replayed and isinstance(record, dict) else record
    sources = record.get("sources") if isinstance(record, dict) else None
    entries = [entry for entry in sources if isinstance(entry, dict)] if isinstance(sources, list) else []
    pairs = [(entry.get("name"), entry.get("sha256")) for entry in entries]
    return {name: sha256 for name, sha256 in pairs if isinstance(name, str) and isinstance(sha256, str)}


def exit_code_of(folder: Path) -> int | None:
    """The code in a run's `exit.json`, None where there is none: it is written last, and taken away by what goes on."""
    try:
        content = read_json(folder / EXIT_FILE)
    except (OSError, ValueError):
        return None
    code = content.get("code") if isinstance(content, dict) else None
    return code if isinstance(code, int) else None


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


def is_being_written(folder: Path) -> bool:
    """Whether another process holds the folder's lock. False too where that cannot be found out."""

    def busy() -> None:
        raise RecipeError("held")

    try:
        with (folder / LOCK_FILE).open("r+") as file:
            lock(file, busy)
    except RecipeError:
        return True
    except OSError:  # no lock, or not ours to open
        return False
    return False


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
