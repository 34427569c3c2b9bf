"""A run starts in an empty folder, goes on in its own, and touches nobody else's."""

import json
import os

import pytest
import yaml

from partialtune.errors import RecipeError
from partialtune.run_folder import locked, read_json, write_exit, write_json
from partialtune.training.resume_check import Standing, standing_of

VALUES = {
    "model_name_or_path": "builtin:lilliput",
    "text": ["a.txt"],
    "trainable": ["all"],
    "output_dir": "x",
    "max_steps": 5,
}


@pytest.fixture
def begun(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**VALUES, "run": {"versions": {}}}))
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    return folder


@pytest.fixture
def unstarted(begun):
    (begun / "trainer_state.json").unlink()
    return begun


def test_an_absent_and_an_empty_folder_are_new(tmp_path):
    assert standing_of(tmp_path / "deep" / "er", VALUES, None) is Standing.NEW
    assert standing_of(tmp_path, VALUES, "auto") is Standing.NEW
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_only_a_lock_was_left_in_is_new(tmp_path):
    with locked(tmp_path):
        pass
    assert standing_of(tmp_path, VALUES, None) is Standing.NEW


def test_a_folder_that_was_left_before_its_recipe_was_written_is_new(tmp_path):
    with locked(tmp_path):
        write_exit(tmp_path, 130, "KeyboardInterrupt")
    (tmp_path / ".recipe.yaml.4711").write_text("half a reci")
    assert standing_of(tmp_path, VALUES, None) is Standing.NEW


def test_a_run_in_which_no_step_was_taken_starts_again_with_the_same_command(unstarted):
    assert standing_of(unstarted, VALUES, None) is Standing.UNSTARTED
    write_exit(unstarted, 3, "a violation before the first step")
    (unstarted / "trainer_state.json").write_text('{"global_step": 0}')
    assert standing_of(unstarted, VALUES, None) is Standing.UNSTARTED
    assert standing_of(unstarted, VALUES, "auto") is Standing.UNSTARTED
    with pytest.raises(RecipeError, match=r"differ in .*trainable"):
        standing_of(unstarted, {**VALUES, "trainable": ["final_norm"]}, None)


@pytest.mark.parametrize("left", ["checkpoint-1/complete.json", "trainer_state.json"])
def test_what_only_a_step_leaves_and_a_state_that_cannot_be_read_are_a_run_that_was_begun(unstarted, left):
    (unstarted / left).parent.mkdir(exist_ok=True)
    (unstarted / left).write_text("{")
    with pytest.raises(RecipeError, match="--resume_from_checkpoint auto"):
        standing_of(unstarted, VALUES, None)


def test_a_recipe_that_somebody_wrote_into_its_own_folder_is_not_written_over(unstarted):
    (unstarted / "recipe.yaml").write_text(yaml.safe_dump(VALUES))  # no key `run`
    with pytest.raises(RecipeError, match="begun and not finished"):
        standing_of(unstarted, VALUES, None)


def test_a_begun_run_is_refused_with_the_flag_that_goes_on(begun):
    with pytest.raises(RecipeError, match="--resume_from_checkpoint auto"):
        standing_of(begun, VALUES, None)
    assert standing_of(begun, VALUES, "auto") is Standing.BEGUN


def test_a_finished_run_is_finished_with_and_without_the_flag(begun):
    write_exit(begun, 0, "done")
    assert standing_of(begun, VALUES, None) is Standing.FINISHED
    assert standing_of(begun, VALUES, "auto") is Standing.FINISHED


def test_a_run_that_ended_otherwise_is_begun(begun):
    write_exit(begun, 130, "interrupted")
    assert standing_of(begun, VALUES, "auto") is Standing.BEGUN


def test_a_finished_run_goes_on_with_more_steps(begun):
    write_exit(begun, 0, "done")
    more = {**VALUES, "max_steps": 9}
    assert standing_of(begun, more, "auto") is Standing.BEGUN
    with pytest.raises(RecipeError, match="resume_from_checkpoint"):
        standing_of(begun, more, None)


def test_logging_and_pushing_may_differ(begun):
    assert standing_of(begun, {**VALUES, "logging_steps": 3, "output_dir": "y"}, "auto") is Standing.BEGUN


def test_another_recipe_is_refused_and_the_message_names_what_differs(begun):
    with pytest.raises(RecipeError, match=r"differ in .*trainable"):
        standing_of(begun, {**VALUES, "trainable": ["final_norm"]}, "auto")


def test_a_strangers_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="holds no run of partialtune"):
        standing_of(tmp_path, VALUES, "auto")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["[a, list]", "{unclosed", "\x00"])
def test_a_recipe_that_cannot_be_read_is_refused_in_words(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        standing_of(tmp_path, VALUES, "auto")


def test_a_file_in_the_place_or_on_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        standing_of(tmp_path / "file", VALUES, None)
    with pytest.raises(RecipeError, match="is a file"):
        standing_of(tmp_path / "file" / "run", VALUES, None)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, **rest: False)  # root may write everywhere
    with pytest.raises(RecipeError, match="not writable"):
        standing_of(tmp_path / "run", VALUES, None)


def test_two_runs_on_one_folder_exclude_each_other(tmp_path):
    with locked(tmp_path), pytest.raises(RecipeError, match="another run is writing"), locked(tmp_path):
        pass
    with locked(tmp_path):  # released
        pass


def test_json_has_no_nan_and_leaves_no_half_file(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1.5]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ä": [\n    1.5\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert read_json(tmp_path / "a.json") == {"ä": [1.5]}
    write_exit(tmp_path, 4, "diverged")
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 4, "reason": "diverged"}
