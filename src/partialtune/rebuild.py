"""A run -> its whole model: in memory, or of a delta and its base, bit for bit, as a folder for `from_pretrained`."""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from partialtune.delta_checkpoint import Delta, check_base, check_config, put_stored, read_delta
from partialtune.errors import HOW_TO_INSTALL_PEFT, InputError, ModelError, is_peft_installed
from partialtune.files import move_all
from partialtune.freeze.adapter_plan import merged_plan
from partialtune.freeze.apply import untie_head
from partialtune.model.checkpoint_folder import PLAN_FILE, TOKENIZER_FILES, checkpoint_folder, holds_adapters
from partialtune.model.digests import buffer_digest, digests
from partialtune.model.held_narrow import widen
from partialtune.model.loading import PROCESSOR_FILES, load_config, load_model, load_tokenizer
from partialtune.model.parameters import persistent_buffers
from partialtune.model.saving import save_pretrained
from partialtune.proof.saved_files import saved_differences
from partialtune.run_folder import RECIPE_FILE, check_writable, is_delta, read_json, write_json
from partialtune.words import counted, joined

logger = logging.getLogger(__name__)


def load(run: str | os.PathLike, base: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a run, in fp32 and in eval mode: of a whole model, a delta or LoRA adapters.

    load("outputs/gpt2-norms") -> GPT2LMHeadModel

    A delta is put over its base, every digest checked, its config's too. LoRA adapters, and those that trained beside a
    delta's parts, are put into their base: then it is a `peft.PeftModel`, not merged.

    Args:
        run: Folder or Hub id (also ID@REVISION) of a run, or of any causal language model.
        base: Where the base of a delta or of adapters lies, if no longer where they say: folder, Hub id (also
            ID@REVISION) or `builtin:lilliput`.
        trust_remote_code: Whether code that comes with a whole model, or with the base of adapters, may run.

    Raises:
        ModelError: If a model cannot be read, a delta's base is not the one that was trained, or the delta not what was
            saved.
    """
    return load_folder(*checkpoint_folder(os.fspath(run)), base, trust_remote_code)


def load_folder(folder: Path, name: str, base: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """`load` of what `checkpoint_folder` has found: a Hub id is not asked for twice, between which it may move.

    Args:
        folder: Of the run.
        name: What messages call it.
        base, trust_remote_code: As for `load`.

    Raises:
        ModelError: As for `load`.
    """
    if is_delta(folder):
        opened = read_delta(folder, name)
        model = _rebuild(opened, base)
        return _with_adapters(model, folder, name) if opened.adapters else model
    if holds_adapters(folder):
        return _with_adapters(load(base or base_of_adapters(folder), None, trust_remote_code), folder, name)
    if base is not None:
        raise ModelError(f"{name} holds a whole model, which has no base. Leave base out.")
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    return load_model(str(folder), config, trust_remote_code=trust_remote_code)


def apply_delta(delta: str | os.PathLike, out: str | os.PathLike, base: str | None = None) -> Path:
    """Write the model that a delta stands for as a folder of its own: weights, configuration, tokenizer, freeze plan.

    Adapters that belong to the delta are merged into it, as peft does it: W + (alpha / rank) B A in fp32. Each value of
    an adapted matrix is rounded to fp32 once more than while it trained; all others keep their bits.

    Args:
        delta: As for `load`.
        out: A folder that is absent or empty. An absent one appears whole or not at all; an empty one, which may be
            `.`, a link's or a mount point and so cannot be replaced, is filled, `config.json` last.
        base: As for `load`.

    Raises:
        InputError: If `out` holds something or cannot be written.
        ModelError: As for `load`; nothing is written.
    """
    out = Path(out).expanduser()
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link to {os.readlink(out)}, which is not there. Name a folder.")
    empty = out.is_dir() and not any(out.iterdir())  # it is filled, an absent one is renamed into place
    if out.exists() and not empty:
        raise InputError(f"{out} exists and is no empty folder. Name another one for the rebuilt model.")
    out = out.resolve()
    check_writable(out, "OUT")
    folder, name = checkpoint_folder(os.fspath(delta), TOKENIZER_FILES)
    opened = read_delta(folder, name)
    # The base in its own dtype, as views of its files: what is written takes no second model. peft merges in fp32.
    model = _rebuild(opened, base, narrow=not opened.adapters)
    if opened.adapters:
        model = _with_adapters(model, folder, name).merge_and_unload()
    same_disk = out if empty else out.parent  # a rename within one file system is whole or not at all
    same_disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=same_disk, prefix=f".{out.name}-") as aside:
        whole = Path(aside) / "model"
        save_pretrained(model, whole)
        _check_written(whole, model, out)
        if (folder / "tokenizer_config.json").is_file():
            load_tokenizer(str(folder)).save_pretrained(whole)
        for file in (folder / name for name in PROCESSOR_FILES):
            if file.is_file():
                shutil.copyfile(file, whole / file.name)
        if (folder / PLAN_FILE).is_file():
            _write_plan(folder / PLAN_FILE, whole / PLAN_FILE, model, merged=bool(opened.adapters))
        try:
            if empty:
                move_all(whole, out)
            else:
                os.replace(whole, out)
        except OSError as error:
            raise InputError(f"{out} could not be written: {error.strerror or error}. Name another folder.") from error
    return out


def _write_plan(file: Path, out: Path, model: PreTrainedModel, merged: bool) -> None:
    """The run's freeze plan for the model that was rebuilt. Once merged, an adapter is a matrix that may have moved."""
    if not merged:
        shutil.copyfile(file, out)
        return
    try:
        write_json(out, merged_plan(read_json(file), digests(model)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read as a freeze plan ({error}). Fetch it again.") from error


def _check_written(whole: Path, model: PreTrainedModel, out: Path) -> None:
    """Read the files back: the model's own `state_dict` and the writers of files stand between it and the disk.

    Raises:
        ModelError: If they hold anything else than the model.
    """
    buffers = {name: buffer_digest(buffer) for name, buffer in persistent_buffers(model)}
    different = saved_differences(whole, model, digests(model), buffers)
    if different:
        raise ModelError(
            f"{out} was not written: read back, its files are not the model that was rebuilt. "
            f"{counted(len(different), 'difference')}: {joined([str(one) for one in different], 240)}."
        )


def _with_adapters(model: PreTrainedModel, folder: Path, name: str) -> Any:
    """A model with the adapters of a folder: a `peft.PeftModel`."""
    if not is_peft_installed():
        raise ModelError(f"{name}: {HOW_TO_INSTALL_PEFT}")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def base_of_adapters(folder: Path) -> str:
    """What adapters were trained on, as a name that `load` takes.

    Of a bundled model `adapter_config.json` has the folder on the machine of the run, for peft; the recipe its name.
    """
    config = read_json(folder / ADAPTER_CONFIG_NAME)
    name, revision = config["base_model_name_or_path"], config.get("revision")
    recorded, _ = recorded_base(folder)
    if recorded is not None and recorded.startswith("builtin:"):
        return recorded
    return f"{name}@{revision}" if revision and not Path(name).is_dir() else name


def recorded_base(folder: Path) -> tuple[str | None, str | None]:
    """`model_name_or_path` of the recipe in a run's folder, and the commit that the run recorded.

    The recipe of a checkpoint lies above it. A file of this name may be somebody else's: then both are None.
    """
    is_checkpoint = folder.name.startswith("checkpoint-") and not (folder / RECIPE_FILE).is_file()
    run = folder.resolve().parent if is_checkpoint else folder
    try:
        values = yaml.safe_load((run / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None, None
    name = values.get("model_name_or_path") if isinstance(values, dict) else None
    record = values.get("run") if isinstance(values, dict) else None
    commit = record.get("base_commit") if isinstance(record, dict) else None
    return name if isinstance(name, str) else None, commit if isinstance(commit, str) else None


def _rebuild(delta: Delta, base: str | None, narrow: bool = False) -> PreTrainedModel:
    """The base with what the delta stores copied over it; config, base and result checked by their digests."""
    check_config(delta)
    place = base or delta.base.location
    try:
        location, base_name = checkpoint_folder(place)
        model = load_model(str(location), _base_config(delta), narrow=narrow)
    except ModelError as error:
        raise ModelError(
            f"{delta.name} is a delta of {delta.base}, which cannot be had from {place}: {error} "
            f"Say where it lies with --base."
        ) from error
    if delta.head == "untied":
        untie_head(model)  # as the run did it before its first step: a copy of the token embedding
    check_base(delta, base_name, digests(model))
    widen(model, delta.stored)  # 16 bits would round what is stored
    if delta.grows:
        with torch.random.fork_rng(devices=[]):  # it draws values for the new rows, all of which the delta stores
            model.resize_token_embeddings(delta.length, mean_resizing=False)
    put_stored(delta, model)
    model.config.name_or_path = delta.name
    return model


def _base_config(delta: Delta) -> PretrainedConfig:
    """The result's configuration, tied as the base is, whose file has no tensor for a head that was untied; and without
    rows of new tokens.
    """
    config = load_config(str(delta.folder))
    if delta.head == "untied":
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    if delta.grows:
        config.get_text_config().vocab_size = max(delta.base_rows.values())
    return config
