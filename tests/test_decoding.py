"""How bytes become characters, and what is refused before they do."""

import codecs
import gzip
import random
from types import SimpleNamespace

import pytest

from partialtune.errors import TextError
from partialtune.text.decoding import Damage, choose_encoding, decoded_pieces, python_encoding

WORDS = "Der Müller aß Käse, „très bien“, naïve café – Ωmega. "
LATIN = "Der Müller aß Käse, très bien, naïve café. "


def decode_text(data, name, http_charset=None):
    """The characters of a file, how they were read, and how many are damaged, as in `reading`."""
    encoding = choose_encoding(lambda: iter((data,)), name, http_charset)
    damage = Damage()
    text = "".join(damage.watched(decoded_pieces(iter((data,)), encoding.name)))
    damage.warn(name, encoding)
    return SimpleNamespace(text=text, encoding=encoding.name, encoding_from=encoding.origin, damaged=damage.count)


def gutenberg_header(charset):
    return f"The Project Gutenberg EBook of X\n\nTitle: X\n\nCharacter set encoding: {charset}\n\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_decides(encoding):
    marks = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    marks |= {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}
    decoded = decode_text(marks[encoding] + WORDS.encode(encoding), "x", http_charset="iso-8859-1")
    assert decoded.text == "\ufeff" + WORDS
    assert (decoded.encoding, decoded.encoding_from, decoded.damaged) == (encoding, "byte order mark", 0)


def test_the_http_charset_comes_before_the_header_in_the_file():
    data = (gutenberg_header("ISO-8859-1") + "Привет, мир").encode("koi8-r")
    decoded = decode_text(data, "x", http_charset="KOI8-R")
    assert decoded.text.endswith("Привет, мир")
    assert (decoded.encoding, decoded.encoding_from) == ("koi8-r", "HTTP header")


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [
        ("ISO-8859-1", "iso8859-1"),
        ("ISO Latin-1", "iso8859-1"),
        ("ISO-8859-1 (Latin-1)", "iso8859-1"),
        ("ISO-8859-2", "iso8859-2"),
        ("Windows Code-Page 1252", "cp1252"),
        ("CP-1252", "cp1252"),
        ("UTF-8", "utf-8"),
        ("Unicode UTF-8", "utf-8"),
        ("Codepage 850", None),
    ],
)
def test_the_header_in_a_gutenberg_file_names_the_charset(charset, encoding, caplog):
    text = gutenberg_header(charset) + LATIN.replace("ï", "i").replace("è", "e")
    decoded = decode_text(text.encode(encoding or "utf-8"), "x")
    assert decoded.text == text
    assert decoded.encoding == (encoding or "utf-8")
    assert decoded.encoding_from == ("Gutenberg header" if encoding else "valid UTF-8")
    assert ("does not know" in caplog.text) == (encoding is None)


def test_the_charset_line_of_another_file_means_nothing():
    data = ("Character set encoding: ISO-8859-1\n\n" + WORDS).encode()
    assert decode_text(data, "x").encoding_from == "valid UTF-8"


@pytest.mark.parametrize("charset", ["US-ASCII", "ISO-646-US (US-ASCII)", "UTF-8"])
def test_a_declaration_that_does_not_fit_is_passed_over_with_a_warning(charset, caplog):
    text = gutenberg_header(charset) + LATIN
    decoded = decode_text(text.encode("cp1252"), "x")
    assert decoded.text == text
    assert decoded.encoding == "cp1252"
    assert "some bytes are not" in caplog.text


def test_without_declaration_valid_utf8_is_utf8():
    decoded = decode_text(WORDS.encode(), "x")
    assert (decoded.text, decoded.encoding, decoded.encoding_from) == (WORDS, "utf-8", "valid UTF-8")


def test_what_is_no_utf8_is_cp1252():
    text = LATIN + "“quoted” – 5 €"
    decoded = decode_text(text.encode("cp1252"), "x")
    assert (decoded.text, decoded.encoding, decoded.damaged) == (text, "cp1252", 0)
    assert decoded.encoding_from.startswith("fallback")


def test_a_guess_at_a_foreign_alphabet_is_said(caplog):
    assert decode_text("Привет, мир, это длинный текст".encode("koi8-r"), "x").encoding == "cp1252"
    assert "If it looks wrong, save it as UTF-8" in caplog.text


def test_quotes_of_windows_are_read_where_latin1_is_declared():
    text = gutenberg_header("ISO-8859-1") + "“quoted”"
    decoded = decode_text(text.encode("cp1252"), "x")
    assert (decoded.text, decoded.encoding) == (text, "cp1252")


def test_a_declared_charset_wins_over_utf8_and_the_doubt_is_said(caplog):
    decoded = decode_text("é".encode() * 3, "x", http_charset="iso-8859-1")
    assert decoded.text == "Ã©" * 3
    assert "valid UTF-8 too" in caplog.text


def test_damage_in_utf8_is_counted_and_reported(caplog):
    data = WORDS.encode() * 3
    damaged = data[:20] + b"\xff\xfe" + data[20:]
    decoded = decode_text(damaged, "book.txt")
    assert decoded.encoding == "utf-8"
    assert decoded.damaged == decoded.text.count("\ufffd") == 2
    assert decoded.text.replace("\ufffd", "") == WORDS * 3
    assert "book.txt: 2 damaged characters" in caplog.text


def test_damage_that_is_in_the_file_already_is_reported(caplog):
    assert decode_text("caf\ufffd".encode(), "x").damaged == 1
    assert "1 damaged characters" in caplog.text


def test_bytes_that_no_encoding_knows_are_counted():
    decoded = decode_text(LATIN.encode("cp1252") + b"\x81\x8d", "x")
    assert (decoded.encoding, decoded.damaged) == ("cp1252", 2)


def test_damage_after_a_byte_order_mark_is_counted():
    decoded = decode_text(codecs.BOM_UTF8 + b"caf\xe9", "x")
    assert (decoded.encoding, decoded.damaged) == ("utf-8", 1)


@pytest.mark.parametrize("name", ["hex", "rot13", "no such thing", "", "()"])
def test_what_is_no_charset_has_no_encoding(name):
    assert python_encoding(name) is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\r\n\t", "is empty"),
        (b"%PDF-1.7 and so on", "a PDF"),
        (b"PK\x03\x04rest", "a zip archive"),
        (gzip.compress(b"text", mtime=0), "a gzip archive"),
        (b"\x89PNG\r\n", "a PNG image"),
        (b"PAR1....", "a Parquet file"),
        (b"some text\0and more", "byte 9 is NUL"),
        ("hello there".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (random.Random(0).randbytes(3000).replace(b"\0", b""), "binary"),
        (b"<!DOCTYPE html><p>hello", "HTML page"),
        (b"\n <html lang='en'>", "HTML page"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C">', "HTML page"),
        (codecs.BOM_UTF8 + b"<!doctype HTML>", "HTML page"),
    ],
)
def test_what_is_no_text_is_refused_in_words(data, words):
    with pytest.raises(TextError, match=r"^book\.txt is ") as error:
        decode_text(data, "book.txt")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text", ["<html> is a tag", "I wrote <!doctype html> first.", "a\x0cb\x1b[0m", "\x1a end of file"]
)
def test_odd_text_is_still_text(text):
    if text.startswith("<html>"):
        text = "The tag " + text
    assert decode_text(text.encode(), "x").text == text


def test_utf16_declared_by_http_needs_no_mark():
    assert decode_text(WORDS.encode("utf-16-le"), "x", http_charset="utf-16-le").text == WORDS
