"""A run as GGUF: llama.cpp's own converter takes its folder, and what comes out finds the same next tokens.

The converter is part of llama.cpp's source and of no package: LLAMA_CPP=FOLDER says where that lies (docs/hub.md).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from partialtune.cli import main

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


def write_llama(folder: Path) -> None:
    """A small Llama with half as many heads for keys as for queries, and a tokenizer of the kind that Llama 2 has."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes, **heads, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.slow
def test_what_llama_cpp_s_converter_makes_of_a_run_finds_the_same_next_tokens(tmp_path):
    pytest.importorskip("gguf")
    converter = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
    if not converter.is_file():
        pytest.skip("LLAMA_CPP names no source of llama.cpp")
    write_llama(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT * 60)
    values = {
        "model_name_or_path": str(tmp_path / "base"),
        "text": str(tmp_path / "text.txt"),
        "trainable": ["blocks[-1]", "head"],
        "block_size": 32,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "prompts": [],
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    words = [sys.executable, str(converter), str(tmp_path / "run"), "--outtype", "f32"]
    converted = subprocess.run([*words, "--outfile", str(tmp_path / "run.gguf")], capture_output=True, text=True)
    assert converted.returncode == 0, converted.stderr

    run, base = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("run", "base"))
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="run.gguf").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run")("It was the age", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs, before = (model(tokens).logits for model in (run, read_back, base))
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert not torch.allclose(before, ours, atol=1e-2)
    written = [model.generate(tokens, max_new_tokens=20, do_sample=False)[0].tolist() for model in (run, read_back)]
    assert written[0] == written[1]
    assert len(set(written[0])) > 8
