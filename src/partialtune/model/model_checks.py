"""Is it a whole model, in weights that can be trained, and does it fit the run? Asked before loading and afterwards.

In:  a name, folder, config, loading report or model; the run's block size and token ids.
Out: nothing, or a ModelError that says the reason and the way out.
"""

import json
import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from partialtune.builtin import builtin_folder
from partialtune.errors import ModelError
from partialtune.model.parameters import chunks_of
from partialtune.model.sharded_files import MODEL_FOLDER, is_sharded_checkpoint

logger = logging.getLogger(__name__)

# In files of older versions of transformers, made anew from the config: what masks are filled with, rotary frequencies,
# position ids. The masks themselves (h.0.attn.bias of GPT-2) are left out of the report by their model's class.
MADE_ANEW = re.compile(r"(.*\.)?(masked_bias|inv_freq|position_ids)")
PLAIN = re.compile(r"[\w.:/~ +@=,-]+")  # characters that mean nothing to a shell within quotes, nor to Python
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def refuse_adapter(name: str, location: str, revision: str = "main") -> None:
    """Stop where adapters lie in the place of a model, or beside one: transformers would load them as a part of it.

    Args:
        name: What messages call it.
        location: Folder or Hub id.
        revision: Of the Hub id.

    Raises:
        ModelError: Names their base, and the command that merges them into it.
    """
    file = find_adapter_config_file(location, revision=revision)
    if file is None:
        return
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    base = base if isinstance(base, str) and PLAIN.fullmatch(base) else None
    holds = f"{name} holds an adapter of {base or 'a model that it does not name'}"
    if (Path(location) / "config.json").is_file():
        raise ModelError(
            f"{holds}, beside a model. Move the files adapter_* to a folder of their own, ADAPTER: the model then "
            f"trains without them. To train it with them, merge them first, with: {_merge_command('ADAPTER', location)}"
        )
    raise ModelError(f"{holds}. Merge it first, with: {_merge_command(location, base)}")


def _merge_command(adapter: str, base: str | None) -> str:
    if base and base.startswith("builtin:"):
        with suppress(ModelError):  # of another version of this package
            base = str(builtin_folder(base))
    base, adapter = _in_command(base or "BASE", "BASE"), _in_command(adapter, "ADAPTER")
    return (
        'python -c "from peft import PeftModel; '
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"PeftModel.from_pretrained(M.from_pretrained('{base}'), '{adapter}').merge_and_unload()"
        f".save_pretrained('MERGED'); T.from_pretrained('{base}').save_pretrained('MERGED')\""
    )


def _in_command(place: str, else_this: str) -> str:
    """A folder or Hub id in a command that is advised; another word where a shell would read more into it."""
    return place if PLAIN.fullmatch(place) else else_this


def check_weights(name: str, location: str, config: PretrainedConfig) -> None:
    """Stop before anything is loaded where the weights are quantised, or lie in pickles alone.

    Args:
        name: What messages call it.
        location: Folder or Hub id; the files of a Hub id are not asked for here.
        config: Its own.

    Raises:
        ModelError: In either case.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        kind = settings.get("quant_method") or "quantised"
        raise ModelError(
            f"{name} is quantised ({getattr(kind, 'value', kind)}): its values stand for others, and cannot be "
            f"trained. Name the repository in full precision that it was made from (its model card says which)."
        )
    folder = Path(location)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if is_sharded_checkpoint(folder):
            raise ModelError(
                f"{name} is a checkpoint in shards ({MODEL_FOLDER}), which a run goes on from. The whole model lies in "
                f"the folder of its run once that has ended; while it goes on, set fsdp_state_dict_type: "
                f"FULL_STATE_DICT, by which checkpoints hold it too."
            )
        raise without_safetensors(name, location, any(folder.glob("*.bin")))


def without_safetensors(name: str, location: str, has_pickle: bool) -> ModelError:
    """The error on a model whose weights do not lie in safetensors files."""
    if not has_pickle:
        return ModelError(
            f"The model {name} cannot be loaded: beside its config.json is no file named model.safetensors."
        )
    place = _in_command(location, "MODEL")
    return ModelError(
        f"{name} has its weights in *.bin files alone. These are pickles, which can run code when they are opened; "
        f"partialtune opens safetensors files only. Where you trust it, convert it first, with: "
        f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{place}', use_safetensors=False).save_pretrained('CONVERTED'); "
        f"T.from_pretrained('{place}').save_pretrained('CONVERTED')\""
    )


def check_loaded(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Stop where loading left a tensor of the model at random, or blocks of the file out; warn of all else left out.

    Args:
        name: What messages call it.
        model: As it was loaded.
        report: transformers' `output_loading_info`.

    Raises:
        ModelError: In these two cases.
    """
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:
        raise ModelError(
            f"{name}: the weight file lacks {len(lost)} of the model's tensors, {lost[0]} first. "
            f"They would start at random; use a complete checkpoint."
        )
    left_out = [key for key in sorted(report["unexpected_keys"]) if not MADE_ANEW.fullmatch(key)]
    beyond = _further_blocks(left_out, [name for name, _ in model.named_parameters()], model.base_model_prefix)
    if beyond:
        raise ModelError(
            f"{name}: its weight file holds {len(beyond)} tensors of blocks that its config.json does not have, "
            f"{beyond[0]} first. They would be left out. Fetch config.json and weights of one and the same model."
        )
    if left_out:
        logger.warning(
            "%s: its weight file holds %d tensors that the causal language model has no place for, %s first. "
            "They are left out, and are not in what is saved.",
            name,
            len(left_out),
            left_out[0],
        )


