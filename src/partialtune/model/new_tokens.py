"""New tokens: a tokenizer gets them, a model gets a row for each of them, and these rows are what trains.

    selectors = add_tokens(model, tokenizer, ["<poem>", "<drama>"], {"<drama>": "a play for the stage"})
    selectors                           # ["embeddings.tokens[50257:50259]"], of an untied head its rows, too
    plan_freeze(model, selectors)

A matrix may be padded: it then has more rows than the tokenizer has tokens. New tokens take such rows first, and the
matrix grows only where they do not fit. The rows that are there keep every bit. Where a head has a bias, a vector that
has no rows to train, the new tokens' entries are set as their rows are, and stay frozen.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from partialtune.errors import ModelError, RecipeError, in_one_line
from partialtune.grammar.values import wrong_new_tokens
from partialtune.model.digests import digest, same_bits
from partialtune.model.held_narrow import widen
from partialtune.model.parameters import is_sharded, named_weights, plain_name, uncompiled
from partialtune.model.row_parameters import modules_with_rows
from partialtune.model.rows import Rows, as_runs, rows_in_words

logger = logging.getLogger(__name__)

MEAN = "mean"
ROWS_AT_ONCE = 2**13  # of which a mean is summed: 8192 x 1024 x 8 bytes = 64 MB


@dataclass(frozen=True)
class NewToken:
    """One token that a tokenizer was given.

    Attributes:
        token: Its text.
        row: Its id, which is its row in the matrices.
        init: What its row starts from: `mean`, or the words whose rows are averaged.
        init_rows: The rows of these words; empty for the mean of all.
    """

    token: str
    row: int
    init: str = MEAN
    init_rows: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `freeze_plan.json` has it."""
        content = {"token": self.token, "row": self.row, "init": self.init}
        return {**content, "init_rows": list(self.init_rows)} if self.init_rows else content


@dataclass(frozen=True)
class BaseTensor:
    """A tensor as the base has it, before new tokens changed it. `sha256` is None where no weights were read."""

    shape: tuple[int, ...]
    sha256: str | None = None


