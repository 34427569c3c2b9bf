"""What is cut from Project Gutenberg's editions, old and new, and that the book itself stays whole."""

import functools
import textwrap
import time

import pytest

from partialtune.text.cleaning import clean_gutenberg
from partialtune.text.gutenberg import is_gutenberg

FIRST = "The first sentence of this book must survive, whatever stood before it in the file."
LAST = "And this is its last sentence, which must survive whatever comes after it."
FILLER = (
    "In the middle of the night the travellers came to an inn, and the landlord gave them bread and cheese. "
    "They slept upon straw until the morning, when the coach went on towards the sea, which none of them had seen. "
)
PARAGRAPH = textwrap.fill(FILLER * 4, 72)
TITLE = "THE COACH TO THE SEA\n\nby A. N. Author\n\n\n\n\nCHAPTER I\n\n\n"
BODY = textwrap.fill(FIRST + " " + FILLER, 72) + ("\n\n" + PARAGRAPH) * 30 + "\n\n" + textwrap.fill(FILLER + LAST, 72)
BOOK = TITLE + BODY
CLEAN_BOOK = TITLE + f"{FIRST} {FILLER}".strip() + f"\n\n{(FILLER * 4).strip()}" * 30 + f"\n\n{FILLER}{LAST}\n"

MODERN_HEAD = """The Project Gutenberg eBook of The Coach to the Sea

This ebook is for the use of anyone anywhere in the United States and
most other parts of the world at no cost and with almost no restrictions
whatsoever. You may copy it, give it away or re-use it under the terms
of the Project Gutenberg License included with this ebook or online
at www.gutenberg.org.

Title: The Coach to the Sea

Author: A. N. Author

Release date: February 1, 1997 [eBook #829]

Language: English

"""
START = "*** START OF THE PROJECT GUTENBERG EBOOK THE COACH TO THE SEA ***\n\n\n\n\n"
END = "\n\n\n\n\n*** END OF THE PROJECT GUTENBERG EBOOK THE COACH TO THE SEA ***\n\n"
LICENCE = """Updated editions will replace the previous one—the old editions will
be renamed.

Creating the works from print editions not protected by U.S. copyright
law means that no one owns a United States copyright in these works.

START: FULL LICENSE

THE FULL PROJECT GUTENBERG LICENSE

Section 1. General Terms of Use and Redistributing Project Gutenberg™
electronic works
"""
OLD_HEAD = """***The Project Gutenberg Etext of The Coach to the Sea, by Author***

Copyright laws are changing all over the world, be sure to check
the copyright laws for your country before posting these files!!

**Welcome To The World of Free Plain Vanilla Electronic Texts**

The Coach to the Sea

by A. N. Author

March, 1994  [Etext #11]

"""
SMALL_PRINT = """***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
Why is this "Small Print!" statement here?  You know: lawyers.
They tell us you might sue us if there is something wrong with
your copy of this etext.

LIMITED WARRANTY; DISCLAIMER OF DAMAGES
But for the "Right of Replacement or Refund" described below,
the Project disclaims all liability to you for damages, costs
and expenses, including legal fees.

*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*





"""

