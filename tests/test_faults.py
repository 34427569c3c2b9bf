"""Bad days: full disks, damaged files, losses that are not finite, other bases and texts, two runs on one folder.

In each of them the run ends in words, and what was saved before is whole.
"""

import errno
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cluster import fingerprint, small_recipe
from conftest import some_windows, tiny_gpt2
from partialtune.cli import main
from partialtune.compare.outcomes import read_outcome
from partialtune.compare.run_queue import run_child
from partialtune.engine.checkpoint_files import ASIDE, checkpoints_in, damage_of
from partialtune.errors import InputError, RecipeError, TextError, TrainingDiverged
from partialtune.hub import push
from partialtune.hub.published_files import check_finished
from partialtune.net.download import fetch
from partialtune.proof.deltas import WeightDeltaCallback
from partialtune.recipe.recipe import read_recipe
from partialtune.recipe_run import train
from partialtune.recipe_run import write_results as results
from partialtune.run_folder import locked, write_exit
from partialtune.text.reading import check_texts_unchanged
from partialtune.text.sources import raw_text
from partialtune.training import recipe_trainer, settings
from partialtune.training.resume_check import Standing
from partialtune.training.stopping import BatchWatch
from partialtune.training.training_data import collate_windows, data_of_recipe
from test_download import cached_files, server  # noqa: F401  (a fixture)
from two_processes import on_two_processes

pytestmark = pytest.mark.usefixtures("undrawn")

