"""`init` and `train TEXT`: a text alone becomes a recipe, a run, and a model that writes."""

import re

import pytest
import yaml
from transformers import AutoTokenizer

from conftest import tiny_gpt2
from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.errors import TextError
from partialtune.propose import POLICIES, SMALL, name_of, propose
from partialtune.recipe.recipe import read_recipe, recipe_from_values


def notes(count=60):
    places = ("harbour", "island", "river", "bay", "cape")
    return "".join(
        f"Day {n}. We sailed from the {places[n % 5]} at noon, and the wind was fair all day. Number {n} of the crew "
        f"said that it would turn. In the {places[n * 3 % 5]} we lost {n} barrels of water, and nobody slept.\n"
        for n in range(count)
    )


@pytest.mark.slow
def test_a_text_alone_is_trained_on_and_its_model_writes(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(notes())
    assert main(["train", "notes.txt", "--max_steps", "4"]) == 0  # 4 in the place of 30, to be quick
    assert "trainable: [embeddings, final_norm, head]" in caplog.text
    assert "partialtune init notes.txt" in caplog.text
    capsys.readouterr()
    recipe = yaml.safe_load((tmp_path / "outputs" / "notes" / "recipe.yaml").read_text())
    assert (recipe["text"][0], recipe["model_name_or_path"], recipe["max_steps"]) == (
        "notes.txt",
        "builtin:lilliput",
        4,
    )
    assert main(["generate", "outputs/notes", "--prompt", "We sailed from", "--max_new_tokens", "10"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("We sailed from")
    assert len(written) > len("We sailed from\n")


def test_init_writes_a_recipe_that_is_read_with_what_it_says_and_overwrites_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(notes())
    assert main(["init", "notes.txt"]) == 0
    written = (tmp_path / "notes.yaml").read_text()
    recipe = read_recipe(tmp_path / "notes.yaml")
    tokens = int(re.search(r"([\d,]+) tokens to train on", written)[1].replace(",", ""))
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    assert tokens == pytest.approx(0.9 * len(tokenizer(notes())["input_ids"]), rel=0.02)
    assert recipe.text.block_size * 16 <= tokens < recipe.text.block_size * 32
    assert "# Trains 885,120 of 2,664,576 parameters (33.2%)" in written
    held_out = notes()[-len(notes()) // 10 :]
    assert len(set(recipe.evaluation.prompts)) == 3
    assert all(prompt in held_out for prompt in recipe.evaluation.prompts)
    assert len(re.findall(r"^#   .* +\d+% +\d+%  ", written, re.MULTILINE)) == len(POLICIES)
    assert "100%  100%  full fine-tuning" in written
    assert main(["init", "notes.txt"]) == 2
    assert "notes.yaml exists already" in capsys.readouterr().err
    assert (tmp_path / "notes.yaml").read_text() == written


def test_a_large_model_gets_its_last_blocks_and_a_text_as_short_windows_as_it_needs(tmp_path):
    (tmp_path / "text.txt").write_text(notes(12))
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    model = tiny_gpt2(vocab_size=len(tokenizer), n_embd=1024, n_layer=5)
    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    assert sum(parameter.numel() for parameter in model.parameters()) > SMALL
    proposal = propose(str(tmp_path / "text.txt"), str(tmp_path / "large"))
    assert proposal.values["trainable"] == ["blocks[-2:]", "final_norm"]
    assert proposal.values["block_size"] == 32
    assert proposal.values["output_dir"] == "outputs/text-large"  # `train text.txt` took outputs/text
    assert recipe_from_values(proposal.values).training["learning_rate"] == 5e-5
    assert proposal.policies[0].cost.products.total < proposal.policies[-1].cost.products.total


def test_prompts_come_from_several_texts_in_turn_and_from_one_where_there_is_one(tmp_path):
    for name, count in {"a": 60, "b": 40, "c": 50, "d": 45}.items():
        (tmp_path / f"{name}.md").write_text(notes(count).replace("We sailed", f"At {name}, we sailed"))
    (tmp_path / "lines.txt").write_text("\n".join(f"- item {n}" for n in range(400)))
    (tmp_path / "z.txt").write_text(notes())

    def prompts(glob):
        return propose(str(tmp_path / glob)).values["prompts"]

    assert prompts("*.md") == ["At a, we sailed", "At b, we sailed", "At c, we sailed"]
    first, second, third = prompts("[ab].md")
    assert (first, third) == ("At a, we sailed", "At b, we sailed")
    assert second in (tmp_path / "a.md").read_text()
    both = prompts("*.txt")
    assert len(both) == 3
    assert [prompt.startswith(("- item", "item")) for prompt in both] == [True, True, False]
    one = prompts("z.txt")
    assert len(set(one)) == 3
    held_out = notes()[-len(notes()) // 10 :]
    assert all(prompt in held_out for prompt in one)


def test_a_text_too_short_for_two_windows_is_refused_in_words(tmp_path):
    (tmp_path / "text.txt").write_text("It was the best of times.")
    with pytest.raises(TextError, match="too few for two windows of 16"):
        propose(str(tmp_path / "text.txt"))


def test_windows_are_those_of_each_text_and_not_of_all_together(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("It was the best of times. It was the worst of times. " * 4)
    proposal = propose(str(tmp_path / "*.txt"))
    size = proposal.values["block_size"]
    assert size <= 64  # of each text 50 tokens or so train: 256 would give none
    assert f"{40 * (48 // size)} windows" in proposal.comments["block_size"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("notes.txt", "notes"),
        ("/a/b/My notes.md", "My-notes"),
        ("notes/*.md", "notes-md"),
        ("https://www.gutenberg.org/cache/epub/829/pg829.txt", "pg829"),
        ("https://x.org/a/?token=b", "a"),
        ("hf:wikitext:wikitext-2:train", "hf-wikitext-wikitext-2-train"),
        ("...", "run"),
    ],
)
def test_a_run_is_named_for_its_text(text, name):
    assert name_of(text) == name