HEADS = {
    "modern": MODERN_HEAD + START,
    "byte order mark": "\ufeff" + MODERN_HEAD + START,
    "THIS": MODERN_HEAD + START.replace("OF THE", "OF THIS"),
    "unspaced": MODERN_HEAD + START.replace("*** START", "***START").replace("SEA ***", "SEA***"),
    "comma": MODERN_HEAD + START.replace("EBOOK THE", "EBOOK, THE"),
    "etext": MODERN_HEAD + START.replace("EBOOK", "ETEXT"),
    "copyrighted": MODERN_HEAD + START.replace("PROJECT", "COPYRIGHTED PROJECT"),
    "curly quotes": MODERN_HEAD + START.replace("THE COACH TO", "THE COACH’S “WAY” TO"),
    "two lines": MODERN_HEAD + START.replace("COACH TO", "COACH THAT WENT ALL THE LONG WAY TO\n"),
    "bare marker": START,
    "no marker": MODERN_HEAD + "\n\n\n",
    "no marker, credits": MODERN_HEAD
    + "\n\nProduced by Jane Doe and the Online Distributed\nProofreading Team\n\n\n\n",
    "small print on top": OLD_HEAD + SMALL_PRINT,
    "small print on top, spaced": OLD_HEAD + SMALL_PRINT.replace("*END*THE", "*END THE"),
    "small print without its end": OLD_HEAD + SMALL_PRINT[: SMALL_PRINT.index("*END*")] + "\n\n\n\n",
    "small print and start marker": OLD_HEAD + SMALL_PRINT + START,
    "start marker and small print": OLD_HEAD + START + SMALL_PRINT,
    "German": OLD_HEAD.replace("***The Project Gutenberg Etext of", "Project Gutenberg Etext") + SMALL_PRINT,
}
FEET = {
    "modern": END + LICENCE,
    "THIS": END.replace("OF THE", "OF THIS") + LICENCE,
    "unspaced": END.replace("*** END", "***END").replace("SEA ***", "SEA***") + LICENCE,
    "bare marker": END,
    "copyrighted": END.replace("PROJECT", "COPYRIGHTED PROJECT") + LICENCE,
    "twice": "\n\n\n\nEnd of the Project Gutenberg EBook of The Coach to the Sea, by A. N. Author\n" + END + LICENCE,
    "possessive": "\n\n\n\nEnd of Project Gutenberg's The Coach to the Sea, by A. N. Author\n" + END + LICENCE,
    "curly possessive": "\n\n\n\nEnd of Project Gutenberg’s The Coach to the Sea, by A. N. Author\n" + END + LICENCE,
    "etext": "\n\n\n\n\nEnd of the Project Gutenberg Etext of The Coach to the Sea\n",
    "The etext": "\n\n\n\n\nEnd of The Project Gutenberg Etext of The Coach to the Sea\n\n",
    "this etext": "\n\n\n\n\nEnd of this Project Gutenberg Etext of The Coach to the Sea\n",
    "sentence": "\n\n\n\n\nThis is the end of the Project Gutenberg Edition of The Coach to the Sea\n",
    "volume": "\n\n\n\n\nEnd of Volume One of the Project Gutenberg Edition of The Coach\n",
    "brackets": "\n\n\n\n\n[End of Project Gutenberg's Etext The Coach to the Sea]\n",
    "starred": "\n\n\n\n\n*****The End of the Project Gutenberg Etext of The Coach to the Sea*****\n",
    "Etextes": '\n\n\n\n\nEnde dieses Etextes "Die Kutsche", von A. N. Author\n',
    "Projekt": "\n\n\n\n\nEnde dieses Projekt Gutenberg Etextes Die Kutsche, von A. N. Author.\n",
    "Project": '\n\n\n\n\nEnde dieses Project Gutenberg Etextes "Die Kutsche" von Author.\n' + END + LICENCE,
    "Fin": "\n\n\n\n\nFin du Projet Gutenberg Etext de La diligence, par A. N. Author\n",
    "Fin de": "\n\n\n\n\nFin de Project Gutenberg Etext, La diligence\n\n" + END + LICENCE,
    "Fine": "\n\n\n\n\nFine del Progetto Gutenberg EBook di La carrozza\n",
    "small print": END + "This file should be named coach10.txt or coach10.zip\n\n" + SMALL_PRINT,
    "small print without end marker": "\n\n\n\n" + SMALL_PRINT,
    "licence without marker": "\n\n\n\n" + LICENCE,
    "credits": "\n\n\n\nProduced by Jane Doe and the Online Distributed Proofreading Team\n" + END + LICENCE,
    "short licence": END + "license",
    "strange licence": END + "These are the terms of a licence that names nobody. " * 20,
}
CREDITS = {
    "Produced by": "Produced by Jane Doe and the Online Distributed Proofreading\nTeam at http://www.pgdp.net\n",
    "two producers": "Produced by Jane Doe.  HTML version by John Roe.\n",
    "E-text prepared by": "E-text prepared by Jane Doe, Scarborough, Ontario,\nand revised by J. Roe, M.D.\n",
    "etext was prepared": "This etext was prepared by Jane Doe <jane@example.org>\n",
    "text was prepared": "This text was prepared for Project Gutenberg by Jane Doe and\nJohn Roe.\n",
    "Transcribed from": "Transcribed from the 1892 Bell and Sons edition by David Price,\nemail ccx074@pglaf.org\n",
    "Scanned": "Scanned and proofed by Jane Doe\njane@example.org\n",
    "eBook was produced": "This eBook was produced by Jane Doe.\n",
    "file was produced": "(This file was produced from images generously made available\nby The Internet Archive)\n",
    "note with links": "Note: Project Gutenberg also has an HTML version of this\n      file with pictures.\n"
    "      (http://www.gutenberg.org/files/829/829-h.zip)\n",
    "several": "E-text prepared by Jane Doe\n\n\nNote: Images of the original pages are available through\n"
    "      Internet Archive. See https://archive.org/details/coach\n\nTranscribed by John Roe\n",
    "editions": "There are two editions of this ebook in the Project Gutenberg\ncollection.\n\n"
    "Click on any of the filenumbers below to quickly view each ebook.\n\n"
    "27     1874, First Edition; illustrated.\n\n107    1895, Second Edition, revised.\n",
    "boxed note": "+-------------------------+\n| Transcriber's Note:     |\n|                         |\n"
    "| Old spellings were kept.|\n+-------------------------+\n",
    "bracketed note": "[Transcriber's Note: Old spellings were kept.\n\nSo were the author's commas.]\n",
    "note under a heading": "TRANSCRIBER'S NOTE\n\nOld spellings were kept.\n\nSo were the author's commas.\n",
    "credit and note": "Produced by Jane Doe\n\n\n\nTranscriber’s Notes:\n\n    Old spellings were kept.\n",
}


