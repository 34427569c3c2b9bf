"""What people see in a terminal: no line longer than it is wide, and in a pipe what programs read."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import unicodedata

import pytest

from partialtune.terminal import fitted

COLUMNS = 80


def lines_in_terminal(*words: str, columns: int = COLUMNS) -> list[str]:
    """Lines that a command draws in a terminal of so many columns, each state of a bar as a line."""
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-m", "partialtune", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 65_536)
        except OSError:  # Linux says so that nobody writes any more
            break
        if not piece:
            break
        shown += piece
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown.decode(errors="replace")
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown.decode()))


def width(line: str) -> int:
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in line
    )


@pytest.mark.slow
def test_no_line_of_plan_and_train_is_longer_than_a_terminal_of_80_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = lines_in_terminal("plan", "builtin:quickstart")
    assert "tied: transformer.wte.weight is lm_head.weight, one tensor" in planned
    (tmp_path / "text.txt").write_text("天下 is all under heaven, and the age of wisdom was long. " * 200)
    words = ["--text", "text.txt", "--max_steps", "2", "--output_dir", "run"]
    trained = lines_in_terminal("train", "builtin:quickstart", *words)
    assert "Verdict: freeze audit passed." in trained
    assert any("loss=" in line and "held-out=" in line and "tokens/s" in line for line in trained)
    assert "  before" in trained  # prompts stand below each other
    assert "  partialtune generate run --prompt 'The function returns' --beside-base" in trained
    assert [line for line in planned + trained if width(line) > COLUMNS] == []


def test_a_line_is_folded_between_words_and_set_in_and_stays_whole_in_a_pipe():
    line = "  a sentence of several words that goes on"
    assert fitted(line, 20) == "  a sentence of\n    several words\n    that goes on"
    assert fitted(f"short\n{line}", None) == f"short\n{line}"
    assert fitted("x" * 30, 20) == f"{'x' * 20}\n{' ' * 2}{'x' * 10}"
