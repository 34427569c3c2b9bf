"""All mistakes of a recipe in one message, also those that its model shows; wrong words before torch is imported."""

import json
import subprocess
import sys

import pytest

import partialtune
from partialtune.cli import main
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze import recipe_mistakes
from partialtune.recipe.declared_arguments import declared_arguments
from partialtune.recipe.key_rules import recipe_types, training_defaults

GOOD = {
    "model_name_or_path": "builtin:lilliput",
    "text": "book.txt",
    "trainable": ["blocks[-1]"],
    "output_dir": "run",
}
SCHEDULE = [{"from_step": 3, "trainable": ["blocks[8]"]}]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes recipe.yaml with these keys, a key a line, beside a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Some words of a text. " * 200)

    def write(**changes) -> str:
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in {**GOOD, **changes}.items()]
        (tmp_path / "recipe.yaml").write_text("".join(lines))
        return "recipe.yaml"

    return write


def refusal(words, capfd) -> list[str]:
    assert main(words) == 2
    _, _, message = capfd.readouterr().err.partition("partialtune: ")
    return [line.strip() for line in message.splitlines()]


def test_what_only_the_model_shows_is_said_together_with_what_needs_no_model(recipe, capfd, tmp_path):
    changes = {"text": "absent.txt", "trainable": ["blocks[9]", "final_norm"], "schedule": SCHEDULE, "seed": -1}
    rates = {"blocks[7]": 1e-4}
    file = recipe(**changes, part_learning_rates=rates, block_size=4096, learning_rte=1)
    head, *lines = refusal(["train", file], capfd)
    assert head == "recipe.yaml: 7 problems. Nothing was loaded or written."
    said = [
        f"line 2, text: There is no file absent.txt in {tmp_path}.",
        "line 3, trainable: blocks[9] is out of range: builtin:lilliput has 4 blocks, 0 to 3.",
        "line 5, schedule: from step 3: blocks[8] is out of range: builtin:lilliput has 4 blocks, 0 to 3.",
        "line 6, seed: got -1; allowed: a whole number, 0 to 4,294,967,295.",
        "line 7, part_learning_rates: blocks[7] is out of range: builtin:lilliput has 4 blocks, 0 to 3.",
        "line 8, block_size: block_size is 4096, and builtin:lilliput has a context of 512. Use at most 512.",
        "line 9, learning_rte: unknown key. Did you mean learning_rate?",
    ]
    assert [line[: len(words)] for line, words in zip(lines, said, strict=True)] == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["rank", "bench", "compare"])
def test_the_other_commands_that_read_a_recipe_say_both_kinds_too(command, recipe, capfd, tmp_path):
    file = recipe(trainable=["blocks[9]"], seed=-1)
    where = ["--output_dir", "results"] if command == "compare" else []
    said = " ".join(refusal([command, file, *where], capfd))
    assert "2 problems" in said
    assert "trainable: blocks[9] is out of range: builtin:lilliput has 4 blocks" in said
    assert "seed: got -1" in said
    assert not (tmp_path / "results").exists()


def test_mistakes_that_the_model_alone_shows_are_said_together_and_before_the_text_is_cut(recipe, capfd, monkeypatch):
    file = recipe(trainable=["blocks[9]", "blocks[8]"], block_size=4096)
    for command in ("plan", "train"):
        head, *lines = refusal([command, file], capfd)
        assert head == "recipe.yaml: 3 problems. Nothing was loaded or written."
        assert [line.split(": ")[1].split(" is ")[0] for line in lines] == ["blocks[9]", "blocks[8]", "block_size"]
    with pytest.raises(
        RecipeError, match=r"2 problems(.|\n)*learning_rte: unknown key(.|\n)*trainable: blocks\[9\] is"
    ):
        partialtune.train(GOOD | {"trainable": ["blocks[9]"], "learning_rte": 1})
    monkeypatch.setattr("partialtune.recipe_run.prepare.data_of_recipe", lambda *_: pytest.fail("a text was read"))
    contradiction = recipe(trainable=["head", "!embeddings"])
    assert refusal(["train", contradiction], capfd)[0].startswith("head and !embeddings contradict each other")


