"""`partialtune generate`: what a run writes, by its own model, from every kind of folder, as GenerationConfig says."""

import contextlib
import html
import io
import re
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from partialtune.builtin import builtin_folder
from partialtune.cli import main
from partialtune.errors import InputError, ModelError
from partialtune.generate import base_of, sampling_of, writers_of
from partialtune.rebuild import load

PROMPT = "The function returns"
GREEDY = ["--do_sample", "false", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind, of two steps: its folder by its kind."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times, it was the age. " * 200)
    values = {
        "model_name_or_path": "builtin:lilliput",
        "text": str(folder / "text.txt"),
        "block_size": 32,
        "trainable": ["blocks[-1].attention"],
        "max_steps": 2,
        "learning_rate": 1e-1,
        "prompts": ['It was "the" best\n'],
    }
    changes = {
        "whole": {},
        "delta": {"checkpoint_format": "delta"},
        "adapters": {"method": "lora"},
        "rows": {"checkpoint_format": "delta", "trainable": [], "new_tokens": ["<age>"]},
    }
    for kind, change in changes.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({**values, **change, "output_dir": str(folder / kind)}))
        assert main(["train", str(folder / f"{kind}.yaml")]) == 0
    return {kind: folder / kind for kind in changes}


def greedy(model, tokens=12):
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "delta", "adapters"])
def test_a_run_of_each_kind_writes_what_its_model_finds_likeliest_beside_its_base(runs, kind, capsys):
    base = greedy(AutoModelForCausalLM.from_pretrained(builtin_folder("builtin:lilliput")).float())
    own = greedy(load(runs[kind]))
    assert own != base
    capsys.readouterr()
    assert main(["generate", str(runs[kind]), "--prompt", PROMPT, "--beside-base", *GREEDY]) == 0
    assert capsys.readouterr().out == f"--- builtin:lilliput\n{base}\n--- {runs[kind]}\n{own}\n"


@pytest.mark.slow
def test_the_loaded_run_is_the_one_that_its_folder_stands_for(runs):
    whole, delta = (dict(load(runs[kind]).named_parameters()) for kind in ("whole", "delta"))
    assert all(torch.equal(values, delta[name]) for name, values in whole.items())
    assert type(load(runs["adapters"])).__name__.startswith("Peft")
    assert {base_of(folder, kind) for kind, folder in runs.items()} == {"builtin:lilliput"}


def snippet_of(page, text):
    """The one block of Python of a card or a report that lets the model write."""
    blocks = re.findall(r"```python\n(.*?)```" if page == "README.md" else r"<pre><code>(.*?)</code>", text, re.S)
    (code,) = [html.unescape(block) if page == "report.html" else block for block in blocks if "generate(" in block]
    return code


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "delta", "adapters", "rows"])
def test_what_card_and_report_offer_to_paste_writes_what_the_command_writes(runs, kind, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "elsewhere"  # the folder has moved, and nothing in it but what is pushed is needed
    shutil.copytree(runs[kind], folder)
    monkeypatch.chdir(tmp_path)
    prompt = 'It was "the" best\n'
    assert main(["generate", "elsewhere", "--prompt", prompt, "--seed", "3"]) == 0
    expected = capsys.readouterr().out
    assert expected.startswith(prompt)
    assert len(expected) > len(prompt) + 50
    for page, place in (("README.md", '"NAMESPACE/NAME"'), ("report.html", f'"{runs[kind]}"')):
        code = snippet_of(page, (folder / page).read_text(encoding="utf-8"))
        assert code.count(place) == 1
        seeded = code.replace(
            "written = ", "import torch; torch.manual_seed(3)\nwritten = "
        )  # peft draws while it loads
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(seeded.replace(place, '"elsewhere"'), page, "exec"), {})  # what a reader would paste
        assert printed.getvalue() == expected
    command = re.search(r"<code>(partialtune generate .*?)</code>", (folder / "report.html").read_text(), re.S)[1]
    assert shlex.split(html.unescape(command))[2:] == [str(runs[kind]), "--prompt", prompt, "--beside-base"]


def test_a_seed_gives_the_same_text_again_and_another_seed_another(capsys):
    def written(seed):
        words = ["generate", "builtin:lilliput", "--prompt", PROMPT, "--seed", seed, "--max_new_tokens", "20"]
        assert main(words) == 0
        return capsys.readouterr().out

    assert written("1") == written("1") != written("2")


