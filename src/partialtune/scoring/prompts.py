"""What a model makes of prompts, before and after training: next tokens, their probabilities, continuations.

before = probe_prompts(model, tokenizer, ["My father had"])       # then train
after = probe_prompts(model, tokenizer, ["My father had"])
comparison = compare_prompts(before, after)                       # plain values, for evaluation.json
print(format_prompts(comparison))                                 # side by side, for the terminal
"""

import contextlib
import logging
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from partialtune.errors import TextError
from partialtune.model.model_checks import check_ids, context_of
from partialtune.model.train_mode import evaluating
from partialtune.text.tokenizing import tokenize_text

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 5  # rows of a prompt's table in the terminal; evaluation.json holds all that were kept
COLUMN_WIDTH = 48  # two of them and a gap: about 100 columns
CACHE_AGREES = 1e-3  # of the largest logit: rounding is far below it, positions that are off by one far above
# The model's own distribution but for its longest tail.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 0}


@dataclass(frozen=True)
class PromptProbe:
    """One prompt's next-token distribution and continuation.

    Attributes:
        prompt: The text that was continued.
        log_probabilities: ln p(next token | prompt) for the whole vocabulary, fp64 on the CPU, shape (V,).
        top: The most probable next tokens, `{token, id, probability}`, most probable first.
        continuation: Greedy continuation, the prompt not included.
        sample: Sampled continuation, the prompt not included.
    """

    prompt: str
    log_probabilities: torch.Tensor
    top: list[dict]
    continuation: str
    sample: str = ""


def probe_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    top_k: int = 10,
    new_tokens: int = 30,
) -> list[PromptProbe]:
    """Look at what the model says next after each prompt. The model gets every module's mode back.

    One continuation takes the most probable token each time, one is drawn as `SAMPLING` says: with the same seed for
    every prompt and model, and without touching the random numbers of the training that follows.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        prompts: Texts to continue. An empty one starts from the tokenizer's BOS.
        top_k: Next tokens to keep by name; the distribution is kept whole in any case.
        new_tokens: Tokens of a continuation, fewer where the model's context or an end-of-text comes first.

    Raises:
        TextError: If a prompt has no token or more tokens than the model's context.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        return [_probe(model, tokenizer, prompt, top_k, new_tokens, device) for prompt in prompts]


def check_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Stop before anything is computed where a prompt cannot be probed.

    Raises:
        TextError: If a prompt has no token or more tokens than the model's context.
        ModelError: If one has a token that the model has no place for.
    """
    for prompt in prompts:
        ids = _prompt_ids(prompt, tokenizer, context_of(config))
        check_ids(config.name_or_path, config, {f"the prompt {prompt[:40]!r}": max(ids)})


def compare_prompts(before: Sequence[PromptProbe], after: Sequence[PromptProbe]) -> list[dict]:
    """Entries for `prompts` of evaluation.json.

    `kl` is KL(before to after) = sum over the vocabulary of p_before * (ln p_before - ln p_after), in nats; 0 for equal
    distributions, None where it is not finite.
    """
    return [
        {
            "prompt": old.prompt,
            "before": old.top,
            "after": new.top,
            "kl": _kl_divergence(old.log_probabilities, new.log_probabilities),
            "continuation_before": old.continuation,
            "continuation_after": new.continuation,
        }
        for old, new in zip(before, after, strict=True)
    ]


def format_prompts(comparison: Sequence[dict]) -> str:
    """The comparison as text for a terminal, before and after side by side, about 100 columns wide.

    Tokens and continuations are shown as Python literals, so that a line end, a control character or a space in them is
    seen and does not break the table.
    """
    return "\n\n".join(_format_entry(entry) for entry in comparison)


def _probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    top_k: int,
    new_tokens: int,
    device: torch.device,
) -> PromptProbe:
    ids = _prompt_ids(prompt, tokenizer, context_of(model.config))
    input_ids = torch.tensor([ids], device=device)  # (1, T)
    logits = _logits(model, input_ids)
    log_probabilities = logits[0, -1].cpu().double().log_softmax(-1)  # (V,); fp64 on the CPU: MPS has none

    def continuation(greedy: bool) -> str:
        return decode_after(ids, _continue(model, tokenizer, input_ids, new_tokens, greedy), tokenizer)

    spoilt = bool(log_probabilities.isnan().any())  # nothing can be drawn, and generating raises
    best = log_probabilities.topk(min(top_k, len(log_probabilities)))
    return PromptProbe(
        prompt=prompt,
        log_probabilities=log_probabilities,
        top=[
            {
                "token": decode_after(ids, [token_id], tokenizer),
                "id": token_id,
                "probability": _finite(math.exp(value)),
            }
            for value, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
        continuation="" if spoilt else continuation(greedy=True),
        sample="" if spoilt else continuation(greedy=False),
    )


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> list[int]:
    ids = tokenize_text(prompt, tokenizer).tolist()
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise TextError(f"The prompt {prompt!r} has no token and this tokenizer no BOS to start from: give it a word.")
    if context_length is not None and len(ids) > context_length:
        raise TextError(
            f"The prompt {prompt[:40]!r}... has {len(ids):,} tokens, the model takes {context_length:,}: shorten it."
        )
    return ids


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor, new_tokens: int, greedy: bool
) -> list[int]:
    """Ids of the continuation of input_ids (1, T)."""
    context_length = context_of(model.config)
    if context_length is not None:
        new_tokens = min(new_tokens, context_length - input_ids.shape[1])
    if new_tokens < 1:
        return []
    # The model's own generation settings (penalties, forced or forbidden tokens) would fill every gap in ours, and the
    # continuation would no longer be what the weights find probable.
    own = model.generation_config
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    chosen = {"temperature": SAMPLING["temperature"], "top_p": SAMPLING["top_p"], "top_k": 0}
    settings = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=new_tokens,
        eos_token_id=own.eos_token_id,
        pad_token_id=next(token_id for token_id in pads if token_id is not None),
        return_dict_in_generate=True,
        output_logits=True,
        **({} if greedy else chosen),
    )
    model.generation_config = settings
    try:
        output = _generated(model, input_ids, settings)
    finally:
        model.generation_config = own
    return output[0, input_ids.shape[1] :].tolist()


