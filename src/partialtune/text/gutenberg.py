"""A file of Project Gutenberg as text -> where the book in it begins and ends: header, licence, credits, footer cut.

Fifty years of editions mark their ends in many ways, and some not at all, so no single marker is trusted. What is cut
lies near an end of the file and is bounded by more words of Project Gutenberg: a credit line that stays in costs less
than a page of the book that is lost.
"""

import re
from collections.abc import Iterator

ZONE = 60_000  # characters at either end where headers and footers are looked for; the longest known have 25,000
WIDEST_GAP = 2_500  # characters of a header or licence without a word that only Project Gutenberg would use
FRONT = 6_000  # characters at either end of the book itself where credits and transcriber's notes are looked for
ENDS = ZONE + 4 * FRONT  # characters at either end beyond which nothing is looked at

# *** START OF THE PROJECT GUTENBERG EBOOK X ***; where the asterisks were lost, capitals alone: prose may say it too.
_START_MARKER = re.compile(
    r"^[ \t]*(?:\*+\s*(?i:START\s+OF\s+(?:THE\s+|THIS\s+)?(?:COPYRIGHTED\s+)?PROJECT\s+GUTENBERG)"
    r"|START OF (?:THE |THIS )?PROJECT GUTENBERG).*$",
    re.M,
)
_END_MARKER = re.compile(
    r"^[ \t]*(?:\*+\s*(?i:END\s+OF\s+(?:THE\s+|THIS\s+)?(?:COPYRIGHTED\s+)?PROJECT\s+GUTENBERG)"
    r"|END OF (?:THE |THIS )?PROJECT GUTENBERG).*$",
    re.M,
)
# Until about 2003 the licence stood before the book: *START*THE SMALL PRINT! ... *END*THE SMALL PRINT!
_SMALL_PRINT_START = re.compile(r"^[ \t]*\*+\s*START[\s*]*THE SMALL PRINT.*$", re.I | re.M)
_SMALL_PRINT_END = re.compile(r"^[ \t]*\*+\s*END[\s*]*THE SMALL PRINT.*$", re.I | re.M)
# "End of Project Gutenberg's X", "Ende dieses Projekt Gutenberg Etextes". The first letter is large: "at the end of the
# Gutenberg press" is a sentence. \w{3,6} after "pro": project, projekt, projet, projeto, and their misspellings.
_END_WORD = r"(?=[A-Z])(?i:(?:THIS\s+IS\s+)?THE\s+END|END|ENDE|FIN|FINE|FIM|EINDE|SLUT|SLUTT|LOPPU|KONIEC)\b"
_FOOTER_LINE = re.compile(
    r"^[ \t]*(?:[*_=\[\"'“-]+\s*)?(?:"
    rf"{_END_WORD}[^\n]{{0,30}}?\b(?i:PRO\w{{3,6}}[ -]GUTENBERG)"
    r"(?=['’]s\b|\W*$|[,:]|\W+(?i:e-?text|e-?book|edition|projekt))"
    rf"|{_END_WORD}\s+(?:\w{{1,6}}\s+){{0,2}}(?i:e-?text|e-?book)(?i:e?s)?(?=\W*(?:$|[\"'“„«]|(?i:of|von|de|di|van)\b))"
    r"|(?i:START[\s*]*THE SMALL PRINT|START: FULL LICENSE|THE FULL PROJECT GUTENBERG LICENSE)"
    r"|(?i:This file should be named \S+ or \S+)"
    r"|Updated editions will replace the previous one"
    r"|(?i:More information about this book is at the top of this file)"
    r").*$",
    re.M,
)
_OPENING = re.compile(r"project\s+gutenberg|gutenberg\W+(?:projekt|e-?text|e-?book)", re.I)
_FIELD = (
    r"^(?:Title|Author|Release date|Posting date|Language|Character set encoding|Editor|Translator|Illustrator|Edition"
    r"|Subtitle|Contributor|Last updated|Most recently updated|Original publication|Credits)[ \t]*:"
)
_FIELDS = re.compile(_FIELD, re.I | re.M)
# What a header or licence says over and over, and a book hardly ever: its gaps tell where the boilerplate ends.
_GUTENBERG_WORDS = re.compile(
    r"\bpro\w{3,6}[\s-]+gutenberg|gutenberg\W{0,3}(?:tm|org|net|literary|association|projekt|e-?text|e-?book)\b"
    r"|\be-?texts?\b|\be-?books?\b|small print|public domain|copyright laws|plain vanilla|donations?\b"
    r"|(?:updated|corrected) editions|full license|michael s?\.? ?hart|limited warranty|right of replacement"
    rf"|{_FIELD}",
    re.I | re.M,
)
_NUMBER = re.compile(r"\[e-?(?:text|book)\s*#\s*\d+\]", re.I)  # the oldest headers have no fields, but this
# A book may name Project Gutenberg in its first lines; one of these makes it a header.
_HEADER_PROOF = re.compile(
    r"^(?:Title|Release date|Character set encoding)[ \t]*:|\[e-?(?:text|book)\s*#|small print"
    r"|copyright laws are changing|e-?(?:text|book) is for the use of anyone|plain vanilla"
    r"|e-?(?:texts|books) (?:prepared|readable) by",
    re.I | re.M,
)
_MADE = (
    r"(?:produced|prepared|transcribed|scanned|typed|typeset|digiti[sz]ed|proof-?read|proofed|reformatted|converted"
    r"|created|provided|contributed|donated|entered|submitted|made|corrected|updated|edited)"
)
_MADE_FROM_PAPER = r"(?:produced|transcribed|scanned|typed|digiti[sz]ed|proof-?read|proofed|reformatted|ocr['’]?e?d)"
# "Produced by A. Nobody and the Online Team", "This eBook was prepared by ...". Not "Written by": that is the author.
_CREDIT = re.compile(
    r"[\[(*_\s]*(?:"
    r"(?:(?:this|the)\s+)?(?:project\s+gutenberg\s+)?(?:e-?text|e-?book|electronic\s+(?:text|edition|version))\s+"
    rf"(?:(?:was|is|has\s+been)\s+)?(?:originally\s+)?{_MADE}\b"
    rf"|this\s+(?:text|file)\s+was\s+(?:originally\s+)?(?:prepared|{_MADE_FROM_PAPER})\s+(?:by|from|for)\b"
    rf"|(?:original\s+|html\s+)?{_MADE_FROM_PAPER}(?:(?:,|\s+and|\s+&)\s+[\w-]+){{0,3}}\s+(?:by|from)\b"
    r"|(?:text|html)\s+(?:file|version|edition)\s.{0,20}?\bby\b"
    r"|credits?\s*:|scanned\s+images\s+provided"
    r"|note:\s+(?:project\s+gutenberg|images?\s+of\s+the\s+original|the\s+original\s+\w+\s+(?:of|for)\s+this)"
    r")",
    re.I,
)
_EDITION_TITLE = re.compile(  # The Project Gutenberg Etext of Candide; Project Gutenberg's Candide, by Voltaire
    r"\W*(?:(?:this|here)\s+is\s+)?(?:the\s+)?pro\w{3,6}\s+gutenberg"
    r"(?:['’]s\s[^\n]*(?:\n[^\n]*)?\bby\s|\W{0,4}(?:e-?text|e-?book|edition)\b)[^\n]*(?:\n[^\n]+){0,2}(?<![.!?])\n?",
    re.I,
)
_MAKERS = re.compile(
    r"distributed\s+proof|\bpgdp\b|pglaf\.org|gutenberg\.(?:org|net)/|editions\s+of\s+this\s+e-?book"
    r"|click\s+on\s+any\s+of\s+the\s+file\s?numbers",
    re.I,
)
_EDITION_ROW = re.compile(r"\[?\s*#?\d{1,6}\s{2,}\S[^\n]*\n")
_NOTE = re.compile(
    r"\W*(?:transcri(?:ber|ption)s?['’`´]?s?['’]?\s+(?:end\s?|foot\s?)?(?:notes?|comments?|remarks?)"
    r"|notes?\s+(?:by|of|from)\s+(?:the\s+)?transcriber|anmerkung(?:en)?\s+(?:zur|der)\s+transkription"
    r"|note\s+(?:de|sur\s+la|du)\s+transcript(?:ion|eur))[^\w\n]*",
    re.I,
)
# [1], {A}, (iv): a footnote about an edition of Project Gutenberg is the book's own.
_FOOTNOTE = re.compile(r"\s*[\[{(]\w{1,4}[\]})]")
_HEADING = re.compile(r"\s*(?:chapter|part|book|volume|canto|act|scene|preface|contents|introduction|prologue)\b", re.I)
_PARAGRAPH = re.compile(r"[^\n]+(?:\n[^\n]+)*\n?")


