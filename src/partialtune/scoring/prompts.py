"""What a model makes of prompts, before and after training: next tokens, their probabilities, continuations.

before = probe_prompts(model, tokenizer, ["My father had"])       # then train
after = probe_prompts(model, tokenizer, ["My father had"])
comparison = compare_prompts(before, after)                       # plain values, for evaluation.json
print(format_prompts(comparison))                                 # side by side, for the terminal
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from partialtune.errors import TextError
from partialtune.model.held_narrow import unrounded
from partialtune.model.model_checks import check_ids, context_of
from partialtune.model.train_mode import evaluating
from partialtune.scoring.continuations import Continuations, continuations_of, logits_of
from partialtune.text.tokenizing import tokenize_text

NEW_TOKENS = 30  # of a continuation
SHOWN_TOKENS = 5  # rows of a prompt's table in the terminal; evaluation.json holds all that were kept
COLUMN_WIDTH = 48  # two of them and a gap: about 100 columns


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
    new_tokens: int = NEW_TOKENS,
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
    ids = [prompt_ids(prompt, tokenizer, context_of(model.config)) for prompt in prompts]
    with evaluating(model), unrounded():
        passes = (logits_of(model, torch.tensor([one], device=device)) for one in ids)  # (1, T, V)
        nexts = [logits[0, -1].cpu().double().log_softmax(-1) for logits in passes]  # (V,); on the CPU: MPS has no fp64
        sound = [at for at, one in enumerate(nexts) if not one.isnan().any()]  # of others nothing can be drawn
        found = continuations_of(model, tokenizer, [ids[at] for at in sound], new_tokens, device)
    continuations = dict(zip(sound, found, strict=True))
    return [
        _probe(tokenizer, prompt, ids[at], nexts[at], top_k, continuations.get(at, ([], [])))
        for at, prompt in enumerate(prompts)
    ]


def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = NEW_TOKENS
) -> list[str]:
    """The greedy continuation of each prompt alone, as `probe_prompts` has it, in half of its time.

    It may be called between two steps of training: modes are given back, and no random number of torch is used up.

    Args:
        model, tokenizer, prompts, new_tokens: As for `probe_prompts`.

    Raises:
        TextError: If a prompt has no token or more tokens than the model's context.
    """
    device = next(model.parameters()).device
    ids = [prompt_ids(prompt, tokenizer, context_of(model.config)) for prompt in prompts]
    # greedy search draws nothing, but models do that hash by random directions in eval mode too (Reformer)
    with evaluating(model), unrounded(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = continuations_of(model, tokenizer, ids, new_tokens, device, sampled=False)
    return [decode_after(one, greedy, tokenizer) for one, (greedy, _) in zip(ids, found, strict=True)]


def check_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Stop before anything is computed where a prompt cannot be probed.

    Raises:
        TextError: If a prompt has no token or more tokens than the model's context.
        ModelError: If one has a token that the model has no place for.
    """
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer, context_of(config))
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


def format_prompts(comparison: Sequence[dict], stacked: bool = False) -> str:
    """The comparison as text for a terminal: before and after side by side in 100 columns, or below each other in 50.

    Tokens and continuations are shown as Python literals, so that a line end, a control character or a space in them is
    seen and does not break the table.
    """
    return "\n\n".join((_stacked_entry if stacked else _format_entry)(entry) for entry in comparison)


def _probe(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ids: list[int],
    log_probabilities: torch.Tensor,
    top_k: int,
    continuations: Continuations,
) -> PromptProbe:
    best = log_probabilities.topk(min(top_k, len(log_probabilities)))
    greedy, sampled = (decode_after(ids, new, tokenizer) for new in continuations)
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
        continuation=greedy,
        sample=sampled,
    )


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> list[int]:
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


def _stacked_entry(entry: dict) -> str:
    kl = "not finite" if entry["kl"] is None else f"{entry['kl']:.4f} nats"
    lines = _wrap(f"prompt {entry['prompt']!r}, KL(before to after) {kl}", 2 * COLUMN_WIDTH - 20)
    for when in ("before", "after"):
        lines += [f"  {when}", *(_format_token(one) for one in entry[when][:SHOWN_TOKENS])]
        lines += [f"    {line}" for line in _wrap(repr(entry[f"continuation_{when}"]), COLUMN_WIDTH)]
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
