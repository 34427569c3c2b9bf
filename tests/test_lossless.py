"""Tokenizers that can write a text, and those that cannot: what is said of them, and that their bits are withheld."""

import json

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster import small_recipe
from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.text.lossless import SAMPLE_CHARACTERS, round_trip_of

PROSE = "It was the Best of times; it was (so said Dr. Café) 'the worst' of them:\n\n  an Age\tof 1,775 fools.\n"
ODD = "e\u0301 ﬁ 漢字 \u200b 🙂👨‍👩‍👧 a  b\t\tc\n\n\nd . , don't 's ( x ) <unk> ½\n"


def byte_level(normalizer=None, add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def llama():
    """Spaces as a letter, one of them put in front, bytes for what is no token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def words_only(*words):
    vocabulary = {word: number for number, word in enumerate(("[UNK]", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


WHOLE = {
    "lilliput": lambda: AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput")),
    "byte level": byte_level,
    "prefix space": lambda: byte_level(add_prefix_space=True),
    "NFC": lambda: byte_level(normalizers.NFC()),
}


@pytest.mark.parametrize("tokenizer", WHOLE)
def test_a_tokenizer_that_writes_everything_loses_nothing(tokenizer):
    for text in (PROSE, ODD, PROSE * 5000, " \n" + PROSE, "x" * 10_000, "字" * 10_000, "", " ", "a"):
        round_trip = round_trip_of([text, text], WHOLE[tokenizer]())
        assert (round_trip.unknown, round_trip.lost, round_trip.lossless) == (0, 0, True), text[:20]


def test_a_space_in_front_is_no_loss():
    assert round_trip_of([PROSE * 20], llama()).lost == 0


def test_what_is_lost_is_measured(caplog):
    lowering = round_trip_of([PROSE * 2000], byte_level(normalizers.Lowercase()))
    capitals = sum(len(word) for word in ("It", "Best", "Dr", "Café", "Age"))
    assert lowering.lost == pytest.approx(capitals / len(PROSE), rel=0.1)  # the words that hold one
    assert (lowering.unknown, lowering.lossless) == (0, False)
    few = round_trip_of([PROSE * 2000], words_only("the", "was", "of"))
    assert 0.6 < few.unknown < 0.9
    assert few.lost > 0.6
    few.warn("validation")
    assert "validation: 7" in caplog.text
    assert "withheld" in caplog.text


def test_a_loss_that_no_score_would_show_is_said_and_tolerated(caplog):
    round_trip = round_trip_of(["ﬁ " + "plain words and no others " * 200], byte_level(normalizers.NFKC()))
    assert 0 < round_trip.lost < 0.001
    assert round_trip.lossless
    round_trip.warn("training")
    assert "given all the same" in caplog.text


def test_the_sample_is_bounded_and_spaced_over_all_texts():
    seen = []
    tokenizer = byte_level()

    class Watched:
        unk_token = unk_token_id = None
        decode = tokenizer.decode

        def __call__(self, text, **settings):
            seen.append(text)
            return tokenizer(text, **settings)

    numbered = " ".join(f"number{number}" for number in range(300_000))
    assert round_trip_of([numbered, "the other text"], Watched()).lost == 0
    assert sum(map(len, seen)) <= 1.05 * SAMPLE_CHARACTERS
    assert seen[-1] == "the other text"
    assert int(seen[-2].rpartition("number")[2]) > 295_000


def base_with(folder, tokenizer, size):
    tiny_gpt2(vocab_size=size).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def test_bits_per_byte_are_withheld_where_the_text_does_not_come_back(tmp_path, caplog, capfd):
    words = small_recipe(tmp_path, max_steps=2, schedule=[], eval_steps=1)
    known = [f"w{number}" for number in range(97)]
    base_with(tmp_path, words_only("age", "It", *known), 100)
    (tmp_path / "known.txt").write_text(" ".join(known * 20))
    assert main([*words, "--eval_texts", json.dumps({"known": str(tmp_path / "known.txt")})]) == 0
    assert "validation: 87% of its tokens are unknown" in caplog.text
    assert "bits per byte are withheld" in caplog.text
    assert "known: " not in caplog.text
    assert "withheld" in capfd.readouterr().out
    run = tmp_path / "run"
    scores = json.loads((run / "evaluation.json").read_text())
    for name in ("validation", "training"):
        for side in ("before", "after"):
            assert scores[name][side]["bits_per_byte"] is None
            assert scores[name][side]["perplexity"] > 0
    assert scores["known"]["after"]["bits_per_byte"] > 0
    assert "withheld" in (run / "report.html").read_text()
    card = yaml.safe_load((run / "README.md").read_text().split("---")[1])
    named = [(m["type"], r["dataset"]["config"]) for r in card["model-index"][0]["results"] for m in r["metrics"]]
    assert ("bits_per_byte", "validation") not in named
    assert ("bits_per_byte", "known") in named
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert not [entry for entry in log if "bits_per_byte/validation" in entry]


@pytest.mark.usefixtures("undrawn")
def test_an_id_beyond_the_model_is_refused_and_an_unused_token_is_not(tmp_path, caplog, capfd):
    """The counts may agree where ids have gaps, and differ where a token was added and never used."""
    words = small_recipe(tmp_path, max_steps=1, schedule=[], prompts=[])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    assert main(words) == 0
    assert f"its tokenizer has {size + 1:,} tokens, its model {size:,}" in caplog.text
    (tmp_path / "other.txt").write_text("It was [PAD] the age of. " * 40)
    other = ["--output_dir", str(tmp_path / "other")]
    used = [
        (["--text", str(tmp_path / "other.txt")], "text has a token with the id"),
        (["--eval_texts", json.dumps({"other": str(tmp_path / "other.txt")})], "eval_texts other has a token"),
        (["--prompts", "Say [PAD]"], "the prompt 'Say [PAD]' has a token"),
    ]
    for change, message in used:
        assert main([*words, *other, *change]) == 2
        said = capfd.readouterr().err
        assert message in said
        assert f"the model's ids are 0 to {size - 1:,}" in said
    assert main(["rank", *words[1:], *used[0][0]]) == 2
    assert "text has a token with the id" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()
