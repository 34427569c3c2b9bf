"""`partialtune generate`: what a run writes after a prompt, streamed, alone or beside its base.

Writers come first (`writers_of`: the run, and its base where it is asked for), then `write_after` for each prompt. How
tokens are drawn is said in fields of transformers' `GenerationConfig`; without any, as `SAMPLING` says.
"""

import copy
import dataclasses
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from partialtune.delta_checkpoint import read_delta
from partialtune.errors import InputError, ModelError, in_one_line
from partialtune.model.checkpoint_folder import TOKENIZER_FILES, checkpoint_folder, holds_adapters
from partialtune.model.loading import load_tokenizer
from partialtune.model.model_checks import context_of
from partialtune.rebuild import base_of_adapters, load, load_folder, recorded_base
from partialtune.run_folder import RECIPE_FILE, is_delta
from partialtune.scoring.prompts import prompt_ids

logger = logging.getLogger(__name__)

# Close to what the weights find probable, without the long tail in which small models lose the thread.
SAMPLING: Mapping[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 100}


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that continues prompts.

    Attributes:
        name: As it was named.
        model: In eval mode.
        tokenizer: Its own.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase


def writers_of(run: str, beside_base: bool = False, revision: str | None = None) -> list[Writer]:
    """The model of a run, and before it that of its base where it is asked for.

    Args:
        run: Folder or Hub id (also ID@REVISION) of a run, a checkpoint, a delta, LoRA adapters, or any causal language
            model. Of a run that has not ended its newest complete checkpoint is taken.
        beside_base: Whether the base is to write too: the one that the run's recipe, delta or adapters name.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        ModelError: If a model cannot be loaded, or nothing says what the base is.
    """
    run = _checkpoint_of(run)
    folder, name = checkpoint_folder(f"{run}@{revision}" if revision else run, TOKENIZER_FILES)
    bases = [base_of(folder, name)] if beside_base else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    writers = [Writer(base, load(base).to(device), load_tokenizer(*_at(base))) for base in bases]
    return [*writers, Writer(run, load_folder(folder, name).to(device), _tokenizer(folder, name))]


def _checkpoint_of(run: str) -> str:
    """A folder as it is named; of a run that was interrupted or goes on, and holds no model yet, a checkpoint.

    Raises:
        ModelError: If it has none that is complete.
    """
    folder = Path(run).expanduser()
    if not (folder / RECIPE_FILE).is_file() or (folder / "config.json").is_file() or holds_adapters(folder):
        return run
    from partialtune.engine.checkpoint_files import newest_whole_checkpoint  # which imports Trainer

    checkpoint = newest_whole_checkpoint(folder)
    if checkpoint is None:
        again = shlex.join(["partialtune", "train", str(folder / RECIPE_FILE), "--resume_from_checkpoint", "auto"])
        raise ModelError(
            f"{run} holds no model: the run there has not ended, and has no complete checkpoint. Go on with it: {again}"
        )
    logger.info("The run in %s has not ended: this is its %s.", run, checkpoint.name)
    return str(checkpoint)


def base_of(folder: Path, name: str) -> str:
    """What a run was made from, as a name that `load` takes.

    Raises:
        ModelError: If neither recipe nor delta nor adapters name it, or it was a folder that is not here.
    """
    if is_delta(folder):
        return read_delta(folder, name).base.location
    if holds_adapters(folder):
        return base_of_adapters(folder)
    base, commit = recorded_base(folder)
    if base is None:
        raise ModelError(f"{name} does not say which base it was made from. Leave out --beside-base.")
    # what has no commit was no Hub id, although a folder's name may look like one
    if commit is None and not base.startswith("builtin:") and not Path(base).expanduser().is_dir():
        raise ModelError(f"{name} was made from the folder {base}, which is not here. Leave out --beside-base.")
    return f"{base}@{commit}" if commit else base