RESUME = ["--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, a text, a recipe, and a run of it that was left alone."""
    folder = tmp_path_factory.mktemp("faults")
    assert main(small_recipe(folder, max_steps=8, schedule=[{"from_step": 6, "trainable": ["embeddings"]}])) == 0
    return folder


@pytest.fixture
def place(home, tmp_path):
    """The same, with the run as it was at step 6: begun, and not finished."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    recipe = (tmp_path / "recipe.yaml").read_text().replace(str(home), str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(recipe)
    run = tmp_path / "run"
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(home), str(tmp_path)))
    (run / "exit.json").unlink()
    shutil.rmtree(run / "checkpoint-8")
    return tmp_path


def again(place, *words):
    return main(["train", str(place / "recipe.yaml"), *words])


def marks(folder: Path):
    """Every file of a folder with the digest of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(run):
    return [int(path.name.rpartition("-")[2]) for path in checkpoints_in(run)]


# ---- what a run may go on from --------------------------------------------------------------------------------------


def other_base(place):
    tiny = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        tiny.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    tiny.save_pretrained(place / "base")


def other_config(place):
    file = place / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_head": 4}))


def other_text(place):
    (place / "text.txt").write_text((place / "text.txt").read_text().replace("wisdom", "folly"))


OTHERS = {
    "base": (other_base, [], "base: 1 of 40 parameters, transformer.h.1.mlp.c_fc.bias first"),
    "config": (other_config, [], "base: its config.json, n_head (2 -> 4)"),
    "text": (other_text, [], "has another content than"),
    "windows": (None, ["--block_size", "16"], "block_size: 32 then, 16 now"),
    "share": (None, ["--validation_share", "0.2"], "validation_share: 0.1 then, 0.2 now"),
    "batch": (None, ["--per_device_train_batch_size", "2"], "windows a step: 4 then, 2 now"),
    "trainable": (None, ["--trainable", "blocks[0]", "final_norm"], "its optimizer holds"),
    "phases": (
        None,
        ["--schedule", "[{from_step: 6, trainable: [embeddings.positions]}]"],
        "trainable from step 6: 1 parameters then, not now, such as transformer.wte.weight",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_what_differs_is_named(name, place, capfd):
    change, words, said = OTHERS[name]
    if change:
        change(place)
    new = ["--output_dir", str(place / "new"), "--resume_from_checkpoint", str(place / "run" / "checkpoint-4")]
    assert again(place, *words, *new) == 2
    assert said in capfd.readouterr().err
    assert not (place / "new").exists()


def test_a_finished_run_is_not_said_to_be_done_where_its_text_was_edited(place, capfd, caplog):
    run, text = place / "run", place / "text.txt"
    write_exit(run, 0, "done")
    before, content = marks(run), text.read_bytes()
    assert again(place) == 0
    assert "nothing to do" in caplog.text
    text.write_bytes(content.replace(b"wisdom", b"folly"))
    for words in ([], RESUME):
        assert again(place, *words) == 2
    assert f"its text is not what it was: {text}: sha256" in capfd.readouterr().err
    text.write_bytes(content)
    assert again(place, *RESUME) == 0
    text.unlink()
    assert again(place) == 0
    assert f"nothing to do. Not looked at again: {text}." in caplog.text
    assert marks(run) == before


def test_texts_of_a_finished_run_are_compared_without_the_network(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    digest = hashlib.sha256(b"one").hexdigest()
    kept = {str(tmp_path / "a.txt"): digest, "https://host.invalid/b.txt": "0"}
    sources = [str(tmp_path / "*.txt"), "https://host.invalid/b.txt", "hf:nobody/nothing"]
    assert check_texts_unchanged(kept, sources, tmp_path) == ["https://host.invalid/b.txt"]
    assert check_texts_unchanged({}, sources, tmp_path) == ["its texts"]
    (tmp_path / "c.txt").write_text("a third")
    with pytest.raises(TextError, match=r"c\.txt: not among its texts"):
        check_texts_unchanged(kept, sources, tmp_path)


def test_an_address_whose_query_was_not_written_down_is_compared_by_its_content(tmp_path, monkeypatch):
    texts = {"https://host.invalid/get?id=7": b"seven", "https://host.invalid/get?id=8": b"eight"}

    class Fetched:
        def __init__(self, name):
            self.name = name

        def chunks(self):
            return [texts[self.name]]

    monkeypatch.setattr("partialtune.text.reading.raw_text", lambda name, column: Fetched(name))
    seven, eight = texts
    kept = {"https://host.invalid/get?id=***": hashlib.sha256(b"seven").hexdigest()}
    assert check_texts_unchanged(kept, [seven], tmp_path) == []
    with pytest.raises(TextError, match=r"get\?id=\*\*\*: sha256 .* then, .* now") as refused:
        check_texts_unchanged(kept, [eight], tmp_path)
    assert "id=8" not in str(refused.value)


def test_a_finished_run_on_a_file_with_columns_is_compared_by_its_column(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "one"}\n')
    raw = b"".join(raw_text(str(file), "body").chunks())
    kept = {str(file): hashlib.sha256(raw).hexdigest()}
    assert check_texts_unchanged(kept, [str(file)], tmp_path, "body") == []
    file.write_text('{"body": "another"}\n')
    with pytest.raises(TextError, match=r"rows\.jsonl: sha256"):
        check_texts_unchanged(kept, [str(file)], tmp_path, "body")


def test_a_base_that_changed_in_its_place_stops_the_run_that_goes_on_and_leaves_it_as_it_was(place, capfd):
    other_base(place)
    before = marks(place / "run")
    assert again(place, *RESUME) == 2
    assert "checkpoint-6 belongs to another run" in capfd.readouterr().err
    assert marks(place / "run") == before


def test_a_checkpoint_of_the_same_run_elsewhere_goes_on_with_its_history(home, place):
    new = ["--output_dir", str(place / "new"), "--resume_from_checkpoint", str(place / "run" / "checkpoint-4")]
    assert again(place, *new) == 0
    assert fingerprint(place / "new") == fingerprint(home / "run")


@pytest.mark.slow
def test_what_auto_chose_is_kept_though_the_machine_would_choose_otherwise_now(place, monkeypatch):
    for pays in (True, False):
        monkeypatch.setattr(settings, "bf16_pays", lambda pays=pays: pays)
        words = ["--bf16", "auto", "--output_dir", str(place / "auto"), "--max_steps", "4" if pays else "6", *RESUME]
        assert again(place, *words, "--schedule", "[]", "--lr_scheduler_type", "constant") == 0
    assert "precision: bf16" in (place / "auto" / "recipe.yaml").read_text()


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth"])
def test_a_damaged_file_makes_the_run_go_on_from_the_checkpoint_before_to_the_same_bits(name, home, place, caplog):
    file = place / "run" / "checkpoint-6" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    assert again(place, *RESUME) == 0
    assert f"checkpoint-6 is incomplete or damaged ({name} has another content): skipped." in caplog.text
    assert "Going on from" in caplog.text
    assert fingerprint(place / "run") == fingerprint(home / "run")


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(place, capfd):
    (place / "run" / "checkpoint-6" / "optimizer.pt").unlink()
    assert again(place, "--resume_from_checkpoint", str(place / "run" / "checkpoint-6")) == 2
    assert "optimizer.pt is missing" in capfd.readouterr().err


# ---- the disk -------------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int):
    """As on a full disk: nothing can be written beyond `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("full_for", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_is_full_while_saving_ends_the_run_and_the_last_checkpoint_is_whole(
    full_for, home, place, capfd, monkeypatch
):
    run = place / "run"
    sizes = {name: (run / "checkpoint-6" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")}
    if full_for == "optimizer.pt":  # the smaller one: writing it is what fails
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda *args, **kwargs: _limited(save, *args, **kwargs))
        code = again(place, *RESUME)
        monkeypatch.undo()
    else:
        with files_up_to(sizes[full_for] // 2):
            code = again(place, *RESUME)
    assert code == 2
    err = capfd.readouterr().err
    assert "checkpoint-8 could not be saved" in err
    assert "checkpoint-6 is complete" in err
    assert "Traceback" not in err
    assert damage_of(run / "checkpoint-6") == []
    assert not (run / ASIDE).exists()
    assert again(place, *RESUME) == 0
    assert fingerprint(run) == fingerprint(home / "run")


def test_a_report_that_finds_no_room_is_written_at_the_next_save(home, place, monkeypatch, caplog):
    write, tries = WeightDeltaCallback._write_lines, []

    def full_once(self, args):
        tries.append(len(self._unwritten))
        if len(tries) > 1:
            return write(self, args)
        with files_up_to(self._file(args).stat().st_size + 1000):  # room for half of the lines
            return write(self, args)

    monkeypatch.setattr(WeightDeltaCallback, "_write_lines", full_once)
    assert again(place, *RESUME) == 0
    assert tries[:2] == [40, 40]  # at step 8, then at its checkpoint
    assert "File too large. Its 40 new lines are tried again at the next save." in caplog.text
    assert fingerprint(place / "run") == fingerprint(home / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weight_deltas.jsonl", "audit.json", "trainer_state.json", "evaluation.json"])
def test_a_file_of_the_run_that_finds_no_room_ends_it_with_one_code_and_it_can_be_gone_on_with(
    name, home, place, monkeypatch, capfd
):
    run = place / "run"
    with monkeypatch.context() as full:
        full_for(name, full)
        assert again(place, *RESUME) == 2
    err = capfd.readouterr().err
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    said = json.loads((run / "exit.json").read_text())
    assert said["code"] == 2
    assert "No space left on device" in said["reason"]
    assert not list(run.glob(".*.part"))
    assert again(place, *RESUME) == 0
    assert fingerprint(run) == fingerprint(home / "run")


def full_for(name, patch):
    """A disk that has no room for files of this name."""
    replace, opened = os.replace, Path.open

    def refuse(one, other, *args):
        return _no_room() if Path(other).name == name else replace(one, other, *args)

    def refuse_to_append(path, mode="r", *args, **kwargs):
        return _no_room() if (path.name, mode) == (name, "ab") else opened(path, mode, *args, **kwargs)

    patch.setattr(os, "replace", refuse)
    patch.setattr(Path, "open", refuse_to_append)


def _limited(save, *args, **kwargs):
    with files_up_to(100):
        return save(*args, **kwargs)


def test_a_disk_that_is_full_while_downloading_leaves_nothing_in_the_cache(server, tmp_path):  # noqa: F811
    url = server.serve("/book.txt", b"It was the best of times.\n" * 40_000)
    with files_up_to(100_000), pytest.raises(TextError, match=r"cannot be used .*File too large"):
        fetch(url, tmp_path)
    assert cached_files(tmp_path) == []
    assert fetch(url, tmp_path).size == 1_040_000


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system on which nobody can write")
def test_a_folder_that_nobody_can_make_is_refused(place, capfd):
    assert again(place, "--output_dir", "/proc/partialtune-run") == 2
    assert "output_dir: nothing can be written in /proc/partialtune-run" in capfd.readouterr().err


# ---- two runs on one folder -----------------------------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_and_the_first_ones_files_stay(place, capfd):
    before = marks(place / "run")
    with locked(place / "run"):
        assert again(place, *RESUME) == 2
    assert "another run is writing" in capfd.readouterr().err
    assert marks(place / "run") == before


def test_a_run_that_another_process_finished_while_this_one_loaded_is_not_written_over(home, place, monkeypatch):
    def finishing_meanwhile(*args):
        (place / "run" / "exit.json").write_text('{"code": 0, "reason": "done"}')
        return locked(*args)

    monkeypatch.setattr(train, "locked", finishing_meanwhile)
    before = marks(place / "run" / "checkpoint-6")
    assert again(place, *RESUME) == 2
    assert marks(place / "run" / "checkpoint-6") == before


def test_a_run_that_goes_on_is_not_taken_for_finished_any_more(place, monkeypatch):
    (place / "run" / "exit.json").write_text('{"code": 0, "reason": "done"}')
    monkeypatch.setattr(train, "train_to_the_end", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    more = ["--max_steps", "12", *RESUME]
    assert again(place, *more) == 130
    assert json.loads((place / "run" / "exit.json").read_text())["code"] == 130
    recipe = read_recipe(place / "recipe.yaml", more)
    assert train.standing_of(place / "run", recipe.values, "auto") is Standing.BEGUN
    with pytest.raises(RecipeError, match="--resume_from_checkpoint auto"):
        train.standing_of(place / "run", recipe.values, None)


def test_a_run_that_went_on_and_was_killed_while_scoring_is_not_pushed_under_its_old_scores(
    place, monkeypatch, capfd, caplog
):
    run, words = place / "more", ["--lr_scheduler_type", "constant", "--output_dir", str(place / "more")]
    assert again(place, *words) == 0
    check_finished(run, allow_failed_audit=False)
    scores = (run / "evaluation.json").read_bytes()
    with monkeypatch.context() as killed:  # a killed process leaves no exit.json
        killed.setattr(train, "write_insight", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        killed.setattr(train, "write_exit", lambda *args: None)
        assert again(place, *words, "--max_steps", "10", *RESUME) == 130
    assert (run / "evaluation.json").read_bytes() == scores  # of 8 steps, beside the weights of 10
    for allowed in (False, True):
        with pytest.raises(InputError, match="did not finish") as refused:
            check_finished(run, allow_failed_audit=allowed)
    capfd.readouterr()
    assert main(["push", str(run), "--repo_id", "me/run"]) == 2
    assert "did not finish" in capfd.readouterr().err
    with pytest.raises(InputError, match="has not ended"):
        read_outcome(run)
    assert main(["report", str(run)]) == 0
    assert f"The run in {run} has not ended" in caplog.text
    command = shlex.split(str(refused.value).rpartition("Finish it first: ")[2])
    assert main(command[1:]) == 0
    check_finished(run, allow_failed_audit=False)
    assert (run / "evaluation.json").read_bytes() != scores


def test_a_push_and_a_run_exclude_each_other(place, monkeypatch, capfd):
    run = place / "run"
    with locked(run):
        assert main(["push", str(run), "--repo_id", "me/run"]) == 2
    assert "RUN: another run is writing to" in capfd.readouterr().err
    write_exit(run, 0, "done")
    codes = []
    monkeypatch.setattr(push, "_push", lambda *args: codes.append(again(place, "--max_steps", "12", *RESUME)))
    assert main(["push", str(run), "--repo_id", "me/run"]) == 0
    assert codes == [2]
    assert "or a push is reading it" in capfd.readouterr().err


def test_a_model_that_finds_no_room_leaves_the_whole_one_of_before(place, monkeypatch, capfd):
    run, words = place / "more", ["--lr_scheduler_type", "constant", "--output_dir", str(place / "more")]
    assert again(place, *words) == 0
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json")}
    with monkeypatch.context() as full:
        full.setattr(results, "move_all", lambda *args: _no_room())
        assert again(place, *words, "--max_steps", "10", *RESUME) == 2
    assert "The model could not be saved" in capfd.readouterr().err
    assert {name: (run / name).read_bytes() for name in before} == before
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    assert not (run / ASIDE).exists()
    (run / "delta.json").write_text("{}")  # as of an end at which the model was saved in another way
    assert again(place, *words, "--max_steps", "10", *RESUME) == 0
    assert (run / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert not (run / "delta.json").exists()


def _no_room():
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- what is not finite ---------------------------------------------------------------------------------------------


class Spoilt(TrainerCallback):
    """In the sixth step the loss that the model gives, or the gradient that comes back to it, is not finite."""

    def __init__(self, how):
        self.how = how

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            model.register_forward_hook(self.spoil, prepend=True)

    def spoil(self, model, args, output):
        if self.how == "gradients":
            output.loss = output.loss * 1.0
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        else:
            output.loss = output.loss * float("nan")
        return output


@pytest.mark.parametrize("how", ["loss", "gradients"])
@pytest.mark.parametrize("clipping", ["1.0", "0"])
def test_a_loss_or_a_gradient_that_is_not_finite_ends_the_run_before_the_step_and_names_its_windows(
    how, clipping, place, capfd, monkeypatch
):
    batches = []
    collate = collate_windows
    monkeypatch.setattr(recipe_trainer, "collate_windows", lambda rows: batches.append(collate(rows)) or batches[-1])
    made = recipe_trainer.attached_trainer

    def spoilt(**settings):
        run = made(**settings)
        run.trainer.add_callback(Spoilt(how))
        return run

    monkeypatch.setattr(recipe_trainer, "attached_trainer", spoilt)
    run = place / "new"
    words = ["--output_dir", str(run), "--max_grad_norm", clipping, "--eval_strategy", "no", "--logging_steps", "50"]
    assert again(place, *words) == 4
    said = json.loads((run / "exit.json").read_text())
    assert said["code"] == 4
    assert said["reason"] in capfd.readouterr().err
    assert f"the {how} of step 6 became non-finite" in said["reason"]
    named = [int(number) for number in re.search(r"windows ([\d, ]+)\.", said["reason"])[1].split(",")]
    data = data_of_recipe(read_recipe(place / "recipe.yaml"), _one_process(), _tokenizer(place))
    windows = np.asarray(data.train["input_ids"][:])
    assert {tuple(windows[number]) for number in named} == {tuple(row) for row in batches[5]["input_ids"].tolist()}
    assert steps(run) == [2, 4]
    assert all(
        bool(torch.isfinite(value).all()) for value in load_file(run / "checkpoint-4/model.safetensors").values()
    )


class SpoiltGradient(TrainerCallback):
    """In the second step one element of one gradient, as backward gives it, is this number."""

    def __init__(self, number):
        self.number, self.before = number, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            model.transformer.ln_f.weight.register_hook(self.spoil)

    def spoil(self, gradient):
        gradient = gradient.clone()
        gradient[3] = self.number
        return gradient


def stock_trainer(folder, callbacks, **changes):
    model = tiny_gpt2(vocab_size=160)
    loss = changes.pop("compute_loss_func", None)
    said = {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True}
    args = {**said, "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "logging_steps": 1, **changes}
    return Trainer(
        model=model,
        args=TrainingArguments(**args),
        train_dataset=some_windows(),
        data_collator=collate_windows,
        callbacks=[BatchWatch(some_windows()), *callbacks],
        compute_loss_func=loss,
    )


@pytest.mark.parametrize("clipping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_one_gradient_that_is_not_finite_stops_a_stock_trainer_before_the_step_however_it_clips(
    number, clipping, tmp_path
):
    spoilt = SpoiltGradient(number)
    trainer = stock_trainer(tmp_path, [spoilt], max_grad_norm=clipping)
    with pytest.raises(TrainingDiverged, match="the gradients of step 2 became non-finite") as stopped:
        trainer.train()
    assert len(re.search(r"windows ([\d, ]+)\.", str(stopped.value))[1].split(",")) == 4
    assert spoilt.before
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, spoilt.before[name]), name


@pytest.mark.parametrize(
    ("clipping", "words"),
    [(0.0, "the gradients of step 2 became non-finite"), (1.0, "the norm of the gradients of step 2 is inf")],
)
def test_finite_gradients_whose_norm_overflows_end_the_run_though_clipping_makes_them_zero(clipping, words, tmp_path):
    trainer = stock_trainer(tmp_path, [SpoiltGradient(1e30)], max_grad_norm=clipping)
    with pytest.raises(TrainingDiverged, match=words):
        trainer.train()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())


def test_a_loss_that_the_model_does_not_take_itself_is_told_by_its_gradients(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * float("nan")

    trainer = stock_trainer(tmp_path, [], compute_loss_func=loss)
    with pytest.raises(TrainingDiverged, match=r"the gradients of step 1 became non-finite .* windows \d+, \d+"):
        trainer.train()


def test_only_the_accumulated_batch_whose_loss_is_not_finite_is_named(tmp_path):
    class SpoiltBatch(TrainerCallback):
        passes = 0

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_hook(self.spoil, with_kwargs=True, prepend=True)

        def spoil(self, model, args, kwargs, output):
            SpoiltBatch.passes += 1
            if SpoiltBatch.passes == 2:
                SpoiltBatch.rows = kwargs["input_ids"].tolist()
                output.loss = output.loss * float("inf")
            return output

    trainer = stock_trainer(tmp_path, [SpoiltBatch()], gradient_accumulation_steps=3)
    with pytest.raises(TrainingDiverged, match="the loss of step 1 became non-finite") as stopped:
        trainer.train()
    named = [int(number) for number in re.search(r"windows ([\d, ]+)\.", str(stopped.value))[1].split(",")]
    windows = some_windows()["input_ids"]
    assert sorted(tuple(windows[number]) for number in named) == sorted(map(tuple, SpoiltBatch.rows))


def test_the_scaler_of_fp16_is_left_to_skip_a_step_that_is_not_finite():
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.full((1, 2), float("inf"))
    optimizer = SimpleNamespace(scaler=object(), param_groups=[{"lr": 1.0}])
    args = SimpleNamespace(device=torch.device("cpu"))
    state = SimpleNamespace(global_step=0)
    watch = BatchWatch(None)
    watch.on_pre_optimizer_step(args, state, None, model=model, optimizer=optimizer)
    watch.on_log(args, state, None, logs={"grad_norm": float("inf")}, optimizer=optimizer)
    optimizer.scaler = None
    with pytest.raises(TrainingDiverged, match="without a number"):
        watch.on_pre_optimizer_step(args, state, None, model=model, optimizer=optimizer)


def judged_in_shards():
    """What a process says of a step in which all gradients are finite, and of one with an infinite one on rank 1."""
    torch.distributed.init_process_group("gloo")
    model = tiny_gpt2(vocab_size=160).train()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    args = SimpleNamespace(device=torch.device("cpu"))
    state, optimizer = SimpleNamespace(global_step=0), SimpleNamespace(param_groups=[{"lr": 1e-3}])
    watch = BatchWatch(some_windows())
    watch.on_train_begin(args, state, None, model=model)
    rank = torch.distributed.get_rank()
    ids = torch.tensor(some_windows()["input_ids"][rank : rank + 1])
    said = []
    for number in (0.0, float("inf")):
        watch.on_step_begin(args, state, None)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        shard = model.transformer.ln_f.weight.grad.to_local()
        assert shard.numel() == model.config.n_embd // 2
        if rank == 1:
            shard[0] = number
        try:
            watch.on_pre_optimizer_step(args, state, None, model=model, optimizer=optimizer)
            said.append("")
        except TrainingDiverged as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_where_parameters_are_sharded_all_processes_stop_for_a_gradient_of_one():
    (first, second), other = on_two_processes(judged_in_shards)
    assert [first, second] == other
    assert first == ""
    assert "the gradients of step 1 became non-finite" in second
    assert "windows 0, 1. The step was not taken." in second


def _one_process():
    return SimpleNamespace(world_size=1, seed=42, data_seed=None)


def _tokenizer(place):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "base")


# ---- threads --------------------------------------------------------------------------------------------------------


def test_a_run_in_a_worker_thread_works_without_signals(home, place):
    codes = []
    words = ["train", str(place / "recipe.yaml"), *RESUME]
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert fingerprint(place / "run") == fingerprint(home / "run")


def test_a_child_of_a_comparison_is_run_from_a_worker_thread_too(tmp_path):
    codes = []
    command = [sys.executable, "-c", "print('it ran')"]
    thread = threading.Thread(target=lambda: codes.append(run_child(command, tmp_path / "log", lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert (tmp_path / "log").read_text() == "it ran\n"
