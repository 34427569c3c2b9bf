"""Which line breaks are wrapping and which are meant."""

import textwrap
import time

import pytest

from conftest import EXCERPTS
from partialtune.text.unwrapping import WrapWidth, learn_wrap_width, unwrapped_lines

SENTENCES = (
    "The author of these travels is my ancient and intimate friend, and there is some relation between us. "
    "About three years ago he grew weary of the concourse of curious people, and made a small purchase of land. "
    "Before he quitted the town he left the custody of the following papers in my hands, to dispose of as I liked. "
)
PROSE = textwrap.wrap(SENTENCES * 12, 72)  # about 50 wrapped lines, from which the width is learnt


def join_wrapped_lines(lines):
    return list(unwrapped_lines(lambda: iter(lines)))


def unwrap(text, prose=PROSE):
    """Unwrap a text that stands between two long paragraphs of wrapped prose."""
    lines = join_wrapped_lines([*prose, "", *text.split("\n"), "", *prose])
    assert lines[0] == lines[-1] == " ".join(prose)
    return "\n".join(lines[2:-2])


def kept(text, prose=PROSE):
    return unwrap(text, prose) == text


@pytest.mark.parametrize("width", [55, 65, 72, 78, 90])
def test_wrapped_paragraphs_become_one_line_at_any_width(width):
    paragraphs = [SENTENCES.strip() * 3, SENTENCES.strip(), SENTENCES.strip() * 9]
    lines = "\n\n".join(textwrap.fill(paragraph, width) for paragraph in paragraphs).split("\n")
    assert join_wrapped_lines(lines) == [paragraphs[0], "", paragraphs[1], "", paragraphs[2]]


def test_a_paragraph_whose_first_line_is_indented_is_joined():
    text = textwrap.fill(SENTENCES.strip(), 72, initial_indent="   ")
    assert unwrap(text) == "   " + SENTENCES.strip()


def test_paragraphs_without_blank_lines_between_stay_apart():
    one = textwrap.fill(SENTENCES.strip(), 72, initial_indent="  ")
    assert unwrap(one + "\n" + one) == "  " + SENTENCES.strip() + "\n  " + SENTENCES.strip()


def test_a_file_that_is_indented_as_a_whole_is_joined():
    lines = ["     " + line for line in PROSE]
    assert join_wrapped_lines([*lines, "", *lines]) == [" ".join(PROSE), "", " ".join(PROSE)]


def test_ragged_lines_are_joined():
    ragged = [
        "It may be that he swept back into the past, and fell among the",
        "blood-drinking, hairy savages of the Age of Unpolished Stone;",
        "into the abysses of the Cretaceous Sea; or among the grotesque",
        "saurians, the huge reptilian brutes of the Jurassic times.  He may",
        "even now, if I may use the phrase, be wandering on some coral",
        "Oolitic reef, or beside the lonely saline lakes of the Triassic Age.",
    ]
    lines = join_wrapped_lines(ragged * 8)
    assert lines == [" ".join(ragged * 8)]


@pytest.mark.parametrize(
    "verse",
    [
        "Twas brillig, and the slithy toves\nDid gyre and gimble in the wabe;\nAll mimsy were the borogoves,",
        "For when a lady's in the case,\nYou know all other things give place.",
        "The further off from England the nearer is to France--\n"
        "Then turn not pale, beloved snail, but come and join the dance.\n"
        "Will you, won't you, will you, won't you, will you join the dance?",
        "    How doth the little crocodile\n      improve his shining tail,\n    and pour the waters of the Nile",
        "so much depends\nupon\n\na red wheel\nbarrow",
    ],
)
def test_verse_keeps_its_lines(verse):
    assert kept(verse)


def test_a_book_of_verse_keeps_its_lines():
    canto = [
        "Of man's first disobedience, and the fruit",
        "Of that forbidden tree whose mortal taste",
        "Brought death into the World, and all our woe,",
        "With loss of Eden, till one greater Man",
        "Restore us, and regain the blissful seat,",
        "Sing, Heavenly Muse, that, on the secret top",
    ]
    lines = [*canto, "", *canto, *canto, ""] * 20
    assert join_wrapped_lines(lines) == lines


@pytest.mark.parametrize(
    "text",
    [
        "NEWS FROM NOWHERE\nOR\nAN EPOCH OF REST",
        "CHAPTER XLI\nSUSPICION--FANNY IS SENT FOR",
        "A STRANGE INTERVIEW, WHICH IS A SEQUEL TO THE LAST CHAMBER AND WHICH\nSHOWS SURPRISES",
        "Gulliver's Travels into Several Remote Nations\nby Jonathan Swift",
        "CHAPTER I.\n The author gives some account of himself and family.",
        "                              CHAPTER I\nIt was the best of times.",
        "                                                  London, 5 May 1850.\nDear Sir,",
    ],
)
def test_headings_keep_their_lines(text):
    assert kept(text)