def is_gutenberg(text: str) -> bool:
    """Whether a text carries a header or a footer of Project Gutenberg. Naming it in passing is not enough."""
    head, foot = unify_lines(text[:ZONE]), unify_lines(text[-ZONE:])
    return _header_end(head) > 0 or _footer_start(foot) < len(foot)


def book_limits(text: str) -> tuple[int, int]:
    """Where the book begins and ends in a text with unified lines. Only ENDS characters at either end matter."""
    start, before = _header_end(text[:ZONE]), 0  # characters
    while start > before:  # an older edition's header may stand inside the newer one, before or behind its credits
        before = start
        start += _header_end(text[start:ZONE])
        start = _skip_credits(text, start) if start == before else start
    first = max(start, len(text) - ZONE)
    end = first + _footer_start(text[first:])
    if start > 0 or end < len(text):
        end = _drop_last_credits(text, start, end)
        while (inner := first + _inner_footer_start(text[first:end])) < end:
            end = _drop_last_credits(text, start, inner)
        start, end = _skip_first_notes(text, start, end), _drop_last_notes(text, start, end)
    return start, end


def unify_lines(text: str) -> str:
    """LF line ends; no byte order mark, form feeds, end-of-file characters of DOS, or white space before line ends."""
    text = text.removeprefix("\ufeff").replace("\f", "").replace("\x1a", "")
    text = text.replace("\r\r\n", "\n").replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join([line.rstrip() for line in text.split("\n")])


