"""A checkpoint as the command line names it -> a folder on this disk, fetched from the Hub where it lies there."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from partialtune.errors import ModelError
from partialtune.modeling import model_location

PLAN_FILE = "freeze_plan.json"
FETCHED = ("config.json", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json", PLAN_FILE)


def model_folder(name: str) -> tuple[Path, str]:
    """Where a checkpoint lies, and what to call it.

    model_folder("me/x@v1") -> (.../snapshots/607a30d..., "me/x@v1 (commit 607a30d7...)")

    Args:
        name: Folder, `builtin:lilliput`, or a Hub id, which may end in `@REVISION`. From the Hub, all files are of one
            commit, and those in the cache are not fetched again.

    Raises:
        ModelError: If it is none of these, or cannot be fetched.
    """
    hub_id, at, revision = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():
        hub_id, revision = name, ""
    location = model_location(hub_id)
    if not Path(location).is_dir():
        folder = _fetch(hub_id, revision)
        return folder, f"{name} (commit {folder.name})"
    if revision:
        raise ModelError(f"{name}: {hub_id} is on this disk, where it has one revision. Leave out @{revision}.")
    return Path(location), name


def _fetch(hub_id: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=list(FETCHED)))
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{hub_id}{at} cannot be fetched from the Hub, and there is no such folder: {reason}"
        ) from error