@pytest.mark.parametrize("head", HEADS)
def test_every_style_of_header_goes_and_the_book_stays(head):
    cleaned = clean_gutenberg(HEADS[head] + BOOK + END + LICENCE)
    assert cleaned.text == CLEAN_BOOK
    assert cleaned.removed_head == pytest.approx(len(HEADS[head]), abs=10)
    assert is_gutenberg(HEADS[head] + BOOK)


@pytest.mark.parametrize("foot", FEET)
def test_every_style_of_footer_goes_and_the_book_stays(foot):
    cleaned = clean_gutenberg(MODERN_HEAD + START + BOOK + FEET[foot])
    assert cleaned.text == CLEAN_BOOK
    assert cleaned.removed_foot == pytest.approx(len(FEET[foot]), abs=10)


@pytest.mark.parametrize("foot", FEET)
def test_a_footer_alone_goes_too(foot):
    assert is_gutenberg(BOOK + FEET[foot])
    cleaned = clean_gutenberg(BOOK + FEET[foot])
    assert cleaned.text == CLEAN_BOOK
    assert cleaned.removed_head == 0


@pytest.mark.parametrize("head", HEADS)
def test_a_header_alone_goes_too(head):
    cleaned = clean_gutenberg(HEADS[head] + BOOK)
    assert cleaned.text == CLEAN_BOOK
    assert cleaned.removed_foot == 0


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("head", ["modern", "small print on top"])
def test_credits_after_the_header_go(head, credit):
    assert clean_gutenberg(HEADS[head] + CREDITS[credit] + "\n\n\n\n" + BOOK + END).text == CLEAN_BOOK


INNER_HEADS = {
    "title and credit": "The Project Gutenberg Etext of The Coach, by Author\n\n\nProduced by Jane Doe.\n",
    "credit and title": "Produced by Jane Doe.\n\n\n\nProject Gutenberg's The Coach to the Sea, by A. N. Author\n",
    "starred title": "***The Project Gutenberg Etext of The Coach to the Sea, by Author***\n\nby A. N. Author\n\n"
    "This etext was produced by Jane Doe,\nwho thanks the library for its images.\n",
    "title over two lines": "The Project Gutenberg EBook of The Coach to the Sea,\nbeing a Journey, by A. N. Author\n",
    "old header": OLD_HEAD,
    "old header and small print": OLD_HEAD + SMALL_PRINT,
    "modern header": MODERN_HEAD + START,
    "three of them": "Produced by Jane Doe\n\n"
    + OLD_HEAD
    + SMALL_PRINT
    + "\n\nProduced by Jane Doe\n\n\n"
    + MODERN_HEAD,
}
INNER_FEET = {
    "credit": "\n\n\n\nEnd of the Project Gutenberg Etext of The Coach, by Author\n\nProduced by Jane Doe\n" + END,
    "note": "\n\n\n\nEnd of Project Gutenberg's The Coach\n\n\n" + ("Produced by Jane Doe\n" * 15 + "\n") * 3 + END,
    "old footer": FEET["small print"] + END,
    "three of them": "\n\n\n\nEnd of Project Gutenberg's The Coach\n\n" + FEET["twice"] + END + LICENCE,
}


