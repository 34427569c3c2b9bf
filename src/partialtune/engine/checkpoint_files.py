"""Checkpoints that are whole or not there: written aside, marked complete, renamed; the newest whole one found.

The marker, `complete.json`, is written last and holds size and sha256 of every other file, so that a file that was cut
short, lost or changed is found before anything is loaded from it. Trainer's own way is to write in place, and to go on
from the highest number, whole or not.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from partialtune.distributed import is_main
from partialtune.errors import DiskError, InputError, ModelError, in_one_line, is_ours
from partialtune.files import write_whole
from partialtune.model.digests import same_bits
from partialtune.model.held_narrow import held_state_dict, modules_with_narrow
from partialtune.model.loading import has_remote_code
from partialtune.model.narrow_weights import NARROW
from partialtune.model.parameters import chunks_of, is_sharded, reshard
from partialtune.model.sharded_files import WRITTEN_BY
from partialtune.model.weight_files import open_weights, tensor_files
from partialtune.run_folder import STATE_FILE, read_json

logger = logging.getLogger(__name__)

ASIDE = ".unfinished"  # a name that Trainer's own search and rotation never count
REPLACED = "replaced"  # in it: a checkpoint that one of the same step takes the place of
MARKER = "complete.json"
NAME = re.compile(r"checkpoint-\d+")
LOADED_AT_ONCE = 2**25  # bytes

# How PyTorch says that a file could not be written: in RuntimeErrors without a number.
CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")
# What reading a file that is damaged, or holds something else, raises in Python, PyTorch and safetensors.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, pickle.UnpicklingError, SafetensorError)
# What libraries raise beside it, since they take what they read apart without a look at its types. Raised by a line of
# this package these are bugs, and stay what they are: what we read ourselves is checked before it is used.
UNREADABLE_TO_LIBRARIES = (TypeError, AttributeError, LookupError, AssertionError)


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, oldest step first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named for."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def damage_of(checkpoint: Path, read: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files, a phrase each; empty if they are what its marker promises.

    Args:
        checkpoint: Its folder.
        read: Whether to compare the files' sha256 too, about a second for 2 GB, or only their sizes.
    """
    try:
        promised = _promised(read_json(checkpoint / MARKER))
        with ThreadPoolExecutor() as pool:  # shards are many files
            found = [pool.submit(_problem, checkpoint, *entry, read) for entry in promised]
            return [problem for problem in (one.result() for one in found) if problem]
    except (OSError, ValueError):
        return [f"{MARKER} is missing or cannot be read"]


def _promised(marker: Any) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of each file that a marker promises.

    Raises:
        ValueError: If it is no marker.
    """
    files = marker.get("files") if isinstance(marker, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"{MARKER} names no files")
    promised = [(name, entry.get("bytes"), entry.get("sha256")) for name, entry in files.items()]
    if not all(isinstance(size, int) and isinstance(sha256, str) for _, size, sha256 in promised):
        raise ValueError(f"{MARKER} lacks sizes or digests")
    return promised


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


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Load the weights of a checkpoint into the model that wrote it, a few tensors at a time.

    Trainer's own way takes the memory of a second model. It also passes over names that are not the model's own, and
    `save_pretrained` gives those of the model's origin back: each expert of Mixtral by itself, LLaVA's
    `language_model.lm_head`. Such names are read as `from_pretrained` would find them.

    Of a sharded model each process takes its shards out of the file, with which none of them has to wait for others.

    Raises:
        ModelError: If one of its tensors would be rounded.
    """
    reshard(model)
    state, as_held = held_state_dict(model), model.state_dict(keep_vars=True)
    held = {id(module._parameters[key]) for module in modules_with_narrow(model) for key in module.narrow_weights}
    frozen = {name for name, tensor in as_held.items() if id(tensor) in held}
    files = tensor_files(checkpoint)
    names: list[str] = files.names
    read: Callable[[str], torch.Tensor] = files.read
    if not set(names) <= state.keys():
        weights = open_weights(checkpoint, str(checkpoint), has_remote_code(model))
        names = [name for name in state if name in weights.structure.by_name or name in weights.buffers]
        read = weights.read
    values: dict[str, torch.Tensor] = {}
    for name in names:
        stored = read(name)
        if is_sharded(state[name]):
            values[name] = _shard_of(stored.to(state[name].dtype), state[name])
        elif not _holds(state[name].detach(), stored):  # else it is let be: what is a view of the base's file stays one
            values[name] = stored.to(state[name].dtype)
            if name in frozen and (state[name].dtype not in NARROW or not _holds(values[name], stored)):
                raise ModelError(f"{checkpoint}: {name} is frozen and held in 16 bits, and its file has other values.")
        del stored  # before the next one is read
        if sum(one.nbytes for one in values.values()) > LOADED_AT_ONCE or name == names[-1]:
            model.load_state_dict(values, strict=False)  # with its own hooks: rows that train take theirs over
            values = {}
    # A tie is loaded under each of its names. Shards without values are all at address 0.
    place = {name: id(as_held[name]) if is_sharded(one) else one.data_ptr() for name, one in state.items()}
    loaded = {place[name] for name in names}
    lacking = [name for name in state if place[name] not in loaded]
    if lacking:
        logger.warning(
            "%s holds nothing for %d of the model's tensors, %s first.", checkpoint, len(lacking), lacking[0]
        )


