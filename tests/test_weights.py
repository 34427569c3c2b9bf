"""Digests are over fp32 values; names are plain; a checksum sees one flipped bit."""

import hashlib

import pytest
import torch
from torch import nn

from conftest import tiny_gpt2
from partialtune.model import digests as weights
from partialtune.model.digests import bit_sum, bit_sums, digest, digests
from partialtune.model.parameters import CHUNK, chunks_of, named_weights, plain_name


def test_digest_is_sha256_over_little_endian_fp32_in_c_order():
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3).t()  # not contiguous
    assert digest(values) == hashlib.sha256(values.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def test_digest_of_a_16_bit_weight_equals_that_of_its_widened_copy():
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.randn(7, 5).to(dtype)
        assert digest(narrow) == digest(narrow.float())


@pytest.mark.parametrize("threads", [1, 4])
def test_digests_and_sums_are_those_of_each_parameter_by_itself_on_any_number_of_threads(threads):
    torch.set_num_threads(threads)  # the suite runs on one; `one_thread` of conftest.py sets it back
    model = tiny_gpt2()
    named = dict(named_weights(model))
    assert digests(model) == {name: digest(values) for name, values in named.items()}
    assert bit_sums(named.items()) == {name: bit_sum(values) for name, values in named.items()}
    assert list(digests(model)) == list(named)


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


DTYPES = [*(torch.float64, torch.float32, torch.bfloat16, torch.float16), torch.complex64, torch.int64, torch.int8]


def exchanged(values, *pairs):
    order = list(range(len(values)))
    for one, other in pairs:
        order[one], order[other] = order[other], order[one]
    return values[order]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bit_sum_sees_rows_that_changed_places(dtype):
    torch.manual_seed(0)
    values = (10 * torch.randn(200, 300)).to(dtype)
    sums = {bit_sum(one) for one in (values, values.flip(0), values.flip(1), values.roll(1, 0), values.roll(1, 1))}
    sums |= {bit_sum(exchanged(values, *pairs)) for pairs in ([(0, 1)], [(0, 199)], [(0, 1), (2, 3)], [(5, 105)])}
    assert len(sums) == 9
    two = values[:2]
    assert bit_sum(torch.cat([two, two.flip(0)])) != bit_sum(
        torch.cat([two.flip(0), two])
    )  # weights in even steps fail
    signs = torch.tensor([1, -1], dtype=dtype)
    assert bit_sum(signs) != bit_sum(signs.flip(0))


def test_bit_sums_of_parts_by_place_add_up_to_that_of_the_whole(monkeypatch):
    integers = torch.randn(3 * weights.ROW + 5).view(torch.int32)
    whole = weights._weighted_sum(integers, 0)
    for cut in (0, 1, weights.ROW, weights.ROW + 7, len(integers)):
        assert weights._weighted_sum(integers[:cut], 0) + weights._weighted_sum(integers[cut:], cut) == whole
    assert {int(weight) % 2 for weight in weights._odd_numbers(0, 1000, torch.device("cpu"))} == {1}


def test_values_that_fp32_cannot_hold_are_digested_over_their_own_bytes():
    wide = torch.tensor([1.0, 1 / 3, 2.0**-1000], dtype=torch.float64)
    for values in (wide, torch.tensor([2**53, 1]), torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1 + 2j])):
        assert digest(values) == hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert digest(wide) != digest(wide + torch.tensor([1e-9, 0, 0]))
    big = torch.tensor([2**53])
    assert digest(big) != digest(big + 1)
    turned = torch.tensor([1 + 2j]).conj()  # a view that only says so
    assert digest(turned) == digest(turned.resolve_conj()) != digest(torch.tensor([1 + 2j]))


def test_fp64_values_that_fp32_holds_have_the_digest_of_their_fp32_copy():
    values = torch.randn(7, 5)
    assert digest(values.double()) == digest(values)


def test_plain_name_drops_the_wrappers_of_compile_and_ddp():
    assert plain_name("_orig_mod.transformer.wte.weight") == "transformer.wte.weight"
    assert plain_name("module.transformer.h.0._orig_mod.ln_1.weight") == "transformer.h.0.ln_1.weight"


def test_named_weights_lists_a_tied_tensor_once():
    names = [name for name, _ in named_weights(tiny_gpt2())]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_an_empty_parameter_has_the_digest_of_nothing():
    assert digest(nn.Parameter(torch.empty(0))) == hashlib.sha256(b"").hexdigest()
