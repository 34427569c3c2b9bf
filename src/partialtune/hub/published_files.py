"""What of a run's folder goes to the Hub: a finished run -> its files with digests; compared with what the Hub has."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.hf_api import RepoFile

from partialtune.errors import FreezeViolation, InputError, UploadIncomplete
from partialtune.pages.run_files import read_run
from partialtune.run_folder import EXIT_FILE, exit_code_of

# Decide what `from_pretrained` loads, and how: see `gap_between`.
WEIGHTS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "delta.safetensors", "delta.json"),
)
# Of these and of WEIGHTS nothing may stay behind from another model that was in the repository before: beside the
# configuration of a whole model a repository of adapters looks like that model.
CONFIGURATIONS = ("config.json", "generation_config.json")
OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
# Everything that is sent. Not in it, and so never sent: checkpoints, optimizer and scheduler state, caches,
# training_args.bin, Trainer's log.
# A list of what may go, not of what may not: training_args.bin is a pickle that can hold a token in clear.
SENT = (
    *WEIGHTS,
    *CONFIGURATIONS,
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("README.md", "report.html", "figures/*.png", "recipe.yaml", "freeze_plan.json", "audit.json", "evaluation.json"),
    *("insight.json", "performance.json", "train_results.json", "weight_deltas.jsonl", "block_draws.jsonl"),
    "samples.jsonl",
)
WRITTEN_LAST = ("evaluation.json", "README.md", "report.html")


@dataclass(frozen=True)
class LocalFile:
    """A file of the run: `size` in bytes, `sha256` as the Hub keeps it of large files, `git_sha1` as of small ones."""

    path: Path
    size: int
    sha256: str
    git_sha1: str

    def equals(self, remote: RepoFile | None) -> bool:
        """Whether the Hub holds these very bytes."""
        if remote is None or remote.size != self.size:
            return False
        return remote.lfs.sha256 == self.sha256 if remote.lfs else remote.blob_id == self.git_sha1


@dataclass(frozen=True)
class Gap:
    """How a revision on the Hub differs from the run: names of files to send, and of those to take away."""

    missing: tuple[str, ...]
    stale: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.stale)

    def __str__(self) -> str:
        return ", ".join([*self.missing, *(f"{name} (of another model)" for name in self.stale)])


def files_to_send(run: Path) -> dict[str, LocalFile]:
    """Name in the repository -> file of the run, for all that is sent. Files that did not change are not read twice."""
    paths = sorted({path for pattern in SENT for path in run.glob(pattern) if path.is_file()})
    return {path.relative_to(run).as_posix(): _local_file(path) for path in paths}


def gap_between(local: Mapping[str, LocalFile], remote: Iterable[RepoFile]) -> Gap:
    """Compare the run with what a revision on the Hub holds.

    Weights and configurations of another model are to go: a whole model, a delta and adapters have different ones, and
    any of them can follow any other. Other files there are let be.
    """
    there = {file.path: file for file in remote if isinstance(file, RepoFile)}
    missing = tuple(name for name, file in local.items() if not file.equals(there.get(name)))
    stale = tuple(name for name in there if _is_of_a_model(name) and name not in local)
    return Gap(missing, stale)


def check_finished(run: Path, allow_failed_audit: bool) -> None:
    """Make sure that a folder holds a whole run that came to its end and may be published.

    A run that goes on with more steps replaces the files of its earlier end one by one, and `exit.json` last: where
    that is missing, the weights may be newer than the scores.

    Raises:
        InputError: If it does not.
    """
    check_whole(run, allow_failed_audit)
    code = exit_code_of(run)
    ended = (0, UploadIncomplete.exit_code, *([FreezeViolation.exit_code] if allow_failed_audit else []))
    if code not in ended:
        why = f"{EXIT_FILE} says {code}" if code is not None else f"it has no {EXIT_FILE}"
        raise InputError(
            f"The newest run in {run} did not finish ({why}): its files may come from different steps. "
            f"Finish it first: {_finishing(run)}"
        )


def check_whole(run: Path, allow_failed_audit: bool) -> None:
    """Make sure that a folder holds all files of a run that may be published.

    Raises:
        InputError: If it does not.
    """
    files = read_run(run)
    lacking = [name for name in WRITTEN_LAST if not (run / name).is_file()] + _lacking_weights(run)
    if not all(parameter.get("sha256_after") for parameter in files.plan.get("parameters") or [{}]):
        lacking.append("the digests after training in freeze_plan.json")
    if lacking:
        raise InputError(
            f"{run} holds no finished run: it lacks {', '.join(lacking)}. Finish it first: {_finishing(run)}"
        )
    if files.audit.get("passed") is not True and not allow_failed_audit:
        raise InputError(
            f"{run}: the freeze audit of this run failed (audit.json says why), so it is not published. "
            f"With --allow_failed_audit it is, and the card says so on top."
        )


def _finishing(run: Path) -> str:
    """The command that goes on with a run; its folder may have moved since."""
    words = ["partialtune", "train", str(run / "recipe.yaml"), "--output_dir", str(run)]
    return shlex.join([*words, "--resume_from_checkpoint", "auto"])


def _lacking_weights(run: Path) -> list[str]:
    """What is missing for the model in the folder to load."""
    instead = [config for config in ("adapter_config.json", "delta.json") if (run / config).is_file()]
    if instead:  # both where adapters trained beside parts of the base
        weights = [run / config.replace("_config", "_model").replace(".json", ".safetensors") for config in instead]
        return [file.name for file in weights if not file.is_file()]
    index = run / "model.safetensors.index.json"
    names = {"config.json", *(_shards(index) if index.is_file() else ["model.safetensors"])}
    return sorted(name for name in names if not (run / name).is_file())


def _shards(index: Path) -> set[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        return set(content["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: {error}. Run the recipe again.") from error


def _is_of_a_model(name: str) -> bool:
    patterns = (*WEIGHTS, *CONFIGURATIONS, *OTHER_WEIGHTS)
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def _local_file(path: Path) -> LocalFile:
    state = path.stat()
    return _read(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _read(path: Path, size: int, modified: int) -> LocalFile:
    """Digest a file; `modified` is there to read it again when it was written to."""
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)  # git's name of a file's content
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            sha1.update(block)
    return LocalFile(path, size, sha256.hexdigest(), sha1.hexdigest())
