"""Whether a text comes back from its token ids: text -> ids -> text, on a sample -> shares unknown and lost.

Bits per byte is a fair score only where the ids hold the whole text. A tokenizer that knows few words or lowers its
letters has less to predict, and an untrained model would score 1.2 bits per byte with it.
"""

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from partialtune.text.stored_text import StoredText

logger = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 1 << 17  # of a text, evenly spaced: 0.1 s with a fast tokenizer
STRETCH = 256  # characters tokenised at a time
STRETCHES_A_PLACE = 8
# Share of characters that may be lost. One sign that a normaliser rewrites (NFKC: a ligature) does not spoil a score
# that is read to three digits; a lower-casing tokenizer loses thirty times as much.
TOLERATED = 0.001
_PARTS = re.compile(r"\s|\w+|[^\w\s]")


@dataclass(frozen=True)
class RoundTrip:
    """How much of a text comes back from its token ids, measured on a sample of it.

    Attributes:
        unknown: Share of the ids that are the tokenizer's unknown token.
        lost: Share of the characters that do not come back from their ids.
    """

    unknown: float
    lost: float

    @property
    def lossless(self) -> bool:
        """Whether the text comes back from its ids, but for TOLERATED."""
        return self.lost <= TOLERATED

    def warn(self, name: str) -> None:
        """Log what is lost, if anything is."""
        if not self.unknown and not self.lost:
            return
        fate = (
            "so little that its bits per byte are given all the same"
            if self.lossless
            else "so its bits per byte are withheld: they would count bytes that no token stands for"
        )
        logger.warning(
            "%s: %.2g%% of its tokens are unknown ones, and %.2g%% of its characters do not come back from their "
            "tokens, %s.",
            *(name, 100 * self.unknown, 100 * self.lost, fate),
        )


def round_trip_of(texts: Sequence[str | StoredText], tokenizer: PreTrainedTokenizerBase) -> RoundTrip:
    """Measure how much of texts comes back from their token ids.

    A text comes back if decoding its ids gives the same characters, up to Unicode's canonical equivalence (NFC) and a
    space that the tokenizer puts in front: neither takes anything from what is to be predicted.
    """
    unknown = tokens = lost = characters = 0
    stretches = list(_sample(texts))
    ids = [tokenizer(stretch, add_special_tokens=False, verbose=False)["input_ids"] for stretch in stretches]
    for stretch, row in zip(stretches, ids, strict=True):
        back = tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        lost += _lost(stretch, back)
        characters += len(stretch)
        unknown += row.count(tokenizer.unk_token_id)
        tokens += len(row)
    literal = sum(stretch.count(str(tokenizer.unk_token)) for stretch in stretches)  # a text may hold <unk> itself
    return RoundTrip(max(0, unknown - literal) / max(1, tokens), lost / max(1, characters))


def _sample(texts: Sequence[str | StoredText]) -> Iterator[str]:
    """Stretches of the texts, evenly spaced, that neither begin nor end with white space nor inside a word."""
    total = sum(map(len, texts))
    place = STRETCH * STRETCHES_A_PLACE
    every = max(place, total * place // SAMPLE_CHARACTERS)
    for text in texts:
        for at in range(0, len(text), every):
            end = min(len(text), at + place)
            part = text[at:end] if isinstance(text, str) else text.part(at, end).read()
            words = re.findall(r"\s*\S+", part)
            words = words[bool(at) : len(words) - (end < len(text))] or words  # the first and the last may be torn
            stretch = ""
            for word in words:
                stretch += word
                if len(stretch) >= STRETCH:
                    yield stretch.strip()
                    stretch = ""
            if stretch.strip():
                yield stretch.strip()


def _lost(text: str, back: str) -> int:
    """Characters of a text that are not in what came back, in order."""
    if text == back or text == back.removeprefix(" "):
        return 0
    text, back = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", back)
    if text == back or text == back.removeprefix(" "):
        return 0
    parts, others = _PARTS.findall(text), _PARTS.findall(back)
    blocks = difflib.SequenceMatcher(None, parts, others, autojunk=False).get_matching_blocks()
    kept = sum(len(part) for block in blocks for part in parts[block.a : block.a + block.size])
    return max(1, len(text) - kept)  # more than there was (a repeated word) is a loss too
