"""Checkpoints that are whole or not there: written aside, marked complete, renamed; the newest complete one found."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

ASIDE = ".unfinished"  # a name that Trainer's own search and rotation never count
MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, oldest step first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named for."""
    return int(NAME.fullmatch(checkpoint.name).group(1))


def missing_files(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks of what its marker promises; the marker itself where there is none that can be read."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return [MARKER]
    return [name for name, size in sizes.items() if not _has_size(checkpoint / name, size)]


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def newest_complete_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the highest step whose files are all there; incomplete ones are passed over with a warning."""
    for checkpoint in reversed(checkpoints_in(run)):
        missing = missing_files(checkpoint)
        if not missing:
            return checkpoint
        logger.warning("%s is incomplete (%s): skipped.", checkpoint.name, ", ".join(missing[:3]))
    return None


def clear_aside(run: Path) -> None:
    """Remove what a killed save left."""
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def finish_checkpoint(aside: Path, final: Path) -> None:
    """Mark the checkpoint at `aside` complete and put it in its place.

    Every file and folder is synced before the rename, so that a power cut leaves the old state or the new one.
    An incomplete folder that stands in the place makes way; a complete one of the same step is replaced.
    """
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(aside)): path.stat().st_size for path in files}
    (aside / MARKER).write_text(json.dumps({"bytes": sizes}, indent=2) + "\n", encoding="utf-8")
    for path in (*files, aside / MARKER, aside):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    aside.parent.rmdir()
    _sync(final.parent)


def rotate_checkpoints(run: Path, keep: int | None, spare: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep` of them; never the newest complete one, never `spare` (the best)."""
    if not keep:
        return
    complete = [path for path in checkpoints_in(run) if not missing_files(path)]
    protected = {path.name for path in complete[-1:]} | ({Path(spare).name} if spare else set())
    surplus = len(complete) - max(keep, len(protected & {path.name for path in complete}))
    for checkpoint in [path for path in complete if path.name not in protected][: max(0, surplus)]:
        logger.info("Deleting %s: save_total_limit is %d.", checkpoint.name, keep)
        shutil.rmtree(checkpoint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
