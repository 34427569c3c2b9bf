"""A folder that was just saved + the audit's digests -> where the files differ: what is proved is what is saved.

The audit digests the weights in memory. Between them and the disk stand the model's own `state_dict`, hooks, renamings
and the writer of the files. So the files are read back as a reader would read them, one tensor at a time, and digested.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from partialtune.delta_checkpoint import check_config, read_delta
from partialtune.errors import ModelError, is_disk_fault
from partialtune.freeze.plan import FreezePlan
from partialtune.model.config_keys import config_differences
from partialtune.model.digests import buffer_digest, digest_with_rows, digests_of
from partialtune.model.loading import has_remote_code, load_config
from partialtune.model.parameters import named_weights, plain_name
from partialtune.model.rows import other_rows_name
from partialtune.model.weight_files import TensorFiles, Weights, open_weights
from partialtune.proof.audit_result import SavedDifference
from partialtune.run_folder import VALUES_FILE, is_delta, read_json

OTHER_VALUES = "has other values in the saved files than it had when it was audited"
NOT_SAVED = "is not in the saved files"
NOT_OF_THE_MODEL = "is in the saved files, and is no tensor that was audited"


def saved_differences(
    folder: Path,
    model: PreTrainedModel,
    digests: Mapping[str, str],
    buffers: Mapping[str, str],
    plan: FreezePlan | None = None,
    gathered: Mapping[str, torch.Tensor] | None = None,
) -> list[SavedDifference]:
    """Read a saved model back and compare it with its digests; empty where the files hold that very model.

    Only files are read and nothing is gathered: of several processes one is enough.

    Args:
        folder: Holds the model as safetensors files, as a delta, or as adapters.
        model: That was saved.
        digests: sha256 by name of the parameters to compare: all of them, or, at a checkpoint, the frozen ones. The
            frozen rows of a matrix are among them by their name in `plan.frozen_rows`.
        buffers: sha256 by name of the persistent buffers, see `digests.buffer_digest`.
        plan: Of the run, where there is one; says whether there are adapters, and of which matrices rows train.
        gathered: Of a sharded model, the whole matrices of which a delta holds rows.
    """
    remote_code = has_remote_code(model)
    try:
        if is_delta(folder):
            saved = load_config(str(folder), trust_remote_code=remote_code)
            return [
                *_delta_differences(folder, model, digests, plan, gathered or {}),
                *(_adapter_differences(folder, plan, digests) if plan is not None and plan.adapter is not None else ()),
                *_config_differences(model.config, saved),
            ]
        if plan is not None and plan.adapter is not None:
            return [*_adapter_differences(folder, plan, digests)]
        weights = open_weights(folder, folder.name, remote_code)
        return [
            *_weight_differences(weights, digests, plan),
            *_buffer_differences(weights, buffers),
            *_not_of_the_model(weights, model),
            *_config_differences(model.config, weights.config),
        ]
    except (ModelError, SafetensorError, OSError, ValueError, KeyError) as error:
        if is_disk_fault(error):
            raise  # a fault of the machine, not of the files
        return [SavedDifference(folder.name, f"cannot be read back: {error}")]


def _weight_differences(
    weights: Weights, digests: Mapping[str, str], plan: FreezePlan | None
) -> Iterator[SavedDifference]:
    rows = plan.rows if plan is not None else {}
    matrix_of = {other_rows_name(name, rows[name]): name for name in rows}
    known = ((name, matrix_of.get(name, name)) for name in digests)
    tensors = ((name, weights.read(stored)) for name, stored in known if stored in weights.structure.by_name)
    yield from _compared(digests, digests_of(tensors, plan.frozen_rows if plan is not None else {}))


def _compared(digests: Mapping[str, str], found: Mapping[str, str]) -> Iterator[SavedDifference]:
    for name, sha256 in digests.items():
        if name not in found:
            yield SavedDifference(name, NOT_SAVED)
        elif found[name] != sha256:
            yield SavedDifference(name, OTHER_VALUES)


def _buffer_differences(weights: Weights, buffers: Mapping[str, str]) -> Iterator[SavedDifference]:
    """Of the buffers that the files hold. Others are computed by the model, so that no file has them."""
    for name in sorted(weights.buffers & buffers.keys()):
        if buffer_digest(weights.read(name)) != buffers[name]:
            yield SavedDifference(name, OTHER_VALUES)


def _not_of_the_model(weights: Weights, model: PreTrainedModel) -> Iterator[SavedDifference]:
    """Parameters in the files that the model does not have, such as a head that is tied in the model alone."""
    audited = {name for name, _ in named_weights(model)}
    for info in weights.structure.parameters:
        if info.name not in audited:
            yield SavedDifference(info.name, NOT_OF_THE_MODEL)


def _config_differences(audited: PretrainedConfig, saved: PretrainedConfig) -> Iterator[SavedDifference]:
    for difference in config_differences(audited, saved):
        yield SavedDifference("config.json", f"is of another model: {difference}")


def _delta_differences(
    folder: Path,
    model: PreTrainedModel,
    digests: Mapping[str, str],
    plan: FreezePlan | None,
    gathered: Mapping[str, torch.Tensor],
) -> Iterator[SavedDifference]:
    """What is stored, by its values; the rest by the base's digests in `delta.json`, which each load compares."""
    delta = read_delta(folder, folder.name)
    check_config(delta)
    values = TensorFiles([folder / VALUES_FILE])
    stored = digests_of((name, values.read(name)) for name in delta.stored - delta.rows.keys())
    # Of a matrix of which rows are stored: of these, with the other rows of the model, whose digest the audit has.
    present = {name: parameter for name, parameter in named_weights(model) if name in delta.rows}
    for name, parameter in present.items():
        stored[name] = digest_with_rows(gathered.get(name, parameter), delta.rows[name], values.read(name))
    of_base = {name: sha256 for name, sha256 in delta.before.items() if name not in stored}
    not_here = {*plan.frozen_rows, *plan.adapters} if plan is not None else set()
    whole = {name: sha256 for name, sha256 in digests.items() if name not in not_here}
    yield from _compared(whole, {**of_base, **stored})
    for name in delta.after.keys() - {name for name, _ in named_weights(model)}:
        yield SavedDifference(name, NOT_OF_THE_MODEL)
    for name, sha256 in whole.items():
        if delta.after.get(name) != sha256:
            yield SavedDifference(name, "has another sha256_after in delta.json than it had when it was audited")
    for name, rows in delta.rows.items():
        other = other_rows_name(name, rows)
        if digests.get(other) != delta.other_rows.get(name):
            yield SavedDifference(other, "have another sha256_other_rows in delta.json than when they were audited")


def _adapter_differences(folder: Path, plan: FreezePlan, digests: Mapping[str, str]) -> Iterator[SavedDifference]:
    """Of the adapters; the base's own weights were audited in memory, and what trained of them lies in the delta."""
    file = TensorFiles([folder / ADAPTER_SAFE_WEIGHTS_NAME])
    names = {plain_name(name): name for name in file.names}
    of_adapters = set(plan.adapters)
    trained = {name: sha256 for name, sha256 in digests.items() if name in of_adapters}
    yield from _compared(trained, digests_of((name, file.read(names[name])) for name in trained if name in names))
    for name in names.keys() - of_adapters:
        yield SavedDifference(name, NOT_OF_THE_MODEL)
    config = read_json(folder / ADAPTER_CONFIG_NAME)
    for key, value in (("r", plan.adapter.rank), ("lora_alpha", plan.adapter.alpha)):
        if config.get(key) != value:
            yield SavedDifference(ADAPTER_CONFIG_NAME, f"says {key} {config.get(key)}, and {value} was trained")
