"""What is saved a piece at a time is byte for byte what transformers saves; 16 bits are widened on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

from conftest import tiny_gpt2
from partialtune.model import saving
from partialtune.model.digests import digests
from partialtune.model.held_narrow import narrow_values
from partialtune.model.loading import load_config, load_model
from partialtune.model.saving import Stored, save_pretrained, write_tensors

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "GPT-2": tiny_gpt2,
    "Llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "Llama, untied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**{**SMALL, "num_hidden_layers": 3}, num_local_experts=11)),
    "OLMoE": lambda: OlmoeForCausalLM(OlmoeConfig(**{**SMALL, "num_hidden_layers": 3}, num_experts=12)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 6})),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=MODELS)
def base(request, tmp_path) -> Path:
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_every_file_is_byte_for_byte_what_transformers_writes(base, tmp_path):
    made = AutoModelForCausalLM.from_pretrained(base)
    for number, model in enumerate([made, type(made)(made.config)]):  # from a folder, and from a config alone
        model.save_pretrained(tmp_path / f"theirs-{number}")
        save_pretrained(model, tmp_path / f"ours-{number}")
        assert contents(tmp_path / f"ours-{number}") == contents(tmp_path / f"theirs-{number}")
    assert contents(tmp_path / "ours-0")["model.safetensors"] == contents(base)["model.safetensors"]


def test_what_is_held_in_16_bits_is_widened_to_the_file_of_the_wide_model(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "narrow")
    config = load_config(str(tmp_path / "narrow"))
    held, wide = (load_model(str(tmp_path / "narrow"), config, narrow=narrow) for narrow in (True, False))
    assert narrow_values(held)
    wide.save_pretrained(tmp_path / "theirs")
    save_pretrained(held, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert digests(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)) == digests(held)


def test_shards_hold_the_whole_model_and_their_index_says_where(base, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_SIZE", 40_000)
    made = AutoModelForCausalLM.from_pretrained(base)
    save_pretrained(made, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "ours" / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 1
    assert all(path.stat().st_size < 45_000 for path in (tmp_path / "ours").glob("model-*"))
    tensors = {name: shards[file][name] for name, file in index["weight_map"].items()}
    whole = load_file(base / "model.safetensors")
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert index["metadata"] == {
        "total_parameters": made.num_parameters(),
        "total_size": sum(values.nbytes for values in whole.values()),
    }
    assert digests(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) == digests(made)


def test_a_file_of_any_dtypes_and_names_is_byte_for_byte_that_of_the_library(tmp_path):
    values = torch.arange(-4, 20, dtype=torch.float32)
    tensors = {
        f'{name} \u00e9 "{place}"': values.to(dtype, copy=True)
        for place, (dtype, name) in enumerate(saving.DTYPES.items())
    }
    tensors |= {
        "empty": torch.empty(0, 3),
        "number": torch.tensor(7.0),
        "b.10": values.view(2, 12) + 1,
        "b.9": values + 2,
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours = {name: Stored(tuple(one.shape), one.dtype, lambda one=one: one) for name, one in tensors.items()}
    write_tensors(tmp_path / "ours", ours, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_transformers_saves_in_a_way_of_its_own_it_saves(tmp_path):
    """Such as a variant, or a model whose class has a `save_pretrained` of its own."""

    class Named(GPT2LMHeadModel):
        def save_pretrained(self, save_directory, **others):
            super().save_pretrained(save_directory, **{**others, "variant": "named"})

    model = tiny_gpt2()
    for number, kind in enumerate([GPT2LMHeadModel, Named]):
        model.__class__ = kind
        own = {} if kind is Named else {"variant": "wide"}
        save_pretrained(model, tmp_path / f"ours-{number}", **own)
        model.save_pretrained(tmp_path / f"theirs-{number}", **own)
        assert contents(tmp_path / f"ours-{number}") == contents(tmp_path / f"theirs-{number}")
        assert f"model.{'named' if kind is Named else 'wide'}.safetensors" in contents(tmp_path / f"ours-{number}")


def test_another_process_than_the_main_one_writes_nothing(tmp_path):
    save_pretrained(tiny_gpt2(), tmp_path, is_main_process=False)
    assert not any(tmp_path.iterdir())