@pytest.mark.parametrize("inner", INNER_HEADS)
@pytest.mark.parametrize("head", ["modern", "small print on top"])
def test_headers_within_headers_go(head, inner):
    """*Candide* (4650-8) has its first edition's title and credits behind the start marker of the present one."""
    inner_head = INNER_HEADS[inner].replace("by A. N. Author\n\nThis", "This")
    assert clean_gutenberg(HEADS[head] + inner_head + "\n\n\n\n" + BOOK + END + LICENCE).text == CLEAN_BOOK


@pytest.mark.parametrize("inner", INNER_FEET)
def test_footers_within_footers_go(inner):
    assert clean_gutenberg(MODERN_HEAD + START + BOOK + INNER_FEET[inner] + LICENCE).text == CLEAN_BOOK


@pytest.mark.parametrize(
    "opening",
    [
        "The Project Gutenberg edition is the one that I had read as a boy.",
        "Project Gutenberg's first etexts were typed by hand, and by one man.",
        "The Project Gutenberg Etext of my life, said he, was never finished!",
    ],
)
def test_a_sentence_that_begins_as_a_title_of_an_edition_is_kept(opening):
    book = opening + "\n\n" + BODY + "\n\n" + opening
    text = clean_gutenberg(MODERN_HEAD + START + book + END + LICENCE).text
    assert text.startswith(opening)
    assert text.endswith(opening + "\n")


def test_notes_of_the_transcriber_at_the_end_go():
    note = "\n\n\n\n\nTranscriber's Notes\n\nPage 11: a comma was added.\n\nOld spellings were kept.\n"
    assert clean_gutenberg(MODERN_HEAD + START + BOOK + note + END + LICENCE).text == CLEAN_BOOK


def test_the_book_goes_on_after_a_note_of_the_transcriber():
    note = "\n\n\n\nTranscriber's Note: the following pages are misnumbered.\n\n\n\nCHAPTER II\n\n"
    cleaned = clean_gutenberg(MODERN_HEAD + START + BOOK + note + LAST + END + LICENCE)
    assert cleaned.text.endswith(f"misnumbered.\n\n\n\nCHAPTER II\n\n{LAST}\n")


@pytest.mark.parametrize("note", ["Transcriber's Note: spelling kept.\n\n", "Transcriber's Note\n\nSpelling kept.\n\n"])
def test_a_note_at_the_start_takes_no_sentence_of_the_book_along(note):
    cleaned = clean_gutenberg(MODERN_HEAD + START + note + BODY + END + LICENCE)
    assert FIRST in cleaned.text
    assert LAST in cleaned.text


@pytest.mark.parametrize(
    "opening",
    [
        "Produced by the sun and the rain, the corn stood high that year, and " + FILLER * 12,
        "Prepared by his long journey for the worst, he opened the door.",
        "Note: the reader is asked to be patient.",
        "Created by hand, the chair stood in a corner.",
        "The text was written on the wall.",
        "The text is edited from the manuscripts in the library of the college, by a friend.",
        "This edition was prepared by the author himself in the last year of his life.",
        "The file was produced from his pocket, and the bars of the window gave way.",
    ],
)
def test_a_book_that_opens_like_a_credit_is_kept(opening):
    text = textwrap.fill(opening, 72)
    cleaned = clean_gutenberg(MODERN_HEAD + START + text + "\n\n" + BODY + END + LICENCE).text
    assert cleaned.startswith(opening[:40])
    assert FIRST in cleaned


