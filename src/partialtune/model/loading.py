"""Model and tokenizer: a Hub id, folder or bundled name -> config, model, tokenizer; or an empty model.

In:  `model_name_or_path` as a recipe has it, its revision, and what the recipe changes in the config.
Out: transformers' own objects; or a ModelError that says in one sentence why not, and what to do.

In the order of their calls: `model_location`, `load_config`, `load_tokenizer`, then `empty_model` (a plan, a forecast)
or `load_model` (a run). What is asked of files and of what was loaded stands in `model_checks`.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    core_model_loading,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from partialtune.builtin import builtin_folder
from partialtune.errors import ModelError, in_one_line
from partialtune.model.held_narrow import hold_narrow
from partialtune.model.model_checks import (
    check_loaded,
    check_weights,
    refuse_adapter,
    refuse_wider_than,
    without_safetensors,
)
from partialtune.model.narrow_weights import NARROW
from partialtune.model.train_mode import set_dropout
from partialtune.net.hub_client import HUB_ERRORS, unreachable_hub
from partialtune.run_folder import is_delta

logger = logging.getLogger(__name__)

# How images become a model's inputs.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
REMOTE = "transformers_modules"  # the package of code that came with a model
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_location(name: str) -> str:
    """Where to load `name` from: a Hub id as it is, a folder that exists, the package's folder for `builtin:...`.

    Raises:
        ModelError: If it is neither.
    """
    if name.startswith("builtin:"):
        return str(builtin_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            refuse_adapter(name, str(path))
            raise ModelError(f"model_name_or_path: {name} is a folder without config.json, so it holds no model.")
        return str(path)
    if path.exists():
        raise ModelError(f"model_name_or_path: {name} is a file. Name the folder that holds config.json.")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_a_path or not HUB_ID.fullmatch(name):
        raise ModelError(
            f"model_name_or_path: there is no folder {name}, and it is no Hub id. A Hub id is NAME or NAMESPACE/NAME, "
            f"such as openai-community/gpt2; the bundled model is builtin:lilliput."
        )
    return name


def load_config(
    name: str, revision: str = "main", dropout: str | float = "model", trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a causal language model, with `dropout` put on every dropout that it has, unless it says `model`.

    Raises:
        ModelError: If there is none, or it belongs to no causal language model.
    """
    with _loading(name, revision):
        location = model_location(name)
        if location == name and not Path(name).is_dir():
            _offline_where_unreachable(name, revision)
        if not is_delta(Path(location)):  # adapters beside a delta belong to it: `read_delta` sees to that
            refuse_adapter(name, location, revision)
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
        config.get_text_config()  # MusicGen has two, and no causal language model is made of it
    if not trust_remote_code and not _is_known(config):
        raise ModelError(f"{name} is a {config.model_type} model; partialtune trains causal language models.")
    if dropout != "model":
        with _loading(name, revision):
            set_dropout(config, float(dropout))
    config.name_or_path = name  # what messages call it: not the folder of a bundled model
    # transformers 5.23 knows the commit while it loads, and keeps it no more. It is put back under transformers' own
    # name: `load_model` and the run's record read it here, since the weights have to be of the same commit
    # (`test_a_base_that_moved_on_the_hub_is_taken_at_the_commit_that_the_run_began_with`).
    config._commit_hash = _hub_commit(name, revision)
    return config


def _offline_where_unreachable(name: str, revision: str) -> None:
    """Where there is no network, take what the cache has of a model, or say at once that it has nothing.

    Raises:
        ModelError: If the model's config is not in the cache.
    """
    host = unreachable_hub()
    if host is None:
        return
    if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        raise ModelError(
            f"The model {name} is not in the cache, and {host} cannot be reached. Without a network take a folder, or "
            f"builtin:lilliput; HF_HUB_OFFLINE=1 asks for what the cache has."
        )
    logger.warning("%s cannot be reached: %s is taken from the cache, as with HF_HUB_OFFLINE=1.", host, name)
    constants.HF_HUB_OFFLINE = True  # which the client asks before each request


def auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class of transformers' whose `from_pretrained` loads the model of a config.

    `AutoModelForCausalLM` wherever it gives a model that it loads again. It knows no LLaVA and no Qwen2.5-VL, and of
    Mllama it gives a text part that it does not know afterwards: these are loaded whole, as models for images and text.
    Of Llama 4 and Qwen3.5 it gives the text part alone, which is a model of its own; `check_loaded` says what is left
    out. What cannot be trained on text is found out as any other model: by `check_conformance`.

    `_model_mapping` is private to transformers: the table that from_pretrained looks into. Asked beforehand, so that
    the refusal is one sentence and comes before any weights. `test_a_model_that_is_no_causal_lm_is_refused` and
    `test_the_auto_class_is_one_that_loads_again_what_it_loaded` notice a change.
    """
    kind, causal = type(config), AutoModelForCausalLM._model_mapping
    loads_again = kind in causal and causal[kind].config_class in causal
    sees = kind in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees and not loads_again else AutoModelForCausalLM


def _is_known(config: PretrainedConfig) -> bool:
    """Whether `auto_class` has a class for it."""
    return type(config) in auto_class(config)._model_mapping


def _hub_commit(name: str, revision: str = "main") -> str | None:
    """The commit that a Hub id's revision was resolved to when its config was loaded; None for a folder."""
    folder = _files_folder(name, revision)
    return None if folder == Path(model_location(name)) else folder.name


