"""The keys of a recipe that are our own: plain dataclasses, one for each stage of a run.

In: nothing but the standard library, so that a help text costs milliseconds. Out: fields with their type, default,
help with unit, and the bound that a value must keep. The other keys of a recipe are those of
`transformers.TrainingArguments`.
"""

import textwrap
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from partialtune.grammar.rate_syntax import DECAY
from partialtune.grammar.values import Bound, allowed, at_least
from partialtune.text.sources import SOURCE_HELP

DEFAULT_PROMPTS = ("Once upon a time", "The first thing to know is", "It was a great surprise to")


BELOW_ONE = Bound("0 or more and below 1", lambda value: 0 <= value < 1)
NOT_EMPTY = Bound("not empty", lambda text: bool(text.strip()))
MODEL_OR_SHARE = Bound(BELOW_ONE.words, lambda value: value == "model" or BELOW_ONE.holds(value))
SOURCES = Bound("one or more, none empty", lambda sources: bool(sources) and all(map(str.strip, sources)))
ENTRIES = Bound("none empty", lambda entries: all(map(str.strip, entries)))
NAMED_SOURCES = Bound(
    "none empty; the names validation and training are taken, and prompts",
    lambda named: (
        all(map(str.strip, [*named, *named.values()])) and not {"validation", "training", "prompts"} & set(named)
    ),
)


@dataclass(frozen=True)
class ModelArguments:
    """The model to start from."""

    model_name_or_path: str = field(
        metadata={"help": "Hub id, folder, or builtin:lilliput (the bundled small GPT-2).", "bound": NOT_EMPTY}
    )
    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit on the Hub; its commit is recorded.", "bound": NOT_EMPTY},
    )
    dropout: Literal["model"] | float = field(
        default="model",
        metadata={
            "help": "Probability put on every dropout of the config, or the model's own.",
            "bound": MODEL_OR_SHARE,
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model on the Hub."}
    )
    new_tokens: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tokens to add to the tokenizer. Their rows train, in the embedding and in the head, beside what "
            "`trainable` selects, which may then be absent."
        },
    )
    new_tokens_init: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "New token -> words whose rows are averaged for its start; the others start from the mean of all."
        },
    )


@dataclass(frozen=True)
class TextArguments:
    """The text and its windows."""

    text: list[str] = field(
        metadata={
            "help": f"Training text, one or more of: {SOURCE_HELP}.",
            "bound": SOURCES,
        }
    )
    text_cleaning: Literal["auto", "gutenberg", "none"] = field(
        default="auto",
        metadata={
            "help": "Removal of Project Gutenberg's header and licence, and of hard wraps: where its markers are "
            "found (auto), always (gutenberg), or never (none keeps every byte that decodes)."
        },
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column that holds the text in an hf: data set or a .jsonl, .json, .csv, .tsv or .parquet file.",
            "bound": NOT_EMPTY,
        },
    )
    block_size: int = field(
        default=256,
        metadata={"help": "Tokens per window: one of context, the others are predicted.", "bound": at_least(2)},
    )
    window_stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from one window's start to the next one's, for chunked windows; block_size if not said.",
            "bound": at_least(1),
        },
    )
    window_sampling: Literal["chunked", "random"] = field(
        default="chunked",
        metadata={"help": "chunked: each window once an epoch; random: offsets drawn up front from data_seed."},
    )
    validation_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of each source's characters held out, cut from its end before windows are made.",
            "bound": BELOW_ONE,
        },
    )

    replay: dict = field(
        default_factory=dict,
        metadata={
            "help": "{text, share, text_column?, text_cleaning?}: windows of a second text in each optimizer step, "
            "round(share x its windows) of them and at least 1, so that less is forgotten. It is cut into windows as "
            "the text is, goes round when it ends, and is scored as `replay`."
        },
    )

    def __post_init__(self) -> None:
        if self.window_stride is None:
            # the dataclass is frozen: a plain assignment would raise
            object.__setattr__(self, "window_stride", self.block_size)