@pytest.mark.parametrize(
    "text",
    [
        "I am, your sincere well-wisher,\nFANNY ROBIN.",
        "Believe me to be, my dear Sir, with the greatest respect and esteem, your\nmost humble servant,\nJOHN SMITH.",
        "Yours ever,\nA. W.",
        "Your obliged and affectionate Son,\n\n        F. C. WESTON CHURCHILL.",
    ],
)
def test_letters_ends_keep_their_lines(text):
    assert unwrap(text).split("\n")[-1] == text.split("\n")[-1]


def test_the_end_of_a_letter_below_its_paragraph_stays_apart():
    body = textwrap.fill(SENTENCES.strip(), 72)
    assert unwrap(body + "\nYours truly,\nJohn Smith") == SENTENCES.strip() + "\nYours truly,\nJohn Smith"


@pytest.mark.parametrize(
    "table",
    [
        "CHAPTER I     The Stable and the man who stood before it at night    1\nCHAPTER II    The Road     12",
        "The Stable and the Road to the Town ................................. 1\nThe Town ...... 9",
        "+------------------------------------+-------------------------------+\n| the first   | and the second |",
        "1\tthe first of all the things that were said on that day in the hall\n2\tthe second",
        "  Délicieux,                      heerlijk, lekker.\n  bientôt,                        gauw, spoedig.",
    ],
)
def test_tables_keep_their_lines(table):
    assert kept(table)


def test_list_items_stay_apart_and_are_joined_within():
    item = "1. " + SENTENCES[:101]
    text = textwrap.fill(item, 72) + "\n" + textwrap.fill(item.replace("1.", "2."), 72)
    assert unwrap(text) == item + "\n" + item.replace("1.", "2.")


def test_an_indented_block_keeps_its_lines():
    assert kept(textwrap.indent(textwrap.fill(SENTENCES.strip(), 60), "     "))


@pytest.mark.parametrize(
    ("line", "following", "joined"),
    [
        ("the meetings and the debates that came after the lec-", "tures", "lec-tures"),
        ("and there they lay, both the five-pound and the two-", "and three-pound notes", "two- and three-pound"),
        ("in those days everybody wanted to be good at hide-", "and-seek in the old house", "hide-and-seek"),
        ("and I have by me, for my comfort, two white flowers", "--shrivelled now", "flowers--shrivelled"),
        ("and I have by me for my comfort two white flowers--", "shrivelled now", "flowers--shrivelled"),
        ("and I have by me for my comfort two white flowers —", "shrivelled now", "flowers — shrivelled"),
        ("and I have by me for my comfort two white flowers", "— shrivelled now", "flowers — shrivelled"),
    ],
)
def test_hyphens_and_dashes_at_a_break_keep_their_spacing(line, following, joined):
    lines = join_wrapped_lines([line, following])
    assert len(lines) == 1
    assert joined in lines[0]


def test_chinese_lines_are_joined_without_a_space():
    line = "却说黛玉自那日弃舟登岸时便有荣府打发轿子并拉行李车辆伺候" * 3
    assert join_wrapped_lines([line, "吃穿用度"]) == [line + "吃穿用度"]


def test_lines_longer_than_any_wrapping_are_paragraphs_by_themselves():
    paragraphs = [SENTENCES.strip() for _ in range(30)]
    assert join_wrapped_lines(paragraphs) == paragraphs


def test_the_width_is_learnt_from_a_text_and_assumed_for_a_short_one():
    width = learn_wrap_width(PROSE)
    assert 72 <= width.reach <= 74
    assert width.longest <= 82
    assert learn_wrap_width(PROSE[:5]) == WrapWidth(60, 45, 130)


def test_nothing_but_white_space_changes():
    text = "\n".join(PROSE) + "\n\nA line\n  of verse,\nand--\n--a dash-\ned one.\n\n\n" + "\n".join(PROSE)
    assert "".join("".join(join_wrapped_lines(text.split("\n"))).split()) == "".join(text.split())


@pytest.mark.parametrize("book", ["pg158", "pg940", "pg471", "pg107"])
def test_nothing_but_white_space_changes_in_a_book(texts, book):
    text = (texts / "books" / f"{book}.txt").read_text("utf-8-sig")
    lines = [line.rstrip() for line in text.split("\n")]
    joined = join_wrapped_lines(lines)
    assert "".join("".join(joined).split()) == "".join(text.split())
    assert len(joined) < (0.7 if texts == EXCERPTS else 0.45) * len(lines)  # an excerpt is headings by half


def test_a_block_without_blank_lines_takes_linear_time():
    lines = PROSE * 1500  # 5 MB; each repetition ends with a short line
    start = time.perf_counter()
    assert join_wrapped_lines(lines) == [" ".join(PROSE)] * 1500
    assert time.perf_counter() - start < 10
