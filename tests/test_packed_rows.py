"""Packed examples are known one by one: in whatever company they come again, they start from kept states."""

import types

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from partialtune.engine.forward_stack import put_on
from partialtune.engine.packed_rows import why_not_apart
from partialtune.engine.prefix import PrefixCache
from partialtune.engine.row_digests import DigestingCollator, joined, rows_of, segments_of, words_of
from partialtune.engine.state_store import MemoryStore
from partialtune.model.structure import decoder_blocks, read_structure
from test_no_logits import build
from test_prefix import kept_from_start, largest_difference, losses, run
from tiny_models import tiny_config

EXAMPLES = 20


def examples(count=EXAMPLES, seed=0):
    """Token ids of different lengths."""
    torch.manual_seed(seed)
    lengths = torch.randint(3, 12, (count,)).tolist()
    return [{"input_ids": torch.randint(1, 100, (length,)).tolist()} for length in lengths]


FLAT = DataCollatorWithFlattening()
FLAT_AND_LENGTHS = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)


def model_of(name):
    kind, _, attention = name.partition(" ")
    model = build(kind)
    if attention:
        model.set_attn_implementation(attention)
    return model


def mixes_all_columns(model):
    """Let its first block add to each token the mean of all before it in the row."""
    block = model.model.layers[0]
    own = block.forward

    def forward(self, hidden_states, *args, **kwargs):
        output = own(hidden_states, *args, **kwargs)
        before = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        return output + before

    block.forward = types.MethodType(forward, block)
    return model


PACKED_RUN = {
    "data": examples(),
    "max_steps": 15,  # 3 epochs of 20 examples, 4 a step
    "eval_strategy": "no",
}


@pytest.mark.parametrize("collator", [FLAT, FLAT_AND_LENGTHS], ids=["positions", "positions and lengths"])
@pytest.mark.parametrize(("name", "blocks"), [("llama sdpa", 1), ("llama eager", 1), ("gpt2", 2)])
def test_shuffled_padding_free_batches_hit_from_the_second_epoch_on(tmp_path, name, blocks, collator):
    settings = {**PACKED_RUN, "collator": collator}
    plain = run(tmp_path / "a", model_of(name), ["blocks[-1]"], fast_paths=(), **settings)
    kept = run(tmp_path / "b", model_of(name), ["blocks[-1]"], kept_from_start(blocks), **settings)
    assert (kept.fast.hits, kept.fast.misses) == (2 * EXAMPLES, EXAMPLES)
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6


def test_a_model_that_mixes_packed_examples_keeps_whole_rows_and_stays_right(tmp_path):
    settings = {**PACKED_RUN, "collator": FLAT}
    plain = run(tmp_path / "a", mixes_all_columns(build("llama")), ["blocks[-1]"], fast_paths=(), **settings)
    kept = run(tmp_path / "b", mixes_all_columns(build("llama")), ["blocks[-1]"], kept_from_start(1), **settings)
    assert kept.fast.misses == 15  # joined in another order each time
    assert kept.fast.hits == 0
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-6)
    assert largest_difference(kept, plain) < 1e-6


def test_whole_packed_rows_that_come_again_hit_where_examples_are_not_apart():
    model = mixes_all_columns(build("llama")).eval()
    cache = PrefixCache(model, 1, MemoryStore(2**30, torch.uint8))
    cache.put_on()
    batch = FLAT(examples(4))
    with torch.no_grad():
        losses = [model(**batch, use_cache=False).loss.item() for _ in range(3)]
    cache.take_off()
    assert (cache.hits, cache.misses) == (2, 1)
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)


def proof(model, inputs):
    block = model.model.layers[0]
    return why_not_apart(model, block, model.model.forward, {**inputs, "use_cache": False}, "Llama")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_proof_tells_models_that_keep_examples_apart_from_those_that_do_not(attention):
    batch = FLAT_AND_LENGTHS(examples(4))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert proof(model_of(f"llama {attention}"), inputs) == ""
    assert "has other states than by itself" in proof(mixes_all_columns(model_of(f"llama {attention}")), inputs)


def test_a_model_that_counts_columns_instead_of_positions_is_found_out():
    model = build("llama")
    rotary = model.model.rotary_emb
    own = rotary.forward

    def by_column(x, position_ids):  # the distances within an example are the same: add the columns themselves
        return tuple(part * (1 + torch.arange(part.shape[1])[None, :, None]) for part in own(x, position_ids))

    rotary.forward = by_column
    assert "has other states than by itself" in proof(model, FLAT(examples(4)))


def test_a_pass_that_fails_on_packed_examples_leaves_rows_whole():
    model = build("llama")

    def fails(*args, **kwargs):
        raise ValueError("positions must not begin anew")

    model.model.layers[0].self_attn.forward = fails
    assert "positions must not begin anew" in proof(model, FLAT(examples(4)))


def test_the_proof_runs_once_a_kind_of_batch_and_draws_no_random_number():
    model = model_of("llama sdpa").train()
    seen = []

    def see(forward, *args, **kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])
        return forward(*args, **kwargs)

    cache = PrefixCache(model, 1, MemoryStore(2**30, torch.uint8))
    cache.put_on()
    watch = put_on(model.model.layers[0], see)
    batch = FLAT(examples(4))
    state = torch.get_rng_state()
    width = batch["input_ids"].shape[1]
    for _ in range(3):
        model(**batch)
    model.set_attn_implementation("eager")
    model(**batch)
    watch.take_off()
    cache.take_off()
    assert seen == [16, 16, 8, width, width, width, 16, 16, 8, width]  # whole, then twice from states
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert (cache.hits, cache.misses) == (12, 4)


