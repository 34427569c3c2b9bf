r"""The syntax of selectors: one line of text -> Selector. No model is needed; `model/selectors` applies what is read.

embeddings, embeddings.tokens, embeddings.positions        input embeddings
embeddings.tokens[50257:], head[-4:]                       rows of a matrix, Python's indices and slices
experts[3], experts[0,2:4], blocks[-1].experts[3]          single experts of a mixture, likewise
blocks[11], blocks[-2:], blocks[0,3:6,-1]                  whole blocks, Python's indices and slices
blocks[...].attention, .mlp, .router, .experts,            a part of those blocks
            .mixer, .norms, .biases
attention, mlp, router, experts, mixer, norms, biases      that part of every block (norms, biases: final norm too)
final_norm, head, all                                      as named
vision, projector, language                                a tower of a model that has several
language.blocks[-2:], language.attention, ...              any of the above but all, of the language tower
/transformer\.h\.\d+\.ln_1\..*/                            full dotted names, re.fullmatch
!selector                                                  taken away from what came before it
"""

import difflib
import re
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from partialtune.errors import RecipeError
from partialtune.grammar.named_selectors import BLOCK_PARTS, LANGUAGE_PARTS, WITH_ROWS, WORD_FOR, WORDS

PATIENCE_SECONDS = 2.0  # for one name; an ordinary pattern takes microseconds
HOW_BLOCKS_ARE_WRITTEN = (
    "Blocks are written blocks[11], blocks[-2:], blocks[0,3:6,-1] or blocks[:] (all of them), and a part of them "
    "blocks[-1].attention; attention alone is that of every block."
)

HOW_ROWS_ARE_WRITTEN = (
    "Rows are written embeddings.tokens[-4:], embeddings.tokens[50257:], head[0,3:6,-1]: rows of the matrix, counted "
    "as Python counts."
)
HOW_EXPERTS_ARE_WRITTEN = (
    "Experts are written experts[3], experts[0,2:4] or blocks[-1].experts[3]; experts alone is all of them."
)


class Pattern:
    """A compiled regular expression of Python's re, whose matching is broken off after PATIENCE_SECONDS.

    Args:
        written: The selector as it was written, for messages.
        source: The expression between the slashes.

    Raises:
        RecipeError: If it is none.
    """

    def __init__(self, written: str, source: str) -> None:
        self.written, self.pattern = written, source
        try:
            self._compiled = re.compile(source)
        except (re.error, OverflowError, RecursionError) as error:
            raise RecipeError(f"{written} cannot be read as a regular expression of Python's re: {error}.") from error

    def fullmatch(self, name: str) -> re.Match | None:
        return self._in_time(self._compiled.fullmatch, name)

    def search(self, name: str) -> re.Match | None:
        return self._in_time(self._compiled.search, name)

    def _in_time(self, match: Callable[[str], re.Match | None], name: str) -> re.Match | None:
        if threading.current_thread() is not threading.main_thread():
            return match(name)  # only the main thread has signals, which re listens to while it matches

        def give_up(number, frame) -> None:
            raise RecipeError(
                f"{self.written} takes more than {PATIENCE_SECONDS:g} s on the name {name}: repetitions within "
                rf"repetitions, as in (\w+)+, can be matched in too many ways. Write one of them."
            )

        before = signal.signal(signal.SIGALRM, give_up)
        left, interval = signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
        try:
            return match(name)
        finally:
            signal.setitimer(signal.ITIMER_REAL, left, interval)
            signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Selector:
    """One selector as it was read. Exactly one of `word`, `indices` and `pattern` is set."""

    text: str  # as written, with its "!"
    removes: bool  # whether it has a "!"
    word: str | None = None  # one of WORDS
    indices: tuple[int | slice, ...] | None = None  # of blocks
    part: str | None = None  # of those blocks, one of BLOCK_PARTS; None for all of a block
    pattern: Pattern | None = None
    rows: tuple[int | slice, ...] | None = None  # of the matrices that word or part names; None for all of them
    of_language: bool = False  # whether it stands behind "language.", and so asks for a model of several towers


def parse_selector(text: str) -> Selector:
    """Read one selector: parse_selector("!blocks[-2:].norms") removes the norms of blocks slice(-2, None).

    Raises:
        RecipeError: If it is not in the grammar; the message gives the nearest that is.
    """
    if not isinstance(text, str):
        raise RecipeError(f"selector {text!r} is not text. In YAML, quote selectors: 'blocks[-2:]', '!biases'.")
    written = text.strip()
    removes = written.startswith("!")
    body = written.removeprefix("!").strip()
    if body.startswith("/"):
        return Selector(written, removes, pattern=_parse_pattern(written, body))
    body = re.sub(r"\s*([\[\],:.])\s*", r"\1", body)
    of_language, body = body.startswith("language."), body.removeprefix("language.")
    words = LANGUAGE_PARTS if of_language else WORDS
    if body in words:
        return Selector(written, removes, word=body, of_language=of_language)
    of_word = re.fullmatch(r"([\w.]+)\[([^\[\]]*)\]", body)
    if of_word is not None and of_word[1] in WITH_ROWS:
        of_matrix = _parse_rows(written, of_word[1], of_word[2])
        return Selector(written, removes, word=of_word[1], rows=of_matrix, of_language=of_language)
    blocks = re.fullmatch(r"blocks\[([^\[\]]*)\](?:\.(.*))?", body)
    if blocks is None:
        advice = _nearest_of_language(body) if of_language else _nearest_selector(body, removes)
        raise RecipeError(f"unknown selector {written!r}. {advice}")
    indices = tuple(_parse_index(written, item) for item in blocks[1].split(","))
    part: str | None = blocks[2]
    rows: tuple[int | slice, ...] | None = None
    of_part = re.fullmatch(r"(\w+)\[([^\[\]]*)\]", part or "")
    if of_part is not None and of_part[1] in WITH_ROWS:
        part, rows = of_part[1], _parse_rows(written, of_part[1], of_part[2])
    return Selector(written, removes, None, indices, _parse_part(written, part), None, rows, of_language)