FAKES = [
    "*** END OF THE PROJECT GUTENBERG EBOOK THE COACH TO THE SEA ***",
    "*** START OF THE PROJECT GUTENBERG EBOOK THE COACH TO THE SEA ***",
    "***START OF THIS PROJECT GUTENBERG EBOOK***",
    "End of Project Gutenberg's The Coach to the Sea, by A. N. Author",
    "Ende dieses Projekt Gutenberg Etextes",
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
    "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***",
    "Produced by Jane Doe",
    "Transcriber's Note",
    "[Transcriber's Note: a page is missing here.]",
    "THE FULL PROJECT GUTENBERG LICENSE",
]


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("size", [0.2, 1, 12])
@pytest.mark.parametrize("around", ["whole", "no header", "no footer", "nothing"])
def test_a_marker_deep_in_the_book_cuts_nothing(fake, size, around):
    half = ("\n\n" + PARAGRAPH) * int(15 * size)  # 2,500, 12,600 and 150,000 characters
    book = TITLE + FIRST + half + "\n\n" + fake + "\n" + half + "\n\n" + LAST
    head = MODERN_HEAD + START if around in ("whole", "no footer") else ""
    foot = END + LICENCE if around in ("whole", "no header") else ""
    text = clean_gutenberg(head + book + foot).text
    assert fake in text
    assert text.startswith(TITLE + FIRST)
    assert text.endswith(LAST + "\n")


@pytest.mark.parametrize(
    "text",
    [
        BOOK,
        "Project Gutenberg was founded in 1971.\n\nIts ebooks are free.\n\n" + BOOK,
        "An essay on Project Gutenberg's ebooks and etexts.\n\n"
        + BOOK
        + "\n\nThe end of Project Gutenberg is not near.\n",
        "The History of Printing\n\n" + BOOK + "\n\nEnd of the ebook era? Not yet.",
        BOOK + "\n\nTHE END",
        "Title: The Coach\n\n" + BOOK,
        "",
    ],
)
def test_a_text_without_markers_is_not_taken_for_gutenbergs(text):
    assert not is_gutenberg(text)
    cleaned = clean_gutenberg(text)
    assert (cleaned.removed_head, cleaned.removed_foot) == (0, 0)


def test_a_book_about_project_gutenberg_stays_whole():
    about = "Project Gutenberg gives its ebooks away, and Michael Hart typed the first of its etexts himself.\n\n"
    book = about * 30
    for head, foot in ((MODERN_HEAD + START, END + LICENCE), (MODERN_HEAD, END + LICENCE), (MODERN_HEAD + START, "")):
        cleaned = clean_gutenberg(head + book + foot)
        assert cleaned.text == book.rstrip("\n") + "\n"


@pytest.mark.parametrize("line_end", ["\r\n", "\r", "\n", "\r\r\n"])
def test_any_line_end_becomes_lf(line_end):
    text = (MODERN_HEAD + START + BOOK + END + LICENCE).replace("\n", line_end)
    assert is_gutenberg(text)
    assert clean_gutenberg(text).text == CLEAN_BOOK


def test_white_space_before_line_ends_and_dos_end_of_file_go():
    text = (MODERN_HEAD + START + BOOK + END + LICENCE).replace("\n", "  \n") + "\x1a"
    assert clean_gutenberg(text).text == CLEAN_BOOK


def test_a_short_book_is_not_taken_for_boilerplate():
    cleaned = clean_gutenberg(MODERN_HEAD + START + "Produced by Jane Doe\n\n\nHello.\n" + END + LICENCE)
    assert cleaned.text == "Hello.\n"


def test_cleaning_takes_linear_time():
    text = MODERN_HEAD + START + (BODY + "\n\n") * 160 + END + LICENCE  # 4 MB
    start = time.perf_counter()
    assert len(clean_gutenberg(text).text) > 3_900_000
    assert time.perf_counter() - start < 10


