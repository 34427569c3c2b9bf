"""`partialtune init`, and `train TEXT`: a text and a model -> a commented recipe to begin with.

Everything in it is a rule of thumb that can be read here, and said in its comments: window and length from the number
of tokens, what trains from the model's size, prompts from the held-out end of the text. Costs of what else could train
are counted without weights (`cost`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from partialtune.cost.dry_step import Cost, dry_step
from partialtune.errors import ModelError, RecipeError, TextError
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.model.loading import empty_model, load_config, load_tokenizer
from partialtune.model.model_checks import context_of
from partialtune.net.addresses import sources_without_secrets, without_secrets
from partialtune.text.reading import read_texts
from partialtune.text.tokenizing import token_ids_of
from partialtune.text.windows import split_text
from partialtune.words import counted

MODEL = "builtin:lilliput"
HELD_OUT = 0.1  # of the text, the recipe's default
LONGEST, SHORTEST, WINDOWS = 256, 16, 16  # tokens of a window; windows that a text should give at least
BATCH = 8
EPOCHS, STEPS = 3, (30, 400)  # as often as the text is gone through, within so many steps
# With fewer parameters a step is cheap whatever trains, and the embeddings learn a new kind of text as well as all does
# (docs/compare.md). Above it, what freezing saves counts: the last blocks start from states that are kept.
SMALL = 50_000_000
RATES = {True: 1e-3, False: 5e-5}  # of a small model, and of others
PROMPTS, PROMPT_WORDS = 3, 4
LOOKED_AT = 30  # held-out texts at most in which sentences for prompts are looked for
POLICIES: list[tuple[dict[str, Any], str]] = [
    ({"trainable": ["embeddings", "final_norm", "head"]}, "learns a new kind of text best"),
    ({"trainable": ["blocks[-2:]", "final_norm"]}, "frozen blocks are computed once for each window"),
    ({"trainable": ["final_norm", "head"], "head": "untied"}, "no backward pass through any block"),
    ({"trainable": ["norms"]}, "learns little, forgets little"),
    ({"trainable": ["all"]}, "full fine-tuning, to compare with"),
]


@dataclass(frozen=True)
class Policy:
    """What could train, and what a step of it costs.

    Attributes:
        keys: Of a recipe: `trainable`, and `head` where it is untied.
        reason: For it, in a phrase.
        plan: Of this model.
        cost: Of a step.
    """

    keys: dict[str, Any]
    reason: str
    plan: FreezePlan
    cost: Cost


@dataclass(frozen=True)
class Proposal:
    """A recipe to begin with.

    Attributes:
        values: Its keys and values.
        comments: What is said beside a key.
        policies: What could train; the first is what is proposed, the last is full fine-tuning.
    """

    values: dict[str, Any]
    comments: dict[str, str]
    policies: Sequence[Policy]

    def text(self, file: str) -> str:
        """The recipe as YAML, with comments; an address of the text without its password or token, as runs write it.

        Args:
            file: Its name, for the command at its head.
        """
        chosen, full = self.policies[0], self.policies[-1]
        plan = chosen.plan
        share = plan.trainable_parameters / plan.total_parameters
        lines = [
            f"# Trains {plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({share:.1%}): "
            f"{chosen.reason}.",
            f"#   partialtune train {file}",
            "# In place of `trainable`, by what a step costs beside full fine-tuning (arithmetic, memory of tensors):",
        ]
        lines += [f"#   {_words(policy.keys):46} {_share(policy, full)}  {policy.reason}" for policy in self.policies]
        for key, value in sources_without_secrets(self.values).items():
            line = f"{key}: {_flow(value)}"
            lines.append(f"{line:36}  # {self.comments[key]}" if key in self.comments else line)
        return "\n".join(lines) + "\n"


def propose(text: str, model: str = MODEL, output_dir: str | None = None) -> Proposal:
    """A recipe to begin with.

    Args:
        text: As the recipe's `text`: a path, a glob, an address.
        model: As the recipe's `model_name_or_path`.
        output_dir: Of the run; `outputs/NAME OF THE TEXT` where absent, of another model than MODEL with its name.

    Raises:
        TextError: If the text cannot be read or is too short.
        ModelError: If the model cannot be loaded.
    """
    config, tokenizer = load_config(model), load_tokenizer(model)
    halves = [split_text(source.content, HELD_OUT) for source in read_texts([text])]
    train, held_out = ([half for half in side if half] for side in zip(*halves, strict=True))
    lengths = [len(ids) for ids in token_ids_of(train, tokenizer)]
    tokens = sum(lengths)
    block_size = _block_size(text, lengths, context_of(config.get_text_config()))
    windows = _windows(lengths, block_size)
    steps = min(max(math.ceil(EPOCHS * windows / BATCH), STEPS[0]), STEPS[1])
    empty = empty_model(config)
    policies = _policies(empty, block_size)
    small = policies[0].plan.total_parameters < SMALL
    values = {
        "model_name_or_path": model,
        "text": text,
        "block_size": block_size,
        **policies[0].keys,
        "output_dir": output_dir or f"outputs/{name_of(text)}{_suffix(model)}",
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATES[small],
        "weight_decay": 0.01,
        "prompts": _prompts(held_out, tokenizer),
    }
    comments = {
        "text": f"{counted(tokens, 'token')} to train on, the last tenth of the text is held out",
        "block_size": f"tokens a window: {counted(windows, 'window')}",
        "max_steps": f"{steps * BATCH / windows:.1f} times through the text",
        "per_device_train_batch_size": f"{BATCH} x {block_size} = {BATCH * block_size:,} tokens a step on one device",
        "learning_rate": "`partialtune compare RECIPE --learning_rates ...` tries others",
        "prompts": "from the held-out end",
    }
    return Proposal(values, comments, policies)


def name_of(text: str) -> str:
    """A folder's name for a text: `notes/*.md` -> `notes-md`, `https://x.org/pg829.txt` -> `pg829`."""
    text = without_secrets(text)
    last = re.sub(r"[?#].*", "", text).rstrip("/").rpartition("/")[2]
    stem = Path(last).stem if last != Path(last).suffix else last
    if not re.search(r"\w", stem) or "*" in last:
        stem = text
    return re.sub(r"[^\w.-]+", "-", stem).replace("-.", "-").strip("-.") or "run"


