"""Nodes that share no disk go on from one checkpoint: the main process's, whose files the others are sent.

    with same_checkpoint(True, "outputs/run") as folder:     # in Trainer.train: which checkpoint, on every process
    with on_each_node(Path("outputs/run/checkpoint-4"), ...) as folder:   # in a folder that this process can read

A checkpoint is written on the disk of the main process alone, with what the processes of other nodes have to add. What
another node has under the same name counts only if every file has the same content. Else the files travel through the
process group, are compared with their sha256 there, and are removed when they were read: a second copy that nobody
keeps up would be taken for the run's results.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from transformers.trainer_utils import get_last_checkpoint

from partialtune.distributed import (
    decided_by_main,
    done_together,
    from_all,
    from_main,
    is_first_of_node,
    is_main,
    rank_and_processes,
    several_nodes,
)
from partialtune.engine.checkpoint_files import disk_errors
from partialtune.errors import DiskError, InputError

logger = logging.getLogger(__name__)

RECEIVED = ".received-"  # how the name of a folder begins in which a node keeps what it was sent
SENT_AT_ONCE = 2**24  # bytes


class _File(NamedTuple):
    """What tells two files apart without reading them: on two disks one of the numbers differs."""

    size: int
    inode: int
    mtime_ns: int


@contextmanager
def same_checkpoint(
    given: str | bool | None, output_dir: str | PathLike[str], own_files: bool = False
) -> Iterator[str | bool | None]:
    """The checkpoint that Trainer goes on from, the main process's on every process.

    Args:
        given: As for `Trainer.train`: a folder, True for the last one of `output_dir`, or none.
        output_dir: The Trainer's.
        own_files: Whether each node has saved files of its own (`save_on_each_node`) and goes on from these.

    Raises:
        InputError: If the main process finds none where it should, or a node of `own_files` another one.
    """
    if rank_and_processes()[1] == 1:
        yield given
        return
    chosen = decided_by_main(lambda: _chosen(given, Path(output_dir)))
    if chosen is None:
        yield None
        return
    with on_each_node(Path(chosen), Path(output_dir), own_files) as folder:
        yield str(folder)


def _chosen(given: str | bool | None, output_dir: Path) -> str | None:
    if given is True:
        last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if last is None:
            raise InputError(f"There is no checkpoint in {output_dir}. Leave resume_from_checkpoint out to start anew.")
        return last
    return str(given) if given else None


@contextmanager
def on_each_node(checkpoint: Path, output_dir: Path, own_files: bool = False) -> Iterator[Path]:
    """A folder with the files of the main process's checkpoint, on every process.

    Args:
        checkpoint: The same path on all of them.
        output_dir: Where a node puts what it is sent.
        own_files: Whether each node has files of its own there.

    Raises:
        InputError: If the main process cannot read it, or a node of `own_files` has none.
        DiskError: If a node cannot keep it.
    """
    if own_files:
        done_together(lambda: _check_there(checkpoint))
    if own_files or not several_nodes() or _is_on_each_node(checkpoint):
        yield checkpoint
        return
    digests = decided_by_main(lambda: _digests(checkpoint))
    lacks = done_together(lambda: is_first_of_node() and _digests(checkpoint) != digests)
    nodes = sum(from_all(lacks))
    if not nodes:
        yield checkpoint
        return
    rank, token = rank_and_processes()[0], from_main(uuid4().hex[:8])
    logger.info("%s is sent to %d nodes which do not have it on their disks.", checkpoint, nodes)
    inbox = output_dir / f"{RECEIVED}{token}-{rank}" if lacks else None
    made = inbox is not None and not output_dir.exists()
    if inbox is not None:
        for rest in output_dir.glob(f"{RECEIVED}*"):  # of a process that was killed
            if token not in rest.name:
                shutil.rmtree(rest, ignore_errors=True)
    try:
        _transfer(checkpoint, digests, inbox)
        # the first process of this node has received it, or none had to
        received = next(output_dir.glob(f"{RECEIVED}{token}-*"), None)
        yield checkpoint if received is None else received / checkpoint.name
        from_all(None)  # others of this node may still be reading
    finally:
        if inbox is not None:
            shutil.rmtree(inbox, ignore_errors=True)
            if made and not any(output_dir.iterdir()):
                output_dir.rmdir()


def _check_there(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint} is not on this node, and with save_on_each_node each goes on from its own.")


def _is_on_each_node(checkpoint: Path) -> bool:
    """Whether all nodes see the very same files, as they do in a folder that they share."""
    files = decided_by_main(lambda: _files(checkpoint))
    return all(from_all(not is_first_of_node() or _files(checkpoint) == files))


def _names(checkpoint: Path) -> list[str]:
    return sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())


def _files(checkpoint: Path) -> dict[str, _File]:
    stats = {name: (checkpoint / name).stat() for name in _names(checkpoint)}
    return {name: _File(stat.st_size, stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def _digests(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file below a folder, by name; empty where there is none."""
    return {name: _digest(checkpoint / name) for name in _names(checkpoint)}


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _transfer(checkpoint: Path, digests: Mapping[str, tuple[int, str]], inbox: Path | None) -> None:
    """Send the main process's files to all; those with an inbox keep them.

    Raises:
        DiskError: If one of them cannot.
    """
    failure: OSError | None = None
    for name, (size, _) in digests.items():
        for start in range(0, max(1, size), SENT_AT_ONCE):
            part = decided_by_main(partial(_part, checkpoint / name, start))
            if inbox is None or failure is not None:  # where one cannot keep it, all hear of it when it was sent
                continue
            try:
                _append(inbox / checkpoint.name / name, part)
            except OSError as error:
                failure = error

    def check() -> None:
        if inbox is None:
            return
        if failure is not None:
            raise DiskError(
                f"{checkpoint.name} could not be received in {inbox}: {failure.strerror or failure}. Make room on the "
                f"disk of this node, then go on with: --resume_from_checkpoint auto"
            ) from failure
        if _digests(inbox / checkpoint.name) != digests:
            raise DiskError(
                f"{checkpoint.name} did not arrive in {inbox} as it was sent (sha256). Check the disk of this node, "
                f"and that nothing else writes to {checkpoint}."
            )

    done_together(check)


def _part(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(SENT_AT_ONCE)


def _append(path: Path, part: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(part)


def random_file(rank: int) -> str:
    """Trainer's name for the random state of a process: PyTorch writes it into the file, too."""
    return f"rng_state_{rank}.pth"


def gather_random_states(own: bytes, checkpoint: Path, output_dir: Path) -> None:
    """Let the main process write the random states of all. Every process calls this.

    Args:
        own: Of this process; empty where it has written its own.
        checkpoint: Where to.
        output_dir: Of the run.

    Raises:
        DiskError: If they cannot be written.
    """
    states = from_all(own)

    def write() -> None:
        for rank, state in enumerate(states):
            if state:
                (checkpoint / random_file(rank)).write_bytes(state)

    with disk_errors(checkpoint.name, output_dir):
        decided_by_main(write)


def remove_if_empty(folder: Path, output_dir: Path) -> None:
    """What FSDP has made on the disk of another node and left empty, with the folders above it in `output_dir`."""
    if is_first_of_node() and not is_main():
        with suppress(OSError):  # it is not there, or one that is shared
            while folder.is_relative_to(output_dir):
                folder.rmdir()
                folder = folder.parent
