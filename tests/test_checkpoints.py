"""A checkpoint is whole or not there; the newest complete one is found; rotation spares the last good one."""

import errno
import shutil

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerState

from partialtune.engine.checkpoint_files import (
    ASIDE,
    MARKER,
    checkpoints_in,
    clear_aside,
    damage_of,
    disk_errors,
    finish_checkpoint,
    newest_whole_checkpoint,
    read_with_care,
    rotate_checkpoints,
    write_state,
)
from partialtune.errors import DiskError, InputError
from partialtune.files import write_whole

pytestmark = pytest.mark.contract


def write_checkpoint(run, step, complete=True):
    folder = run / (ASIDE if complete else ".") / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "trainer_state.json").write_text("{}")
    if complete:
        finish_checkpoint(folder, run / folder.name)
    return run / folder.name


def test_checkpoints_are_ordered_by_step_and_not_by_spelling(tmp_path):
    for step in (100, 20, 9):
        write_checkpoint(tmp_path, step)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_the_newest_whole_checkpoint_passes_over_one_without_a_marker(tmp_path, caplog):
    good = write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20, complete=False)
    assert newest_whole_checkpoint(tmp_path) == good
    assert "checkpoint-20 is incomplete or damaged (complete.json is missing" in caplog.text


def test_the_newest_whole_checkpoint_passes_over_one_with_a_shortened_file(tmp_path):
    good, damaged = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    (damaged / "model.safetensors").write_bytes(b"half")
    assert damage_of(damaged) == ["model.safetensors has 4 of 140 bytes"]
    assert newest_whole_checkpoint(tmp_path) == good


def test_one_changed_bit_in_a_file_of_the_right_size_is_found_and_the_checkpoint_passed_over(tmp_path, caplog):
    good, damaged = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[7] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    assert damage_of(damaged) == ["model.safetensors has another content"]
    assert damage_of(damaged, read=False) == []  # sizes alone do not show it
    assert newest_whole_checkpoint(tmp_path) == good
    assert "model.safetensors has another content" in caplog.text


def test_a_lost_file_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    (checkpoint / "trainer_state.json").unlink()
    assert damage_of(checkpoint) == ["trainer_state.json is missing"]


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"files": 3}', '{"files": {"a": 1}}', '{"bytes": {}}'])
def test_a_damaged_marker_counts_as_missing(tmp_path, content):
    checkpoint = write_checkpoint(tmp_path, 10)
    (checkpoint / MARKER).write_text(content)
    assert damage_of(checkpoint) == [f"{MARKER} is missing or cannot be read"]


def test_finishing_replaces_an_incomplete_folder_of_the_same_step(tmp_path):
    write_checkpoint(tmp_path, 10, complete=False)
    finished = write_checkpoint(tmp_path, 10)
    assert damage_of(finished) == []
    assert not (tmp_path / ASIDE).exists()


def test_finishing_replaces_a_complete_one_of_a_run_that_has_gone_back(tmp_path):
    write_checkpoint(tmp_path, 10)
    again = write_checkpoint(tmp_path, 10)
    assert damage_of(again) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_said_in_words_and_the_half_checkpoint_makes_room(tmp_path, error):
    write_checkpoint(tmp_path, 10)
    (tmp_path / ASIDE / "checkpoint-20").mkdir(parents=True)
    words = r"checkpoint-20 could not be saved.*checkpoint-10 is complete.*--resume_from_checkpoint auto"
    with pytest.raises(DiskError, match=words) as caught, disk_errors("checkpoint-20", tmp_path):
        raise error
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_another_error_while_saving_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), disk_errors("checkpoint-20", tmp_path):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("error", [ValueError("no JSON"), EOFError(), MemoryError(), OSError(errno.EIO, "I/O error")])
def test_what_a_damaged_file_raises_is_said_in_words(tmp_path, error):
    with pytest.raises(InputError, match="cannot be gone on from"), read_with_care(tmp_path):
        raise error


def test_a_type_that_a_library_did_not_expect_is_the_files_fault_and_one_that_we_did_not_expect_is_a_bug(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match="cannot be gone on from"), read_with_care(tmp_path):
        torch.optim.SGD([parameter]).load_state_dict([1, 2])
    with pytest.raises(AttributeError, match="with_name"), read_with_care(tmp_path):
        write_whole("no path", b"")  # raised by a line of this package


def test_the_state_is_written_as_trainer_writes_it(tmp_path):
    state = TrainerState(global_step=3, log_history=[{"loss": 1.5, "step": 3}])
    state.save_to_json(str(tmp_path / "theirs.json"))
    write_state(tmp_path / "ours.json", state)
    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()


def test_what_a_killed_save_left_is_cleared(tmp_path):
    (tmp_path / ASIDE / "checkpoint-3").mkdir(parents=True)
    clear_aside(tmp_path)
    clear_aside(tmp_path)
    assert not (tmp_path / ASIDE).exists()


def test_rotation_keeps_the_newest_complete_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    rotate_checkpoints(tmp_path, keep=2, spare=str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-4"]


def test_rotation_never_removes_the_only_complete_one_for_newer_incomplete_ones(tmp_path):
    write_checkpoint(tmp_path, 1)
    for step in (2, 3):
        write_checkpoint(tmp_path, step, complete=False)
    rotate_checkpoints(tmp_path, keep=1, spare=None)
    assert not damage_of(tmp_path / "checkpoint-1")


def test_a_link_to_a_checkpoint_is_let_be_and_a_checkpoint_that_cannot_be_deleted_is_no_reason_to_end(
    tmp_path, monkeypatch, caplog
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2, 3):
        write_checkpoint(run, step)
    write_checkpoint(elsewhere, 0)
    (run / "checkpoint-0").symlink_to(elsewhere / "checkpoint-0", target_is_directory=True)
    with monkeypatch.context() as refused:
        refused.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        rotate_checkpoints(run, keep=2, spare=None)
    assert "could not be deleted (Permission denied)" in caplog.text
    rotate_checkpoints(run, keep=1, spare=None)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-3"]
    assert damage_of(elsewhere / "checkpoint-0") == []


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_checkpoint_takes_the_place_of_a_link_and_what_the_link_named_stays(target, tmp_path):
    run = tmp_path / "run"
    write_checkpoint(tmp_path / "elsewhere", 4)
    run.mkdir()
    (run / "checkpoint-4").symlink_to(tmp_path / target / "checkpoint-4", target_is_directory=True)
    write_checkpoint(run, 4)
    assert not (run / "checkpoint-4").is_symlink()
    assert damage_of(run / "checkpoint-4") == damage_of(tmp_path / "elsewhere" / "checkpoint-4") == []
    assert not (run / ASIDE).exists()
