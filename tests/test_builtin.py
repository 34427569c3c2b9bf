"""The bundled model: what lies in its folder, how well it predicts, and the script that made it."""

import hashlib
import json
import re
import socket

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import pretrain
from books import tidy
from partialtune.builtin import builtin_folder
from partialtune.errors import ModelError, TextError
from partialtune.scoring.evaluation import score_text, scored_text
from partialtune.text.cleaning import clean_gutenberg
from partialtune.text.tokenizing import tokenize_text

FOLDER = builtin_folder("builtin:lilliput")

# Jonathan Swift, Gulliver's Travels (1726), part I, chapter 1: public domain, not among the books it was trained on.
GULLIVER = """\
My father had a small estate in Nottinghamshire; I was the third of five sons. He sent me to Emanuel College in \
Cambridge at fourteen years old, where I resided three years, and applied myself close to my studies; but the charge \
of maintaining me, although I had a very scanty allowance, being too great for a narrow fortune, I was bound \
apprentice to Mr. James Bates, an eminent surgeon in London, with whom I continued four years. My father now and then \
sending me small sums of money, I laid them out in learning navigation, and other parts of the mathematics, useful to \
those who intend to travel, as I always believed it would be, some time or other, my fortune to do. When I left Mr. \
Bates, I went down to my father: where, by the assistance of him and my uncle John, and some other relations, I got \
forty pounds, and a promise of thirty pounds a year to maintain me at Leyden: there I studied physic two years and \
seven months, knowing it would be useful in long voyages.

But my good master Bates dying in two years after, and I having few friends, my business began to fail; for my \
conscience would not suffer me to imitate the bad practice of too many among my brethren. Having therefore consulted \
with my wife, and some of my acquaintance, I determined to go again to sea. I was surgeon successively in two ships, \
and made several voyages, for six years, to the East and West Indies, by which I got some addition to my fortune. My \
hours of leisure I spent in reading the best authors, ancient and modern, being always provided with a good number of \
books; and when I was ashore, in observing the manners and dispositions of the people, as well as learning their \
language; wherein I had a great facility, by the strength of my memory.
"""


@pytest.fixture(scope="module")
def lilliput():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def bits_per_byte(model, tokenizer, text, block_size=256):
    scored = scored_text([text], [tokenize_text(text, tokenizer)], block_size)
    return score_text(model, scored, batch_size=8, description="test")["bits_per_byte"]


# ------------------------------------------------------------------------------------------ the bundled model


