"""Windows: held-out text, tokens of whole texts, chunked and random windows."""

import logging
import re

import numpy as np
import pytest
from datasets import List, Value
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from conftest import EXCERPTS, gpt2_tokenizer
from partialtune.errors import RecipeError, TextError
from partialtune.model.loading import load_tokenizer
from partialtune.recipe.arguments import TextArguments
from partialtune.text import tokenizing, windows
from partialtune.text.tokenizing import tokenize_text
from partialtune.text.windows import chunked_windows, random_windows, split_text
from partialtune.training.training_data import prepare_data

PROSE = "".join(
    f'Chapter {number}.\r\n\r\n"I said {number * 7}, didn\'t I?" he asked --  twice;\n\tthe {number}th time.\n\n'
    f"Été à Paris, naïve    œuvres... {{x}} and_so_on {number / 7:.4f}\n"
    for number in range(400)
)
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "prefixed": pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
}


def bpe_tokenizer(pre_tokenizer, **special) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on PROSE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(PROSE[:20_000].splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def whole(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.fixture(scope="module")
def byte_bpe():
    return bpe_tokenizer(PRE_TOKENIZERS["gpt2"])


# ---- held-out text


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_held_out_text_is_the_end_and_tears_no_word(share):
    train, held_out = split_text(PROSE, share)
    assert train + held_out == PROSE
    assert held_out[0].isspace()
    assert not train[-1].isspace()
    assert abs(len(held_out) - share * len(PROSE)) <= 20  # no word of PROSE is longer


def test_share_zero_holds_out_nothing():
    assert split_text("one two", 0) == ("one two", "")
    assert split_text("", 0.1) == ("", "")


def test_text_without_white_space_is_cut_at_the_share():
    assert [len(part) for part in split_text("字" * 1000, 0.25)] == [750, 250]


def test_a_character_keeps_its_combining_marks():
    train, held_out = split_text("e\u0301\u0323" * 1000, 0.1)  # 3 code points a character: 2700 is a character's start
    assert (len(train), len(held_out)) == (2700, 300)
    train, held_out = split_text("e\u0301\u0323" * 1000, 0.1003)
    assert held_out[0] == "e"
    assert train[-1] == "\u0323"


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_impossible_share_is_refused(share):
    with pytest.raises(RecipeError, match=re.escape(f"validation_share is {share}")):
        split_text("one two", share)


# ---- tokens


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch, kind):
    tokenizer = bpe_tokenizer(PRE_TOKENIZERS[kind])
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 1500)
    assert tokenize_text(PROSE, tokenizer).tolist() == whole(PROSE, tokenizer)


def test_a_seam_that_would_change_tokens_is_not_used(monkeypatch):
    tokenizer = bpe_tokenizer(PRE_TOKENIZERS["llama3"])
    text = PROSE[:1000] + ".\n.\n" * 500  # in this pattern ".\n" is one token: no seam lies between "." and "\n"
    assert whole(".\n", tokenizer) != whole(".", tokenizer) + whole("\n", tokenizer)
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 1500)
    assert tokenize_text(text, tokenizer).tolist() == whole(text, tokenizer)


def test_long_texts_are_tokenised_in_pieces(monkeypatch, byte_bpe):
    lengths = []
    encode = tokenizing.WordTokens.encode
    monkeypatch.setattr(
        tokenizing.WordTokens, "encode", lambda self, text: lengths.append(len(text)) or encode(self, text)
    )
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 1500)
    tokenize_text(PROSE, byte_bpe)
    assert len(PROSE) > 30_000
    assert max(lengths) <= 1500
    assert sum(lengths) == len(PROSE)


def test_tokens_are_int32_and_whole(byte_bpe):
    ids = tokenize_text(PROSE, byte_bpe)
    assert ids.dtype == np.int32
    assert ids.tolist() == whole(PROSE, byte_bpe)
    assert tokenize_text("", byte_bpe).shape == (0,)


