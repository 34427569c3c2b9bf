"""Copies of what trains lie on disk where they are large, are mapped while looked at, and never outlive the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_gpt2
from partialtune.freeze.plan import plan_freeze
from partialtune.proof import start_copies
from partialtune.proof.snapshot import measure_deltas, take_snapshot
from partialtune.proof.start_copies import FileCopies, MemoryCopies, room_for_copies


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr(start_copies, "IN_MEMORY_UP_TO", 1000)


def test_small_copies_stay_in_memory_and_large_ones_go_to_the_folder(tmp_path, small_memory):
    assert isinstance(room_for_copies(1000, tmp_path / "run"), MemoryCopies)
    assert not (tmp_path / "run").exists()
    assert isinstance(room_for_copies(1001, None), MemoryCopies)
    assert isinstance(room_for_copies(1001, tmp_path / "run"), FileCopies)


def test_copies_in_a_file_come_back_bit_for_bit_in_their_shape_and_dtype(tmp_path):
    stored = FileCopies(tmp_path)
    tensors = {
        "odd": torch.randn(3, 5, dtype=torch.bfloat16),
        "transposed": torch.randn(4, 6).t(),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "large": torch.randn(70_001),
    }
    for name, values in tensors.items():
        stored[name] = values
    assert list(stored) == list(tensors)
    for name, values in tensors.items():
        assert stored[name].dtype == values.dtype
        assert torch.equal(stored[name], values), name


@pytest.mark.parametrize("make", [lambda folder: MemoryCopies(), FileCopies], ids=["memory", "file"])
def test_a_copy_is_no_view_of_the_tensor_and_what_is_written_to_it_goes_nowhere(tmp_path, make):
    stored, values = make(tmp_path), torch.zeros(8)
    stored["a"] = values
    values.add_(1)
    assert torch.equal(stored["a"], torch.zeros(8))


def test_a_snapshot_on_disk_measures_what_one_in_memory_does(tmp_path, small_memory):
    model = tiny_gpt2()
    plan = plan_freeze(model, ["blocks[-1]", "final_norm"])
    in_memory = take_snapshot(tiny_gpt2(), plan)
    on_disk = take_snapshot(model, plan, tmp_path)
    assert isinstance(on_disk.copies, FileCopies)
    assert take_snapshot(model, plan, tmp_path, known=on_disk) is on_disk
    with torch.no_grad():
        for parameter in model.transformer.h[2].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    assert list(measure_deltas(model, on_disk)) == list(measure_deltas(model, in_memory))
    assert any(delta.l2_delta for delta in measure_deltas(model, on_disk))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's /proc to look at another process's files")
def test_the_file_has_no_name_and_is_gone_with_a_killed_process(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from partialtune.proof.start_copies import FileCopies\n"
        "copies = FileCopies(Path(sys.argv[1])); copies['a'] = torch.ones(2**20)\n"
        "print(Path(sys.argv[1]).stat().st_nlink, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    held = sum(os.stat(f"/proc/{process.pid}/fd/{fd}").st_size >= 2**22 for fd in os.listdir(f"/proc/{process.pid}/fd"))
    assert held == 1
    assert list(tmp_path.iterdir()) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_not_used_and_that_is_said(tmp_path, small_memory, caplog):
    assert isinstance(room_for_copies(10**18, Path(tmp_path)), MemoryCopies)
    assert "kept in memory" in caplog.text