def test_a_packed_example_has_the_digest_that_it_has_alone():
    first, second, third = examples(3)
    together = segments_of(FLAT_AND_LENGTHS([first, second, third]))
    exchanged = segments_of(FLAT([third, second]))
    (alone,) = segments_of(FLAT([second]))
    assert together[1].digest == exchanged[1].digest == alone.digest
    assert together[0].digest != together[1].digest
    assert together[2].digest == exchanged[0].digest
    lengths = [len(one["input_ids"]) for one in (first, second, third)]
    assert [(row.start, row.end, row.number) for row in together] == [
        (0, lengths[0], 0),
        (lengths[0], lengths[0] + lengths[1], 0),
        (lengths[0] + lengths[1], sum(lengths), 0),
    ]
    (whole,) = rows_of(
        {"input_ids": torch.tensor([second["input_ids"]]), "position_ids": FLAT([second])["position_ids"]}
    )
    assert whole.digest == alone.digest


def test_several_packed_rows_are_cut_each_by_itself():
    ids = torch.arange(12).view(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    segments = segments_of({"input_ids": ids, "position_ids": positions})
    assert [tuple(row)[1:] for row in segments] == [(0, 3, 0), (3, 6, 0), (0, 2, 1), (2, 6, 1)]


def test_rows_with_a_mask_or_with_lengths_that_contradict_positions_stay_whole():
    batch = FLAT_AND_LENGTHS(examples(3))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert len(segments_of(inputs)) == 3
    assert words_of(inputs) == words_of({})
    assert segments_of({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}) is None
    assert segments_of({**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}) is None
    assert segments_of({"input_ids": inputs["input_ids"]}) is None
    whole = torch.tensor([0, inputs["input_ids"].shape[1]], dtype=torch.int32)
    for name, value in {
        "cu_seq_lens_q": whole,
        "cu_seq_lens_k": whole,
        "seq_idx": torch.zeros_like(inputs["seq_idx"]),
    }.items():
        assert segments_of({**inputs, name: value}) is None


def test_examples_are_joined_again_to_whole_rows_where_they_are_not_apart():
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    apart = rows_of(inputs)
    whole = joined(apart)
    assert [tuple(row)[1:] for row in whole] == [(0, 6, 0), (0, 6, 1)]
    assert whole[1] == apart[2]
    assert whole[0].digest not in {row.digest for row in apart}
    batch = DigestingCollator(FLAT)(examples(3))
    assert batch["partialtune_rows"] == [tuple(row) for row in segments_of(FLAT(examples(3)))]


def test_a_tensor_that_happens_to_be_as_long_as_the_batch_belongs_to_all_rows():
    ids = torch.tensor([[5, 6], [7, 8], [9, 10]])
    one, other = (
        rows_of({"input_ids": ids, "cu_seq_lens_q": torch.tensor(bounds)}) for bounds in ([0, 2, 6], [0, 4, 6])
    )
    assert all(a.digest != b.digest for a, b in zip(one, other, strict=True))
    positions = torch.arange(18).view(3, 3, 2)  # of a model of images: (kinds, rows, columns)
    moved = positions.clone()
    moved[1, 0, 0] = 50  # of the first row
    one, other = (rows_of({"input_ids": ids, "position_ids": given}) for given in (positions, moved))
    assert one[0].digest != other[0].digest


def test_models_that_carry_a_state_along_the_row_do_not_keep_examples_apart():
    gpt2, batch = build("gpt2"), {**FLAT(examples(4)), "use_cache": False}
    assert why_not_apart(gpt2, gpt2.transformer.h[1], gpt2.transformer.forward, batch, "GPT-2") == ""
    for kind in ("mamba", "recurrent_gemma"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
        inner = model.get_submodule(read_structure(model).blocks_path.rpartition(".")[0])
        assert why_not_apart(model, decoder_blocks(model)[0], inner.forward, batch, kind) != ""


@pytest.mark.parametrize("apart", [True, False])
def test_a_joined_row_starts_from_the_states_of_its_examples(apart, monkeypatch):
    if not apart:
        monkeypatch.setattr("partialtune.engine.prefix.why_not_apart", lambda *_: "said so")
    model = build("gpt2")
    cache = PrefixCache(model, 2, MemoryStore(2**20, torch.uint8))
    seen = []
    model.transformer.h[2].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    texts = [{"input_ids": ids} for ids in ([5, 6, 7], [8, 9], [1, 2, 3, 4])]

    def states(*numbers):
        with torch.no_grad():
            model(**FLAT_AND_LENGTHS([texts[number] for number in numbers]), use_cache=False)
        return seen[-1]

    plain = states(2, 0, 1)
    cache.put_on()
    states(0, 1, 2)
    assert (cache.hits, cache.misses) == (0, 3 if apart else 1)
    torch.testing.assert_close(states(2, 0, 1), plain, atol=1e-6, rtol=0)
    assert (cache.hits, cache.misses) == ((3, 3) if apart else (0, 2))
    states(0, 1, 2)
    assert cache.hits == (6 if apart else 1)
    cache.take_off()
