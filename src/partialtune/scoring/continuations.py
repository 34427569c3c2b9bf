"""How a model continues prompts: token ids of each -> ids of a greedy and, where it is wanted, a sampled continuation.

Both are rows of one batch, and so are all prompts, where the model gives in a padded batch what it gives alone: its
weights are read once a token for all of them, and to read them is what a pass of a few tokens takes on a CPU.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from partialtune.model.model_checks import context_of

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 8  # each with its greedy and its sampled continuation; logits of all their tokens are kept
CACHE_AGREES = 1e-3  # of the largest logit: rounding is far below it, positions that are off by one far above
# The model's own distribution but for its longest tail.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 0}
Continuations = tuple[list[int], list[int]]  # ids: greedy, sampled


def continuations_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    device: torch.device,
    sampled: bool = True,
) -> list[Continuations]:
    """Ids of the greedy and of the sampled continuation of each prompt.

    Args:
        model: In eval mode, without gradients.
        tokenizer: Its tokenizer.
        prompts: Ids of each.
        new_tokens: Tokens of a continuation, fewer where the model's context or an end-of-text comes first.
        device: The model's.
        sampled: Whether the second is wanted too; it is empty without.
    """
    context_length = context_of(model.config)
    rooms = [new_tokens if context_length is None else min(new_tokens, context_length - len(ids)) for ids in prompts]
    found: dict[int, Continuations] = {at: ([], []) for at, room in enumerate(rooms) if room < 1}
    together = [at for at, room in enumerate(rooms) if room == new_tokens and room > 0]
    for share in (together[at : at + PROMPTS_AT_ONCE] for at in range(0, len(together), PROMPTS_AT_ONCE)):
        if len(share) > 1:
            with suppress(_WrongCache):
                rows = _by_cache(model, tokenizer, [prompts[at] for at in share], new_tokens, device, sampled)
                found.update(zip(share, rows, strict=True))
    for at, ids in enumerate(prompts):
        if at not in found:
            found[at] = _alone(model, tokenizer, ids, rooms[at], device, sampled)
    return [found[at] for at in range(len(prompts))]


def _alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    new_tokens: int,
    device: torch.device,
    sampled: bool,
) -> Continuations:
    """The continuations of one prompt: by the model's own `generate`, if it is right."""
    try:
        return _by_cache(model, tokenizer, [ids], new_tokens, device, sampled)[0]
    except _WrongCache as wrong:
        logger.info("Prompts are continued by whole passes of the model: %s.", wrong)
    settings, input_ids = _settings(model, tokenizer, new_tokens), torch.tensor([ids], device=device)
    greedy = _by_whole_passes(model, input_ids, settings, lambda scores: scores.argmax(-1))
    if not sampled:
        return greedy, []
    draw = _Draw(1, device)
    return greedy, _by_whole_passes(model, input_ids, settings, lambda scores: draw(0, scores))


def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> GenerationConfig:
    # The model's own generation settings (penalties, forced or forbidden tokens) would fill every gap in ours, and the
    # continuation would no longer be what the weights find probable.
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=next(token_id for token_id in pads if token_id is not None),
        return_dict_in_generate=True,
        output_logits=True,
    )


class _WrongCache(Exception):
    """With its cache the model fails, or gives other logits than in a whole pass; in words."""


class _Draw:
    """Draws next tokens as `SAMPLING` says: each prompt from random numbers of its own, which begin with the seed.

    Args:
        prompts: Their number.
        device: Of the scores.
    """

    def __init__(self, prompts: int, device: torch.device) -> None:
        self._random = [torch.Generator(device).manual_seed(SAMPLING["seed"]) for _ in range(prompts)]

    def __call__(self, prompt: int, scores: torch.Tensor) -> torch.Tensor:
        """A token (1,) of scores (1, V), drawn from its nucleus."""
        nucleus = TopPLogitsWarper(SAMPLING["top_p"])(None, scores.float() / SAMPLING["temperature"])
        return torch.multinomial(nucleus.softmax(-1), 1, generator=self._random[prompt]).squeeze(1)


class _DrawnRows(LogitsProcessor):
    """Draws the next token of every second row, and leaves it as the only one that greedy search can take.

    So both continuations of a prompt are rows of one batch.
    """

    def __init__(self, draw: _Draw) -> None:
        self._draw = draw

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row in range(1, len(scores), 2):
            drawn = self._draw(row // 2, scores[row : row + 1])
            scores[row] = -math.inf
            scores[row, drawn] = 0.0
        return scores


def _by_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    device: torch.device,
    sampled: bool,
) -> list[Continuations]:
    """The continuations of each prompt by the model's own `generate`.

    A decoder of an encoder-decoder model gets a cache of as many layers as its encoder has, which may be fewer,
    CamemBERT other positions than in a plain pass, and not every model knows padding on the left. One whole pass over
    each prompt and what was generated shows it.

    Raises:
        _WrongCache: If it is not right.
    """
    settings, own = _settings(model, tokenizer, new_tokens), model.generation_config
    width = max(map(len, prompts))
    each = 2 if sampled else 1  # greedy, sampled, greedy, sampled, ...
    rows = [ids for ids in prompts for _ in range(each)]
    padded = [[settings.pad_token_id] * (width - len(ids)) + ids for ids in rows]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
    drawn = [_DrawnRows(_Draw(len(prompts), device))] if sampled else []
    model.generation_config = settings
    try:
        found = model.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(drawn),
        )
        steps = torch.stack(found.logits, dim=1).to(device)  # (P or 2 P, n, V)
        generated = found.sequences[:, width:]  # (P or 2 P, n)
        for at, ids in enumerate(prompts):
            pair = slice(each * at, each * at + each)
            passed = torch.cat([torch.tensor([ids] * each, device=device), generated[pair, :-1]], dim=1)
            whole = logits_of(model, passed)[:, len(ids) - 1 :]  # (1 or 2, n, V)
            # a row that has ended is filled with padding, of which a model may make anything
            ends = [len(_until_end(row.tolist(), settings)) for row in generated[pair]]
            apart = max((steps[pair][row, :end] - whole[row, :end]).abs().max() for row, end in enumerate(ends))
            if apart > CACHE_AGREES * whole.abs().max():
                raise _WrongCache("its cache gives other logits than whole passes")
    except _WrongCache:
        raise
    except Exception as error:  # the model's own, of any kind
        raise _WrongCache(f"with its cache it fails ({type(error).__name__}: {error})") from error
    finally:
        model.generation_config = own
    new = [_until_end(row.tolist(), settings) for row in generated]
    return list(zip(new[::2], new[1::2], strict=True)) if sampled else [(greedy, []) for greedy in new]


def _ends(settings: GenerationConfig) -> list[int | None]:
    return settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]


def _until_end(ids: list[int], settings: GenerationConfig) -> list[int]:
    """Ids up to the first end-of-text, with it."""
    ends = _ends(settings)
    return ids[: next((at + 1 for at, token_id in enumerate(ids) if token_id in ends), len(ids))]


def _by_whole_passes(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    settings: GenerationConfig,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> list[int]:
    """As `generate` without a cache: new ids. `choose` takes the next token (1,) of scores (1, V)."""
    start = input_ids.shape[1]
    for _ in range(settings.max_new_tokens):
        chosen = choose(logits_of(model, input_ids)[:, -1].float())
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        if chosen.item() in _ends(settings):
            break
    return input_ids[0, start:].tolist()


def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (1, T, V) of one whole pass."""
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
