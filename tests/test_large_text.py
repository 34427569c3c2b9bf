"""Texts that are streamed: the same as in one go, on disk, made once, and rebuilt when they are damaged."""

import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from accelerate import PartialState
from datasets import table
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import REPOSITORY
from partialtune.builtin import builtin_folder
from partialtune.cache import LIFETIME_DAYS, cached_by_content
from partialtune.distributed import first_on_each_node
from partialtune.errors import TextError
from partialtune.recipe.arguments import TextArguments
from partialtune.text import cleaning, reading, sources, stored_text, tokenizing
from partialtune.text.cleaning import Ends, clean_gutenberg, clean_gutenberg_pieces, unified_pieces
from partialtune.text.decoding import choose_encoding, decoded_pieces
from partialtune.text.gutenberg import unify_lines
from partialtune.text.reading import read_texts
from partialtune.text.stored_text import StoredText, write_pieces
from partialtune.text.tokenizing import WordTokens, tokenize_text, word_pattern
from partialtune.text.windows import split_text
from partialtune.training import training_data as data
from partialtune.training.training_data import prepare_data
from test_decoding import decode_text
from two_processes import on_two_processes

LLAMA_3_PATTERN = tokenizing._LLAMA_3
WRAPPED = (
    "It was the best of times, it was the worst of times, it was the age of\r\n"
    "wisdom, it was the age of foolishness -- “naïve”, œuvres; {x} and_so_on!\r\n"
    "it's 12345.678, didn't I say?\r\n\r\n  A line that stands\r\n  by itself\r\n\r\n\r\n"
)
BOOK = (
    "\ufeffThe Project Gutenberg eBook of X\r\n\r\nTitle: X\r\n\r\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
    "Produced by A. Nobody\r\n\r\n\r\n"
    + "".join(f"CHAPTER {number}\r\n\r\n{WRAPPED}" for number in range(1000))
    + "Transcriber's Notes\r\n\r\nNone.\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\nDonations\r\n"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and chunks and pieces so small that every text has many."""
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10_001)
    monkeypatch.setattr(cleaning, "PIECE_CHARACTERS", 7_001)
    monkeypatch.setattr(stored_text, "PIECE_CHARACTERS", 7_001)
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 5_003)
    return tmp_path / "cache" / "prepared"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_bytes(BOOK.encode())
    return str(tmp_path / "book.txt")


@pytest.fixture
def short(tmp_path):
    """A text of 20 KB, for what does not depend on its length."""
    (tmp_path / "short.txt").write_bytes(WRAPPED.encode() * 80)
    return str(tmp_path / "short.txt")


def cut(whole, rng, longest):
    """Something cut at random places."""
    at = 0
    while at < len(whole):
        size = rng.randint(1, longest)
        yield whole[at : at + size]
        at += size


def both(source, cleaning="auto"):
    """A source in memory and streamed."""
    return read_texts([source], cleaning)[0], read_texts([source], cleaning, in_memory_bytes=0)[0]


def facts(source):
    return {name: value for name, value in vars(source).items() if name != "content"}


# ---- the text


@pytest.mark.parametrize("cleaning", ["auto", "gutenberg", "none"])
def test_a_streamed_text_is_the_text_that_fits_into_memory(book, cleaning):
    small, large = both(book, cleaning)
    assert isinstance(large.content, StoredText)
    assert large.text == small.text == small.content
    assert len(large.content) == len(small.content)
    assert facts(large) == facts(small)
    if cleaning != "none":
        whole = clean_gutenberg(BOOK)
        assert (small.text, small.removed_head, small.removed_foot) == (
            *(whole.text, whole.removed_head, whole.removed_foot),
        )
        assert small.text.startswith("CHAPTER 0\n\nIt was the best of times, it was")
        assert small.text.endswith("A line that stands\n  by itself\n")


@pytest.mark.parametrize("folder", ["books", "gulliver", "gutenberg_styles"])
def test_every_style_of_book_is_cleaned_alike_whole_and_in_pieces(texts, folder):
    files = sorted((texts / folder).glob("*.txt"))[:8]
    assert files
    for file in files:
        decoded = decode_text(file.read_bytes(), file.name).text
        whole, stream = clean_gutenberg(decoded), read_texts([str(file)], "gutenberg", in_memory_bytes=0)[0]
        assert stream.text == whole.text, file
        assert (stream.removed_head, stream.removed_foot) == (whole.removed_head, whole.removed_foot), file


def test_pieces_may_be_cut_anywhere():
    rng = random.Random(1)
    indented = "".join(f"    {line}\n" if line else "\n" for line in BOOK.replace("\r\n", "\n").split("\n"))
    old_mac, mixed = (
        BOOK.replace("\r\n", "\r"),
        BOOK.replace("\r\n", "\r\r\n").replace("CHAPTER", "\f\x1a\r\f\nCHAPTER "),
    )
    for whole in (BOOK, indented, old_mac, mixed, WRAPPED, "one line", "\r\r\r\n\n \t\n", "\ufeff", ""):
        for longest in (3, 5_000):
            pieces = list(cut(whole, rng, longest)) if len(whole) < 50_000 or longest > 3 else [whole]
            cleaned = clean_gutenberg_pieces(lambda pieces=pieces: iter(pieces))
            expected = clean_gutenberg(whole)
            assert "".join(cleaned.pieces) == expected.text
            assert (cleaned.removed_head, cleaned.removed_foot) == (expected.removed_head, expected.removed_foot)


def test_lines_are_unified_where_pieces_are_cut_between_carriage_return_and_line_feed():
    for whole in ("a\r\r\nb\r\nc\rd \t\r\n", "a\r", "a\r\r", "\r\f\n", "\ufeffa\n\ufeffb\n", "\r\r\rx"):
        for size in (1, 2, 3):
            pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
            assert "".join(unified_pieces(pieces)) == unify_lines(whole), (whole, size)


def test_the_ends_of_a_text_are_its_first_and_last_characters():
    whole = "".join(map(chr, range(65, 165)))
    for width in (1, 7, 50, 60, 200):
        ends = Ends.of(cut(whole, random.Random(2), 9), width)
        assert ends.length == 100
        assert ends.text == (whole if width >= 50 else whole[:width] + whole[-width:])


@pytest.mark.parametrize(
    ("encoding", "charset"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", None),
        ("cp1252", None),
        ("koi8-r", "koi8-r"),
        ("utf-8", "ascii"),
    ],
)
def test_bytes_are_decoded_alike_whole_and_in_chunks(encoding, charset):
    words = "naïve “œuvres” " if encoding != "koi8-r" else "Привет, мир "
    whole = (words * 400).encode(encoding)
    damaged = whole[:3000] + b"\xff\xe2\x82" + whole[3000:]
    for encoded in (whole, damaged):
        chunks = [encoded[:1001], *cut(encoded[1001:], random.Random(3), 5)]
        chosen = choose_encoding(lambda chunks=chunks: iter(chunks), "x", charset)
        expected = decode_text(encoded, "x", charset)
        assert (chosen.name, chosen.origin) == (expected.encoding, expected.encoding_from)
        assert "".join(decoded_pieces(iter(chunks), chosen.name)) == expected.text


def test_what_is_no_text_is_refused_wherever_it_shows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 10_000 + b"\0" + b"word ")
    with pytest.raises(TextError, match=r"binary, not plain text: byte 50,000 is NUL"):
        read_texts([str(path)], in_memory_bytes=0)
    path.write_bytes(b"\r\n" * 20_000)
    with pytest.raises(TextError, match="is empty"):
        read_texts([str(path)], in_memory_bytes=0)


def test_damage_is_reported_the_second_time_too(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("naïve ".encode() * 5000 + b"\xff" + b" end")
    for _ in range(2):
        caplog.clear()
        assert read_texts([str(tmp_path / "a.txt")], in_memory_bytes=0)[0].damaged == 1
        assert "1 damaged characters" in caplog.text


def test_texts_are_stored_once_memory_is_full(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 100)
    contents = [source.content for source in read_texts([str(tmp_path / "*.txt")], in_memory_bytes=450)]
    assert [type(content) for content in contents] == [str, str, StoredText]


def test_a_datasets_rows_are_streamed(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 7)
    (tmp_path / "rows").mkdir()
    rows = [json.dumps({"text": f"row {number} of it"}) for number in range(100)]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(rows))
    small, large = both(f"hf:{tmp_path / 'rows'}")
    assert large.text == small.text == "".join(f"row {number} of it\n" for number in range(100))
    assert facts(large) == facts(small)


# ---- parts of a stored text


def test_a_part_of_a_stored_text_is_that_part(tmp_path):
    whole = "aé字😀 \ud800" * 5000
    marks = tuple(write_pieces(cut(whole, random.Random(4), 3000), tmp_path / "text"))
    large = StoredText(tmp_path / "text", "", marks, 0, len(whole))
    assert large.read() == whole
    for start, end in ((0, 0), (0, 1), (6_999, 7_003), (100, 29_000), (29_999, 30_000), (0, 30_000)):
        part = large.part(start, end)
        assert part.read() == whole[start:end]
        assert part.utf8_bytes() == len(whole[start:end].encode("utf-8", errors="surrogatepass"))
        assert part.part(0, len(part) // 2).read() == whole[start : start + (end - start) // 2]


@pytest.mark.parametrize("share", [0, 0.0001, 0.1, 0.5, 0.999])
def test_held_out_text_of_a_stored_text_starts_at_the_same_character(tmp_path, share):
    for whole in (BOOK, "字" * 20_000, "e\u0301\u0323" * 9000):
        marks = tuple(write_pieces([whole], tmp_path / "text"))
        large = StoredText(tmp_path / "text", "", marks, 0, len(whole))
        assert tuple(part.read() for part in split_text(large, share)) == split_text(whole, share)


# ---- tokens


def bpe_tokenizer(pre_tokenizer, normalizer=None, **added):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>"], show_progress=False)
    backend.train_from_iterator(BOOK[:20_000].splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **added)


def split_by(pattern):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), level])


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BY_WORDS = {
    "gpt2": GPT_2,
    "llama3": split_by(LLAMA_3_PATTERN),
    "qwen2": split_by(LLAMA_3_PATTERN.replace("{1,3}", "")),
}


def awkward_text(seed):
    """Runs of every kind of white space, punctuation, marks and letters."""
    rng = random.Random(seed)
    alphabet = [
        *" \n\r\t\v\f\x85\u00a0\u2003\u3000",
        "  ",
        "\r\n",
        *"ab'’_.!?-1²½字éЯ\u0301\u200d😀",
        "'s",
        "'ll",
        "<s>",
    ]
    return "".join(rng.choices(alphabet, k=4000))


@pytest.mark.parametrize("kind", [*BY_WORDS, "lilliput"])
def test_tokens_by_words_are_those_of_the_whole_text(tokenizer, kind):
    tokenizer = tokenizer if kind == "lilliput" else bpe_tokenizer(BY_WORDS[kind])
    by_words = WordTokens(tokenizer)
    for whole in (BOOK, *map(awkward_text, range(20)), " ", "!", "a! ", "\n\na", ""):
        ids = by_words.encode(whole)
        assert ids is not None
        assert ids.tolist() == tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]


def test_rare_words_are_forgotten_and_learnt_again(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizing, "MOST_WORDS", 6)
    by_words = WordTokens(tokenizer)
    rng = random.Random(5)
    for _ in range(50):
        whole = " often" * 5 + "".join(f" word{rng.randrange(30)}" for _ in range(5))
        assert by_words.encode(whole).tolist() == tokenizer(whole)["input_ids"]
        assert len(by_words._known) <= 6 + 6
        assert " often" in by_words._known


def test_many_texts_share_what_is_known_of_the_tokenizer(tokenizer, monkeypatch):
    looked_at = []
    monkeypatch.setattr(tokenizing, "word_pattern", lambda tokenizer: looked_at.append(1) or word_pattern(tokenizer))
    texts = [f"{WRAPPED} {number}" for number in range(30)]
    ids = tokenizing.token_ids_of(texts, tokenizer)
    assert [one.tolist() for one in ids] == tokenizer(texts)["input_ids"]
    assert len(looked_at) == 1


@pytest.mark.parametrize(
    "tokenizer",
    [
        bpe_tokenizer(pre_tokenizers.Metaspace()),
        bpe_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        bpe_tokenizer(GPT_2, normalizers.NFC()),
        bpe_tokenizer(split_by(r"\s+|\S+")),
        bpe_tokenizer(GPT_2, additional_special_tokens=["two words"]),
    ],
    ids=["metaspace", "prefix space", "normalizer", "another pattern", "token with a space"],
)
def test_a_tokenizer_whose_words_may_depend_on_each_other_is_given_whole_pieces(tokenizer):
    assert word_pattern(tokenizer) is None
    assert tokenize_text(BOOK, tokenizer).tolist() == tokenizer(BOOK, verbose=False)["input_ids"]


def test_separators_that_are_white_space_for_python_alone_are_left_to_the_tokenizer(tokenizer):
    whole = "!!\x1c a\x1d\x1e !\x1f\n" * 3000
    assert WordTokens(tokenizer).encode(whole) is None
    assert tokenize_text(whole, tokenizer).tolist() == tokenizer(whole, verbose=False)["input_ids"]


# ---- the data of a run


SAMPLINGS = {
    "chunked": {},
    "overlapping": {"window_stride": 11},
    "random": {"window_sampling": "random"},
    "nothing held out": {"validation_share": 0.0},
}


def rows(dataset):
    return np.asarray(dataset.with_format("numpy")["input_ids"][:])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_streamed_run_trains_and_scores_on_the_same_windows(book, tmp_path, tokenizer, sampling):
    (tmp_path / "other.txt").write_text("Another text, which is short. " * 200)
    arguments = TextArguments(text=[book, str(tmp_path / "other.txt")], block_size=32, **SAMPLINGS[sampling])
    runs = [prepare_data(arguments, {"other": book}, tokenizer, 3, size) for size in (1 << 30, 50_000)]
    small, large = runs
    assert [type(source.content) for source in large.sources] == [StoredText, str]
    assert np.array_equal(rows(large.train), rows(small.train))
    assert large.scored.keys() == small.scored.keys() >= {"training", "other"}
    for name, scored in small.scored.items():
        assert np.array_equal(rows(large.scored[name].windows), rows(scored.windows)), name
        assert large.scored[name].text_tokens == scored.text_tokens
        assert large.scored[name].text_bytes == scored.text_bytes
    assert (large.held_out is None) == (sampling == "nothing held out")
    assert isinstance(large.train.data, table.MemoryMappedTable)
    assert large.train.cache_files
    assert isinstance(small.train.data, table.InMemoryTable)
    assert not small.train.cache_files


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_text_is_held_out_from_the_end_of_each_source(tmp_path, tokenizer, in_memory_bytes):
    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number} " for number in range(900)))
    arguments = TextArguments(text=[str(tmp_path / "*.txt")], block_size=64, validation_share=0.2)
    run = prepare_data(arguments, {}, tokenizer, seed=0, in_memory_bytes=in_memory_bytes)
    for rows_of, before, after in ((run.train, 0, 720), (run.held_out, 720, 900)):
        texts = [tokenizer.decode(ids) for ids in rows_of["input_ids"]]
        assert not [text for text in texts if "first" in text and "second" in text]
        for name in ("first", "second"):
            numbers = {int(number) for text in texts for number in re.findall(rf"{name} (\d{{3}})\b", text)}
            assert numbers, f"nothing of {name}"
            assert before - 5 <= min(numbers) <= max(numbers) <= after + 5


def test_bits_per_byte_of_a_streamed_text_rest_on_all_its_bytes_and_tokens(book, tokenizer):
    large = prepare_data(TextArguments(text=[book], block_size=32), {}, tokenizer, 0, in_memory_bytes=0)
    cleaned = clean_gutenberg(BOOK).text
    for name, part in zip(("training", "validation"), split_text(cleaned, 0.1), strict=True):
        assert large.scored[name].text_bytes == len(part.encode())
        assert large.scored[name].text_tokens == len(tokenizer(part, verbose=False)["input_ids"])


def prepare(book, tokenizer, **changes):
    return prepare_data(
        TextArguments(text=[book], **{"block_size": 32, **changes}), {}, tokenizer, 0, in_memory_bytes=0
    )


def test_a_second_run_makes_nothing_again(book, tokenizer, monkeypatch):
    first = prepare(book, tokenizer)

    def refuse(*arguments):
        raise AssertionError("made again")

    for module, name in ((reading, "_prepare"), (tokenizing, "token_pieces"), (data, "chunked_windows")):
        monkeypatch.setattr(module, name, refuse)
    second = prepare(book, tokenizer)
    assert second.sources == first.sources
    assert np.array_equal(rows(second.train), rows(first.train))
    monkeypatch.undo()


def test_another_text_tokenizer_share_or_block_size_is_made_anew(book, tmp_path, tokenizer, cache):
    def entries():
        return {kind: len(list((cache / kind).glob("*.json"))) for kind in ("texts", "tokens", "windows")}

    prepare(book, tokenizer)
    assert entries() == {"texts": 1, "tokens": 2, "windows": 2}
    copy = tmp_path / "copy.txt"
    copy.write_bytes(BOOK.encode())
    prepare(str(copy), tokenizer)
    assert entries() == {"texts": 1, "tokens": 2, "windows": 2}  # the content counts, not the name
    prepare(book, tokenizer, block_size=16)
    assert entries() == {"texts": 1, "tokens": 2, "windows": 4}
    prepare(book, tokenizer, validation_share=0.0)
    assert entries() == {"texts": 1, "tokens": 3, "windows": 5}
    prepare(book, bpe_tokenizer(GPT_2))
    assert entries() == {"texts": 1, "tokens": 5, "windows": 7}
    copy.write_bytes(BOOK.encode() + b"more\n")
    prepare(str(copy), tokenizer)
    assert entries()["texts"] == 2


# ---- the cache


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_record(path):
    path.with_suffix(".json").unlink()


def garble_the_record(path):
    path.with_suffix(".json").write_text("{")


def lose_the_file(path):
    path.unlink()


def leave_half(path):
    path.with_suffix(".json").unlink()
    path.rename(path.with_suffix(".part"))


@pytest.mark.parametrize("kind", ["texts", "tokens", "windows"])
@pytest.mark.parametrize("harm", [truncate, flip, lose_the_record, garble_the_record, lose_the_file, leave_half])
def test_a_damaged_entry_is_rebuilt_with_a_message(short, tokenizer, cache, caplog, kind, harm):
    first = prepare(short, tokenizer)
    expected, source = rows(first.train), first.sources[0].text
    del first
    for path in [path for path in (cache / kind).iterdir() if path.suffix not in (".json", ".lock")]:
        harm(path)
    caplog.set_level(logging.WARNING)
    again = prepare(short, tokenizer)
    assert "is made again" in caplog.text
    assert np.array_equal(rows(again.train), expected)
    assert again.sources[0].text == source
    caplog.clear()
    prepare(short, tokenizer)
    assert caplog.text == ""


def test_an_entry_whose_time_alone_changed_is_kept(cache):
    first = cached_by_content("texts", ".txt", {"a": 1}, lambda path: {"size": path.write_bytes(b"abc")})
    first.path.touch()
    assert cached_by_content("texts", ".txt", {"a": 1}, lambda path: pytest.fail("built again")) == first


def test_an_entry_that_another_user_may_have_written_is_read_whole_and_links_are_not_followed(cache, monkeypatch):
    def again():
        return cached_by_content("texts", ".txt", {"a": 1}, lambda path: {"size": path.write_bytes(b"abc")})

    first = again()
    times = first.path.stat()
    first.path.write_bytes(b"xyz")  # the same size and, with that, the same time
    os.utime(first.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert again().path.read_bytes() == b"xyz"  # one's own file is believed: reading gigabytes takes its time
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: times.st_uid + 1)
        assert again().path.read_bytes() == b"abc"
    for suffix in (".txt", ".json"):
        mine = cache / "mine"
        mine.write_bytes(first.path.with_suffix(suffix).read_bytes())
        first.path.with_suffix(suffix).unlink()
        first.path.with_suffix(suffix).symlink_to(mine)
        assert not again().path.with_suffix(suffix).is_symlink()
        assert mine.exists()


def test_an_entry_that_no_run_used_for_a_month_goes_when_another_is_made(cache):
    def entry(name):
        return cached_by_content("texts", ".txt", {"name": name}, lambda path: {"size": path.write_bytes(b"text")})

    kept, dropped = entry("kept"), entry("dropped")
    left_behind = dropped.path.with_name("killed.part")
    left_behind.write_bytes(b"half")
    for path in (*(one.path.with_suffix(".json") for one in (kept, dropped)), left_behind):
        os.utime(path, times=(0, time.time() - (LIFETIME_DAYS + 1) * 86400))
    assert entry("kept") == kept  # used: its month begins again
    another = entry("another")
    here = {file.name for file in (cache / "texts").iterdir() if file.suffix != ".lock"}
    assert here == {one.path.with_suffix(suffix).name for one in (kept, another) for suffix in (".txt", ".json")}


def test_a_build_that_fails_leaves_nothing(cache):
    def build(path):
        path.write_bytes(b"half")
        raise TextError("no")

    with pytest.raises(TextError, match=r"^no$"):
        cached_by_content("texts", ".txt", {}, build)
    assert [path.suffix for path in (cache / "texts").iterdir()] == [".lock"]


def test_two_that_want_the_same_build_it_once(cache):
    builds, results = [], []

    def build(path):
        builds.append(path)
        time.sleep(0.2)
        path.write_bytes(b"x")
        return {}

    threads = [
        threading.Thread(target=lambda: results.append(cached_by_content("texts", ".txt", {}, build))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert results == [results[0]] * 4


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_change(tmp_path, book):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(TextError, match=r"cannot be used .*Set PARTIALTUNE_CACHE"):
        read_texts([book], in_memory_bytes=0)


def read_as_one_of_two(book, cache):
    """How often this process tokenised a text, and how many windows it has."""
    os.environ["PARTIALTUNE_CACHE"] = cache
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    made, make = [], tokenizing.token_pieces
    tokenizing.token_pieces = lambda *arguments: made.append(1) or make(*arguments)
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    arguments = TextArguments(text=[book], block_size=32)
    windows = len(first_on_each_node(lambda: prepare_data(arguments, {}, tokenizer, 0, 0)).train)
    state.wait_for_everyone()
    return len(made), windows


@pytest.mark.slow
def test_two_processes_read_what_the_first_one_made(book, tmp_path):
    (made, first), (made_again, second) = on_two_processes(read_as_one_of_two, book, str(tmp_path / "cache"))
    assert (made, made_again) == (2, 0)
    assert first == second


@pytest.mark.slow
def test_80_mb_of_text_need_hardly_more_memory_than_20_mb():
    command = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / "large_text.py"), "--megabytes", "20", "80"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    first, first_again, second, second_again = map(json.loads, done.stdout.splitlines())
    assert abs(second["peak_mb"] - first["peak_mb"]) < 100
    assert abs(second_again["peak_mb"] - first_again["peak_mb"]) < 100
    assert second["text_bytes"] == 80_000_000
    assert second_again["seconds"] < second["seconds"] / 4