def test_without_a_prompt_each_line_is_one_until_the_end(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("If the\nA class\n"))
    assert main(["generate", "builtin:lilliput", *GREEDY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in lines] == ["If the ", "A class"]


def test_several_texts_of_beams_are_written_when_they_are_done(capsys):
    words = ["--num_beams", "3", "--num_return_sequences", "2", "--max_new_tokens", "5"]
    assert main(["generate", "builtin:lilliput", "--prompt", PROMPT, *words]) == 0
    assert capsys.readouterr().out.count(PROMPT) == 2


def test_settings_are_those_of_generation_config_over_ours():
    settings = sampling_of(["--temperature=0.5", "--top-k", "7"])
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.5, 7, 0.95)
    assert sampling_of(["--do_sample", "false"]).temperature in (None, 1.0)
    assert not sampling_of(["--num_beams", "4"]).do_sample
    with pytest.raises(InputError, match="Say --max_new_tokens"):
        sampling_of(["--max_length", "20"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperatur", "1"], "--temperatur is no setting of generation"),
        (["--top_p"], "--top_p lacks its value"),
        (["--top_p", "--seed", "1"], "--top_p lacks its value"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
        (["--max_new_tokens", "null"], "--max_new_tokens is None; allowed"),
        (["--max_new_tokens", "many"], "--max_new_tokens is 'many'; allowed"),
        (["--temperature", "-3"], "temperature"),
    ],
)
def test_a_wrong_setting_ends_with_2_in_words(words, said, capsys):
    assert main(["generate", "builtin:lilliput", "--prompt", PROMPT, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_text_ends_with_it(capsys):
    words = ["--do_sample", "false", "--max_new_tokens", "5000"]
    assert main(["generate", "builtin:lilliput", "--prompt", "a " * 600, *words]) == 2
    assert "tokens" in capsys.readouterr().err


def test_the_base_of_a_model_that_names_none_is_not_guessed():
    with pytest.raises(Exception, match="does not say which base"):
        writers_of("builtin:lilliput", beside_base=True)


@pytest.mark.slow
def test_a_run_that_has_not_ended_writes_from_its_newest_whole_checkpoint_or_says_how_to_go_on(
    runs, tmp_path, capsys, caplog
):
    recipe = yaml.safe_load((runs["whole"] / "recipe.yaml").read_text())
    recipe |= {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    for left in [path for path in (tmp_path / "run").iterdir() if path.name != "recipe.yaml" and path.is_file()]:
        left.unlink()  # as a kill leaves it
    words = ["generate", str(tmp_path / "run"), "--prompt", PROMPT, "--beside-base", *GREEDY]
    capsys.readouterr()
    assert main(words) == 0
    base = greedy(AutoModelForCausalLM.from_pretrained(builtin_folder("builtin:lilliput")).float())
    newest = tmp_path / "run" / "checkpoint-2"
    expected = f"--- builtin:lilliput\n{base}\n--- {newest}\n{greedy(load(runs['whole']))}\n"
    assert capsys.readouterr().out == expected
    assert "has not ended: this is its checkpoint-2" in caplog.text
    assert main(["generate", str(newest), *words[2:]]) == 0
    assert capsys.readouterr().out == expected

    (newest / "model.safetensors").write_bytes(b"cut short")
    assert main(words) == 0
    assert f"--- {newest.with_name('checkpoint-1')}\n" in capsys.readouterr().out
    shutil.rmtree(newest.with_name("checkpoint-1"))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "has not ended, and has no complete checkpoint" in said
    assert "recipe.yaml --resume_from_checkpoint auto" in said


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("model_name_or_path: models/mine\n", "was made from the folder models/mine, which is not here"),
        ("- of another program", "does not say which base"),
        ("model: {a: [", "does not say which base"),
        ("model_name_or_path: [1]\nrun: 3", "does not say which base"),
    ],
)
def test_a_base_that_a_recipe_does_not_name_or_that_lay_elsewhere_is_refused_in_words(tmp_path, recipe, said):
    shutil.copytree(builtin_folder("builtin:lilliput"), tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    with pytest.raises(ModelError, match=said):
        writers_of(str(tmp_path / "run"), beside_base=True)


def test_a_folder_has_no_revisions(capsys):
    assert main(["generate", "builtin:lilliput", "--revision", "v1", "--prompt", PROMPT]) == 2
    assert "Leave out @v1" in capsys.readouterr().err