def test_weights_are_one_16_bit_file_of_at_most_8_megabytes():
    assert [path.name for path in FOLDER.glob("*.safetensors")] == ["model.safetensors"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, not a dictionary
    assert len(kinds) == 1
    assert kinds <= {"F16", "BF16"}


def test_it_loads_without_a_network_and_without_missing_weights(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    AutoTokenizer.from_pretrained(FOLDER)
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_it_computes_in_fp32_where_nobody_asks_for_a_precision():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_configuration_fits_the_tokenizer_and_the_default_window(lilliput, tokenizer):
    config = lilliput.config
    assert config.n_positions >= 512
    assert config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == config.n_positions
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert config.eos_token_id == lilliput.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.bos_token_id == lilliput.generation_config.bos_token_id == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text",
    [
        GULLIVER,
        " two  spaces,\ttabs\r\n\r\n\n and\n   an indent \n",
        "don’t, it's, WE'LL; 1726, 1234567 + £5 … “so,” — she said",
        "Füße, naïve, žluťoučký, Ελλάδα, 本日は晴天, שלום, e\u0301 and 🙂👩‍🚀",
        "\x00\x07\ufeff\u2028\U0010ffff",
        "def f(x):\n    return {'a': x[0], \"b\": 1e-5}  # code\n",
    ],
    ids=["prose", "white space", "marks", "languages", "odd characters", "code"],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_text_cut_before_white_space_has_the_tokens_of_the_whole(tokenizer):
    text = "“No!”\n\n  He said:—  1,234 times...\t \n\nthe end’s near\n " + GULLIVER[:300]
    whole = tokenizer(text)["input_ids"]
    cuts = [match.start() for match in re.finditer(r"(?<=\S)\s", text)]
    assert len(cuts) > 50
    for cut in cuts:
        assert tokenizer(text[:cut])["input_ids"] + tokenizer(text[cut:])["input_ids"] == whole, text[cut - 9 : cut + 9]


def test_it_predicts_a_novel_that_it_has_not_seen(lilliput, tokenizer):
    assert bits_per_byte(lilliput, tokenizer, GULLIVER) < 1.7  # 1.51 when it was made


def test_card_tells_at_most_1_85_bits_per_byte_for_every_held_out_novel():
    scores = json.loads((FOLDER / "metrics.json").read_text("utf-8"))["held_out"]
    assert scores
    assert max(bits for score in scores for bits in score["bits_per_byte"].values()) <= 1.85


def test_it_predicts_a_held_out_novel_as_well_as_its_card_says(texts, lilliput, tokenizer):
    metrics = json.loads((FOLDER / "metrics.json").read_text("utf-8"))
    stem = metrics["settings"]["held_out"][0]
    text = clean_gutenberg((texts / "books" / f"{stem}.txt").read_text("utf-8-sig")).text
    middle = text[len(text) // 2 :][:60_000]
    told = metrics["held_out"][0]["bits_per_byte"]["256"]
    assert bits_per_byte(lilliput, tokenizer, middle) == pytest.approx(told, abs=0.08)


def test_greedy_text_is_made_of_words(lilliput, tokenizer):
    prompt = tokenizer("When I came home, I", return_tensors="pt")
    ids = lilliput.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    words = tokenizer.decode(ids[0]).split()
    spelled = [word for word in words if re.fullmatch(r"[A-Za-z“”’'_—-]+[.,;:!?”’'_—-]*", word)]
    assert len(words) > 20
    assert len(spelled) >= 0.9 * len(words), words


def test_card_holds_the_measured_figures_and_no_path_of_a_machine():
    metrics = json.loads((FOLDER / "metrics.json").read_text("utf-8"))
    card = (FOLDER / "README.md").read_text("utf-8")
    assert f"{metrics['parameters']:,}" in card
    assert metrics["command"] in card
    for score in metrics["held_out"]:
        assert score["book"] in card
        for bits in score["bits_per_byte"].values():
            assert f"{bits:.3f}" in card
    assert metrics["model_bytes"] == (FOLDER / "model.safetensors").stat().st_size
    for text in (card, json.dumps(metrics)):
        assert not re.search(r"(?<![\w:/])/(?:home|work|tmp|root|Users|mnt)\b", text)


def test_unknown_name_is_refused_with_the_names_there_are():
    for name in ("builtin:liliput", "lilliput", "builtin:"):
        with pytest.raises(ModelError, match="builtin:lilliput"):
            builtin_folder(name)


# --------------------------------------------------------------------------------- the script that made it


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for number, title in enumerate(("The Sea", "The Hill", "The Fair")):
        story = "\n\n".join(f"Chapter {at}.\n\nOn day {at * (number + 2)} of the voyage, {GULLIVER}" for at in range(9))
        head = f"\ufeffThe Project Gutenberg eBook of {title}\n\nTitle: {title}\n\nAuthor: A. Nobody\n\n"
        marks = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK {title.upper()} ***" for word in ("START", "END"))
        (folder / f"pg{number}.txt").write_text(head + f"\n\n{story}\n\n".join(marks) + "\n", encoding="utf-8")
    return folder


def tiny_run(books, out, *more):
    shape = "--vocab_size 300 --width 16 --depth 2 --heads 2 --context 32 --batch_tokens 128 --threads 1"
    pretrain.main([str(books), str(out), *shape.split(), *more])
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_script_makes_a_model_folder_with_its_card(books, tmp_path, capsys):
    out = tmp_path / "model"
    tiny_run(books, out, "--steps", "6", "--held_out", "pg2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    assert metrics["run"]["steps"] == 6
    assert metrics["run"]["tokens"] == 6 * 128
    assert metrics["training_books"] == ["The Sea, by A. Nobody", "The Hill, by A. Nobody"]
    score = metrics["held_out"][0]["bits_per_byte"]["32"]
    text = clean_gutenberg((books / "pg2.txt").read_text("utf-8-sig")).text
    assert score == pytest.approx(bits_per_byte(model, tokenizer, text, block_size=32), abs=1e-3)
    assert f"| The Fair, by A. Nobody | {len(text.encode()):,} | {score:.3f} |" in (out / "README.md").read_text(
        "utf-8"
    )
    assert "The Fair" in capsys.readouterr().out


def test_script_gives_the_same_weights_for_the_same_seed_and_steps(books, tmp_path):
    first = tiny_run(books, tmp_path / "a", "--steps", "4")
    assert tiny_run(books, tmp_path / "b", "--steps", "4") == first
    assert tiny_run(books, tmp_path / "c", "--steps", "4", "--seed", "1") != first


def test_interrupted_script_goes_on_where_it_stopped(books, tmp_path, monkeypatch):
    whole = tiny_run(books, tmp_path / "whole", "--steps", "8")
    state, calls, step = tmp_path / "state.pt", [], pretrain.training_step

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(model, batch)

    monkeypatch.setattr(pretrain, "STATE_SECONDS", 0)
    monkeypatch.setattr(pretrain, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(books, tmp_path / "parts", "--steps", "8", "--state", str(state))
    monkeypatch.setattr(pretrain, "training_step", step)
    assert torch.load(state)["step"] == 4
    assert tiny_run(books, tmp_path / "parts", "--steps", "8", "--state", str(state)) == whole


def test_script_in_minutes_ends_in_time_with_the_rate_at_zero(books, tmp_path):
    tiny_run(books, tmp_path / "model", "--minutes", "0.03")
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text("utf-8"))
    assert metrics["held_out"] == []
    assert "## Scores" not in (tmp_path / "model" / "README.md").read_text("utf-8")
    run = metrics["run"]
    assert run["steps"] > 1
    assert run["minutes"] <= 0.1
    assert pretrain.rate_at(1.0, step=1000) == 0.0
    assert pretrain.rate_at(0.5, step=1000) == 0.5


def test_held_out_book_that_is_not_there_is_refused(books, tmp_path):
    with pytest.raises(TextError, match="pg9"):
        pretrain.main([str(books), str(tmp_path / "model"), "--steps", "1", "--held_out", "pg9"])
    with pytest.raises(TextError, match=r"no \.txt file"):
        pretrain.main([str(tmp_path), str(tmp_path / "model"), "--steps", "1"])


def test_tables_and_runs_of_spaces_are_not_trained_on():
    text = "A  line   of prose.\n Malt   12     4\nChapter I ........ 5 ...... 6\n\n\n\n\nThe end.\n"
    assert tidy(text) == "A line of prose.\n\n\nThe end.\n"
