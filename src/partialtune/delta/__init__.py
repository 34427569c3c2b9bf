"""Delta checkpoints: only what was trained, with digests of the base and of the result; and the model made of them."""

from pathlib import Path

DELTA_FILE = "delta.json"
VALUES_FILE = "delta.safetensors"


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta checkpoint."""
    return (folder / DELTA_FILE).is_file()
