"""The recipe's texts -> what a run trains and scores on: training windows, held-out windows, scored texts; batches."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, TrainingArguments

from partialtune.errors import TextError
from partialtune.insight.moved_tokens import token_counts
from partialtune.recipe.arguments import TextArguments
from partialtune.recipe.recipe import Recipe
from partialtune.recipe.replay_key import NAME as REPLAY
from partialtune.run_folder import recorded_sources
from partialtune.scoring.evaluation import ScoredText, evenly_spaced
from partialtune.text.lossless import round_trip_of
from partialtune.text.reading import IN_MEMORY_BYTES, SourceText, check_texts_unchanged, read_texts
from partialtune.text.stored_text import StoredText, utf8_bytes
from partialtune.text.tokenizing import token_ids_of
from partialtune.text.windows import cached_windows, chunked_windows, random_windows, release_pages, split_text
from partialtune.training.other_processes import EpochOrder
from partialtune.training.replay import Replay, ReplayOrder, replay_order, replayed_a_step
from partialtune.training.settings import data_seed

logger = logging.getLogger(__name__)

TRAINING_WINDOWS_SCORED = 32  # before and again after: 1.4% of the time of 123 steps of 16 windows
WINDOWS_COMPARED = 256


@dataclass(frozen=True)
class RunData:
    """What the texts became.

    Attributes:
        sources: The training texts as they were read.
        train: Training windows, `input_ids` (block_size,).
        held_out: Held-out windows, None where nothing is held out.
        scored: Texts that are scored before and after: `validation`, `training`, `replay` (at most 32 windows, as of
            `training`), and those of `eval_texts`.
        token_counts: How often each token occurs in the training text and the replayed one, int64 (largest id + 1,).
        largest_ids: The largest token id of each text, by the key of the recipe that names it.
        replay: The text that is replayed, None where none is.
        order: That of the training windows and the replayed ones; None where nothing is replayed,
            and the Trainer's own is taken.
    """

    sources: list[SourceText]
    train: Dataset
    held_out: Dataset | None
    scored: dict[str, ScoredText]
    token_counts: np.ndarray
    largest_ids: dict[str, int]
    replay: Replay | None = None
    order: ReplayOrder | EpochOrder | None = None

    @property
    def rows(self) -> Dataset:
        """All that is trained on: the training windows, then the replayed ones."""
        return self.train if self.replay is None else concatenate_datasets([self.train, self.replay.windows])

    @property
    def epoch_windows(self) -> int:
        """Windows of an epoch, the replayed ones too."""
        return len(self.train) if self.order is None else len(self.order)


def data_of_recipe(recipe: Recipe, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """The windows and scored texts of a recipe; in files that several processes share, so that they are made once.

    Raises:
        TextError: As `prepare_data`.
        RecipeError: If a step has no room for replayed windows beside those of the text.
    """
    in_memory, replay = IN_MEMORY_BYTES if args.world_size == 1 else 0, recipe.text.replay
    if replay:
        replayed_a_step(replay["share"], args)  # before a text is read
    data = prepare_data(recipe.text, recipe.evaluation.eval_texts, tokenizer, data_seed(args), in_memory, replay)
    if data.replay is None:
        return data
    return replace(data, order=replay_order(len(data.train), len(data.replay.windows), replay["share"], args))


def prepare_data(
    arguments: TextArguments,
    eval_texts: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    in_memory_bytes: int = IN_MEMORY_BYTES,
    replay: Mapping[str, Any] | None = None,
) -> RunData:
    """Read, split, tokenise and window the texts of a run.

    Of several processes on a machine one should do it first: the others find downloads and what it has put on disk.

    Args:
        arguments: The recipe's text settings.
        eval_texts: Further texts to score, name -> source.
        tokenizer: The model's tokenizer.
        seed: Seed of random windows.
        in_memory_bytes: As in `read_texts`; what exceeds it is streamed, and cached by content.
        replay: The recipe's `replay`; absent or empty, nothing is replayed.

    Raises:
        TextError: If a text cannot be read or is too short for one window.
    """
    sources = read_texts(arguments.text, arguments.text_cleaning, arguments.text_column, in_memory_bytes)
    halves = [split_text(source.content, arguments.validation_share) for source in sources]
    train_texts = [train for train, _ in halves]
    held_out_texts = [held_out for _, held_out in halves if held_out]
    if arguments.validation_share and not held_out_texts:
        raise TextError(
            f"validation_share {arguments.validation_share:g} of {sum(map(len, train_texts)):,} characters is none. "
            f"Give a larger share, or 0, which holds nothing out."
        )

    train_ids = token_ids_of(train_texts, tokenizer)
    with _named("the text that trains"):
        train = _training_windows(train_ids, arguments, seed)
    _warn_of_short("text", "train", train_ids, arguments.block_size)
    scored: dict[str, ScoredText] = {}
    counts = token_counts([ids for ids in train_ids if len(ids) >= arguments.block_size])
    largest = {"text": len(counts) - 1}
    if held_out_texts:
        held_out_ids = token_ids_of(held_out_texts, tokenizer)
        largest["text"] = max(largest["text"], _largest(held_out_ids))
        with _named("the held-out text", " validation_share: 0 holds nothing out."):
            scored["validation"] = _scored(held_out_texts, held_out_ids, arguments.block_size)
        _warn_of_short("validation", "get a score", held_out_ids, arguments.block_size)
    scored["training"] = _scored(train_texts, train_ids, arguments.block_size, limit=TRAINING_WINDOWS_SCORED)
    written: dict[str, Sequence[str | StoredText]] = {"validation": held_out_texts, "training": train_texts}
    replayed = None
    if replay:
        again = read_texts(
            replay["text"],
            replay.get("text_cleaning", arguments.text_cleaning),
            replay.get("text_column", arguments.text_column),
            in_memory_bytes,
        )
        _warn_of_own_text(sources, again)
        written[REPLAY] = [source.content for source in again]
        replay_ids = token_ids_of(written[REPLAY], tokenizer)
        counts = added_counts(counts, token_counts(replay_ids))
        largest[REPLAY] = _largest(replay_ids)
        with _named("replay"):
            scored[REPLAY] = _scored(written[REPLAY], replay_ids, arguments.block_size, limit=TRAINING_WINDOWS_SCORED)
        replayed = Replay(again, _training_windows(replay_ids, arguments, seed))
        _warn_of_short(REPLAY, "train", replay_ids, arguments.block_size)
    for name, source in eval_texts.items():
        read = read_texts([source], arguments.text_cleaning, arguments.text_column, in_memory_bytes)
        texts = [text.content for text in read]
        token_ids = token_ids_of(texts, tokenizer)
        largest[f"eval_texts {name}"] = _largest(token_ids)
        with _named(f"eval_texts {name}"):
            scored[name] = _scored(texts, token_ids, arguments.block_size)
        _warn_of_short(f"eval_texts {name}", "get a score", token_ids, arguments.block_size)
        _warn_of_trained(name, read, [*sources, *(replayed.sources if replayed else ())])
        written[name] = texts
    scored = {name: _with_round_trip(name, text, written[name], tokenizer) for name, text in scored.items()}
    held_out = scored["validation"].windows if held_out_texts else None
    return RunData(sources, train, held_out, scored, counts, largest, replayed)


def _warn_of_own_text(sources: Sequence[SourceText], replayed: Sequence[SourceText]) -> None:
    """Log where a text is replayed beside itself: what it holds out is then trained on."""
    same = _in_both(replayed, sources)
    if same:
        logger.warning(
            "replay: %s is the run's own text. Its held-out end is trained on as well, and its scores say nothing of "
            "text that the model has not seen. Replay another text.",
            same,
        )


def _warn_of_trained(name: str, scored: Sequence[SourceText], trained: Sequence[SourceText]) -> None:
    """Log where a text is scored that is trained on: it says nothing of what is forgotten."""
    same = _in_both(scored, trained)
    if same:
        logger.warning(
            "eval_texts %s: %s is trained on, so that its scores say nothing of what the model forgets. Score another "
            "text of its kind.",
            *(name, same),
        )


def _in_both(some: Sequence[SourceText], others: Sequence[SourceText]) -> str:
    """The names of texts that are among others too, by their bytes; empty where there are none."""
    known = {source.sha256 for source in others}
    return ", ".join(source.name for source in some if source.sha256 in known)


def _warn_of_short(part: str, verb: str, token_ids: Sequence[np.ndarray], block_size: int) -> None:
    """Log which share of several texts gives no window, because each of them is shorter than one."""
    short = [len(ids) for ids in token_ids if len(ids) < block_size]
    if short:
        logger.warning(
            "%s: %s of %s texts have fewer tokens than a window of %s, and do not %s: %s of %s tokens. Lower "
            "block_size, or join texts that belong together.",
            *(part, f"{len(short):,}", f"{len(token_ids):,}", f"{block_size:,}", verb),
            *(f"{sum(short):,}", f"{sum(map(len, token_ids)):,}"),
        )


def added_counts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Counts by token id of two texts together, int64 (largest id of both + 1,)."""
    both = np.zeros(max(len(a), len(b)), dtype=np.int64)
    both[: len(a)] += a
    both[: len(b)] += b
    return both


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


