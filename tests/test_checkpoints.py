"""A checkpoint is whole or not there; the newest complete one is found; rotation spares the last good one."""

from partialtune.training.checkpoints import (
    ASIDE,
    MARKER,
    checkpoints_in,
    clear_aside,
    finish_checkpoint,
    missing_files,
    newest_complete_checkpoint,
    rotate_checkpoints,
)


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


def test_the_newest_complete_checkpoint_passes_over_one_without_a_marker(tmp_path, caplog):
    good = write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20, complete=False)
    assert newest_complete_checkpoint(tmp_path) == good
    assert "checkpoint-20 is incomplete" in caplog.text


def test_the_newest_complete_checkpoint_passes_over_one_with_a_shortened_file(tmp_path):
    good, damaged = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    (damaged / "model.safetensors").write_bytes(b"half")
    assert missing_files(damaged) == ["model.safetensors"]
    assert newest_complete_checkpoint(tmp_path) == good


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_complete_checkpoint(tmp_path) is None


def test_a_damaged_marker_counts_as_missing(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    (checkpoint / MARKER).write_text("{")
    assert missing_files(checkpoint) == [MARKER]


def test_finishing_replaces_an_incomplete_folder_of_the_same_step(tmp_path):
    write_checkpoint(tmp_path, 10, complete=False)
    finished = write_checkpoint(tmp_path, 10)
    assert missing_files(finished) == []
    assert not (tmp_path / ASIDE).exists()


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
    assert not missing_files(tmp_path / "checkpoint-1")
