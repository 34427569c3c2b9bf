"""The recipe's texts -> what a run trains and scores on: training windows, held-out windows, scored texts."""

from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from partialtune.arguments import TextArguments
from partialtune.evaluation import ScoredText, scored_text
from partialtune.text import SourceText, read_texts
from partialtune.windows import chunked_windows, random_windows, split_text, tokenize_text

TRAINING_WINDOWS_SCORED = 256


@dataclass(frozen=True)
class RunData:
    """What the texts became.

    Attributes:
        sources: The training texts as they were read.
        train: Training windows, `input_ids` (block_size,).
        held_out: Held-out windows, None where nothing is held out.
        scored: Texts that are scored before and after: `validation`, `training`, and those of `eval_texts`.
    """

    sources: list[SourceText]
    train: Dataset
    held_out: Dataset | None
    scored: dict[str, ScoredText]


def prepare_data(
    arguments: TextArguments, eval_texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> RunData:
    """Read, split, tokenise and window the texts of a run.

    Args:
        arguments: The recipe's text settings.
        eval_texts: Further texts to score, name -> source.
        tokenizer: The model's tokenizer.
        seed: Seed of random windows.

    Raises:
        TextError: If a text cannot be read or is too short for one window.
    """
    block_size = arguments.block_size
    with PartialState().main_process_first():  # one process downloads, the others find the text in the cache
        sources = read_texts(arguments.text, arguments.text_cleaning, arguments.text_column)
        others = {
            name: read_texts([source], arguments.text_cleaning, arguments.text_column)
            for name, source in eval_texts.items()
        }
    halves = [split_text(source.text, arguments.validation_share) for source in sources]
    train_texts = [train for train, _ in halves]
    held_out_texts = [held_out for _, held_out in halves if held_out]
    train_ids = [tokenize_text(text, tokenizer) for text in train_texts]

    if arguments.window_sampling == "random":
        train = random_windows(train_ids, block_size, seed)
    else:
        train = chunked_windows(train_ids, block_size, arguments.window_stride or block_size)
    scored: dict[str, ScoredText] = {}
    if held_out_texts:
        held_out_ids = [tokenize_text(text, tokenizer) for text in held_out_texts]
        scored["validation"] = scored_text(held_out_texts, held_out_ids, block_size)
    scored["training"] = scored_text(train_texts, train_ids, block_size, limit=TRAINING_WINDOWS_SCORED)
    for name, texts in others.items():
        other_texts = [text.text for text in texts]
        scored[name] = scored_text(other_texts, [tokenize_text(text, tokenizer) for text in other_texts], block_size)
    held_out = scored["validation"].windows if held_out_texts else None
    return RunData(sources=sources, train=train, held_out=held_out, scored=scored)