def _shard_of(values: torch.Tensor, like: Any) -> torch.Tensor:
    """The shard that this process has of a sharded tensor, cut out of all of its values."""
    from torch.distributed.tensor import distribute_tensor  # takes 0.4 s, and is there already

    mesh = like.device_mesh
    shard = distribute_tensor(values.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return shard.to(like.device)


def _holds(values: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether values, on any device, are these of a file in every bit, widened to their dtype."""
    pairs = zip(chunks_of(values), chunks_of(stored), strict=True)
    return all(bool(same_bits(mine.to("cpu", stored.dtype), theirs).all()) for mine, theirs in pairs)


def best_checkpoint(run: Path, present: str, state: TrainerState) -> str | None:
    """That of the best evaluation, if it is there or `present`, which is being written; it may lie in the folder of a
    run that this one goes on from."""
    if not state.best_global_step:
        return None
    best = run / f"checkpoint-{state.best_global_step}"
    earlier = Path(state.best_model_checkpoint or best)
    if best.is_dir() or best.name == present:
        return str(best)
    return str(earlier) if earlier.name == best.name and earlier.is_dir() else None


def clear_aside(run: Path) -> None:
    """Remove what a killed save left."""
    shutil.rmtree(run / ASIDE, ignore_errors=True)


Entries = dict[str, dict[str, Any]]  # name of a file below a checkpoint's folder -> bytes and sha256, as in its marker


def entries_of_process(aside: Path, rank: int) -> Entries:
    """What the marker says of the shards that a process wrote, read by that process: no other one has to read them."""
    shards = [
        path for path in sorted(aside.rglob("*")) if (by := WRITTEN_BY.fullmatch(path.name)) and by[1] == str(rank)
    ]
    return dict(_entry(aside, path) for path in shards)


def check_shards_are_here(aside: Path, entries: Entries) -> None:
    """Stop where a process has written shards to a disk that this one does not see.

    Raises:
        InputError: In that case.
    """
    for name, entry in entries.items():
        file = aside / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise InputError(
                f"{aside.name} was saved in shards, and {name}, which another process wrote, is not in {aside.parent} "
                f"as the main process sees it. Let output_dir lie on a disk that all nodes share, or set "
                f"fsdp_state_dict_type: FULL_STATE_DICT, by which the main process writes all files."
            )


def finish_checkpoint(aside: Path, final: Path, known: Entries | None = None) -> None:
    """Mark the checkpoint at `aside` complete and put it in its place.

    Every file and folder is synced before the rename, so that a power cut leaves the old state or the new one.
    What stands in the place, a damaged checkpoint or one of a run that has gone back, makes way.

    Args:
        aside: Where it was written.
        final: Its place.
        known: What the marker says of files that other processes wrote and have read back, see `entries_of_process`.
    """
    known = known or {}
    paths = sorted(path for path in aside.rglob("*") if path != aside / MARKER)
    files = [path for path in paths if path.is_file() and str(path.relative_to(aside)) not in known]
    entries = {**dict(_entry(aside, path) for path in files), **known}
    (aside / MARKER).write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")
    for path in (*paths, aside / MARKER, aside):  # folders too: a file's name lies in its folder
        _sync(path)
    if os.path.lexists(final):
        os.replace(final, aside.parent / REPLACED)  # of a link the link; what it names stays where it is
    os.replace(aside, final)
    _sync(final.parent)
    shutil.rmtree(aside.parent)


def _entry(aside: Path, file: Path) -> tuple[str, dict[str, Any]]:
    return str(file.relative_to(aside)), {"bytes": file.stat().st_size, "sha256": _sha256(file)}


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
    names: dict[int, str] = {}
    tied = dict(state_dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in tied and first in tied:
            tied[name] = tied[first]
    return tied


def say_without_optimizer(checkpoint: str | None) -> None:
    """Warn of a checkpoint that a run cannot go on from as it would have gone on."""
    if checkpoint is not None and not any(Path(checkpoint).glob("optimizer*")):
        logger.warning(
            "%s holds no optimizer state (save_only_model): the run goes on with a new optimizer, and so with other "
            "weights than one that was not interrupted.",
            Path(checkpoint).name,
        )


@contextmanager
def read_with_care(checkpoint: Path) -> Iterator[None]:
    """Say in one sentence that a checkpoint does not hold what it should.

    Raises:
        InputError: In the place of what files can raise; a bug of this package stays what it is.
    """
    try:
        yield
    except (*UNREADABLE, *UNREADABLE_TO_LIBRARIES) as error:
        if isinstance(error, UNREADABLE_TO_LIBRARIES) and is_ours(error):
            raise
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


# ---- trainer_state.json ----------------------------------------------------------------------------------------------


def write_state(file: Path, state: TrainerState) -> None:
    """Write Trainer's state as `TrainerState.save_to_json` does, but as a whole or not at all."""
    content = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"
    write_whole(file, content.encode())


class FirstStepRecord(TrainerCallback):
    """Writes `trainer_state.json` after the first step: a run without it took none, and its folder counts as empty."""

    def __init__(self) -> None:
        self._written = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not self._written:
            with suppress(OSError):  # no reason to end the run; the next step tries again
                write_state(Path(args.output_dir) / STATE_FILE, state)
                self._written = True