# What must stay of each file, first and last. In books: the title's line, and the words before the footer.
SURVIVES = {
    "gulliver/829-0_bare_markers_lf.txt": ("GULLIVER’S TRAVELS", "Gulliver’s home in England."),
    "gulliver/829_2009_ascii_crlf.txt": ("GULLIVER'S TRAVELS", "Gulliver's home in England."),
    "gulliver/829_no_markers.txt": ("THE PUBLISHER TO THE READER.", "Gulliver's home in England."),
    "gulliver/gltrv10_2003_small_print_footer.txt": (
        "Gulliver's Travels into Several Remote Nations of the World\nby Jonathan Swift",
        "Gulliver's home in England.",
    ),
    "gulliver/pg829_2023_utf8bom_crlf.txt": ("GULLIVER’S TRAVELS", "Gulliver’s home in England."),
    "gulliver/pg829_2025_utf8bom_crlf.txt": ("GULLIVER’S TRAVELS", "Gulliver’s home in England."),
    "gutenberg_styles/2312-8.txt": ("Hermann und Dorothea", 'und wir erfreuten uns alle des Friedens."'),
    "gutenberg_styles/3261.txt": ("NEWS FROM NOWHERE", "{3}  Cirencester and Burford he must have meant."),
    "gutenberg_styles/44157-0.txt": ("Au lecteur.", "(de\n               vensterbank.)"),
    "gutenberg_styles/alice30.txt": ("ALICE'S ADVENTURES IN WONDERLAND", "THE END\n\n3"),
    "gutenberg_styles/timem11.txt": (
        "The Time Machine, by H(erbert) G(eorge) Wells [1898]",
        "gratitude and a mutual tenderness still lived on in the heart of man.",
    ),
    "books/pg1028.txt": ("THE PROFESSOR", "Victor and I will begin without you.”\n\n“Papa, come!”"),
    "books/pg105.txt": ("Persuasion", "domestic virtues than in its national importance.\n\nFinis"),
    "books/pg107.txt": ("[Illustration]", "[3] W. Barnes"),
    "books/pg1146.txt": ("THE JOURNAL OF A VOYAGE TO LISBON", "--hie Finis chartaeque viaeque."),
    "books/pg1147.txt": ("A JOURNEY FROM THIS WORLD TO THE NEXT", "discovered in some chandlers shop in Greece.]"),
    "books/pg120.txt": ("TREASURE ISLAND", "still ringing in my ears: “Pieces of eight! Pieces of eight!”"),
    "books/pg121.txt": ("Northanger Abbey", "largely brought into conformity with modern British usage."),
    "books/pg131.txt": ("Notes:\n\n1. Legends: = Sidenotes", "I know not but 'twill make me dream again."),
    "books/pg143.txt": ("cover", "but the occasional episode in a general drama of pain."),
    "books/pg148.txt": ("THE AUTOBIOGRAPHY OF BENJAMIN FRANKLIN", "Bliss Perry"),
    "books/pg158.txt": ("Emma\n\nby Jane Austen", "in the perfect happiness of the union.\n\nFINIS"),
    "books/pg161.txt": ("[Illustration]", "THE END"),
    "books/pg174.txt": ("The Picture of Dorian Gray", "THE END"),
    "books/pg244.txt": ("A STUDY IN SCARLET", "Ipse domi simul ac nummos contemplor in arca.’”"),
    "books/pg370.txt": ("The Fortunes and Misfortunes of the Famous Moll", "WRITTEN IN THE YEAR 1683"),
    "books/pg376.txt": ("[Illustration]", "FINIS"),
    "books/pg394.txt": ("[Picture: “Oh, sir! can you be Peter?”]", "EDINBURGH"),
    "books/pg421.txt": ("KIDNAPPED", "to the very doors of the British Linen Company’s bank."),
    "books/pg471.txt": ("The Bride of Lammermoor", "remain undistinguished by tomb or epitaph."),
    "books/pg508.txt": ("TWICE-TOLD TALES", "the stern Puritan had lain more than a century in the dust."),
    "books/pg521.txt": ("The\nLife and Adventures\nof\nRobinson Crusoe", "in the Second Part of my Story."),
    "books/pg550.txt": ("cover", "I think nobody could be happier than we are.”"),
    "books/pg561.txt": ("THE FURTHER ADVENTURES OF ROBINSON CRUSOE", "the blessing of ending our days in peace."),
    "books/pg619.txt": ("THE WARDEN", 'when so addressed, "not warden now, only precentor."'),
    "books/pg652.txt": (
        "[Picture: Book cover]",
        "Printed by Cassell & Company, Limited, La Belle Sauvage, London, E.C.",
    ),
    "books/pg696.txt": ("CASSELL’S NATIONAL LIBRARY", "the melancholy that had taken possession of his soul."),
    "books/pg711.txt": ("[Illustration]", "The Writer of “Allan Quatermain.”"),
    "books/pg730.txt": ("Oliver Twist", "because that nook is in a Church, and she was weak and erring."),
    "books/pg767.txt": ("Agnes Grey", "_Spottiswode & Co. Ltd._, _Printers_, _London_. _Colchester and Eton_."),
    "books/pg768.txt": ("Wuthering Heights", "unquiet slumbers for the sleepers in that quiet earth."),
    "books/pg786.txt": ("HARD TIMES", "the ashes of our fires turn gray and cold."),
    "books/pg792.txt": (
        "WIELAND; OR THE TRANSFORMATION",
        "the double-tongued deceiver would have been baffled and repelled.",
    ),
    "books/pg804.txt": (
        "A\n                           SENTIMENTAL JOURNEY",
        "{652}  Plate, napkin, knife, fork and spoon.",
    ),
    "books/pg940.txt": ("The Last of the Mohicans", "the last warrior of the wise race of the Mohicans.”"),
    "books/pg947.txt": ("THE LIFE\n\nOF\n\nHORATIO LORD NELSON", "the abbreviations d, m, s have been used.]"),
    "books/pg966.txt": ("MAID MARIAN", "P. 159, l. 20. passed: past 1822."),
    "books/pg969.txt": ("The Tenant of Wildfell Hall", "edition of the works of the Brontë sisters."),
    "books/pg983.txt": ("CASSELL’S NATIONAL LIBRARY", "in my circuit through the county of Kent."),
}