@contextmanager
def _named(part: str, advice: str = "") -> Iterator[None]:
    """Say of a text that is too short which one it is."""
    try:
        yield
    except TextError as error:
        raise TextError(f"Of {part}: {error}{advice}") from error


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
    """What `evaluation.scored_text` prepares, of texts in memory or on disk: those that give a window."""
    fitting = [number for number, ids in enumerate(token_ids) if len(ids) >= block_size]
    texts, token_ids = [texts[number] for number in fitting], [token_ids[number] for number in fitting] or token_ids
    windows = cached_windows(
        token_ids,
        ["chunked", block_size, block_size],
        lambda path: chunked_windows(token_ids, block_size, block_size, path),
    )
    return ScoredText(evenly_spaced(windows, limit), sum(map(len, token_ids)), utf8_bytes(texts))


def traits_of_windows(data: RunData) -> dict[str, Any]:
    """What tells the windows of one run from those of another; of a run that replays nothing no more than ever."""
    traits = _sample(data.train)
    if data.replay is None or not isinstance(data.order, ReplayOrder):
        return traits
    return {
        **traits,
        "replay: texts (sha256)": [source.sha256 for source in data.replay.sources],
        **{f"replay: {key}": value for key, value in _sample(data.replay.windows).items()},
        "replay: windows a step": data.order.drawn,
    }


def _sample(windows: Dataset) -> dict[str, Any]:
    """Their number, and a digest of some of them: another tokenizer or another cleaning shows there."""
    # (windows, block_size) in little-endian int32, so that every machine gets the same digest
    ids = np.asarray(evenly_spaced(windows, WINDOWS_COMPARED).with_format("numpy")["input_ids"][:], dtype="<i4")
    return {"number of windows": len(windows), "tokens": hashlib.sha256(ids.tobytes()).hexdigest()}


def check_run_texts_unchanged(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """Stop where a text that a finished run was trained on, or that it replayed, is no longer what it was.

    Args:
        folder: Of the run.
        values: The recipe, flat.

    Returns:
        Names of texts that were not compared: on the network, or not there any more.

    Raises:
        TextError: Names the texts that differ.
    """
    column, replay = values.get("text_column", "text"), values.get("replay")
    text = [values["text"]] if isinstance(values["text"], str) else values["text"]
    unread = check_texts_unchanged(recorded_sources(folder), text, folder, column)
    if replay:
        recorded = recorded_sources(folder, replayed=True)
        unread += check_texts_unchanged(recorded, replay["text"], folder, replay.get("text_column", column))
    return unread


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
