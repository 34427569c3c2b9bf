"""The keys of a config.json that change what a model computes: their differences between two configs, their digest.

Weights alone are no model: with `n_head` 4 in the place of 2 the same tensors load and compute something else.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from partialtune.model.train_mode import LAYER_DROP, is_dropout

# Keys that change no logit of a loaded model, at any depth of the config -> whether `verify` notes that they differ.
WITHOUT_EFFECT: Mapping[str, bool] = {
    # Every save writes them anew, so that they differ between a base and what was trained from it.
    **dict.fromkeys(("_name_or_path", "architectures", "dtype", "transformers_version"), False),
    # It shows in the weights: a head of its own is compared with the token embedding, and has a note of its own.
    "tie_word_embeddings": False,
    # It shows in the weights: other shapes are refused.
    "vocab_size": True,
    # The class to load. It does have an effect: whoever calls `function_keys` compares `model_type` beside them.
    **dict.fromkeys(("model_type", "auto_map", "tokenizer_class"), True),
    # How weights are held (`dtype` in older files) and run through, not what comes out.
    **dict.fromkeys(("torch_dtype", "use_cache", "gradient_checkpointing", "chunk_size_feed_forward"), True),
    # New weights alone are drawn by them.
    **dict.fromkeys(("initializer_range", "initializer_factor", "init_std"), True),
    # Read by generation and by pipelines.
    **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"), True),
    **dict.fromkeys(("task_specific_params", "prefix"), True),
    # Read by classifiers.
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"), True),
    # What is given out beside the logits, and the weight of a router's loss.
    **dict.fromkeys(("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"), True),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef"), True),
}


def function_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that change what the model computes, nested ones by their path; dropouts are not among them.

    function_keys({"n_head": 2, "resid_pdrop": 0.1, "text_config": {"rope_theta": 1e4}})
    -> {"n_head": 2, "text_config.rope_theta": 10000.0}
    """
    return dict(_flat(json.loads(json.dumps(content, default=str)), ""))  # as a file holds it: lists, keys as text


def _flat(content: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key in WITHOUT_EFFECT or is_dropout(key) or LAYER_DROP.fullmatch(key) or key.startswith("summary_"):
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def notable_differences(before: PretrainedConfig, after: PretrainedConfig) -> list[str]:
    """The keys in which two configs differ and that `verify` notes, each as `use_cache (True -> False)`."""
    one, other = before.to_dict(), after.to_dict()
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return [f"{key} ({one.get(key)} -> {other.get(key)})" for key in keys if WITHOUT_EFFECT.get(key, True)]


def config_differences(before: PretrainedConfig, after: PretrainedConfig) -> list[str]:
    """The keys in which two configs stand for other functions, each as `n_head (2 -> 4)`.

    Of some models with further parts than text (Qwen 3.5) the text part alone is loaded and saved: it is compared then.
    """
    if before.model_type != after.model_type:
        before, after = before.get_text_config(), after.get_text_config()
    return differences_between(function_keys(before.to_dict()), function_keys(after.to_dict()))


def differences_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """As `config_differences`, of `function_keys`."""
    return [
        f"{key} ({before.get(key)} -> {after.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _names_a_pad_token(key, before.get(key))
    ]


def _names_a_pad_token(key: str, before: Any) -> bool:
    """Whether a pad token was named where there was none: no position depends on it then."""
    return key.rpartition(".")[2] == "pad_token_id" and before is None


def config_digest(file: Path) -> str:
    """sha256 over the `function_keys` and the `model_type` of a config.json as canonical JSON, no default added.

    So it is the same with every version of transformers, whose defaults differ.

    Raises:
        OSError, ValueError: If the file cannot be read, or holds no JSON object.
    """
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no JSON object")  # noqa: TRY004  (damage, as other JSON that is wrong)
    keys = {"model_type": content.get("model_type"), **function_keys(content)}  # transformers chooses the class by it
    canonical = json.dumps(keys, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