@dataclass(frozen=True)
class NewTokens:
    """The tokens that were added, and what the base had in their place.

    Attributes:
        tokens: In the order in which they were given.
        known: Tokens that the tokenizer had: the rows that a mean is taken of.
        base: Every name of each tensor that they changed -> the tensor as the base has it. Empty before a model has
            their rows.
        tied: Whether the model's head is its embedding.
    """

    tokens: tuple[NewToken, ...]
    known: int
    base: Mapping[str, BaseTensor] = field(default_factory=dict)
    tied: bool = False

    @property
    def length(self) -> int:
        """Rows that a matrix needs."""
        return max(token.row for token in self.tokens) + 1

    @property
    def tokenizer_length(self) -> int:
        """Tokens of the tokenizer with them."""
        return self.known + len(self.tokens)

    @property
    def rows(self) -> Rows:
        return as_runs(token.row for token in self.tokens)

    @property
    def in_embedding(self) -> str:
        """The selector of their rows in the embedding, and of those of a tied head."""
        return f"embeddings.tokens[{rows_in_words(self.rows)}]"

    @property
    def in_head(self) -> str:
        """That of their rows in a head with a matrix of its own: without them a model reads the tokens and never
        writes them.
        """
        return f"head[{rows_in_words(self.rows)}]"

    @property
    def selectors(self) -> list[str]:
        """Of all of their rows."""
        return [self.in_embedding] if self.tied else [self.in_embedding, self.in_head]

    def to_json(self) -> list[dict[str, Any]]:
        """As `freeze_plan.json` has it."""
        return [token.to_json() for token in self.tokens]

    def of_base(self, name: str) -> dict[str, Any]:
        """What the entry of a parameter says of the base's tensor in `freeze_plan.json`, where that was changed."""
        base = self.base.get(name)
        return {} if base is None else {"base_shape": list(base.shape), "sha256_base": base.sha256}

    def fill(self, values: torch.Tensor, old: torch.Tensor) -> None:
        """Write start values into the rows of the new tokens, and into all further rows that `old` does not have.

        Args:
            values: A matrix with their rows, or a bias with their entries.
            old: The base's; its rows are in `values` already.
        """
        mean = _mean(old[: self.known])
        values[len(old) :] = mean
        for token in self.tokens:
            values[token.row] = _mean(old[list(token.init_rows)]) if token.init_rows else mean


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Mean over the first dimension, summed in fp64 on the CPU.

    Not a draw around the mean, as transformers' `mean_resizing` makes it: nothing depends on a seed, all processes and
    every resumed run get the same bits whatever their number of threads, and a reader can check the value. Tokens that
    start equal part with the first step, since each has a gradient of its own.
    """
    total = sum(piece.to("cpu", torch.float64).sum(0) for piece in rows.split(ROWS_AT_ONCE))
    return (total / len(rows)).to(rows)  # its dtype and device


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, new_tokens: Sequence[str], init: Mapping[str, str] | None = None
) -> NewTokens:
    """Add tokens to a tokenizer.

    They are found in a text as they are written, before it is normalised and split, and are not special: a continuation
    is decoded with them.

    Args:
        tokenizer: Of the model. It is changed.
        new_tokens: One or more, each one new.
        init: Token -> words whose rows are averaged for its start; the others start from the mean of all rows.

    Raises:
        RecipeError: If one is a token already, or cannot be written or read back by this tokenizer.
    """
    init = dict(init or {})
    problems = [f"{key}: {message}" for key, message in wrong_new_tokens(new_tokens, init)]
    problems += [f"new_tokens: {problem}" for token in new_tokens if (problem := _known_already(tokenizer, token))]
    word_ids = {token: _ids(tokenizer, words) for token, words in init.items()}
    without = [token for token, ids in word_ids.items() if not ids]
    problems += [f"new_tokens_init: {init[token]!r}, for {token!r}, holds no token." for token in without]
    if problems:
        raise RecipeError("\n".join(problems))
    known, taken = len(tokenizer), set(tokenizer.get_vocab().values())
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new_tokens])
    rows = {token: tokenizer.convert_tokens_to_ids(token) for token in new_tokens}
    for token, row in rows.items():
        if row in taken or row not in _ids(tokenizer, token):
            raise RecipeError(f"new_tokens: this tokenizer does not take {token!r}. Write it in another way.")
        written = tokenizer.decode([row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if written.strip() != token.strip():  # byte-level ones read "\u00e4" as a byte
            raise RecipeError(
                f"new_tokens: this tokenizer writes {token!r} as {written!r}, so that no text would come back from its "
                f"tokens. Write it in ASCII characters."
            )
    tokens = (NewToken(t, rows[t], init.get(t, MEAN), tuple(word_ids.get(t, ()))) for t in new_tokens)
    return NewTokens(tuple(tokens), known)


def _known_already(tokenizer: PreTrainedTokenizerBase, token: str) -> str | None:
    row = tokenizer.get_vocab().get(token)
    if row is None:
        ids = _ids(tokenizer, token)  # " the" is written otherwise in the vocabulary
        row = ids[0] if len(ids) == 1 and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == token else None
    if row is None:
        return None
    return (
        f"{token!r} is a token already, row {row}. To train its row say trainable: ['embeddings.tokens[{row}]']. Where "
        f"an earlier call has added it, load model and tokenizer anew."
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def config_with(config: PretrainedConfig, new: NewTokens | None) -> PretrainedConfig:
    """The config of the model with the rows of the new tokens, in a copy; the config itself where none are needed."""
    if new is None or new.length <= config.get_text_config().vocab_size:
        return config
    commit, config = getattr(config, "_commit_hash", None), copy.deepcopy(config)
    config.get_text_config().vocab_size = new.length
    config._commit_hash = commit  # which a copy need not keep
    return config


# ---- the model -------------------------------------------------------------------------------------------------------


def add_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str],
    init: Mapping[str, str] | None = None,
) -> list[str]:
    """Add tokens to a tokenizer and their rows to its model. Call it before the text is tokenised and before the plan.

    add_tokens(gpt2, tokenizer, ["<poem>"]) -> ["embeddings.tokens[50257]"]  # of an untied head "head[50257]", too

    Args:
        model: A causal language model, before any plan is applied. It is changed.
        tokenizer: Its own. It is changed, too: save it beside the model.
        new_tokens: One or more, each one new.
        init: Token -> words whose rows are averaged for its start; the others start from the mean of all rows.

    Returns:
        The selectors of their rows, for `plan_freeze`: beside others, or alone.

    Raises:
        RecipeError: If a token cannot be added.
        ModelError: If the model cannot be resized.
    """
    _check_model(model)
    new = extend_tokenizer(tokenizer, new_tokens, init)
    found = give_rows(model, new)
    logger.info(words_on(found))
    return found.selectors


def new_tokens_of(model: nn.Module) -> NewTokens | None:
    """The tokens that `add_tokens` gave to a model since it was loaded."""
    return getattr(uncompiled(model), "_new_tokens", None)


def give_rows(model: nn.Module, new: NewTokens) -> NewTokens:
    """Give a model the rows of new tokens, with their start values; on the meta device without values.

    Args:
        model: As for `add_tokens`.
        new: What its tokenizer was given.

    Returns:
        The same, with what the base had in their place.

    Raises:
        ModelError: If the model cannot be resized.
    """
    _check_model(model)
    whole: Any = uncompiled(model)
    names = {plain_name(name) for name in _vocabulary_tensors(whole)}
    widen(whole, [name for name, _ in named_weights(whole) if name in names])  # rows of these are going to train
    before = _vocabulary_tensors(whole)
    shapes, ties = _shapes(whole), _ties(whole)
    base = {name: BaseTensor(tuple(old.shape), None if old.is_meta else digest(old)) for name, old in before.items()}
    rows = whole.get_input_embeddings().weight.shape[0]
    if new.length > rows:
        with torch.random.fork_rng(devices=[]):  # it draws values, which are overwritten below
            try:
                whole.resize_token_embeddings(new.length, mean_resizing=False)
            except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
                raise _cannot_grow(whole, f"fails ({in_one_line(error)})") from error
        _check_resized(whole, before, shapes, ties)
    done: set[int] = set()
    for name, old in before.items():
        values = whole.get_parameter(name).data
        if not values.is_meta and values.data_ptr() not in done:
            new.fill(values, old if old.data_ptr() != values.data_ptr() else old.clone())
            done.add(values.data_ptr())
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    found = replace(new, base={plain_name(name): tensor for name, tensor in base.items()}, tied=tied)
    whole._new_tokens = found
    return found


def words_on(new: NewTokens) -> str:
    """Which tokens are new, in which rows, and where there was room for them."""
    tokens = "; ".join(
        f"{token.token!r} is row {token.row:,}, from "
        + (f"the mean of {token.init!r}" if token.init_rows else "the mean of all rows")
        for token in new.tokens
    )
    return f"New tokens: {tokens}. {_room(new)}."


def _room(new: NewTokens) -> str:
    rows = max((tensor.shape[0] for tensor in new.base.values()), default=0)
    if rows == new.known < new.length:
        return f"The matrix grows from {rows:,} to {new.length:,} rows"
    grows = f", and the matrix grows to {new.length:,}" if new.length > rows else ": there is room for them"
    return f"Matrix of {rows:,} rows, the tokenizer had {new.known:,} tokens{grows}"


def _check_model(model: nn.Module) -> None:
    whole: Any = uncompiled(model)
    if not isinstance(whole, PreTrainedModel):
        raise ModelError(f"{type(whole).__name__}: new tokens are added to a plain model of transformers, unwrapped.")
    if new_tokens_of(whole) is not None:
        raise ModelError("This model has new tokens already. Load it anew, and add all of them in one call.")
    if any(True for _ in modules_with_rows(whole)) or any(map(is_sharded, whole.parameters())):
        raise ModelError("New tokens are added before a plan is applied, and before the model is sharded or wrapped.")
    for find in (whole.get_input_embeddings, whole.get_output_embeddings):
        try:
            module = find()
        except (AttributeError, NotImplementedError):  # of a class that does not say where they are
            module = None
        if not isinstance(module, nn.Embedding | nn.Linear):
            raise ModelError(
                f"{type(whole).__name__} has no plain embedding and head for rows of new tokens (it has "
                f"{type(module).__name__}). Take a model that has them."
            )


def _vocabulary_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Token matrix, head and its bias under all of their names, as they are now: a resize leaves these as they were."""
    embedding, head = model.get_input_embeddings()._parameters, model.get_output_embeddings()._parameters
    tensors = {id(one) for one in (embedding["weight"], head["weight"], head.get("bias"))}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in tensors
    }


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _check_resized(
    model: Any, before: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], ties: list[list[str]]
) -> None:
    """Stop where resizing changed anything else than lengths: then nothing about the base's bits would be true."""
    present = _shapes(model)
    wrong = [name for name in shapes if present.get(name) != shapes[name] and name not in before]
    for name, old in before.items():
        now = model.get_parameter(name).detach()
        if now.shape[1:] != old.shape[1:] or not (old.is_meta or same_bits(now[: len(old)], old).all()):
            wrong.append(name)
    if wrong:
        raise _cannot_grow(model, f"changes {wrong[0]} otherwise than by rows at its end")
    if _ties(model) != ties:
        raise _cannot_grow(model, "ties other tensors than before")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            loaded = _shapes(type(model)(copy.deepcopy(model.config)))
    except Exception:  # noqa: BLE001 - a class of the user's own that needs more than a config raises anything
        return
    if loaded != present:
        name = next(name for name in present if loaded.get(name) != present[name])
        raise _cannot_grow(model, f"makes {name} {tuple(present[name])}, which its config does not say")


def _cannot_grow(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: resize_token_embeddings {why}, so that new tokens cannot be added here. Resize the "
        f"model yourself, save it with its tokenizer, and train that one."
    )