def _header_end(head: str) -> int:
    """Where the header at the start of a text ends; 0 if there is none.

    Args:
        head: The first characters of the text, or all of it.
    """
    marker = _START_MARKER.search(head)
    if marker and _can_be_header(head[: marker.start()]):
        end = _marker_end(head, marker)
        small_print = _SMALL_PRINT_START.match(head[end:].lstrip("\n"))
        return _header_end(head[end:]) + end if small_print else end
    small_print = _SMALL_PRINT_END.search(head)
    if small_print:
        start = _SMALL_PRINT_START.search(head, 0, small_print.start())
        before = head[: start.start() if start else small_print.start()]
        if _can_be_header(before) and not _END_MARKER.search(before) and not _FOOTER_LINE.search(before):
            return small_print.end()
    return _unmarked_header_end(head)


def _can_be_header(before: str) -> bool:
    """Whether everything before a marker can be a header: it is nearly nothing, or speaks of Gutenberg to the end."""
    words = list(_GUTENBERG_WORDS.finditer(before))
    if not words:
        return len(before.strip()) < 500
    return len(before) - words[-1].end() < 1_000 and _is_boilerplate(before)


def _is_boilerplate(part: str) -> bool:
    """Whether Project Gutenberg's words come up all through a part of a file."""
    last = 0
    for word in _GUTENBERG_WORDS.finditer(part):
        if word.start() - last > WIDEST_GAP:
            return False
        last = word.end()
    return len(part) - last <= WIDEST_GAP


def _marker_end(head: str, marker: re.Match[str]) -> int:
    """The end of a start marker, whose title may run over the next lines until the closing asterisks."""
    if marker[0].endswith("*"):
        return marker.end()
    rest = re.compile(r"(?:\n[^\n]+){1,4}?\*\*$", re.M).match(head, marker.end())
    return rest.end() if rest else marker.end()


def _unmarked_header_end(head: str) -> int:
    """The end of a header without markers: its last field, its number, or the last of its small print."""
    opening = _OPENING.search(head[:1500])
    if not opening or head[: opening.start()].strip("\n").count("\n\n") > 2 or not _HEADER_PROOF.search(head[:FRONT]):
        return 0
    has_fields = _FIELDS.search(head[:FRONT])
    ending = _GUTENBERG_WORDS if _SMALL_PRINT_START.search(head) else _FIELDS if has_fields else _NUMBER
    end = last = 0
    for paragraph in _PARAGRAPH.finditer(head):
        if paragraph.start() - last > WIDEST_GAP // 3:
            break
        if _GUTENBERG_WORDS.search(paragraph[0]):
            last = paragraph.end()
        if ending.search(paragraph[0]):
            end = paragraph.end()
    return end


def _skip_credits(text: str, start: int) -> int:
    """Where the book begins after lines such as 'Produced by ...' that follow the header."""
    if start == 0:
        return 0
    lists_editions = False
    for paragraph in _PARAGRAPH.finditer(text, start, start + FRONT):
        decoration = not any(map(str.isalnum, paragraph[0]))
        lists_editions = lists_editions or "editions of this" in paragraph[0].lower()
        if _is_credit(paragraph[0]) or (lists_editions and _EDITION_ROW.fullmatch(paragraph[0])):
            start = paragraph.end()
        elif not decoration:
            break
    return start