@dataclass(frozen=True)
class FreezeArguments:
    """What trains, and what holds still."""

    trainable: list[str] = field(
        default_factory=list,
        metadata={"help": "Selectors of what trains; everything else is frozen. Required for method partial."},
    )
    schedule: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "Gradual unfreezing: phases {from_step or from_epoch, trainable, learning_rate?}, each adds to "
            "what trains. A phase's learning_rate (if not said, the recipe's) is that of the parameters it adds; "
            "lr_scheduler_type changes both alike, over the whole run."
        },
    )
    block_sampling: dict = field(
        default_factory=dict,
        metadata={
            "help": "Blocks that learn in turn, beside what `trainable` says: {blocks: 2, every: 20, order: random "
            "(LISA), ascending or descending (as BAdam), keep_state: false, candidates: 'blocks[2:]'}. Every so many "
            "steps others are drawn, from `seed`; those that rest lose their optimizer state, or keep it."
        },
    )
    part_learning_rates: dict = field(
        default_factory=dict,
        metadata={
            "help": "Selector -> learning rate of what it names: {embeddings: 1.0e-5, 'blocks[-1]': 1.0e-4}. The last "
            "that matches wins; what none names has learning_rate, or its phase's. lr_scheduler_type changes all alike."
        },
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the learning rate from each layer to the one below it, from the head (factor 1) through "
            "the blocks to the embeddings. It leaves the rates of part_learning_rates as they are.",
            "bound": DECAY,
        },
    )
    head: Literal["tied", "untied"] = field(
        default="tied", metadata={"help": "What to do where the model ties its head to the token embedding."}
    )
    method: Literal["partial", "full", "lora"] = field(
        default="partial",
        metadata={
            "help": "partial trains what `trainable` selects. As baselines, full trains everything, and lora trains "
            "adapters (through peft) beside the matrices that `trainable` selects in the blocks."
        },
    )
    lora: dict = field(
        default_factory=dict,
        metadata={
            "help": "Adapters (through peft) beside what `trainable` selects: {target, rank?, alpha?}. Every matrix in "
            "a block that the selectors in `target` choose gets one; rank is 8 and alpha 16 where they are not said. "
            "method: lora is short for it, with nothing else that trains."
        },
    )
    lora_rank: int = field(
        default=8, metadata={"help": "Rank of an adapter's product, for method lora.", "bound": at_least(1)}
    )
    lora_alpha: int = field(
        default=16,
        metadata={"help": "Scale of an adapter's product, times lora_rank; for method lora.", "bound": at_least(1)},
    )
    frozen_dtype: Literal["auto", "float32", "bf16"] = field(
        default="auto",
        metadata={
            "help": "How frozen matrices are held while training. auto: in the base's own 16 bits where it has them, "
            "widened for each product; float32: widened for good, with the same results; bf16: those of a float32 "
            "base are rounded while training, and scored and saved unrounded. What trains is float32."
        },
    )
    weight_decay_on: Literal["matrices", "all"] = field(
        default="matrices",
        metadata={"help": "What weight_decay acts on: matrices alone (no norms, no biases), or all that trains."},
    )
    frozen_quantization: Literal["int8", "nf4"] | None = field(
        default=None,
        metadata={
            "help": "Hold frozen matrices of the blocks in 8 or 4 bits (bitsandbytes), and widen them one at a time "
            "for each product. What any phase trains stays in fp32. What is saved is a delta on the base as it was."
        },
    )
    delta_steps: int = field(
        default=10, metadata={"help": "Optimizer steps between reports of the weight deltas.", "bound": at_least(1)}
    )
    checkpoint_format: Literal["full", "delta"] = field(
        default="full",
        metadata={
            "help": "The final model as a whole, or as delta.safetensors: only what was trained, with digests of the "
            "base. `partialtune apply` and partialtune.load make it whole again, bit for bit."
        },
    )
    allow_failed_audit: bool = field(
        default=False,
        metadata={"help": "Warn, and go on, where the freeze audit fails; without it the run ends with exit code 3."},
    )


@dataclass(frozen=True)
class EvaluationArguments:
    """What is compared before and after."""

    eval_texts: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> text source: further texts scored before and after (what was forgotten?).",
            "bound": NAMED_SOURCES,
        },
    )
    prompts: list[str] = field(
        default_factory=lambda: list(DEFAULT_PROMPTS),
        metadata={"help": "Texts whose next tokens and continuations are compared.", "bound": ENTRIES},
    )
    sample_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between samples: the prompts continued while training, shown in log, trackers and "
            "report. Without it at each evaluation; 0 is never. Training is not changed by it.",
            "bound": at_least(0),
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations in a row without a better held-out loss after which the run ends, with the weights of "
            "the best checkpoint (load_best_model_at_end: false keeps the last ones). A checkpoint is written at each "
            "evaluation; the best and the newest are kept.",
            "bound": at_least(1),
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={
            "help": "What metric_for_best_model (loss, in nats a token) has to gain to count as better.",
            "bound": at_least(0),
        },
    )


@dataclass(frozen=True)
class SpeedArguments:
    """What is computed in less time and memory."""

    prefix_cache: Literal["auto", "off", "memory", "disk"] = field(
        default="auto",
        metadata={
            "help": "Keep what the frozen blocks below all that trains give for each window, and never compute it "
            "twice: where it pays and fits (auto), always (memory; disk: for later runs too), or never (off)."
        },
    )
    fast_paths: list[Literal["loss", "gelu", "casts"]] = field(
        default_factory=lambda: ["loss", "gelu", "casts"],
        metadata={
            "help": "loss: head and cross entropy without all logits; gelu: tanh GELU in one operation; casts: frozen "
            "weights cast to bf16 once. [] is the plain path."
        },
    )


ARGUMENT_CLASSES = (ModelArguments, TextArguments, FreezeArguments, EvaluationArguments, SpeedArguments)


def argument_fields() -> dict[str, Field]:
    """Every recipe key of our own -> its dataclass field, in the order in which a recipe is written."""
    return {entry.name: entry for cls in ARGUMENT_CLASSES for entry in fields(cls)}


def argument_types() -> dict[str, Any]:
    """Every recipe key of our own -> its type."""
    return {key: hint for cls in ARGUMENT_CLASSES for key, hint in get_type_hints(cls).items()}


def default_of(entry: Field) -> Any:
    """A field's default value, or `dataclasses.MISSING` where the field is required."""
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def recipe_help() -> str:
    """Our own recipe keys, a few lines each: key, what is allowed, default, help. Imports nothing heavy."""
    hints, sections = argument_types(), []
    for cls in ARGUMENT_CLASSES:
        lines = [f"{str(cls.__doc__).rstrip('.')}:"]
        for entry in fields(cls):
            lines += [f"  {entry.name}: {_allowed_and_default(entry, hints[entry.name])}"]
            lines += [f"      {line}" for line in textwrap.wrap(entry.metadata["help"], 100)]
        sections.append("\n".join(lines))
    rest = (
        "Nearly every field of transformers.TrainingArguments is a key as well; output_dir is required. "
        "The others are\nrefused with the reason."
    )
    return "\n\n".join([*sections, rest]) + "\n"


def _allowed_and_default(entry: Field, hint: Any) -> str:
    default = default_of(entry)
    fallback = "required" if default is MISSING else f"default: {_show_default(default)}"
    return f"{allowed(hint, entry.metadata.get('bound'))} ({fallback})"


def _show_default(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return "; ".join(default) or "none"
    return "none" if default in (None, {}) else str(default)
