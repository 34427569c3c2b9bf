"""The store on disk: what was kept is found by whoever comes later, what is damaged is not, and nothing grows on."""

import errno
import os
import stat
import subprocess
import sys
import time

import pytest
import torch

from partialtune.engine.disk_folders import hold_folder, prefix_root
from partialtune.engine.disk_store import open_disk_store
from partialtune.errors import RecipeError

FACTS = {"weights": "a", "blocks": 2}
KEYS = [bytes([number]) * 16 for number in range(6)]
MEGABYTE = 2**20


def states(number, tokens=5, width=8):
    return torch.full((tokens, width), float(number)).view(torch.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTIALTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def filled(facts=FACTS, numbers=range(3)):
    """A folder with some rows -> the file that holds their states."""
    store = open_disk_store(facts)
    for number in numbers:
        assert store.put(KEYS[number], states(number))
    path = store.path
    store.close()
    (file,) = path.glob("*.states")
    return file


def found(facts=FACTS):
    store = open_disk_store(facts)
    try:
        return [number for number, key in enumerate(KEYS) if store.get(key) is not None]
    finally:
        store.close()


def test_what_one_store_keeps_another_one_finds_and_one_of_other_facts_does_not():
    store = open_disk_store(FACTS)
    other = open_disk_store(FACTS)  # of another process, open at the same time
    assert store.get(KEYS[0]) is None
    assert store.put(KEYS[0], states(7))
    assert torch.equal(other.get(KEYS[0]), states(7))
    assert other.put(KEYS[0], states(8))  # kept already: nothing is written
    assert (store.size, other.size) == (5 * 32, 0)
    assert torch.equal(store.get(KEYS[0]).view(torch.float32), torch.full((5, 8), 7.0))
    for one in (store, other):
        one.close()
    assert torch.equal(open_disk_store(FACTS).get(KEYS[0]), states(7))
    assert found({**FACTS, "blocks": 3}) == []


def test_a_row_without_tokens_and_rows_of_other_dtypes_come_back():
    store = open_disk_store(FACTS, torch.bfloat16)
    store.put(KEYS[0], torch.ones(0, 8, dtype=torch.bfloat16))
    store.put(KEYS[1], torch.ones(3, 8, dtype=torch.bfloat16))
    assert store.get(KEYS[0]).shape == (0, 8)
    assert torch.equal(store.get(KEYS[1]), torch.ones(3, 8, dtype=torch.bfloat16))
    store.close()


@pytest.mark.parametrize("damage", ["a flipped byte", "states cut off", "records cut off", "a flipped record"])
def test_damage_is_noticed_and_the_row_kept_again(damage, caplog):
    file = filled()
    records = file.with_suffix(".records")
    if damage == "a flipped byte":
        with file.open("r+b") as content:
            content.seek(160 + 33)  # in the second of three rows of 160 bytes
            content.write(b"\x01")
        left = [0, 2]
    elif damage == "states cut off":
        os.truncate(file, 2 * 160 + 1)
        left = [0, 1]
    elif damage == "records cut off":  # as of a writer that was killed
        os.truncate(records, 2 * records.stat().st_size // 3 - 1)
        left = [0]
    else:
        with records.open("r+b") as content:
            content.write(b"\xff")
        left = [1, 2]
    assert found() == left
    assert ("damaged or cut off" in caplog.text) == (damage in ("a flipped byte", "states cut off"))
    store = open_disk_store(FACTS)
    for number in range(3):
        if store.get(KEYS[number]) is None:
            assert store.put(KEYS[number], states(number))
        assert torch.equal(store.get(KEYS[number]), states(number))
    store.close()
    caplog.clear()
    assert found() == [0, 1, 2]
    assert caplog.text == ""  # what is newer is read, and the damage never again


def test_a_folder_that_is_deleted_while_it_is_used_can_still_be_read(caplog):
    filled()
    store = open_disk_store(FACTS)
    for file in store.path.iterdir():
        file.unlink()
    store.path.rmdir()
    assert torch.equal(store.get(KEYS[1]), states(1))
    assert store.get(KEYS[4]) is None
    assert not store.put(KEYS[4], states(4))
    assert "The run goes on without" in caplog.text
    store.close()
    assert found() == []


def test_the_least_recently_used_goes_first_and_what_is_in_use_never(monkeypatch, caplog):
    monkeypatch.setenv("PARTIALTUNE_PREFIX_GB", str(3.5 / 1024))
    first, second, third = ({"number": number} for number in range(3))
    for facts, age in ((first, 300), (second, 200)):
        store = open_disk_store(facts)
        assert store.put(KEYS[0], torch.ones(MEGABYTE, 1, dtype=torch.uint8))
        store.close()
        used = (store.path / "lock").stat().st_mtime - age
        os.utime(store.path / "lock", (used, used))
    held = hold_folder(first)  # which makes it the one used last, and nobody else may remove it
    os.utime(held.path / "lock", (1, 1))
    store = open_disk_store(third)
    assert store.put(KEYS[0], torch.ones(2 * MEGABYTE, 1, dtype=torch.uint8))
    assert sorted(path.name for path in prefix_root().iterdir()) == sorted([held.path.name, store.path.name])
    assert not store.put(KEYS[1], torch.ones(MEGABYTE, 1, dtype=torch.uint8))
    assert "the limit of all kept states is reached" in caplog.text
    held.let_go()
    store.close()
    assert found(first) == [0]


def test_a_full_disk_is_a_warning_and_what_was_kept_before_is_found(monkeypatch, caplog):
    store = open_disk_store(FACTS)
    assert store.put(KEYS[0], states(0))
    written = os.pwrite

    def full(descriptor, content, start):
        if start + len(content) > 2 * 160:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(descriptor, content, start)

    monkeypatch.setattr(os, "pwrite", full)
    assert store.put(KEYS[1], states(1))
    assert not store.put(KEYS[2], states(2))
    assert not store.put(KEYS[3], states(3))
    assert caplog.text.count("cannot be written (No space left on device). The run goes on without.") == 1
    assert store.get(KEYS[2]) is None
    store.close()
    assert found() == [0, 1]


def test_a_disk_that_fails_on_reading_is_a_row_computed_again(monkeypatch, caplog):
    filled()

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    assert found() == []
    assert "damaged or cut off" in caplog.text


def test_what_nobody_has_used_for_30_days_goes_and_rests_of_a_killed_removal_too():
    for facts, days in ((FACTS, 31), ({"weights": "b"}, 29)):
        lock = filled(facts).with_name("lock")
        os.utime(lock, (time.time() - days * 24 * 3600,) * 2)
    (prefix_root() / ".removed-by-a-killed-process").mkdir()
    filled({"weights": "c"})
    assert len(list(prefix_root().iterdir())) == 2
    assert found({"weights": "b"}) == [0, 1, 2]
    assert found(FACTS) == []


def test_files_may_be_read_by_those_whom_the_umask_allows(cache):
    before = os.umask(0o027)
    try:
        file = filled()
    finally:
        os.umask(before)
    assert [f"{stat.S_IMODE(path.stat().st_mode):o}" for path in (file, file.with_suffix(".records"))] == ["640"] * 2
    assert f"{stat.S_IMODE(file.parent.stat().st_mode):o}" == "750"


WRITER = """
import sys, time, torch
from partialtune.engine.disk_store import open_disk_store
store = open_disk_store({"weights": "a", "blocks": 2})
for number in range(10**6):
    store.put(number.to_bytes(16, "little"), torch.full((64, 64), number % 251, dtype=torch.uint8))
    if number == 200:
        print("going on", flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_rows_and_a_folder_that_may_go(monkeypatch, caplog):
    process = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "going on\n"
    reader = open_disk_store(FACTS)
    assert len(reader) >= 200
    process.kill()
    process.wait()
    rows = [reader.get(number.to_bytes(16, "little")) for number in range(len(reader) + 1)]
    assert all((row == number % 251).all() for number, row in enumerate(rows) if row is not None)
    assert sum(row is not None for row in rows) >= len(rows) - 1
    assert caplog.text == ""
    reader.close()
    monkeypatch.setenv("PARTIALTUNE_PREFIX_GB", "0.00001")  # 10 kB
    filled({"weights": "b"}, [0])
    assert len(list(prefix_root().iterdir())) == 1


@pytest.mark.parametrize("given", ["much", "-1", "inf", "nan"])
def test_a_limit_that_is_no_number_is_refused_in_words(given, monkeypatch):
    monkeypatch.setenv("PARTIALTUNE_PREFIX_GB", given)
    with pytest.raises(RecipeError, match=rf"PARTIALTUNE_PREFIX_GB is '{given}'; allowed is a number of gigabytes"):
        open_disk_store(FACTS)
