"""The recipe's texts -> what a run trains and scores on: training windows, held-out windows, scored texts; batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from partialtune.insight.moved_tokens import token_counts
from partialtune.recipe.arguments import TextArguments
from partialtune.recipe.recipe import Recipe
from partialtune.scoring.evaluation import ScoredText, evenly_spaced
from partialtune.text.lossless import round_trip_of
from partialtune.text.reading import IN_MEMORY_BYTES, SourceText, read_texts
from partialtune.text.stored_text import StoredText, utf8_bytes
from partialtune.text.tokenizing import token_ids_of
from partialtune.text.windows import cached_windows, chunked_windows, random_windows, release_pages, split_text
from partialtune.training.settings import data_seed

TRAINING_WINDOWS_SCORED = 256


@dataclass(frozen=True)
class RunData:
    """What the texts became.

    Attributes:
        sources: The training texts as they were read.
        train: Training windows, `input_ids` (block_size,).
        held_out: Held-out windows, None where nothing is held out.
        scored: Texts that are scored before and after: `validation`, `training`, and those of `eval_texts`.
        token_counts: How often each token occurs in the training text, int64, shape (largest id + 1,).
        largest_ids: The largest token id of each text, by the key of the recipe that names it.
    """

    sources: list[SourceText]
    train: Dataset
    held_out: Dataset | None
    scored: dict[str, ScoredText]
    token_counts: np.ndarray
    largest_ids: dict[str, int]


def data_of_recipe(recipe: Recipe, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """The windows and scored texts of a recipe; in files that several processes share, so that they are made once.

    Raises:
        TextError: As `prepare_data`.
    """
    in_memory = IN_MEMORY_BYTES if args.world_size == 1 else 0
    return prepare_data(recipe.text, recipe.evaluation.eval_texts, tokenizer, data_seed(args), in_memory)


def prepare_data(
    arguments: TextArguments,
    eval_texts: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> RunData:
    """Read, split, tokenise and window the texts of a run.

    Of several processes on a machine one should do it first: the others find downloads and what it has put on disk.

    Args:
        arguments: The recipe's text settings.
        eval_texts: Further texts to score, name -> source.
        tokenizer: The model's tokenizer.
        seed: Seed of random windows.
        in_memory_bytes: As in `read_texts`; what exceeds it is streamed, and cached by content.

    Raises:
        TextError: If a text cannot be read or is too short for one window.
    """
    sources = read_texts(arguments.text, arguments.text_cleaning, arguments.text_column, in_memory_bytes)
    halves = [split_text(source.content, arguments.validation_share) for source in sources]
    train_texts = [train for train, _ in halves]
    held_out_texts = [held_out for _, held_out in halves if held_out]

    train_ids = token_ids_of(train_texts, tokenizer)
    train = _training_windows(train_ids, arguments, seed)
    scored: dict[str, ScoredText] = {}
    counts = token_counts(train_ids)
    largest = {"text": len(counts) - 1}
    if held_out_texts:
        held_out_ids = token_ids_of(held_out_texts, tokenizer)
        largest["text"] = max(largest["text"], _largest(held_out_ids))
        scored["validation"] = _scored(held_out_texts, held_out_ids, arguments.block_size)
    scored["training"] = _scored(train_texts, train_ids, arguments.block_size, limit=TRAINING_WINDOWS_SCORED)
    written = {"validation": held_out_texts, "training": train_texts}
    for name, source in eval_texts.items():
        read = read_texts([source], arguments.text_cleaning, arguments.text_column, in_memory_bytes)
        texts = [text.content for text in read]
        token_ids = token_ids_of(texts, tokenizer)
        largest[f"eval_texts {name}"] = _largest(token_ids)
        scored[name] = _scored(texts, token_ids, arguments.block_size)
        written[name] = texts
    scored = {name: _with_round_trip(name, text, written[name], tokenizer) for name, text in scored.items()}
    held_out = scored["validation"].windows if held_out_texts else None
    return RunData(sources, train, held_out, scored, counts, largest)


def _largest(token_ids: Sequence[np.ndarray]) -> int:
    """The largest of the ids, -1 where there is none."""
    largest = max((int(ids.max()) for ids in token_ids if len(ids)), default=-1)
    for ids in token_ids:
        release_pages(ids)
    return largest


def _with_round_trip(
    name: str, scored: ScoredText, texts: Sequence[str | StoredText], tokenizer: PreTrainedTokenizerBase
) -> ScoredText:
    """A scored text with whether it comes back from its tokens; a warning is logged where it does not."""
    round_trip = round_trip_of(texts, tokenizer)
    round_trip.warn(name)
    return replace(scored, comes_back=round_trip.lossless)


def _training_windows(token_ids: Sequence[np.ndarray], arguments: TextArguments, seed: int) -> Dataset:
    """Windows as the recipe wants them."""
    size = arguments.block_size
    if arguments.window_sampling == "random":
        return cached_windows(
            token_ids, ["random", size, seed, np.__version__], lambda path: random_windows(token_ids, size, seed, path)
        )
    stride = arguments.window_stride or size
    return cached_windows(
        token_ids, ["chunked", size, stride], lambda path: chunked_windows(token_ids, size, stride, path)
    )


def _scored(
    texts: Sequence[str | StoredText], token_ids: Sequence[np.ndarray], block_size: int, limit: int | None = None
) -> ScoredText:
    """What `evaluation.scored_text` prepares, of texts in memory or on disk."""
    windows = cached_windows(
        token_ids,
        ["chunked", block_size, block_size],
        lambda path: chunked_windows(token_ids, block_size, block_size, path),
    )
    return ScoredText(evenly_spaced(windows, limit), sum(map(len, token_ids)), utf8_bytes(texts))


def collate_windows(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Windows -> a batch: `input_ids` and `labels`, int64 (B, T).

    The model shifts the labels by one.
    """
    input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])  # (B, T)
    labels = input_ids.clone()
    # The first token of a window is context and no target. Left a label, it would be counted: Trainer divides the
    # summed loss by the number of labels, and for GPT-2 its losses would come out (T - 1) / T too small.
    labels[:, 0] = -100
    return {"input_ids": input_ids, "labels": labels}