def test_of_keys_that_are_wrong_nothing_follows_that_would_be_said_twice(recipe, capfd):
    lines = refusal(["plan", recipe(trainable=["norm", "blocks[9]"], head="loose")], capfd)
    assert [line.split(": ")[0] for line in lines[1:]] == ["line 3, trainable", "line 3, trainable", "line 5, head"]
    assert "'norm'" in lines[1]
    assert "blocks[9] is out of range" in lines[2]


def test_a_model_that_cannot_be_had_adds_no_line_to_what_is_wrong_with_the_recipe(recipe, capfd, monkeypatch):
    def absent(*_):
        raise ModelError("not here")

    monkeypatch.setattr(recipe_mistakes, "load_config", absent)
    lines = refusal(["plan", recipe(seed=-1, trainable=["blocks[9]"])], capfd)
    assert lines[0] == "recipe.yaml: one problem. Nothing was loaded or written."


WRONG_WORDS = {
    "misspelt key": (["recipe.yaml", "--learning_rte", "1"], "learning_rte: unknown key. Did you mean learning_rate?"),
    "no number": (["recipe.yaml", "--max_steps", "few"], "max_steps: got 'few'; allowed: a whole number"),
    "out of bounds": (["recipe.yaml", "--block_size", "1"], "block_size: got '1'; allowed: a whole number, 2 or more"),
    "no choice": (["recipe.yaml", "--lr_scheduler_type", "cosin"], "Did you mean cosine?"),
    "no key": (["recipe.yaml", "stray"], "`stray`: is no key"),
    "two lengths": (["recipe.yaml", "--max_steps", "5", "--num_train_epochs", "2"], "Keep one of them."),
    "no recipe": (["recipes.yaml"], "There is no recipe recipes.yaml. Did you mean recipe.yaml?"),
    "no text": (["absent.txt"], "There is no file absent.txt"),
    "a text": (["book.txt", "--sed", "1"], "The command line: one problem. Nothing was loaded or written."),
}


def test_wrong_words_of_train_and_plan_are_found_before_torch_is_imported(recipe, tmp_path):
    recipe()
    code = (
        "import contextlib, io, json, sys\nfrom partialtune.cli import main\n"
        "for command, words in json.load(sys.stdin):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said): code = main([command, *words])\n"
        "    print(json.dumps([code, said.getvalue(), 'torch' in sys.modules or 'transformers' in sys.modules]))\n"
    )
    texts = ("no text", "a text")  # which `plan` does not take
    asked = [("train", name) for name in WRONG_WORDS] + [("plan", name) for name in WRONG_WORDS if name not in texts]
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([(command, WRONG_WORDS[name][0]) for command, name in asked]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=True,
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for (command, name), (code, said, heavy) in zip(asked, found, strict=True):
        assert WRONG_WORDS[name][1] in said, (command, name)
        assert (code, heavy) == (2, False), (command, name)


def test_types_and_defaults_read_from_the_source_are_those_of_the_class(recipe):
    types, defaults = declared_arguments()
    real, values = recipe_types(), training_defaults()
    assert types.keys() == real.keys()
    assert {key: hint for key, hint in types.items() if hint is not None and hint != real[key]} == {}
    assert {key for key, hint in types.items() if hint is None} <= {
        *("log_level", "log_level_replica", "ddp_backend", "dataloader_multiprocessing_context")
    }
    assert {key: value for key, value in defaults.items() if value != values[key]} == {}
    assert len(defaults) > 100


def test_where_the_source_has_another_shape_the_words_are_checked_after_the_import(recipe, capfd, monkeypatch):
    monkeypatch.setattr("partialtune.recipe.declared_arguments.find_spec", lambda _: None)
    assert declared_arguments() is None
    assert "learning_rte" in refusal(["plan", recipe(), "--learning_rte", "1"], capfd)[1]