def check_selector_syntax(selector: str) -> str | None:
    """What is wrong with the text of a selector, in words, or None. Needs no model."""
    try:
        parse_selector(selector)
    except RecipeError as error:
        return str(error)
    return None


def numbers_of(
    indices: Iterable[int | slice], count: int, empty: Callable[[slice], str], beyond: Callable[[int], str]
) -> set[int]:
    """Which of range(count) Python's indices and slices choose, so that [-2:] and [::2] mean what they mean there.

    Args:
        indices: As a selector has them between its brackets.
        count: How many there are to choose from.
        empty, beyond: What to say of a slice that chooses none, and of an index that is out of range.

    Raises:
        RecipeError: If one of them is so.
    """
    numbers: set[int] = set()
    for index in indices:
        if isinstance(index, slice):
            chosen = range(count)[index]
            if not chosen:
                raise RecipeError(empty(index))
            numbers.update(chosen)
        elif not -count <= index < count:
            raise RecipeError(beyond(index))
        else:
            numbers.add(index % count)
    return numbers


def slice_as_written(chosen: slice) -> str:
    """slice(-2, None) -> "-2:"."""
    numbers = [chosen.start, chosen.stop] if chosen.step is None else [chosen.start, chosen.stop, chosen.step]
    return ":".join("" if number is None else str(number) for number in numbers)


def _parse_pattern(written: str, body: str) -> Pattern:
    if len(body) < 3 or not body.endswith("/"):
        raise RecipeError(rf"{written}: a regular expression stands between two slashes, like /.*\.ln_1\.weight/.")
    return Pattern(written, body[1:-1])


def _parse_index(written: str, item: str, how: str = HOW_BLOCKS_ARE_WRITTEN) -> int | slice:
    if not re.fullmatch(r"[+-]?[0-9]{1,9}|([+-]?[0-9]{1,9})?(:([+-]?[0-9]{1,9})?){1,2}", item):
        raise RecipeError(f"{written}: {item!r} is neither an index nor a slice. {how}")
    if ":" not in item:
        return int(item)
    numbers = [int(number) if number else None for number in item.split(":")]
    if numbers[2:] == [0]:
        raise RecipeError(f"{written}: the step of a slice cannot be 0. [::2] takes every second one.")
    return slice(*numbers)


def _parse_rows(written: str, word: str, items: str) -> tuple[int | slice, ...]:
    how = HOW_EXPERTS_ARE_WRITTEN if word == "experts" else HOW_ROWS_ARE_WRITTEN
    return tuple(_parse_index(written, item, how) for item in items.split(","))


def _parse_part(written: str, part: str | None) -> str | None:
    if part is None or part in BLOCK_PARTS:
        return part
    near = _nearest(part, BLOCK_PARTS)
    hint = f" Did you mean {near}?" if near else ""
    raise RecipeError(f"{written}: a block has no part {part!r}.{hint} Its parts are {', '.join(BLOCK_PARTS)}.")


def _nearest_selector(body: str, removes: bool) -> str:
    if re.match(r"(blocks?|layers?|h)(\W|$)", body):
        return HOW_BLOCKS_ARE_WRITTEN
    hint = ""
    near = _nearest(body, WORDS)
    if near:
        hint = f"Did you mean {'!' if removes else ''}{near}? "
    elif re.fullmatch(r"\w+(\.\w+)+", body):
        hint = f"A parameter's full name goes between slashes: '/{re.escape(body)}/'. "
    return f"{hint}Selectors are {', '.join(WORDS)}, blocks[...] and /regex/, each also with a '!' before it."


def _nearest_of_language(body: str) -> str:
    near = _nearest(body, LANGUAGE_PARTS)
    hint = f"Did you mean language.{near}? " if near else ""
    return f"{hint}Behind language. stand {', '.join(LANGUAGE_PARTS)} and blocks[...]."


def _nearest(word: str, allowed: tuple[str, ...]) -> str | None:
    meant = WORD_FOR.get(word.lower())
    close = [meant] if meant in allowed else difflib.get_close_matches(word.lower(), allowed, 1)
    return close[0] if close else None
