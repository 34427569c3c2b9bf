"""A checkpoint as the command line names it -> a folder on this disk, after a download where it lies on the Hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import ADAPTER_CONFIG_NAME

from partialtune.errors import ModelError
from partialtune.model.loading import PROCESSOR_FILES, model_location
from partialtune.net.hub_client import HUB_ERRORS, Patience, ask, in_words, progress_bars, time_limits, unreachable_hub
from partialtune.run_folder import RECIPE_FILE, is_delta

PLAN_FILE = "freeze_plan.json"
# Patterns of what is fetched from the Hub: weights as safetensors, never as pickles, and what says how to read them.
FETCHED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "delta.json", "delta.safetensors", PLAN_FILE),
    RECIPE_FILE,  # it names the base
)
TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", *PROCESSOR_FILES),
)


def checkpoint_folder(name: str, beside: Sequence[str] = ()) -> tuple[Path, str]:
    """Where a checkpoint lies, and what to call it.

    checkpoint_folder("me/x@v1") -> (.../snapshots/607a30d..., "me/x@v1 (commit 607a30d...)")

    Args:
        name: Folder, `builtin:lilliput`, or a Hub id, which may end in `@REVISION`. From the Hub all files are of one
            commit, and those in the cache are not fetched again.
        beside: Patterns of further files to fetch.

    Raises:
        ModelError: If it is none of these, or cannot be fetched.
    """
    hub_id, at, revision = name.rpartition("@")
    if not at or Path(name).expanduser().is_dir():  # a folder's own name may hold an @
        hub_id, revision = name, ""
    here = Path(hub_id).expanduser()
    # `model_location` refuses adapters, which are no model; here they are one of the things to compare.
    location = here if (here / ADAPTER_CONFIG_NAME).is_file() else Path(model_location(hub_id))
    if not location.is_dir():
        folder = _fetch(hub_id, revision, [*FETCHED, *beside])
        return folder, f"{name} (commit {folder.name})"  # the Hub's cache names a snapshot's folder by its commit
    if revision:
        raise ModelError(f"{name}: {hub_id} is on this disk, where it has one revision. Leave out @{revision}.")
    return location, name


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters in place of a model, or beside a delta that they belong to."""
    alone = is_delta(folder) or not (folder / "config.json").is_file()
    return (folder / ADAPTER_CONFIG_NAME).is_file() and alone


def _fetch(hub_id: str, revision: str, patterns: list[str]) -> Path:
    patience = Patience()
    host = unreachable_hub()

    def fetch() -> str:
        given = {"revision": revision or None, "allow_patterns": patterns}
        return snapshot_download(hub_id, local_files_only=host is not None, **given)

    try:
        with progress_bars(), time_limits(patience.answer_seconds):
            return Path(ask(fetch, patience))
    except HUB_ERRORS as error:
        at = f" at revision {revision}" if revision else ""
        if host is not None:
            raise ModelError(
                f"There is no folder {hub_id}, the cache has none, and {host} cannot be reached."
            ) from error
        raise ModelError(
            f"There is no folder {hub_id}, and the Hub does not give {hub_id}{at}: {in_words(error)}"
        ) from error
