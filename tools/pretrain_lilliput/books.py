"""Books to train on: a folder of Project Gutenberg files -> cleaned texts, their own tokenizer, batches of windows."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from partialtune.errors import TextError
from partialtune.text.cleaning import clean_gutenberg

END_OF_TEXT = "<|endoftext|>"

# What BPE may merge: a contraction, a word, up to three digits, a run of punctuation (each with one space before it),
# a run of line breaks, other white space. No piece goes on into white space, so a text cut before white space gives
# the same tokens as the whole.
PIECES = r"['’](?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"


def read_books(folder: Path, held_out: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Read every .txt file of a folder (UTF-8), cleaned: ({file stem: text} to train on, {file stem: text} held out).

    Raises:
        TextError: If the folder has no book to train on, or a held-out book is not there.
    """
    books = {path.stem: clean_gutenberg(path.read_text("utf-8-sig")).text for path in sorted(folder.glob("*.txt"))}
    absent = [name for name in held_out if name not in books]
    if absent:
        raise TextError(f"Held-out book {absent[0]!r} is not among the .txt files of {folder}. Name one without .txt.")
    training = {name: tidy(text) for name, text in books.items() if name not in held_out}
    if not training:
        raise TextError(f"{folder} has no .txt file to train on. Give a folder of Project Gutenberg books.")
    return training, {name: books[name] for name in held_out}


def tidy(text: str) -> str:
    """Drop what teaches a small model nothing: table-like lines (two gaps of 3+ spaces or dots) and runs of spaces."""
    lines = [line for line in text.split("\n") if len(re.findall(r"\S(?: {3,}|(?: ?\.){4,} ?)(?=\S)", line)) < 2]
    text = "\n".join(re.sub(r"(?<=\S)[ \t]{2,}", " ", line).rstrip() for line in lines)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def book_title(path: Path) -> str:
    """`Title, by Author` from a Project Gutenberg header, or the file's name."""
    head = path.read_text(encoding="utf-8-sig", errors="replace")[:4000]
    found = [re.search(rf"^{key}:\s*(.+)$", head, re.MULTILINE) for key in ("Title", "Author")]
    return ", by ".join(match.group(1).strip() for match in found if match) or path.stem


def train_tokenizer(texts: Sequence[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: any Unicode text encodes, and decodes to itself."""
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def window_batches(stream: Tensor, context: int, batch: int, seed: int, first: int) -> Iterator[Tensor]:
    """Batches (batch, context + 1) for ever, from batch number `first` on; every epoch cuts and shuffles anew.

    Raises:
        TextError: If the stream, shape (n,), is shorter than a batch.
    """
    per_epoch = (len(stream) - 1 - context) // context // batch
    if per_epoch < 1:
        raise TextError(
            f"The books have {len(stream):,} tokens, a batch needs {(batch + 1) * context + 1:,}. "
            f"Add books or lower --batch_tokens."
        )
    for number in itertools.count(first):
        epoch, position = divmod(number, per_epoch)
        if position == 0 or number == first:
            random = np.random.default_rng((seed, epoch))
            starts = random.integers(context) + context * random.permutation(per_epoch * batch)
        rows = starts[position * batch : (position + 1) * batch]
        yield torch.stack([stream[row : row + context + 1] for row in rows])