@functools.cache
def clean_real(texts, name):
    return clean_gutenberg(read_real(texts, name))


@functools.cache
def read_real(texts, name):
    data = (texts / name).read_bytes()
    return data.decode("latin-1" if name.endswith("2312-8.txt") else "utf-8")


def test_the_table_of_what_survives_names_every_file(texts):
    files = {f"{path.parent.name}/{path.name}" for path in texts.glob("*/*.txt")} - {"gpt2_tokenizer/merges.txt"}
    assert set(SURVIVES) == files


@pytest.mark.parametrize("name", SURVIVES)
def test_the_first_and_last_words_of_a_real_file_survive_and_its_boilerplate_does_not(texts, name):
    raw = read_real(texts, name)
    cleaned = clean_real(texts, name)
    first, last = SURVIVES[name]
    assert cleaned.text.lstrip().startswith(first)
    footnote = "\n\n\n\n\nFOOTNOTES\n\n\n{0}  _Reprinted Pieces_ was released" if name == "books/pg786.txt" else ""
    assert last + (footnote or "\n") in cleaned.text
    assert footnote or cleaned.text.endswith(last + "\n")
    for word in (
        "START OF THE PROJECT",
        "END OF THE PROJECT",
        "Project Gutenberg",
        "SMALL PRINT",
        "Etext",
        "Produced by",
        "pglaf",
        "\r",
        "\ufeff",
    ):
        assert word not in cleaned.text or (footnote and word == "Project Gutenberg")
    kept = raw.removeprefix("\ufeff").replace("\r\n", "\n")
    kept = "\n".join(line.rstrip() for line in kept.split("\n"))
    kept = kept[cleaned.removed_head : len(kept) - cleaned.removed_foot]
    assert "".join(kept.split()) == "".join(cleaned.text.split())
    assert is_gutenberg(raw) == (name != "gulliver/829_no_markers.txt")


