"""The LoRA adapters that lie beside a delta: written with it, and bound to it by sha256, as `delta.json` holds it.

They stand on the base with the delta's values in it, `adapter_model.safetensors` and `adapter_config.json` as peft
writes them. Neither half is a model without the other, and neither is taken for the whole.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.errors import ModelError
from partialtune.freeze.adapter_plan import Adapter
from partialtune.freeze.lora import write_adapters
from partialtune.run_folder import DELTA_FILE

ADAPTER_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME)
# What `adapter_config.json` names as the base. Named by itself the base would be loaded without the delta's values by
# whoever follows that name, as transformers does with a Hub id.
UNDER_ADAPTERS = "the base with the values of delta.safetensors in it, which partialtune.load makes"


def write_beside_delta(
    folder: Path, model: nn.Module, adapter: Adapter, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Write the adapters, and return what `delta.json` says of them.

    Args:
        folder: The delta's.
        model: Adapted by `add_adapters`.
        adapter: Of its plan.
        tensors: Of the adapters, by the plan's names.
    """
    write_adapters(model, folder, tensors, UNDER_ADAPTERS)
    return {**adapter.to_json(), "sha256": {name: sha256_of(folder / name) for name in ADAPTER_FILES}}


def read_sha256(content: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of each file of the adapters that belong to a delta, by its name; empty where there are none.

    Args:
        content: Of `delta.json`.

    Raises:
        TypeError: If it is damaged.
    """
    sha256 = content["adapters"]["sha256"] if "adapters" in content else {}
    if sha256 and (set(sha256) != set(ADAPTER_FILES) or not all(isinstance(one, str) for one in sha256.values())):
        raise TypeError(f"{DELTA_FILE} holds no sha256 of {' and '.join(ADAPTER_FILES)}")
    return dict(sha256)


def check_adapters(folder: Path, name: str, sha256: Mapping[str, str]) -> None:
    """Make sure that the adapters beside a delta are those that trained with it, and that they are all there.

    Args:
        folder: The delta's.
        name: What messages call it.
        sha256: Of each file; empty where the delta has no adapters.

    Raises:
        ModelError: If not.
    """
    for file in ADAPTER_FILES:
        there, expected = (folder / file).is_file(), sha256.get(file)
        if there and expected is None:
            raise ModelError(
                f"{name} is a delta without adapters, and {file} lies beside it. Move the files adapter_* to a folder "
                f"of their own."
            )
        if expected is not None and not there:
            raise ModelError(
                f"{name}: adapters trained beside what this delta holds, and {file} is missing: one without the other "
                f"is no model. Fetch it again."
            )
        if expected is not None and sha256_of(folder / file) != expected:
            raise ModelError(
                f"{name}: {file} is not the one that trained beside this delta (sha256 in {DELTA_FILE}). Fetch both "
                f"again."
            )


def sha256_of(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
