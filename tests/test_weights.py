"""Digests are over fp32 values; names are plain; a checksum sees one flipped bit."""

import hashlib

import torch
from torch import nn

from conftest import tiny_gpt2
from partialtune.proof.weights import CHUNK, bit_sum, chunks_of, digest, named_weights, plain_name


def test_digest_is_sha256_over_little_endian_fp32_in_c_order():
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3).t()  # not contiguous
    assert digest(values) == hashlib.sha256(values.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def test_digest_of_a_16_bit_weight_equals_that_of_its_widened_copy():
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.randn(7, 5).to(dtype)
        assert digest(narrow) == digest(narrow.float())


def test_digest_of_a_weight_larger_than_a_chunk_is_over_all_of_it():
    values = torch.randn(CHUNK + 3)
    assert digest(values) == hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert sum(piece.numel() for piece in chunks_of(values)) == CHUNK + 3


def test_one_flipped_bit_changes_digest_and_bit_sum():
    values = torch.randn(1000)
    flipped = values.clone()
    flipped.view(torch.int32)[617] ^= 1
    assert digest(values) != digest(flipped)
    assert bit_sum(values) != bit_sum(flipped)


def test_plain_name_drops_the_wrappers_of_compile_and_ddp():
    assert plain_name("_orig_mod.transformer.wte.weight") == "transformer.wte.weight"
    assert plain_name("module.transformer.h.0._orig_mod.ln_1.weight") == "transformer.h.0.ln_1.weight"


def test_named_weights_lists_a_tied_tensor_once():
    names = [name for name, _ in named_weights(tiny_gpt2())]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_an_empty_parameter_has_the_digest_of_nothing():
    assert digest(nn.Parameter(torch.empty(0))) == hashlib.sha256(b"").hexdigest()