def _further_blocks(left_out: Collection[str], parameters: Collection[str], prefix: str) -> list[str]:
    """Names in a file that are a parameter's but for a number: h.2.ln_1.weight where the model has h.0 and h.1.

    Files may leave the prefix of the base model out.
    """
    kinds = {NUMBER.sub("#", f".{name}.") for name in parameters if NUMBER.search(f".{name}.")}
    forms = {key: (f".{key}.", f".{prefix}.{key}.", f".{key.removeprefix(f'{prefix}.')}.") for key in left_out}
    return [key for key, names in forms.items() if any(NUMBER.sub("#", name) in kinds for name in names)]


def check_finite(name: str, model: nn.Module) -> None:
    """Stop where a weight is NaN or infinite: no score and no loss would be a number.

    Raises:
        ModelError: Names the first such parameter.
    """
    spoilt = {key: _not_finite(values.detach()) for key, values in model.named_parameters()}
    spoilt = {key: count for key, count in spoilt.items() if count}
    if spoilt:
        first = next(iter(spoilt))
        raise ModelError(
            f"{name}: {first} holds {spoilt[first]:,} values that are NaN or infinite"
            f"{f', and so do {len(spoilt) - 1} further tensors' if len(spoilt) > 1 else ''}. "
            f"Its file is damaged, or its training diverged. Take another checkpoint."
        )


def _not_finite(values: torch.Tensor) -> int:
    """How many there are, a piece at a time: asked of all at once, a matrix takes three times its memory."""
    return int(sum((~piece.isfinite()).sum() for piece in chunks_of(values)))


def refuse_wider_than(dtype: torch.dtype, name: str, folder: Path) -> None:
    """Stop where loading in `dtype` has rounded: then no statement about the base's bits would be true.

    Raises:
        ModelError: If a tensor in the model's files is complex, or in fp64 and `dtype` is not.
    """
    found = dtypes_in(folder)
    complex_ones = sorted(tensor for tensor, kind in found.items() if kind.startswith("C"))
    if complex_ones:
        raise ModelError(
            f"{name} holds {len(complex_ones)} tensors of complex numbers, {complex_ones[0]} first. Loading them as a "
            f"model's weights would drop their imaginary parts. Use a checkpoint in float32, bfloat16 or float16."
        )
    wide = sorted(tensor for tensor, kind in found.items() if kind == "F64")
    if wide and dtype != torch.float64:
        raise ModelError(
            f"{name} holds {len(wide)} tensors in fp64, {wide[0]} first. Weights are trained, compared and saved in "
            f"fp32, which would round them before anything is proved. Round them yourself and use the copy: "
            f"AutoModelForCausalLM.from_pretrained({name!r}, dtype=torch.float32).save_pretrained(FOLDER), and put the "
            f"tokenizer's files beside it."
        )


def dtypes_in(folder: Path) -> dict[str, str]:
    """Tensor in a model's safetensors files -> its dtype as safetensors writes it. Only their headers are read."""
    files = [folder / SAFE_WEIGHTS_NAME]
    if not files[0].is_file():
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else ()
        files = [folder / name for name in sorted(names)]
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt", backend="pread") as opened:
            found |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return found


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens that the model takes at once; None where its config sets no limit (missing, 0, or XLNet's -1)."""
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if context and context > 0 else None


def check_fit(name: str, config: PretrainedConfig, block_size: int, vocabulary: int) -> None:
    """Stop where the windows are longer than the model's context; warn where the tokenizer has more tokens than it.

    Tokens that were added to a tokenizer and are never used need no place in the model: `check_ids` sees which are.

    Raises:
        ModelError: If the windows are too long.
    """
    text_config = config.get_text_config()
    context = context_of(config)
    if context and block_size > context:
        raise ModelError(f"block_size is {block_size}, and {name} has a context of {context}. Use at most {context}.")
    if vocabulary > text_config.vocab_size:
        logger.warning(
            "%s: its tokenizer has %s tokens, its model %s. The model does not know the others; no text may use them.",
            *(name, f"{vocabulary:,}", f"{text_config.vocab_size:,}"),
        )


def check_ids(name: str, config: PretrainedConfig, largest: Mapping[str, int]) -> None:
    """Stop where a text holds a token that the model has no place for, whatever the counts of tokens are.

    Args:
        name: The model.
        config: Its configuration.
        largest: Text -> the largest of its token ids.

    Raises:
        ModelError: Names the text.
    """
    size = config.get_text_config().vocab_size
    for text, token_id in largest.items():
        if token_id >= size:
            raise ModelError(
                f"{name}: {text} has a token with the id {token_id:,}, and the model's ids are 0 to {size - 1:,}. "
                f"Tokenizer and model do not belong together; or tokens were added to the tokenizer and not to the "
                f"model (model.resize_token_embeddings(len(tokenizer)), then save both)."
            )