def _generated(model: PreTrainedModel, input_ids: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """Ids (1, T + n), the prompt's among them: by the model's own `generate`, if it is right.

    A decoder of an encoder-decoder model gets a cache of as many layers as its encoder has, which may be fewer, and
    CamemBERT other positions than in a plain pass. One whole pass over what was generated shows it.
    """
    try:
        with _seeded(input_ids.device, SAMPLING["seed"]):
            found = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
            )
        steps = torch.stack(found.logits, dim=1).to(input_ids.device)  # (1, n, V)
        whole = _logits(model, found.sequences[:, :-1])[:, input_ids.shape[1] - 1 :]
        if not (steps - whole).abs().max() > CACHE_AGREES * whole.abs().max():
            return found.sequences
        reason = "its cache gives other logits than whole passes"
    except Exception as error:  # noqa: BLE001 - the model's own, of any kind
        reason = f"with its cache it fails ({type(error).__name__}: {error})"
    logger.info("Prompts are continued by whole passes of the model: %s.", reason)
    with _seeded(input_ids.device, SAMPLING["seed"]):
        return _by_whole_passes(model, input_ids, settings)


def _by_whole_passes(model: PreTrainedModel, input_ids: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """As `generate` without a cache, ids (1, T + n)."""
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    nucleus = TopPLogitsWarper(settings.top_p) if settings.do_sample else None
    for _ in range(settings.max_new_tokens):
        scores = _logits(model, input_ids)[:, -1].float()  # (1, V)
        if nucleus is None:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(nucleus(input_ids, scores / settings.temperature).softmax(-1), 1)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        if chosen.item() in ends:
            break
    return input_ids


def _logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (1, T, V) of one whole pass."""
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers from `seed`; afterwards they go on as if none had been drawn."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


def decode_after(prompt_ids: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of `ids` as it follows the prompt: a decoder that strips a leading space would lose a word's start."""
    prompt = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(prompt_ids + ids, clean_up_tokenization_spaces=False)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # the prompt ends inside a character


def _kl_divergence(before: torch.Tensor, after: torch.Tensor) -> float | None:
    possible = before > -math.inf  # 0 * ln 0 is 0
    terms = before.exp() * (before - after)
    divergence = torch.where(possible | before.isnan(), terms, 0.0).sum().item()
    return _finite(max(0.0, divergence)) if math.isfinite(divergence) else None  # rounding may fall below 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _format_entry(entry: dict) -> str:
    kl = "not finite" if entry["kl"] is None else f"{entry['kl']:.4f} nats"
    lines = _wrap(f"prompt {entry['prompt']!r}, KL(before to after) {kl}", 2 * COLUMN_WIDTH)
    lines.append(_side_by_side("  before", "  after"))
    rows = zip(entry["before"][:SHOWN_TOKENS], entry["after"][:SHOWN_TOKENS], strict=True)
    lines += [_side_by_side(_format_token(old), _format_token(new)) for old, new in rows]
    old, new = (_wrap(repr(entry[f"continuation_{when}"]), COLUMN_WIDTH - 2) for when in ("before", "after"))
    lines += [_side_by_side(f"  {left}", f"  {right}") for left, right in zip_longest(old, new, fillvalue="")]
    return "\n".join(lines)


def _format_token(choice: dict) -> str:
    probability = choice["probability"]
    share = "  nan   " if probability is None else f"{probability:8.2%}"
    return f"  {share}  {_wrap(repr(choice['token']), COLUMN_WIDTH - 12)[0]}"


def _side_by_side(left: str, right: str) -> str:
    return f"{left}{' ' * (COLUMN_WIDTH + 2 - _width(left))}{right}".rstrip()


def _width(text: str) -> int:
    """Terminal columns: two for East Asian wide characters, none for combining marks."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken after a space where there is one."""
    lines, line = [], ""
    for character in text:
        if _width(line + character) > width:
            space = line.rfind(" ") + 1
            lines.append(line[:space] if space > width // 2 else line)
            line = line[space:] if space > width // 2 else ""
        line += character
    return [*lines, line]
