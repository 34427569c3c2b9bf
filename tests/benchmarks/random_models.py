"""Models of known shapes with random weights, written to a folder as a pretrained one is: 124M to 7B parameters.

    python tests/benchmarks/random_models.py llama-1.1b FOLDER [--tokens 4096]

Seconds and memory do not depend on the values. They are written tensor by tensor: a base of N bytes never takes N.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD = 1 << 30  # bytes of a file of weights: what is held while they are made
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        config: Of transformers, with its `model_type`.
        dtype: In which its weights are saved.
    """

    config: dict[str, Any]
    dtype: str = "float32"


SHAPES = {
    "gpt2": Shape(
        {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # the plain loop computes in eval mode
    ),
    "smollm2": Shape(
        LLAMA
        | {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
    ),
    "llama-1.1b": Shape(
        LLAMA
        | {"num_hidden_layers": 22, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"intermediate_size": 5632, "vocab_size": 32000, "tie_word_embeddings": False},
        dtype="bfloat16",
    ),
    "llama-3.2-3b": Shape(
        LLAMA
        | {"num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
        dtype="bfloat16",
    ),
    "llama-7b": Shape(
        LLAMA
        | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False},
        dtype="bfloat16",
    ),
}


def write_model_and_text(shape: Shape, tokens: int, folder: Path) -> None:
    """Write the model with random weights, where the folder holds none, a tokenizer, and a text of so many tokens."""
    from transformers import AutoTokenizer

    from partialtune import load_text
    from partialtune.builtin import builtin_folder
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    text = load_text("builtin:python-docs")
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= tokens:
        raise SystemExit(f"The text has {len(spans):,} tokens; {tokens:,} are wanted.")
    (folder / "text.txt").write_text(text[: spans[tokens][0]])
    if (folder / "config.json").exists():
        return
    model = empty(shape)
    write_random_weights(model, model.config.dtype, folder)
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)  # last: with it the folder is whole


def empty(shape: Shape) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoConfig

    from partialtune.model.loading import empty_model

    model = empty_model(AutoConfig.for_model(**shape.config))
    model.config.dtype, model.config.architectures = getattr(torch, shape.dtype), [type(model).__name__]
    return model


def write_random_weights(model: Any, dtype: Any, folder: Path, shard: int = SHARD) -> None:
    """Weights of a model on the meta device: normal ones in matrices, 1 and 0 in norms and biases; files of `shard`
    bytes, of which one is in memory."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(held, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(held, file))
        held.clear()

    for name, parameter in model.named_parameters():  # a tied matrix once
        if held and sum(one.nbytes for one in held.values()) + parameter.numel() * dtype.itemsize > shard:
            write()
        value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        held[name] = value.normal_(std=0.02, generator=generator) if parameter.ndim > 1 else value
    write()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text beside the model, text.txt")
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    write_model_and_text(SHAPES[words.shape], words.tokens, words.folder)


if __name__ == "__main__":
    main()
