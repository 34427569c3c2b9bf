"""Bad input: exit 2, one message that says what was got and what is allowed, no traceback, nothing written."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import REPOSITORY, tiny_gpt2
from partialtune.cli import main

pytestmark = pytest.mark.usefixtures("undrawn")


def write_recipe(tmp_path, changes=None, without=(), raw=None):
    values = {
        "model_name_or_path": "builtin:lilliput",
        "text": "{tmp}/book.txt",
        "trainable": ["final_norm"],
        "output_dir": "{tmp}/run",
        "max_steps": 1,
    }
    values = {key: value for key, value in {**values, **(changes or {})}.items() if key not in without}
    content = (raw or "") + yaml.safe_dump(values)
    (tmp_path / "recipe.yaml").write_text(content.replace("{tmp}", str(tmp_path)), encoding="utf-8")
    (tmp_path / "book.txt").write_text("There was once a book that was long enough for a window or two. " * 400)
    return str(tmp_path / "recipe.yaml")


def model_folder(tmp_path, damage):
    """A tiny model beside the recipe, with something wrong."""
    folder = tmp_path / "model"
    tiny_gpt2(vocab_size=4096).save_pretrained(folder)
    damage(folder)


def with_file(name, content):
    def prepare(tmp_path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    return prepare


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.ln_f.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_adapter(folder):
    config = {"peft_type": "LORA", "base_model_name_or_path": "openai-community/gpt2", "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def adapter_alone(folder):
    save_adapter(folder)
    (folder / "config.json").unlink()


def spoil(value):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["transformer.h.1.ln_2.weight"][3] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        whole_vocabulary(folder)

    return damage


def whole_vocabulary(folder):
    """Of the size of lilliput's tokenizer, which is put beside it."""
    from partialtune.builtin import builtin_folder

    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((builtin_folder("builtin:lilliput") / file).read_bytes())


def change_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        whole_vocabulary(folder)

    return damage