def sampling_of(words: Sequence[str]) -> GenerationConfig:
    """`--temperature 0.7 --top_k 50` -> transformers' settings, over `SAMPLING`.

    Raises:
        InputError: If a word is no field of GenerationConfig, or the values do not go together.
    """
    known = {key for key in GenerationConfig().to_dict() if not key.startswith("_") and key != "transformers_version"}
    given: dict[str, Any] = {}
    rest = list(words)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        field = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or field not in known:
            raise InputError(
                f"{key} is no setting of generation. Allowed are --prompt, --seed, --beside-base, --revision and the "
                f"fields of transformers' GenerationConfig, such as --max_new_tokens 60 --temperature 0.7 --top_p 0.9 "
                f"--do_sample false."
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"{key} lacks its value, such as {key} {SAMPLING.get(field, 1)}.")
            value = rest.pop(0)
        given[field] = yaml.safe_load(value)
    greedy = given.get("do_sample") is False or (given.get("num_beams", 1) != 1 and "do_sample" not in given)
    defaults = {"do_sample": False, "max_new_tokens": SAMPLING["max_new_tokens"]} if greedy else SAMPLING
    if "max_length" in given:
        raise InputError("--max_length counts the prompt too. Say --max_new_tokens: tokens after the prompt.")
    if not isinstance(given.get("max_new_tokens", 1), int):
        raise InputError(f"--max_new_tokens is {given['max_new_tokens']!r}; allowed: a whole number, 1 or more.")
    try:
        settings = GenerationConfig(**{**defaults, **given})
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"{' '.join(words)}: {in_one_line(error)}") from error
    return settings


def write_after(writer: Writer, prompt: str, settings: GenerationConfig, seed: int | None) -> None:
    """Print the prompt and what the model writes after it, token by token where it writes one text.

    Args:
        writer: Who writes.
        prompt: Not empty, unless the tokenizer has a BOS to start from.
        settings: Of `sampling_of`.
        seed: Of the draws; None for others each time.

    Raises:
        TextError: If the prompt has no token, or more than the model takes.
        InputError: If this model cannot generate so.
    """
    context = context_of(writer.model.config)
    ids = prompt_ids(prompt, writer.tokenizer, context)
    room = settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - len(ids))
    if room < 1:
        raise InputError(f"The prompt has {len(ids):,} tokens, as many as {writer.name} takes: shorten it.")
    if seed is not None:
        torch.manual_seed(seed)
    streams = settings.num_beams in (None, 1) and settings.num_return_sequences in (None, 1)
    tokenizer = writer.tokenizer
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    own = copy.deepcopy(settings)
    own.update(max_new_tokens=room, pad_token_id=next(pad for pad in pads if pad is not None))
    inputs = torch.tensor([ids], device=writer.model.device)
    try:
        with torch.inference_mode():
            texts = writer.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=own,
                streamer=TextStreamer(tokenizer, skip_special_tokens=True) if streams else None,
            )
    except (ValueError, TypeError) as error:
        print()  # the prompt stands there already
        raise InputError(f"{writer.name} cannot generate so: {in_one_line(error)}") from error
    if not streams:
        print("\n\n".join(tokenizer.decode(text, skip_special_tokens=True) for text in texts), flush=True)


def prompts_of(given: Sequence[str]) -> Iterator[str]:
    """The prompts of the command line; without any, a line of stdin each, until its end or an empty line."""
    if given:
        yield from given
        return

    while True:
        if sys.stdin.isatty():
            try:
                line = input("prompt> ")
            except EOFError:
                print()
                return
        else:
            line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.rstrip("\n")


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; that of its base for adapters, and for what has none beside it."""
    has_own = (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()
    adapters = holds_adapters(folder) and not is_delta(folder)
    names_base = is_delta(folder) or recorded_base(folder)[0] is not None
    return load_tokenizer(*(_at(base_of(folder, name)) if adapters or (names_base and not has_own) else (str(folder),)))


def _at(name: str) -> tuple[str, str]:
    """`ID@REVISION` -> the two."""
    base, at, revision = name.rpartition("@")
    return (base, revision) if at and not Path(name).is_dir() else (name, "main")
