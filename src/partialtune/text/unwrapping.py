"""Hard-wrapped lines of plain text -> a line per paragraph; verse, tables, headings, indented lines keep their breaks.

Nothing marks a wrapped line in plain text, so its width is learnt first: a line whose successor starts with a small
letter was almost certainly wrapped, and with the successor's first word on it, it would have been too long. A break
counts as wrapping if its line, too, would have reached that far.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

FALLBACK_REACH = 60  # characters; for texts with too few wrapped lines to learn from
FEWEST_SAMPLES = 20  # wrapped lines below which a learnt width is worth less than the fallback
WIDEST_WRAP = 130  # characters; nobody wraps lines wider than this, a longer line is a paragraph by itself
LONGEST_BLOCK = 100_000  # lines; more without a blank line between are no paragraph, and are joined part by part
DEEPEST_PARAGRAPH_INDENT = 8  # spaces; a line indented further is centred or set to the right

_LETTER = re.compile(r"[^\W\d_]")
# "12. ", "(iv) ", "* ", "[3] ": a line of its own, if the line before it ends a sentence
_LIST_ITEM = re.compile(r"(?:\(?(?:\d{1,3}|[ivxlc]{1,5}|[a-z])[.)]|[*•]|\[\w{1,4}\]|\{\w{1,4}\})\s")
# "-- Who is it?": another speaker. A dash before a small letter goes on with the sentence.
_SPEECH_DASH = re.compile(r"(?:--|[—–-])\s?[^\W\da-z_]")
_SENTENCE_END = re.compile(r"[.!?:;…][\"'”’»)\]_]*$")
_PAUSE_END = re.compile(r"[.,:;!?][\"'”’»)\]_]*$")
_SUSPENDED = re.compile(r"(?:and|or|und|oder|et|ou)\b(?!-)")  # "two-" and the next line "and three-legged"
_WIDE_SCRIPT = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")  # written without spaces


@dataclass(frozen=True)
class WrapWidth:
    """How a text was wrapped, in characters of a wrapped line with its successor's first word on it.

    Nine tenths of the wrapped lines have at least `reach`, 99 in 100 have `shortest_reach`; no line is over `longest`.
    """

    reach: int
    shortest_reach: int
    longest: int


def unwrapped_lines(lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Join the lines of each paragraph that were parted only by wrapping.

    ["So we beat on, boats against the current, borne back", "ceaselessly into the past."]
    -> ["So we beat on, boats against the current, borne back ceaselessly into the past."]

    Args:
        lines: Lines without line ends and without trailing white space, from the first one at every call. The text
            passes twice, to learn how it was wrapped and to join it; three times where all of it is indented.

    Returns:
        The lines of the text, blank ones included; a joined paragraph is one line.
    """
    indents: Counter[int] = Counter()
    width = learn_wrap_width(_counted(lines(), indents))
    margin = " " * left_margin(indents)
    if margin:  # a line's width counts without it
        width = learn_wrap_width(line.removeprefix(margin) for line in lines())
    block: list[str] = []
    for line in lines():
        line = line.removeprefix(margin)
        if line:
            block.append(line)
        if block and (not line or len(block) == LONGEST_BLOCK):
            yield from _join_block(block, width) if len(block) > 1 else block
            block = []
        if not line:
            yield ""
    yield from _join_block(block, width) if len(block) > 1 else block


def _counted(lines: Iterable[str], indents: Counter[int]) -> Iterator[str]:
    """The lines, once their indents were counted."""
    for line in lines:
        if line:
            indents[indent_of(line)] += 1
        yield line