def other_architecture(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def damaged(damage):
    return lambda tmp_path: model_folder(tmp_path, damage)


MODEL = {"model_name_or_path": "{tmp}/model"}
SMALL_MODEL = {**MODEL, "block_size": 32, "prompts": []}

# name: (recipe changes, what to prepare beside it, words that the message must hold)
CASES = {
    # recipes
    "unknown key with a near miss": ({"learnin_rate": 1e-4}, None, ["learnin_rate", "learning_rate"]),
    "former name of a key": ({"warmup_ratio": 0.1}, None, ["warmup_ratio", "warmup_steps"]),
    "refused key": ({"hub_token": "hf_x"}, None, ["hub_token"]),
    "a word for a number": ({"block_size": "many"}, None, ["block_size", "many"]),
    "a fraction for a count": ({"block_size": 2.5}, None, ["block_size", "2.5"]),
    "a word for a boolean": ({"bf16": "perhaps"}, None, ["bf16", "perhaps"]),
    "not a number": ({"learning_rate": float("nan")}, None, ["learning_rate", "nan"]),
    "infinite": ({"learning_rate": float("inf")}, None, ["learning_rate", "inf"]),
    "a negative rate": ({"learning_rate": -1e-4}, None, ["learning_rate"]),
    "no steps": ({"max_steps": 0}, None, ["max_steps"]),
    "an empty batch": ({"per_device_train_batch_size": 0}, None, ["per_device_train_batch_size"]),
    "a share above 1": ({"validation_share": 1.5}, None, ["validation_share", "1.5"]),
    "a window of one token": ({"block_size": 1}, None, ["block_size"]),
    "a dropout above 1": ({"dropout": 2}, None, ["dropout"]),
    "an unknown choice with a near miss": ({"window_sampling": "chunk"}, None, ["window_sampling", "chunked"]),
    "a stride with random windows": ({"window_stride": 8, "window_sampling": "random"}, None, ["window_stride"]),
    "two units of length": ({"num_train_epochs": 2}, None, ["num_train_epochs", "max_steps"]),
    "two 16-bit formats": ({"bf16": True, "fp16": True}, None, ["bf16", "fp16"]),
    "an optimizer without names": ({"optim": "lomo"}, None, ["optim", "lomo"]),
    "a checkpoint that is not there": ({"resume_from_checkpoint": "{tmp}/none"}, None, ["resume_from_checkpoint"]),
    # selectors
    "a misspelt selector": ({"trainable": ["embedings"]}, None, ["embedings", "embeddings"]),
    "a block out of range": ({"trainable": ["blocks[99]"]}, None, ["blocks[99] is out of range"]),
    "a part that the model lacks": ({"trainable": ["blocks[0].mixer"]}, None, ["mixer"]),
    "everything taken away": ({"trainable": ["final_norm", "!all"]}, None, ["!all"]),
    "a broken regex": ({"trainable": ["/wte(/"]}, None, ["/wte(/"]),
    "a regex without a match": ({"trainable": ["/no_such_name/"]}, None, ["/no_such_name/"]),
    "no selector": ({"trainable": []}, None, ["trainable"]),
    "a head without its twin": ({"trainable": ["head", "!embeddings.tokens"]}, None, ["head: untied"]),
    # texts
    "a missing text": ({"text": "{tmp}/boook.txt"}, None, ["boook.txt"]),
    "a glob without a match": ({"text": "{tmp}/*.epub"}, None, ["*.epub"]),
    "a folder as text": ({"text": "{tmp}"}, None, ["folder"]),
    "a binary text": ({"text": "{tmp}/x.bin"}, with_file("x.bin", bytes(range(256)) * 50), ["x.bin"]),
    "a web page": ({"text": "{tmp}/x.html"}, with_file("x.html", b"<!DOCTYPE html><html><body>x"), ["HTML"]),
    "an empty text": ({"text": "{tmp}/x.txt"}, with_file("x.txt", b""), ["x.txt", "empty"]),
    "a text too short": ({"text": "{tmp}/x.txt"}, with_file("x.txt", b"Too short."), ["No window fits"]),
    "an unknown builtin text": ({"text": "builtin:bible"}, None, ["builtin:python-docs"]),
    "another protocol": ({"text": "ftp://example.org/book.txt"}, None, ["http"]),
    "a missing further text": ({"eval_texts": {"other": "{tmp}/none.txt"}}, None, ["none.txt"]),
    # models
    "a missing model": ({"model_name_or_path": "{tmp}/none"}, None, ["there is no folder"]),
    "no builtin of that name": ({"model_name_or_path": "builtin:gulliver"}, None, ["builtin:lilliput"]),
    "a folder without a model": ({"model_name_or_path": "{tmp}"}, None, ["config.json"]),
    "a model without weights": (MODEL, damaged(lambda f: (f / "model.safetensors").unlink()), ["model"]),
    "a damaged weight file": (MODEL, damaged(cut_weights), ["model"]),
    "a weight file with a hole": (MODEL, damaged(lose_a_tensor), ["model"]),
    "a pickle": (MODEL, damaged(pickle_only), ["*.bin files alone", "use_safetensors=False", "CONVERTED"]),
    "an adapter beside a base": (
        MODEL,
        damaged(save_adapter),
        ["holds an adapter of openai-community/gpt2", "Move the files adapter_*", "merge them first, with: python -c"],
    ),
    "an adapter alone": (
        MODEL,
        damaged(adapter_alone),
        ["holds an adapter of openai-community/gpt2. Merge it first, with: python -c", "merge_and_unload"],
    ),
    "a NaN in the base": (
        SMALL_MODEL,
        damaged(spoil(float("nan"))),
        ["transformer.h.1.ln_2.weight holds 1 values that are NaN or infinite"],
    ),
    "an infinity in the base": (SMALL_MODEL, damaged(spoil(float("-inf"))), ["transformer.h.1.ln_2.weight"]),
    "fewer blocks in config.json than in the file": (
        SMALL_MODEL,
        damaged(change_config(n_layer=2)),
        ["tensors of blocks that its config.json does not have, transformer.h.2."],
    ),
    "a quantised model": (
        SMALL_MODEL,
        damaged(change_config(quantization_config={"quant_method": "gptq", "bits": 4})),
        ["is quantised (gptq)", "full precision"],
    ),
    "no language model": (MODEL, damaged(other_architecture), ["model"]),
    "a window above the context": ({"block_size": 100_000}, None, ["100000", "context"]),
    "a prompt above the context": ({"prompts": ["word " * 9000]}, None, ["prompt"]),
    # folders
    "a stranger's folder": (
        {"output_dir": "{tmp}/theirs"},
        with_file("theirs/thesis.txt", b"years of work"),
        ["holds no run of partialtune"],
    ),
    "another run's folder": (
        {},
        with_file("run/recipe.yaml", b"model_name_or_path: builtin:lilliput\nmax_steps: 9\nlearning_rate: 0.1\n"),
        ["holds a run of another recipe", "learning_rate", "--output_dir"],
    ),
    "a file in its place": ({"output_dir": "{tmp}/book.txt"}, None, ["is a file"]),
    "a file on the way": ({"output_dir": "{tmp}/book.txt/run"}, None, ["is a file"]),
}


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def refused(capfd, words):
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert err.count("partialtune: ") == 1
    return err


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_words_and_nothing_is_written(case, tmp_path, capfd):
    changes, prepare, expected = CASES[case]
    recipe = write_recipe(tmp_path, changes)
    if prepare:
        prepare(tmp_path)
    before = snapshot(tmp_path)
    err = refused(capfd, ["train", recipe])
    assert all(words in err for words in expected), err
    assert snapshot(tmp_path) == before


RAW = {
    "broken YAML": ("trainable: [blocks[-2:], head]\n", "quotes"),
    "a tag": ("prompts: [!head]\n", "quotes"),
    "a list": ("- a\n- b\n", ""),
    "not UTF-8": (b"text: \xff\xfe\n", "UTF-8"),
    "empty": ("", "empty"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_recipe_that_cannot_be_parsed_is_refused_in_words(case, tmp_path, capfd):
    content, expected = RAW[case]
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refused(capfd, ["train", str(file)])


def test_a_duplicate_key_is_refused(tmp_path, capfd):
    recipe = write_recipe(tmp_path, raw="max_steps: 3\n")
    assert "max_steps" in refused(capfd, ["train", recipe])


@pytest.mark.parametrize("key", ["model_name_or_path", "text", "trainable", "output_dir"])
def test_a_missing_required_key_is_named(key, tmp_path, capfd):
    assert key in refused(capfd, ["train", write_recipe(tmp_path, without=(key,))])


def test_several_mistakes_are_reported_together(tmp_path, capfd):
    recipe = write_recipe(tmp_path, {"block_size": 1, "learning_rate": -1, "trainabel": ["head"]})
    err = refused(capfd, ["train", recipe])
    assert all(key in err for key in ("block_size", "learning_rate", "trainabel"))


def test_a_missing_recipe_and_an_unknown_builtin_one_are_said(tmp_path, capfd):
    assert "absent.yaml" in refused(capfd, ["train", str(tmp_path / "absent.yaml")])
    assert "builtin:quickstart" in refused(capfd, ["train", "builtin:absent"])


def test_a_launchers_precision_that_contradicts_the_recipe_is_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "precision" in refused(capfd, ["train", write_recipe(tmp_path)])


def test_a_text_that_may_not_be_read_is_refused(tmp_path, capfd, monkeypatch):
    recipe = write_recipe(tmp_path)
    if os.geteuid() == 0:  # root may read everything: let reading fail as it does for others
        read_bytes = Path.read_bytes

        def denied(path):
            if path.name == "book.txt":
                raise PermissionError(13, "Permission denied", str(path))
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", denied)
    (tmp_path / "book.txt").chmod(stat.S_IWUSR)
    assert "book.txt" in refused(capfd, ["train", recipe])


def test_a_command_that_takes_no_keys_refuses_them(tmp_path, capfd):
    assert "--max_steps" in refused(capfd, ["report", str(tmp_path), "--max_steps", "3"])
    assert "Give the output_dir of a run that has begun to train" in refused(capfd, ["report", str(tmp_path)])


def test_finite_weights_with_scores_that_are_not_are_said_so_before_training_diverges(tmp_path, capfd, caplog):
    recipe = write_recipe(tmp_path, {**SMALL_MODEL, "prompts": ["It was"], "report_to": "none"})
    damaged(spoil(3e38))(tmp_path)
    assert main(["train", recipe]) == 4
    assert "The loss of the base is not a finite number, before any training, on: validation, training." in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_before_training_ends_with_130_and_writes_nothing(tmp_path, capfd, monkeypatch):
    import partialtune.recipe_run.prepare

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(partialtune.recipe_run.prepare, "load_tokenizer", interrupted)
    recipe = write_recipe(tmp_path)
    before = snapshot(tmp_path)
    assert main(["train", recipe]) == 130
    assert "Interrupted" in capfd.readouterr().err
    assert snapshot(tmp_path) == before


def test_ctrl_c_in_any_phase_before_the_first_step_leaves_a_folder_that_the_same_command_takes(
    tmp_path, caplog, monkeypatch
):
    import partialtune.recipe_run.train
    from partialtune.proof.audit import FreezeAuditCallback
    from partialtune.recipe_run import evaluate_before_after as look

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    words = ["train", write_recipe(tmp_path, {"prompts": ["It was"], "report_to": "none", "block_size": 64})]
    phases = {
        "text": (partialtune.recipe_run.prepare, "data_of_recipe"),
        "loading": (partialtune.recipe_run.prepare, "load_base"),
        "the folder": (partialtune.recipe_run.train, "begin_folder"),
        "scoring": (look, "probe_prompts"),
        "training's set-up": (FreezeAuditCallback, "on_train_begin"),
    }
    for phase, place in phases.items():
        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupted)
            assert main(words) == 130, phase
    caplog.clear()
    monkeypatch.setattr(look, "score_windows", scored_after := scored_once_more(look.score_windows))
    assert main(words) == 0
    assert "ended before its first optimizer step: it starts again" in caplog.text
    assert "used again: validation, training, prompts" in caplog.text
    assert scored_after.labels == ["validation, after", "training, after"]
    assert main(words) == 0  # finished: nothing to do


def scored_once_more(score_windows):
    """`score_windows` that keeps the labels of what it scored; learning curves have none."""

    def scored(model, text, batch_size, label, *args, **kwargs):
        scored.labels.append(label)
        return score_windows(model, text, batch_size, label, *args, **kwargs)

    scored.labels = []
    return scored


def test_the_quickstart_with_a_typo_on_the_command_line_is_refused(capfd):
    words = ["plan", str(REPOSITORY / "recipes" / "quickstart.yaml"), "--trainabel", "head"]
    assert "trainable" in refused(capfd, words)