def _is_credit(paragraph: str) -> bool:
    if _EDITION_TITLE.fullmatch(paragraph):
        return True
    return paragraph.count("\n") <= 15 and bool(_CREDIT.match(paragraph) or _MAKERS.search(paragraph))


def _footer_start(foot: str) -> int:
    """Where the footer at the end of a text starts; the length of `foot` if there is none.

    Args:
        foot: The last characters of the text, from the end of its header at the earliest.
    """
    if (start := _inner_footer_start(foot)) < len(foot):
        return start
    markers = list(_END_MARKER.finditer(foot))
    if markers and len(foot) - markers[-1].end() < max(2_000, len(foot) // 8):
        return markers[-1].start()
    return len(foot)


def _inner_footer_start(foot: str) -> int:
    """Where the first footer line stands that has little but Project Gutenberg's words after it."""
    markers = list(_END_MARKER.finditer(foot))
    for match in sorted([*markers, *_FOOTER_LINE.finditer(foot)], key=re.Match.start):
        after = foot[match.end() :].strip()
        word = _GUTENBERG_WORDS.search(after)
        if len(after) < 300 or (word and word.start() < 400 and _is_boilerplate(after)):
            return match.start()
    return len(foot)


def _drop_last_credits(text: str, start: int, end: int) -> int:
    """Where the book ends before credits that stand above the footer; a footnote that names Gutenberg is no credit."""
    for paragraph in reversed(list(_PARAGRAPH.finditer(text, max(start, end - FRONT), end))):
        if not _is_credit(paragraph[0]) or _FOOTNOTE.match(paragraph[0]):
            break
        end = paragraph.start()
    return end


def _skip_first_notes(text: str, start: int, end: int) -> int:
    """Where the book begins after transcriber's notes that open it."""
    limit = min(end, start + FRONT)
    for paragraph in _PARAGRAPH.finditer(text, start, limit):
        if paragraph.start() < start:
            continue  # inside the note before
        if _NOTE.match(paragraph[0]):
            start = _note_end(text, paragraph, limit)
        elif any(map(str.isalnum, paragraph[0])):
            break
    return start


def _note_end(text: str, note: re.Match[str], limit: int) -> int:
    """Where a transcriber's note ends that starts in the paragraph `note`.

    A note in brackets ends with its bracket, a boxed one or one that starts on the line of its heading with its
    paragraph. Under a heading of its own it lasts until two blank lines or another heading; without them it is left in.
    """
    if note[0].lstrip().startswith("["):
        break_after = text.find("\n\n\n", note.end(), limit)
        closing = re.compile(r"\]$", re.M).search(text, note.start(), limit if break_after < 0 else break_after)
        return closing.end() if closing else note.end()
    if not _NOTE.fullmatch(note[0].strip()):
        return note.end()
    end = note.end()
    for paragraph, gap in _paragraphs_with_gaps(text, note.end(), limit):
        if end > note.end() and (gap > 1 or paragraph[0].isupper() or _HEADING.match(paragraph[0])):
            return end
        end = paragraph.end()
    return note.start()


def _drop_last_notes(text: str, start: int, end: int) -> int:
    """Where the book ends before transcriber's notes that close it.

    Under a heading of its own a note may have several paragraphs if it is short or set off by two blank lines.
    Any other must be the last paragraph, or a bracket that closes the text.
    """
    note_start = note_end = end
    for paragraph, gap in _paragraphs_with_gaps(text, max(start, end - FRONT), end):
        if _NOTE.match(paragraph[0]):
            note_start = min(note_start, paragraph.start())
            has_heading = _NOTE.fullmatch(paragraph[0].strip())
            several = has_heading and (gap >= 2 or end - paragraph.start() < 500)
            note_end = end if several else _note_end(text, paragraph, end)
        elif paragraph.start() >= note_end or gap > 2 or paragraph[0].isupper():
            note_start = note_end = end  # the book goes on
    return note_start


def _paragraphs_with_gaps(text: str, start: int, end: int) -> Iterator[tuple[re.Match[str], int]]:
    """The paragraphs of a part of a text, each with the number of blank lines before it."""
    last = start
    for paragraph in _PARAGRAPH.finditer(text, start, end):
        yield paragraph, paragraph.start() - last
        last = paragraph.end()