def _suffix(model: str) -> str:
    """For the folder of a run: `train TEXT` and a recipe of another model on the same text have not the same one.

    openai-community/gpt2 -> -gpt2
    """
    return "" if model == MODEL else "-" + re.sub(r"[^\w.-]+", "-", model.rstrip("/").rpartition("/")[2])


def _windows(lengths: Sequence[int], size: int) -> int:
    """How many windows texts of these lengths give: none of them goes over the end of a text."""
    return sum(length // size for length in lengths)


def _block_size(text: str, lengths: Sequence[int], context: int | None) -> int:
    """The longest window of a power of two that still gives enough of them."""
    size = LONGEST
    while size > SHORTEST and (_windows(lengths, size) < WINDOWS or (context is not None and size > context)):
        size //= 2
    if _windows(lengths, size) < 2:
        raise TextError(
            f"{text} has {counted(sum(lengths), 'token')} to train on: too few for two windows of {size}. Give more."
        )
    return size


def _policies(model: PreTrainedModel, block_size: int) -> list[Policy]:
    """What this model could train, the proposed one first, everything last."""
    found = []
    for keys, reason in POLICIES:
        try:
            plan = plan_freeze(model, keys["trainable"], head=keys.get("head", "tied"))
            found.append(Policy(keys, reason, plan, dry_step(model, plan, BATCH, block_size, fast_paths=("loss",))))
        except (RecipeError, ModelError):  # it has no such part: two blocks, a norm, a tied head
            if keys["trainable"] == ["all"]:
                raise
    small = found[-1].plan.total_parameters < SMALL
    first = next((one for one in found if one.keys == POLICIES[0 if small else 1][0]), found[0])
    return [first, *(one for one in found if one is not first)]


def _prompts(held_out: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """First words of sentences of the held-out texts: of several texts one each, all evenly spaced."""
    looked_at = _spaced(held_out, LOOKED_AT)
    texts = _spaced([found for text in looked_at if (found := _beginnings(text, tokenizer))], PROMPTS)
    shares = [PROMPTS // len(texts) + (at < PROMPTS % len(texts)) for at in range(len(texts))]
    return list(dict.fromkeys(one for text, share in zip(texts, shares, strict=True) for one in _spaced(text, share)))


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced."""
    chosen = min(most, len(items))
    return [items[at * len(items) // chosen] for at in range(chosen)]


def _beginnings(text: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """First words of a text's sentences; first characters where words have no spaces."""
    ids = token_ids_of([text], tokenizer)[0][:20_000]
    plain = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    sentences = [one for one in re.split(r"(?<=[.!?])\s+", plain)[1:] if len(one.split()) > 2 * PROMPT_WORDS]
    if not sentences:
        pieces = plain.split()
        long = [" ".join(pieces[at : at + PROMPT_WORDS]) for at in range(0, len(pieces), 3 * PROMPT_WORDS)]
        sentences = long or [plain]
    return [one for one in dict.fromkeys(" ".join(one.split()[:PROMPT_WORDS])[:60] for one in sentences) if one]


def _words(keys: dict[str, Any]) -> str:
    untied = ", head: untied" if "head" in keys else ""
    return f"{_flow(keys['trainable'])}{untied}"


def _share(policy: Policy, full: Policy) -> str:
    arithmetic = policy.cost.products.total / full.cost.products.total
    return f"{arithmetic:4.0%} {policy.cost.memory.peak / full.cost.memory.peak:5.0%}"


def _flow(value: Any) -> str:
    if isinstance(value, float):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}" if value < 0.01 else str(value)
    written = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return written.removesuffix("...\n").strip()
