"""Tables of the terminal: plain text in columns, whatever the cells hold and wherever it goes."""

from partialtune.tables import draw_table


def test_names_stand_to_the_left_and_numbers_to_the_right():
    rows = [("place", "values", "claim"), ("norms", "1,536", "may move"), ("blocks[-2:]", "64", "")]
    assert draw_table(rows, left=(0, -1)).splitlines() == [
        "place        values  claim",
        "norms         1,536  may move",
        "blocks[-2:]      64",
    ]
    assert draw_table([("a", "b"), ("c", "10")]) == "a   b\nc  10"


def test_wide_characters_take_two_columns():
    assert draw_table([("词", "1"), ("ab", "2")]) == "词  1\nab  2"


def test_no_name_is_cut_and_nothing_is_taken_for_markup_or_coloured(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    name = "[bold]" + "transformer.h.0.attn.c_attn.weight" * 9 + ":smile:"
    assert draw_table([("name", "numel"), (name, "7")]).splitlines()[1] == f"{name}      7"