def test_no_warning_about_the_models_length_is_shown(byte_bpe, caplog):
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()  # whatever ran before
    byte_bpe.model_max_length = 1024
    logger = logging.getLogger("transformers.tokenization_utils_base")
    root = logging.getLogger("transformers")
    before = (root.level, transformers_logging.get_verbosity())
    logger.addHandler(caplog.handler)
    try:
        ids = tokenize_text(PROSE, byte_bpe)
        assert len(ids) > 1024
        assert caplog.text == ""
        byte_bpe(PROSE)  # the tokenizer itself still warns: nothing was switched off for others
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
        byte_bpe.deprecation_warnings.clear()
        after = (root.level, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity(said)
    assert after == before


def test_a_bos_is_kept_and_an_eos_is_not(byte_bpe):
    tokenizer = bpe_tokenizer(PRE_TOKENIZERS["gpt2"], bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("the time")["input_ids"] == [0, *whole("the time", byte_bpe), 1]
    assert tokenize_text("the time", tokenizer).tolist() == [0, *whole("the time", byte_bpe)]


def test_raw_gulliver_has_the_notebooks_158345_tokens(texts, monkeypatch):
    tokenizer = gpt2_tokenizer(texts)
    text = (texts / "gulliver" / "pg829_2025_utf8bom_crlf.txt").read_bytes().decode("utf-8")
    ids = tokenize_text(text, tokenizer)
    assert ids.shape == (11_445 if texts == EXCERPTS else 158_345,)
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 10_000)
    assert np.array_equal(tokenize_text(text, tokenizer), ids)


def test_pieces_agree_on_the_bundled_tokenizer(monkeypatch):
    builtin = pytest.importorskip("partialtune.builtin")
    topics = pytest.importorskip("pydoc_data.topics").topics
    folder = builtin.builtin_folder("builtin:lilliput")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the bundled model is not built yet")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n\n".join(topics.values())[:200_000]
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 5000)
    assert tokenize_text(text, tokenizer).tolist() == whole(text, tokenizer)


# ---- windows


def source(first: int, length: int) -> np.ndarray:
    return np.arange(first, first + length, dtype=np.int32)


def rows(dataset) -> list[list[int]]:
    return dataset["input_ids"][:]


def test_chunked_windows_repeat_no_token_and_drop_the_tail():
    cut = rows(chunked_windows([source(0, 23)], block_size=5, stride=5))
    assert cut == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]


def test_a_stride_shorter_than_a_window_overlaps_and_a_longer_one_skips():
    assert rows(chunked_windows([source(0, 7)], block_size=4, stride=1)) == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
        [3, 4, 5, 6],
    ]
    assert rows(chunked_windows([source(0, 11)], block_size=4, stride=7)) == [[0, 1, 2, 3], [7, 8, 9, 10]]


def test_chunked_windows_do_not_cross_sources():
    sources = [source(0, 11), source(100, 3), source(200, 8)]
    assert rows(chunked_windows(sources, block_size=4, stride=4)) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [200, 201, 202, 203],
        [204, 205, 206, 207],
    ]


def test_many_slabs_hold_the_same_windows_as_one(monkeypatch):
    sources = [source(0, 50), source(100, 41)]
    one = rows(chunked_windows(sources, block_size=4, stride=3)), rows(random_windows(sources, block_size=4, seed=3))
    monkeypatch.setattr(windows, "SLAB_WINDOWS", 2)
    assert (rows(chunked_windows(sources, 4, 3)), rows(random_windows(sources, 4, seed=3))) == one


def test_windows_are_compact_arrow_and_become_int64_tensors():
    dataset = chunked_windows([source(0, 1000)], block_size=10, stride=10)
    assert dataset.features == {"input_ids": List(Value("int32"), length=10)}
    assert dataset.data.nbytes == 4 * 1000
    batch = dataset.with_format("torch")[:8]["input_ids"]
    assert (str(batch.dtype), tuple(batch.shape)) == ("torch.int64", (8, 10))