def _files_folder(name: str, revision: str = "main") -> Path:
    """The folder that holds a model's files: its own, or the one of a Hub id in the cache once its config is there."""
    location = model_location(name)
    file = None if Path(location).is_dir() else try_to_load_from_cache(location, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else Path(location)


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights, on the meta device: shapes and structure only.

    Raises:
        ModelError: If no model can be made of the config, such as one with 0 heads.
    """
    # what has no values needs no start: half of its time
    with _loading(config.name_or_path, "main"), torch.device("meta"), no_init_weights():
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights(recompute_mapping=False)  # which is a part of what was left out
    return model


def load_model(
    name: str,
    config: PretrainedConfig,
    revision: str = "main",
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    narrow: bool = False,
    empty: bool = False,
) -> PreTrainedModel:
    """The pretrained model in fp32, or in a wider dtype, in eval mode. A 16-bit base is widened, which is exact.

    Args:
        name: Hub id, folder, or name of a bundled model.
        config: By `load_config`.
        revision: On the Hub.
        trust_remote_code: Whether code that comes with it may run.
        dtype: To hold it in.
        narrow: Hold its matrices in the 16 bits of its files, as views of these, which the system reads in when they
            are used; what is written into them stays in memory. What it computes is the same: see `held_narrow`.
        empty: Leave the values of its parameters out, on the meta device: another process sends them.

    Raises:
        ModelError: If it cannot be loaded whole from safetensors files, or `dtype` would round its values.
    """
    if is_delta(Path(model_location(name))):
        raise ModelError(f"{name} is a delta, not a whole model. Make it one first: partialtune apply {name} OUT")
    check_weights(name, model_location(name), config)
    commit = getattr(config, "_commit_hash", None) or revision  # that of the config, though the branch moved just now
    with _loading(name, revision), _as_in_files() if narrow else nullcontext():
        model, report = auto_class(config).from_pretrained(
            model_location(name),
            config=config,
            revision=commit,
            trust_remote_code=trust_remote_code,
            dtype=dtype,  # said outright: by default transformers takes the one that config.json names, mostly bf16
            use_safetensors=True,  # pickles can run code when they are opened
            output_loading_info=True,
            **({"device_map": "meta"} if empty else {}),  # tables that it computes for itself it has all the same
        )
    model.config.name_or_path = name
    check_loaded(name, model, report)
    if not trust_remote_code and not _is_known(model.config):
        raise ModelError(
            f"{name} is a {config.model_type} model, of which the text part alone would be saved, as a "
            f"{model.config.model_type} model. transformers loads no causal language model of that type, so that the "
            f"result could not be used."
        )
    refuse_wider_than(dtype, name, _files_folder(name, commit))
    if narrow:
        hold_narrow(model)
    return model


@contextmanager
def _as_in_files() -> Iterator[None]:
    """Within it transformers puts 16-bit values as they are into a model that it makes in fp32.

    `dtype=torch.bfloat16` would do another thing: tables that a model computes for itself, such as Gemma's
    `embed_scale` and XGLM's positions, and code that asks for its dtype would have 16 bits too, and results be others.

    `_materialize_copy` is private to transformers: what makes a tensor of a place in a file.
    `test_a_16_bit_base_is_held_in_its_own_bits` notices a change; until then the base is loaded in fp32, as ever.
    """
    original = getattr(core_model_loading, "_materialize_copy", None)
    if original is None:
        yield
        return

    def as_it_is(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = tensor[...]
        return values.to(device=device, dtype=None if values.dtype in NARROW else dtype)

    core_model_loading._materialize_copy = as_it_is
    try:
        yield
    finally:
        core_model_loading._materialize_copy = original


def has_remote_code(model: PreTrainedModel) -> bool:
    """Whether its code came with it, and was trusted when it was loaded."""
    return any(one.__module__.startswith(REMOTE) for one in type(model).__mro__)


def copy_processor_files(config: PretrainedConfig, folder: Path) -> None:
    """Put the files beside a model that say how images become its inputs into `folder`, as they are.

    Args:
        config: Of the model that they lie beside, by `load_config`. A language model alone has none.
        folder: Beside a model that reads the same inputs.
    """
    if config.get_text_config() is config:
        return
    location, commit = model_location(config.name_or_path), getattr(config, "_commit_hash", None)
    for name in PROCESSOR_FILES:
        file = Path(location) / name
        if not Path(location).is_dir():
            try:
                file = Path(hf_hub_download(location, name, revision=commit))
            except EntryNotFoundError:
                continue
            except HUB_ERRORS as error:
                logger.warning("%s of %s could not be had: %s", name, location, in_one_line(error))
                continue
        if file.is_file():
            shutil.copyfile(file, folder / name)


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        ModelError: If there is none.
    """
    with _loading(name, revision, what="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_location(name), revision=revision, trust_remote_code=trust_remote_code
        )
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one without a word
        raise ModelError(f"{name} has no tokenizer files beside its model. Copy those of the model's origin there.")
    return tokenizer


@contextmanager
def _loading(name: str, revision: str, what: str = "model") -> Iterator[None]:
    """Say in one sentence why a model cannot be loaded.

    Raises:
        ModelError: In the place of whatever else is raised within.
    """
    try:
        yield
    except ModelError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{name}: a weight file is damaged ({error}). Fetch the model again.") from error
    except Exception as error:  # all inside is a library's that reads others' files: with 0 heads it divides by zero
        if what == "model" and "safetensors" in str(error) and "file named" in str(error):  # of a Hub id
            raise without_safetensors(name, name, has_pickle=True) from error
        where = f" at revision {revision}" if revision != "main" else ""
        words = in_one_line(error, longest=300)
        if not isinstance(error, OSError | ValueError | RuntimeError):  # KeyError('x') alone says nothing
            words = f"{words} ({type(error).__name__})"
        raise ModelError(f"The {what} {name}{where} cannot be loaded: {words}") from error


# Warnings of transformers that mean nothing in the way it is used here.
MEANINGLESS = (
    "LOAD REPORT",  # a table of what files and model do not share: `check_loaded` says it, or refuses
    "`loss_type=None` was set",  # transformers writes that null itself; the loss of a causal LM is what is meant
    "There were missing keys in the checkpoint model loaded",  # the best model's: a tied head is stored once
    "Token indices sequence length is longer",  # the whole text is tokenised, and cut into windows afterwards
    "`use_cache=True` is incompatible with",  # what it then does, switching the cache off for training, is right
)


class _PassedOn(logging.Handler):
    """Says what transformers says in one line of ours, once each: it is often what explains what happens next."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        words = in_one_line(record.getMessage(), longest=300)
        if words not in self._said and not any(part in words for part in MEANINGLESS):
            self._said.add(words)
            logger.log(record.levelno, "transformers says: %s", words)


def quiet_libraries() -> None:
    """Keep what the libraries print for their own sake out of the output; warnings of transformers are passed on."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.disable_propagation()  # CI switches it on, and each line would come twice
    library = logging.getLogger("transformers")
    for handler in [handler for handler in library.handlers if isinstance(handler, _PassedOn)]:
        library.removeHandler(handler)
    library.addHandler(_PassedOn())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