def learn_wrap_width(lines: Iterable[str]) -> WrapWidth:
    """Learn the width from breaks before a small letter, which are hardly ever meant.

    Shares instead of the least and the largest, because some texts were wrapped by hand and hold some verse.
    """
    reaches: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    for line, following in pairwise(lines):
        if following[:1].islower() and 30 <= len(line) <= WIDEST_WRAP:
            reaches[_reach(line, following)] += 1
            lengths[len(line)] += 1
    samples = reaches.total()
    if samples < FEWEST_SAMPLES:
        return WrapWidth(FALLBACK_REACH, FALLBACK_REACH * 3 // 4, WIDEST_WRAP)
    reach = max(_at_rank(reaches, samples // 10), 40)
    shortest_reach = max(_at_rank(reaches, samples // 100), reach * 3 // 4)
    return WrapWidth(reach, shortest_reach, min(_at_rank(lengths, samples * 99 // 100) + 10, WIDEST_WRAP))


def _at_rank(counts: Counter[int], rank: int) -> int:
    """The value that stands at index `rank` where all counted values are sorted."""
    for value in sorted(counts):
        rank -= counts[value]
        if rank < 0:
            return value
    raise IndexError("rank is beyond the last value")


def left_margin(indents: Counter[int]) -> int:
    """Spaces that nearly every line starts with, as in some old files that are indented as a whole; mostly 0.

    Args:
        indents: How many lines that are not blank have which indent.
    """
    margin = indents.most_common(1)[0][0] if indents else 0
    beyond = sum(count for indent, count in indents.items() if indent >= margin)
    return margin if beyond > 0.9 * indents.total() else 0


def _join_block(block: list[str], width: WrapWidth) -> list[str]:
    """Join one run of at least two lines without a blank line between."""
    reaches = [_reach(line, following) for line, following in pairwise(block)]
    small = [_starts_small(line) for line in block[1:]]
    fixed = [_is_fixed(line, following, width) for line, following in pairwise(block)]

    def wrapped(reach_before_small: int, reach_before_other: int) -> list[bool]:
        return [
            not is_fixed and reach >= (reach_before_small if is_small else reach_before_other)
            for reach, is_small, is_fixed in zip(reaches, small, fixed, strict=True)
        ]

    breaks = wrapped(width.shortest_reach, width.reach)
    if not all(breaks):
        if _is_verse(breaks, small):
            return block
        # Where most breaks of a block are wrapping, it is prose, and the others are judged by less than at first.
        if 2 * sum(breaks) >= len(breaks):  # prose: what is left over are its wrapper's odd short lines
            breaks = wrapped(width.reach // 2, width.shortest_reach)
    pieces = [block[0]]
    for (line, following), was_wrapped, is_small in zip(pairwise(block), breaks, small, strict=True):
        joins = was_wrapped and not _starts_anew(line, following, is_small)
        if joins and not is_small and following is not block[-1] and len(following) < width.reach // 2:
            joins = False  # a short line inside a block, such as the first one of a letter's end
        pieces += [_glue(line, following) if joins else "\n", following]
    return "".join(pieces).split("\n")


def _is_fixed(line: str, following: str, width: WrapWidth) -> bool:
    """Whether a break is meant for certain: before an indented line, after a centred one, beside a table's row."""
    return (
        following[0].isspace()
        or len(line) > width.longest
        or (line[0].isspace() and indent_of(line) > DEEPEST_PARAGRAPH_INDENT)
        or _is_table_row(line)
        or _is_table_row(following)
    )


def _is_verse(breaks: list[bool], small: list[bool]) -> bool:
    """Whether the breaks of a block that is not all wrapped look meant: most come early, and before capitals."""
    if not any(small):
        return len(breaks) >= 2
    return 2 * sum(breaks) < len(breaks) and 2 * sum(small) < len(small)


def _starts_anew(line: str, following: str, is_small: bool) -> bool:
    """Whether `following` begins something of its own: a list's item, another speaker, a heading, a signature."""
    if _LIST_ITEM.match(following) or _SPEECH_DASH.match(following):
        return bool(_SENTENCE_END.search(line))
    if is_small:
        return False
    return _is_capitals(line) or (_is_capitals(following) and bool(_PAUSE_END.search(line)))


def _starts_small(line: str) -> bool:
    """Whether the first letter of a line is a small one, or of a script without capitals."""
    if line[0].islower():
        return True
    letter = _LETTER.search(line)
    return letter is not None and not letter[0].isupper()


def _is_capitals(line: str) -> bool:
    return line.isupper() and len(_LETTER.findall(line)) >= 4


def _is_table_row(line: str) -> bool:
    """Whether a line has columns, dot leaders or a frame."""
    row = line.lstrip()
    return "   " in row or "\t" in row or "....." in row or ". . . . ." in row or row[0] in "|+" or row[-1] in "|+"


def indent_of(line: str) -> int:
    """White space that a line starts with, in characters."""
    return len(line) - len(line.lstrip())


def _reach(line: str, following: str) -> int:
    """Characters that `line` would have had with the first word of `following` on it."""
    word_end = following.find(" ", 1)
    spaces = 2 if line[-1] in ".?!" else 1  # typists put two after a sentence
    return len(line) + spaces + (word_end if word_end > 0 else len(following))


def _glue(line: str, following: str) -> str:
    """What goes between two joined lines: a space, or nothing beside a hyphen or dash that stands without spaces."""
    if line[-1] in "-—":
        spaced = line.rstrip("-—")[-1:] in ("", " ")
        return " " if spaced or (line[-2:] != "--" and _SUSPENDED.match(following)) else ""
    if following[0] == "—" or following.startswith("--"):
        return " " if following.lstrip("-—")[:1] in ("", " ") else ""
    return "" if _WIDE_SCRIPT.match(line[-1]) and _WIDE_SCRIPT.match(following) else " "
