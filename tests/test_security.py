"""What a run must never do: tell a secret, run code that came with a file, fetch over anything but http(s)."""

import json
import re

import pytest
import torch

from cluster import small_recipe
from conftest import REPOSITORY
from partialtune.cli import main
from partialtune.errors import InputError, TextError
from partialtune.recipe.arguments import ModelArguments
from partialtune.text.sources import read_texts
from partialtune.training.checkpoints import finish_checkpoint, newest_whole_checkpoint
from partialtune.training.optimizer_state import check_checkpoint

SECRET = "hf_ThisIsASecretThatNobodyMayEverSeeAnywhere"
SOURCE = REPOSITORY / "src" / "partialtune"


def everything_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_token_in_the_environment_is_in_no_byte_of_what_a_run_or_a_failure_leaves(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe(tmp_path, max_steps=2, schedule=[], report_to="tensorboard")
    assert main(recipe) == 0
    assert main([*recipe, "--resume_from_checkpoint", "auto", "--max_steps", "4", "--text", "missing.txt"]) == 2
    assert main([*recipe, "--output_dir", str(tmp_path / "other"), "--hub_token", SECRET]) == 2
    with pytest.raises(TextError):
        read_texts([f"http://me:{SECRET}@127.0.0.1:9/book.txt"])
    out = capfd.readouterr()
    assert SECRET not in out.out + out.err
    files = everything_under(tmp_path)
    assert len(files) > 30
    assert [path for path, content in files.items() if SECRET.encode() in content] == []


class Planted:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoints_pickles_is_never_run(tmp_path, name, capfd):
    recipe = small_recipe(tmp_path, max_steps=2, schedule=[], lr_scheduler_type="constant")
    assert main(recipe) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    aside = tmp_path / "run" / ".unfinished" / "checkpoint-2"
    aside.parent.mkdir()
    checkpoint.rename(aside)
    torch.save({"state": Planted(tmp_path / "planted"), "param_groups": []}, aside / name)
    finish_checkpoint(aside, checkpoint)  # its digests are right: whoever planted it could write there
    assert newest_whole_checkpoint(tmp_path / "run") == checkpoint
    assert main([*recipe, "--resume_from_checkpoint", "auto", "--max_steps", "4"]) == 2
    assert "cannot be gone on from" in capfd.readouterr().err
    assert not (tmp_path / "planted").exists()


def test_remote_code_is_off_unless_asked_for():
    assert ModelArguments(model_name_or_path="x").trust_remote_code is False


def test_yaml_and_pickles_are_read_the_safe_way_everywhere_in_the_package():
    code = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    for path, text in code.items():
        assert not re.search(r"yaml\.(load|unsafe_load|full_load)\(", text), path
        assert not re.search(r"\bpickle\.loads?\(", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)
        assert not re.search(r"\b(eval|exec)\(", re.sub(r"\.eval\(", "", text)), path


@pytest.mark.parametrize("address", ["ftp://host/a.txt", "file:///etc/passwd", "gopher://host/", "s3://bucket/a.txt"])
def test_texts_are_fetched_over_http_and_https_only(address):
    with pytest.raises(TextError, match="over http and https only"):
        read_texts([address])


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/none"]
)
def test_a_recipe_with_pythons_yaml_tags_is_refused(tmp_path, tag, capfd):
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: builtin:lilliput\ntext: {tag}\n")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_checkpoint_whose_state_is_no_state_is_refused(tmp_path):
    aside = tmp_path / ".unfinished" / "checkpoint-2"
    aside.mkdir(parents=True)
    (aside / "trainer_state.json").write_text(json.dumps({"global_step": "two"}))
    finish_checkpoint(aside, tmp_path / "checkpoint-2")
    with pytest.raises(InputError, match="cannot be gone on from"):
        check_checkpoint(tmp_path / "checkpoint-2", None)