# Lines of real files that must keep their breaks: verse, headings, tables, letters' ends, indented lines.
KEPT_LINES = {
    "gutenberg_styles/alice30.txt": [
        "            `How doth the little crocodile\n              Improve his shining tail,\n            And pour",
        "                    `Fury said to a\n                   mouse, That he\n                 met in the\n",
        "                            CHAPTER I\n\n                      Down the Rabbit-Hole\n",
        "The further off from England the nearer is to France--\nThen turn not pale, beloved snail",
    ],
    "gutenberg_styles/2312-8.txt": [
        "Erster Gesang: Kalliope.  Schicksal und Anteil\nZweiter Gesang: Terpsichore.  Hermann\nDritter Gesang",
        "Kalliope\nSchicksal und Anteil\n\n",
    ],
    "gutenberg_styles/3261.txt": [
        "NEWS FROM NOWHERE\nOR\nAN EPOCH OF REST\nBEING SOME CHAPTERS FROM\nA UTOPIAN ROMANCE\n",
        '   "_Guests and neighbours_, _on the site of this Guest-hall once stood\n   the lecture-room',
    ],
    "gutenberg_styles/44157-0.txt": [
        "  Délicieux,                      heerlijk, lekker.\n  bientôt,                        gauw, spoedig.\n",
    ],
    "gulliver/829_2009_ascii_crlf.txt": [
        "    _--Nec si miserum Fortuna Sinonem_\n    _Finxit_, _vanum etiam_, _mendacemque improba finget_.\n",
        "                         BY JONATHAN SWIFT, D.D.,\n                      DEAN OF ST. PATRICK'S, DUBLIN.\n",
    ],
    "gulliver/pg829_2025_utf8bom_crlf.txt": [
        " THE PUBLISHER TO THE READER.\n A LETTER FROM CAPTAIN GULLIVER TO HIS COUSIN SYMPSON.\n PART I.",
        "\n\n\n                                                     RICHARD SYMPSON.\n\n\n",
    ],
    "books/pg158.txt": [
        "“For when a lady’s in the case,\n“You know all other things give place.”",
        "“Yours ever,\n“A. W.”\n",
    ],
    "books/pg107.txt": [
        "I am, your sincere well-wisher,\nFANNY ROBIN.\n",
        "CHAPTER XLI\nSUSPICION—FANNY IS SENT FOR\n",
    ],
    "books/pg471.txt": ["Had I nought of a capon but the liver,\nAnd of your white bread nought but a shiver,\n"],
    "books/pg730.txt": ["CHAPTER L.\nTHE PURSUIT AND ESCAPE\n"],
    "books/pg969.txt": ["Yours immutably,\nGILBERT MARKHAM.\n"],
}
# Paragraphs that must be on one line, by a piece that spans at least one of the file's line ends.
JOINED = {
    "gutenberg_styles/alice30.txt": "very tired of sitting by her sister on the bank, and of having nothing",
    "gutenberg_styles/2312-8.txt": "Ist doch die Stadt wie gekehrt!  wie ausgestorben!",
    "gutenberg_styles/3261.txt": "being used to public meetings and after-lecture debates, if they did not listen",
    "gutenberg_styles/44157-0.txt": "„Dicht bij Huis” et „De Wereld in” nous avons voulu composer",
    "gutenberg_styles/timem11.txt": "white flowers--shrivelled now, and brown and flat and brittle",
    "gulliver/829_2009_ascii_crlf.txt": "coming to him at his house in Redriff, made a small purchase",
    "gulliver/gltrv10_2003_small_print_footer.txt": "growing weary of the concourse of curious people",
    "gulliver/pg829_2025_utf8bom_crlf.txt": "I was the third of five sons. He sent me to Emanuel College",
    "books/pg158.txt": "the wishes, the hopes, the confidence, the predictions of the small band",
    "books/pg940.txt": "The pale faces are masters of the earth, and the time of the red men",
}


@pytest.mark.parametrize("name", KEPT_LINES)
def test_meant_line_breaks_of_a_real_file_stay(texts, name):
    text = clean_real(texts, name).text
    for lines in KEPT_LINES[name]:
        assert lines in text


@pytest.mark.parametrize("name", JOINED)
def test_paragraphs_of_a_real_file_are_joined(texts, name):
    assert JOINED[name] not in "\n".join(read_real(texts, name).splitlines())
    assert JOINED[name] in clean_real(texts, name).text


@pytest.mark.parametrize("name", [name for name in SURVIVES if not name.startswith("books/")])
@pytest.mark.parametrize("missing", ["start", "end"])
def test_a_real_file_that_lost_one_marker_is_cleaned_all_the_same(texts, name, missing):
    raw = read_real(texts, name)
    words = (
        ("START OF TH", "*END*THE SMALL PRINT")
        if missing == "start"
        else ("*END OF TH", "* END OF TH", "End of", "Ende dieses ")
    )
    damaged = "".join(line for line in raw.splitlines(keepends=True) if not any(word in line for word in words))
    assert clean_gutenberg(damaged).text == clean_real(texts, name).text
