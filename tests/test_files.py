"""Locks where there are none, and files that are whole or not there."""

import errno
import fcntl
import os

import pytest

from partialtune import files
from partialtune.cache import cached_by_content
from partialtune.compare.run_queue import wait_for_lock
from partialtune.files import lock, move_all, write_whole
from partialtune.net.download import fetch
from partialtune.run_folder import LOCK_FILE, locked
from test_download import Server


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "ENOSYS", "EINVAL"])
def no_locks(request, monkeypatch):
    """A file system without locks, and the call that finds out."""

    def refuse(file, operation):
        raise OSError(getattr(errno, request.param), os.strerror(getattr(errno, request.param)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_without_locks", set())


def test_a_file_system_without_locks_is_a_warning_and_all_goes_on(no_locks, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    server = Server()
    with locked(tmp_path / "run"):
        pass
    wait_for_lock(tmp_path / "run", "norms, seed 0")
    assert cached_by_content("texts", ".txt", {"a": 1}, lambda path: {"size": path.write_bytes(b"abc")}).facts == {
        "size": 3
    }
    assert fetch(server.serve("/book.txt", b"It was the best of times."), tmp_path).size == 25
    server.http.shutdown()
    server.http.server_close()
    assert caplog.text.count("has no locks") == 1  # all of them lie on one file system


def test_one_that_loses_its_locks_while_we_wait_is_a_warning_too(tmp_path, monkeypatch, caplog):
    answers = [BlockingIOError(errno.EAGAIN, "held"), OSError(errno.ENOLCK, "No locks available")]

    def refuse(file, operation):
        raise answers.pop(0)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_without_locks", set())
    waited = []
    with (tmp_path / LOCK_FILE).open("a") as file:
        lock(file, lambda: waited.append(True))
    assert waited == [True]
    assert "No locks available" in caplog.text


def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", b"old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.json", "no bytes")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"old"


def test_files_move_with_those_in_folders_and_the_configuration_last(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "additional_chat_templates/tool.jinja"):
        (tmp_path / "aside" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aside" / name).write_text(name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("old")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: moved.append(other.name) or replace(one, other))
    move_all(tmp_path / "aside", tmp_path / "run")
    assert moved[-1] == "config.json"
    assert (
        tmp_path / "run" / "additional_chat_templates" / "tool.jinja"
    ).read_text() == "additional_chat_templates/tool.jinja"
    assert (tmp_path / "run" / "config.json").read_text() == "config.json"