def test_random_windows_are_drawn_by_the_seed_and_never_cross_sources():
    sources = [source(0, 40), source(1000, 3), source(2000, 25)]
    drawn = rows(random_windows(sources, block_size=4, seed=7))
    assert len(drawn) == (40 + 3 + 25) // 4
    assert all(row == list(range(row[0], row[0] + 4)) for row in drawn)
    assert {row[0] // 1000 for row in drawn} == {0, 2}
    assert rows(random_windows(sources, block_size=4, seed=7)) == drawn
    assert rows(random_windows(sources, block_size=4, seed=8)) != drawn


def test_random_windows_draw_sources_in_proportion_to_their_starts_and_reach_every_start():
    sources = [source(0, 41), source(100, 121)]  # 40 + 120 starts of 2 tokens, 81 windows a draw
    starts = [row[0] for seed in range(50) for row in rows(random_windows(sources, block_size=2, seed=seed))]
    assert set(starts) == {*range(40), *range(100, 220)}
    share = sum(start < 100 for start in starts) / len(starts)
    assert share == pytest.approx(0.25, abs=0.035)  # 4,050 draws: 5 standard deviations


@pytest.mark.parametrize("make", [lambda ids: chunked_windows(ids, 256, 256), lambda ids: random_windows(ids, 256, 0)])
def test_text_shorter_than_a_window_says_what_to_change(make):
    with pytest.raises(
        TextError, match=r"256 tokens and the text has 120.*block_size to at most 120.*validation_share"
    ):
        make([source(0, 120)])
    with pytest.raises(TextError, match=r"the longest of 3 texts, which windows do not cross, has 200"):
        make([source(0, 120), source(0, 200), source(0, 80)])
    with pytest.raises(TextError, match=r"has 0\. Change one of these: give a longer text"):
        make([source(0, 0)])


@pytest.mark.parametrize(
    ("words", "share", "message"),
    [
        (9, 0.2, "Of the held-out text: .*the text has [1-5].* validation_share: 0 holds nothing out"),
        (2, 0.0, "Of the text that trains: "),
    ],
)
def test_which_part_of_a_text_is_too_short_is_said(tmp_path, words, share, message):
    (tmp_path / "few.txt").write_text(" ".join(["ship"] * words) + "\n\n" + ("sea" if share else ""))
    arguments = TextArguments(text=[str(tmp_path / "few.txt")], block_size=6, validation_share=share)
    with pytest.raises(TextError, match=message):
        prepare_data(arguments, {}, load_tokenizer("builtin:lilliput"), seed=0)


def poems(folder, lengths):
    """Files of so many words, each of another."""
    for number, words in enumerate(lengths):
        (folder / f"{number}.txt").write_text(" ".join([["ship", "sea", "king", "land"][number % 4]] * words))
    return [str(folder / f"{number}.txt") for number in range(len(lengths))]


def test_texts_shorter_than_a_window_are_told_and_count_in_no_score(tmp_path, caplog):
    tokenizer = load_tokenizer("builtin:lilliput")
    files = poems(tmp_path, [60, 5, 5, 80])
    arguments = TextArguments(text=files, block_size=16, validation_share=0.0)
    data = prepare_data(arguments, {"poems": str(tmp_path / "*.txt")}, tokenizer, seed=0)
    long = prepare_data(TextArguments(text=[files[0], files[3]], block_size=16, validation_share=0.0), {}, tokenizer, 0)
    assert "text: 2 of 4 texts have fewer tokens than a window of 16, and do not train" in caplog.text
    assert "eval_texts poems: 2 of 4 texts have fewer tokens than a window of 16, and do not get a score" in caplog.text
    assert len(data.train) == len(long.train) == len(data.scored["poems"].windows)
    for name in ("training", "poems"):
        found = data.scored[name]
        assert (found.text_tokens, found.text_bytes) == (
            long.scored["training"].text_tokens,
            long.scored["training"].text_bytes,
        )
    assert data.token_counts.sum() == long.token_counts.sum()


def test_a_text_that_is_scored_as_another_and_trained_on_is_told(tmp_path, caplog):
    files = poems(tmp_path, [60, 70])
    arguments = TextArguments(text=[files[0]], block_size=8, validation_share=0.0)
    prepare_data(arguments, {"old": files[1], "own": files[0]}, load_tokenizer("builtin:lilliput"), seed=0)
    assert "eval_texts own: " in caplog.text
    assert "is trained on" in caplog.text
    assert "eval_texts old" not in caplog.text


def test_a_share_that_holds_nothing_out_is_refused(tmp_path):
    arguments = TextArguments(text=poems(tmp_path, [60]), block_size=8, validation_share=1e-5)
    with pytest.raises(TextError, match=r"validation_share 1e-05 of .* characters is none"):
        prepare_data(arguments, {}, load_tokenizer("builtin:lilliput"), seed=0)
