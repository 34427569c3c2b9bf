"""Text sources as a recipe names them, and what is recorded of each."""

import hashlib
import json
import logging
import subprocess
import sys

import pytest

from conftest import EXCERPTS, gpt2_tokenizer
from partialtune.errors import TextError
from partialtune.net.download import Download
from partialtune.text import sources
from partialtune.text.cleaning import with_line_feeds
from partialtune.text.reading import check_texts_unchanged, load_text, read_texts

PLAIN = "A first line,\nand a second.\n"
GUTENBERG = (
    "The Project Gutenberg eBook of X\r\n\r\nTitle: X\r\n\r\nCharacter set encoding: ISO-8859-1\r\n\r\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
    "It was a dark and stormy night; the rain fell in torrents, except at\r\noccasional intervals in the café.\r\n\r\n"
    "*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\n"
)
BOOK = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals in the café.\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a few texts."""
    for name in ("b.txt", "a.txt", "c.text"):
        (tmp_path / name).write_text(f"{name}\n{PLAIN}")
    (tmp_path / "book.txt").write_bytes(GUTENBERG.encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_read_and_recorded(folder):
    (text,) = read_texts(["book.txt"])
    raw = GUTENBERG.encode("latin-1")
    assert text.name == "book.txt"
    assert text.text == BOOK
    assert (text.sha256, text.raw_bytes) == (hashlib.sha256(raw).hexdigest(), len(raw))
    assert (text.encoding, text.encoding_from, text.damaged) == ("iso8859-1", "Gutenberg header", 0)
    assert text.cleaning == "gutenberg"
    assert text.removed_head == GUTENBERG.replace("\r", "").index("It was") - 2
    assert text.removed_foot == len("*** END OF THE PROJECT GUTENBERG EBOOK X ***\n")
    assert load_text("book.txt") == load_text(folder / "book.txt") == BOOK


def test_the_log_says_how_much_was_cut(folder, caplog):
    caplog.set_level(logging.INFO)
    (text,) = read_texts(["book.txt"])
    assert f"cut {text.removed_head} characters at the head and {text.removed_foot} at the foot" in caplog.text
    assert "iso8859-1 (Gutenberg header)" in caplog.text


def test_a_text_without_markers_is_left_as_it_is(folder, caplog):
    caplog.set_level(logging.INFO)
    (folder / "a.txt").write_bytes(b"A first line that might have been wrapped, who\r\nknows that?\r\n")
    (text,) = read_texts(["a.txt"])
    assert text.text == "A first line that might have been wrapped, who\nknows that?\n"
    assert (text.cleaning, text.removed_head, text.removed_foot) == ("none", 0, 0)
    assert "left as it is" in caplog.text


@pytest.mark.parametrize("line_end", ["\r\n", "\r", "\r\r\n", "\n"])
def test_line_ends_become_lf_unless_every_byte_is_wanted(folder, line_end):
    lines = ["  A line with white space at its ends,  ", "", "a tab\t", "and a form feed.\f", "", ""]
    (folder / "a.txt").write_bytes(line_end.join(lines).encode())
    assert load_text("a.txt") == "\n".join(lines)
    assert load_text("a.txt", cleaning="none") == line_end.join(lines)


def test_line_ends_across_pieces_become_lf():
    text = "one\r\ntwo\r\r\nthree\rfour\r\r\r\nfive\r"
    for size in range(1, len(text) + 1):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert "".join(with_line_feeds(pieces)) == "one\ntwo\nthree\nfour\n\nfive\n", size


def test_cleaning_can_be_asked_for(folder):
    line = "A first line that is as long as the lines of a book that was wrapped, who\r\nknows?\r\n"
    (folder / "a.txt").write_bytes(line.encode())
    assert load_text("a.txt", cleaning="gutenberg") == line.replace("who\r\n", "who ").replace("\r\n", "\n")


def test_without_cleaning_every_byte_that_decodes_stays(folder):
    (folder / "a.txt").write_bytes("\ufeff".encode() + GUTENBERG.encode() + b"\r\x1a \n")
    (text,) = read_texts(["a.txt"], cleaning="none")
    assert text.text == "\ufeff" + GUTENBERG + "\r\x1a \n"
    assert text.cleaning == "none"


def test_a_byte_order_mark_is_no_text(folder):
    (folder / "a.txt").write_bytes("\ufeff".encode() + PLAIN.encode())
    assert load_text("a.txt") == PLAIN


def test_several_sources_keep_their_order_and_a_globs_files_are_sorted(folder):
    texts = read_texts(["c.text", "*.txt"])
    assert [text.name for text in texts] == ["c.text", "a.txt", "b.txt", "book.txt"]
    assert load_text("[ab].txt") == f"a.txt\n{PLAIN}\n\nb.txt\n{PLAIN}"


def test_a_glob_looks_into_folders_where_it_says_so(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "d.txt").write_text(PLAIN)
    assert [text.name for text in read_texts(["deep/**/*.txt"])] == ["deep/er/d.txt"]


def test_a_file_with_glob_characters_in_its_name_is_that_file(folder):
    (folder / "a[1].txt").write_text("brackets\n")
    assert load_text("a[1].txt") == "brackets\n"


def test_a_file_that_is_named_twice_is_read_once(folder, caplog):
    assert [text.name for text in read_texts(["a.txt", "[ab].txt", "a.txt"])] == ["a.txt", "b.txt"]
    assert "read once: a.txt" in caplog.text


def test_the_home_folder_may_be_written_as_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert load_text("~/a.txt") == f"a.txt\n{PLAIN}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.txt", ["no file missing.txt"]),
        ("bok.txt", ["no file bok.txt", "Did you mean book.txt?"]),
        ("nowhere/a.txt", ["folder", "nowhere does not exist"]),
        ("*.epub", ["*.epub matches no file"]),
        (".", ["is a folder", "*.txt (3 files)"]),
        ("ftp://host/a.txt", ["http and https only"]),
        ("file:///etc/passwd", ["http and https only"]),
        ("builtin:lilliput", ["builtin:python-docs"]),
        ("hf:", ["names no dataset"]),
        ("/dev/null", ["no regular file"]),
        ("empty.txt", ["is empty"]),
        ("page.txt", ["HTML page"]),
        ("binary.txt", ["is binary"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(folder, source, words):
    (folder / "empty.txt").write_bytes(b"")
    (folder / "page.txt").write_bytes(b"<!DOCTYPE html><html>")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    for name in ("empty.txt", "page.txt", "binary.txt"):
        if name != source:
            (folder / name).unlink()
    with pytest.raises(TextError) as error:
        read_texts([source])
    for word in words:
        assert word in str(error.value)


def test_all_missing_files_are_named_at_once(folder):
    with pytest.raises(TextError) as error:
        read_texts(["x.txt", "a.txt", ".", "y.txt"])
    assert [line.split(" ")[0] for line in str(error.value).split("\n")] == ["There", ".", "There"]


def test_an_unreadable_file_is_an_error(folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(TextError, match=r"a\.txt cannot be read: Permission denied"):
        read_texts(["a.txt"])


def test_nothing_left_after_cleaning_is_an_error(folder):
    (folder / "a.txt").write_text(GUTENBERG[: GUTENBERG.index("It was")].replace("\r", ""))
    with pytest.raises(TextError, match="nothing is left after cleaning"):
        read_texts(["a.txt"])


def test_no_source_and_an_unknown_cleaning_are_errors():
    with pytest.raises(TextError, match="No text is named"):
        read_texts([])
    with pytest.raises(TextError, match="auto, gutenberg, none"):
        read_texts(["a.txt"], cleaning="some")


def test_an_address_is_fetched_and_its_charset_counts(folder, monkeypatch):
    path = folder / "cached.txt"
    path.write_bytes("Привет".encode("koi8-r"))
    fetched = []

    def fetch(url):
        fetched.append(url)
        return Download(path, "https://host/a.txt", "00", 6, "koi8-r")

    monkeypatch.setattr("partialtune.net.download.fetch", fetch)
    (text,) = read_texts(["https://me:secret@host/a.txt"])
    assert fetched == ["https://me:secret@host/a.txt"]
    assert (text.name, text.text, text.encoding_from) == ("https://host/a.txt", "Привет", "HTTP header")


def test_the_builtin_text_is_the_same_every_time():
    (text,) = read_texts(["builtin:python-docs"])
    assert text.name == "builtin:python-docs"
    assert text.text.startswith('The "assert" statement')
    assert text.raw_bytes == len(text.text.encode()) > 300_000
    code = "from partialtune.text.reading import read_texts; print(read_texts(['builtin:python-docs'])[0].sha256)"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()


class Shouted(sources.Source):
    """A kind of source that this package does not have: shouted:PATH, a file in capitals."""

    form, prefix = "shouted:PATH", "shouted:"

    def read(self, name, text_column):
        data = sources.Path(name.removeprefix(self.prefix)).read_bytes().upper()
        return sources.RawText(name, lambda: iter((data,)))


def test_a_new_kind_of_source_is_one_class_in_the_table(folder, monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", (Shouted(), *sources.SOURCES))
    (text, other) = read_texts(["shouted:a.txt", "b.txt"])
    assert (text.name, text.text, text.raw_bytes) == ("shouted:a.txt", f"a.txt\n{PLAIN}".upper(), len(text.text))
    assert other.text == f"b.txt\n{PLAIN}"
    kept = {text.name: text.sha256, other.name: other.sha256}
    assert check_texts_unchanged(kept, list(kept), folder) == []
    (folder / "a.txt").write_text("another")
    with pytest.raises(TextError, match=r"shouted:a\.txt: sha256"):
        check_texts_unchanged(kept, list(kept), folder)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A folder with a dataset of two splits; what `datasets` caches stays in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "letters"
    folder.mkdir()
    for split, words in (("train", ["first", "second\n", None]), ("test", ["third"])):
        rows = [json.dumps({"text": word, "title": f"title of {word}", "number": 1}) for word in words]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_a_datasets_rows_become_one_text(dataset):
    (text,) = read_texts([f"hf:{dataset}"])
    assert text.text == "first\nsecond\n"
    assert text.name == f"hf:{dataset}"
    assert text.sha256 == hashlib.sha256(b"first\nsecond\n").hexdigest()
    assert (text.encoding_from, text.raw_bytes) == ("dataset", 13)


def test_a_split_and_a_column_can_be_named(dataset):
    assert read_texts([f"hf:{dataset}:default:test"])[0].text == "third\n"
    assert read_texts([f"hf:{dataset}::test"], text_column="title")[0].text == "title of third\n"
    assert read_texts([f"hf:{dataset}::train[:1]"])[0].text == "first\n"


@pytest.mark.parametrize(
    ("suffix", "column", "words"),
    [
        ("", "body", "Set text_column to one of text, title, number"),
        ("", "number", "holds no text in 3 rows"),
        ("::nowhere", "text", "cannot be loaded"),
        (":other", "text", "cannot be loaded"),
    ],
)
def test_what_a_dataset_does_not_have_is_an_error(dataset, suffix, column, words):
    with pytest.raises(TextError, match=f"^hf:{dataset}{suffix}") as error:
        read_texts([f"hf:{dataset}{suffix}"], text_column=column)
    assert words in str(error.value)


ROWS = [{"number": 1, "text": "A line,\nand one more."}, {"number": 2, "text": "The end \U0001f642."}]
FILES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.ndjson": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.json": json.dumps(ROWS),
    "rows.CSV": 'number,text\n1,"A line,\nand one more."\n2,The end \U0001f642.\n',
    "rows.tsv": 'number\ttext\n1\t"A line,\nand one more."\n2\tThe end \U0001f642.\n',
}


@pytest.mark.parametrize("name", FILES)
def test_the_text_column_of_a_file_with_columns_is_read(dataset, name):
    file = dataset.parent / name
    file.write_text(FILES[name])
    (text,) = read_texts([str(file)])
    assert text.text == "A line,\nand one more.\nThe end \U0001f642.\n"
    assert (text.name, text.encoding_from) == (str(file), "column text")
    with pytest.raises(
        TextError, match=r"no column 'body'. Set text_column to one of number, text. To train on the file"
    ):
        read_texts([str(file)], text_column="body")


def test_a_parquet_files_column_is_read_and_a_fetched_files_too(dataset, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    file = dataset.parent / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    assert load_text(file) == "A line,\nand one more.\nThe end \U0001f642.\n"
    cached = dataset.parent / "cached.txt"
    cached.write_text(FILES["rows.jsonl"])
    monkeypatch.setattr(
        "partialtune.net.download.fetch", lambda url: Download(cached, "https://h/r.jsonl", "", 1, None)
    )
    assert load_text("https://h/r.jsonl?token=abc") == load_text(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text":'),
        ("a.jsonl", b"\xff\xfe{}"),
        ("a.jsonl", b'{"text": 1}'),
        ("a.json", b"[" * 100_000),
        ("a.json", b'"text"'),
        ("a.csv", b""),
        ("a.csv", b"no columns here,\nonly, commas, and, lines\n"),
        ("a.csv", "text\ncafé\n".encode("latin-1")),
        ("a.parquet", b"PAR1"),
    ],
)
def test_a_file_with_columns_that_cannot_be_read_is_refused_in_words(dataset, name, content):
    file = dataset.parent / name
    file.write_bytes(content)
    with pytest.raises(TextError, match=name):
        read_texts([str(file)])


def test_a_dataset_that_does_not_exist_is_an_error(tmp_path, dataset):
    with pytest.raises(TextError, match="cannot be loaded"):
        read_texts([f"hf:{tmp_path / 'none'}"])


def test_raw_gulliver_has_the_tokens_of_the_notebook(texts):
    text = load_text(texts / "gulliver" / "pg829_2025_utf8bom_crlf.txt", cleaning="none")
    assert len(gpt2_tokenizer(texts)(text)["input_ids"]) == (11_445 if texts == EXCERPTS else 158_345)


def test_the_german_latin1_text_is_read_right(texts):
    (text,) = read_texts([str(texts / "gutenberg_styles" / "2312-8.txt")])
    assert "Hab ich den Markt und die Straßen doch nie so einsam gesehen!" in text.text
    assert (text.encoding, text.damaged) == ("cp1252", 0)


def test_the_text_without_markers_is_left_as_it_is_but_for_its_line_ends(texts):
    path = texts / "gulliver" / "829_no_markers.txt"
    assert load_text(path) == path.read_bytes().decode("ascii").replace("\r\n", "\n")
