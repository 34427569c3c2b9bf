"""Checkpoints that are whole or not there: written aside, marked complete, renamed; the newest whole one found.

The marker, `complete.json`, is written last and holds size and sha256 of every other file, so that a file that was cut
short, lost or changed is found before anything is loaded from it.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from partialtune.distributed import is_main
from partialtune.errors import DiskError, InputError, in_one_line

logger = logging.getLogger(__name__)

ASIDE = ".unfinished"  # a name that Trainer's own search and rotation never count
REPLACED = "replaced"  # in it: a checkpoint that one of the same step takes the place of
MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")

# how PyTorch says that a file could not be written
CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")
# what reading a file that is not what it should be can raise in json, PyTorch and safetensors
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, RuntimeError),
    *(pickle.UnpicklingError, SafetensorError, MemoryError),
)


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, oldest step first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named for."""
    return int(NAME.fullmatch(checkpoint.name).group(1))


def damage_of(checkpoint: Path, read: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files, a phrase each; empty if they are what its marker promises.

    Args:
        checkpoint: Its folder.
        read: Whether to compare the files' sha256 too, about a second for 2 GB, or only their sizes.
    """
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        promised = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
        return [problem for entry in promised if (problem := _problem(checkpoint, *entry, read))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MARKER} is missing or cannot be read"]


def _problem(checkpoint: Path, name: str, size: int, sha256: str, read: bool) -> str | None:
    file = checkpoint / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
    return f"{name} has another content" if read and _sha256(file) != sha256 else None


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest step whose files are all as they were saved; others are passed over, and named."""
    for checkpoint in reversed(checkpoints_in(run)):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint
        logger.warning("%s is incomplete or damaged (%s): skipped.", checkpoint.name, "; ".join(damage[:3]))
    return None


def clear_aside(run: Path) -> None:
    """Remove what a killed save left."""
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def finish_checkpoint(aside: Path, final: Path) -> None:
    """Mark the checkpoint at `aside` complete and put it in its place.

    Every file and folder is synced before the rename, so that a power cut leaves the old state or the new one.
    What stands in the place, a damaged checkpoint or one of a run that has gone back, makes way.
    """
    paths = sorted(path for path in aside.rglob("*") if path != aside / MARKER)
    files = [path for path in paths if path.is_file()]
    entries = {str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (aside / MARKER).write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")
    for path in (*paths, aside / MARKER, aside):
        _sync(path)
    if os.path.lexists(final):
        os.replace(final, aside.parent / REPLACED)  # of a link the link; what it names stays where it is
    os.replace(aside, final)
    _sync(final.parent)
    shutil.rmtree(aside.parent)


def rotate_checkpoints(run: Path, keep: int | None, spare: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep` of them; never the newest complete one, never `spare` (the best).

    A link is not ours to delete, nor what it names: it is let be and not counted. One that cannot be deleted is no
    reason to end.
    """
    if not keep:
        return
    complete = [path for path in checkpoints_in(run) if not path.is_symlink() and not damage_of(path, read=False)]
    protected = {path.name for path in complete[-1:]} | ({Path(spare).name} if spare else set())
    surplus = len(complete) - max(keep, len(protected & {path.name for path in complete}))
    for checkpoint in [path for path in complete if path.name not in protected][: max(0, surplus)]:
        logger.info("Deleting %s: save_total_limit is %d.", checkpoint.name, keep)
        aside = run / ASIDE / checkpoint.name
        try:
            aside.parent.mkdir(exist_ok=True)
            os.replace(checkpoint, aside)  # at once: what a kill leaves of it is removed before the next save
            shutil.rmtree(aside.parent)
        except OSError as error:
            logger.warning("%s could not be deleted (%s).", checkpoint, error.strerror or error)


def with_ties(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with one tensor for all names of a tied parameter: `save_pretrained` then writes it once.

    FSDP gathers the tensor of each name by itself, and two equal ones would be saved as two.
    """
    names, tied = {}, dict(state_dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in tied and first in tied:
            tied[name] = tied[first]
    return tied


@contextmanager
def read_with_care(checkpoint: Path) -> Iterator[None]:
    """Say in one sentence that a checkpoint does not hold what it should.

    Raises:
        InputError: In the place of what reading raises.
    """
    try:
        yield
    except UNREADABLE as error:
        raise InputError(
            f"{checkpoint} cannot be gone on from: {_reason(error)}. Take a checkpoint that this version of "
            f"partialtune saved, or start in a new output_dir."
        ) from error


@contextmanager
def disk_errors(what: str, run: Path) -> Iterator[None]:
    """Say in one sentence why something could not be saved, and give back the room that a half checkpoint takes.

    Args:
        what: What is being saved.
        run: The run's folder.

    Raises:
        DiskError: In the place of what the writers of files raise: Python's, PyTorch's and safetensors'.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in CANNOT_WRITE):
            raise
        if is_main():  # which may still be writing where another process failed: it clears when all have stopped
            clear_aside(run)
        whole = [path.name for path in checkpoints_in(run) if not damage_of(path, read=False)]
        kept = f"{whole[-1]} is complete" if whole else "There is no complete checkpoint yet"
        raise DiskError(
            f"{what} could not be saved in {run}: {_reason(error)}. {kept}. Make room on the disk, "
            f"then go on with: --resume_from_checkpoint auto"
        ) from error


def _reason(error: Exception) -> str:
    """Without the number and the file that an OSError's own text holds, and without its full stop."""
    return in_one_line(getattr(error, "strerror", None) or error, first_line=True).removesuffix(".")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
