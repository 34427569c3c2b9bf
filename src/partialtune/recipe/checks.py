"""Checks of a whole recipe: entries by key -> converted values, or one error that lists every mistake.

In: entries (value and origin) by key. Out: a flat mapping of converted values: each of its key's type and within its
bound, no two of them contradicting each other, and all of them accepted by `transformers.TrainingArguments`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from partialtune.errors import (
    HOW_TO_INSTALL_BITSANDBYTES,
    HOW_TO_INSTALL_PEFT,
    RecipeError,
    is_bitsandbytes_installed,
    is_peft_installed,
)
from partialtune.grammar.lora_syntax import NOT_WITH_NEW_TOKENS, read_lora
from partialtune.grammar.rate_syntax import read_part_rates
from partialtune.grammar.sampling_syntax import NOT_WITH_A_SCHEDULE, NOT_WITH_LORA, read_block_sampling
from partialtune.grammar.schedule_syntax import read_schedule
from partialtune.grammar.values import (
    allowed,
    convert_value,
    nearest,
    nearest_choice,
    quoting_advice,
    show,
    wrong_new_tokens,
)
from partialtune.net.addresses import without_secrets
from partialtune.recipe.arguments import argument_fields, default_of
from partialtune.recipe.early_stopping import wrong_about_early_stopping
from partialtune.recipe.key_rules import (
    ALIASES,
    LENGTHS,
    OTHER_DEFAULTS,
    REASONS,
    REFUSED,
    bound_of,
    recipe_types,
    training_defaults,
    unknown_key,
)
from partialtune.recipe.parsing import Entry, Problem, Words, word_value
from partialtune.recipe.replay_key import read_replay, wrong_beside_replay
from partialtune.recipe.trainer_checks import training_problems
from partialtune.text.sources import SOURCE_FORMS

REQUIRED = {
    "model_name_or_path": "Give a Hub id, a folder, or builtin:lilliput",
    "text": f"Give {SOURCE_FORMS}",
    "trainable": "Give selectors, such as ['blocks[-2:]', final_norm], or say method: full",
    "output_dir": "Give a folder that does not exist yet, such as outputs/first",
}
# Typed float in TrainingArguments, because a value below 1 is a share of the run; a whole number of steps stays an int.
STEPS_OR_SHARES = ("warmup_steps", "logging_steps", "eval_steps", "save_steps", "eval_delay")


class RecipeMistakes(RecipeError):
    """Every mistake of a recipe in one message, a line each.

    Attributes:
        values: The values that could be converted.
        wrong: Keys that something is wrong with.
    """

    def __init__(
        self, name: str, problems: Sequence[Problem], values: Mapping[str, Any], given: Mapping[Any, Entry]
    ) -> None:
        self._name, self._problems, self._given = name, problems, given
        self.values = values
        self.wrong = {problem.key.split(".")[0] for problem in problems}
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [
            f"  {problem.origin}{', ' * bool(problem.origin)}{problem.key}: {problem.message}"
            for problem in sorted(problems, key=_position)
        ]
        super().__init__(without_secrets("\n".join([f"{name}: {count}. Nothing was loaded or written.", *lines])))

    def with_further(self, found: Iterable[tuple[str, str]]) -> "RecipeMistakes":
        """The same with further mistakes, (key, message), each put where its key stands."""
        lines = [
            (key, line.removeprefix(f"{key}, ").removeprefix(f"{key}: "))
            for key, text in found
            for line in text.splitlines()
        ]
        return RecipeMistakes(self._name, [*self._problems, *_placed(self._given, lines)], self.values, self._given)


def with_present_names(given: Mapping[Any, Entry], problems: list[Problem]) -> dict[Any, Entry]:
    """Deprecated names of a field replaced by the present one; both at once is a problem."""
    for old, new in ALIASES.items():
        if old in given and new in given:
            problems.append(Problem(given[old].origin, old, f"is the former name of {new}, said as well. Keep {new}."))
    doubled = {old for old, new in ALIASES.items() if new in given}
    return {ALIASES.get(key, key): entry for key, entry in given.items() if key not in doubled}


def checked_values(given: Mapping[Any, Entry], problems: list[Problem], name: str) -> dict[str, Any]:
    """Convert and check every value that was given.

    Args:
        given: Entries by key, after the command line has won over the file.
        problems: Mistakes that reading the file and the words has found already.
        name: What the message calls the recipe.

    Raises:
        RecipeError: If there is any problem; lists these and those found here, one a line.
    """
    values, problems = values_and_problems(given, problems, recipe_types(), training_defaults())
    # TrainingArguments is built only where every key of its own is right: it would refuse a wrong one a second time.
    wrong_keys = {problem.key.split(".")[0] for problem in problems}
    if not wrong_keys & training_defaults().keys():
        problems += _placed(given, training_problems(values))
    if problems:
        raise RecipeMistakes(name, problems, values, given)
    return values


def values_and_problems(
    given: Mapping[Any, Entry], problems: Sequence[Problem], types: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """All that can be said of the values without building `TrainingArguments`.

    Args:
        given: As for `checked_values`.
        problems: As for `checked_values`.
        types: Type by key; None for one that is not known, whose value is left out.
        defaults: Of the fields of `TrainingArguments`, which advice names.

    Returns:
        The values that could be converted, and all problems: those given and those found.
    """
    values, problems = {}, list(problems)
    for key, entry in given.items():
        try:
            if key in REFUSED or types.get(key, ...) is not None:
                values[key] = _checked_value(key, entry.value, types, defaults)
        except ValueError as error:
            problems.append(Problem(entry.origin, str(key), str(error)))
    if "schedule" in values:
        from_start = bool(values.get("trainable", "trainable" in given) or values.get("new_tokens")) or "lora" in given
        values["schedule"], wrong = read_schedule(values["schedule"], from_start)
        problems += [Problem(given["schedule"].origin, "schedule", message) for message in wrong]
    if "replay" in values:
        values["replay"], wrong = read_replay(values["replay"])
        problems += [Problem(given["replay"].origin, "replay", message) for message in wrong]
    if "lora" in values:
        lora, wrong = read_lora(values["lora"])
        values["lora"] = {"target": list(lora.target), "rank": lora.rank, "alpha": lora.alpha}
        problems += [Problem(given["lora"].origin, "lora", message) for message in wrong]
    if values.get("block_sampling"):
        values["block_sampling"], wrong = read_block_sampling(values["block_sampling"])
        problems += [Problem(given["block_sampling"].origin, "block_sampling", message) for message in wrong]
    if "part_learning_rates" in values:
        values["part_learning_rates"], wrong = read_part_rates(values["part_learning_rates"])
        problems += [Problem(given["part_learning_rates"].origin, "part_learning_rates", message) for message in wrong]
    return values, problems + _placed(given, [*_missing(given, values), *_contradictions(values)])


def _placed(given: Mapping[Any, Entry], found: Iterable[tuple[str, str]]) -> list[Problem]:
    """(key, message) -> problems that say where the key stands."""
    return [Problem(given[key].origin if key in given else "", key, message) for key, message in found]


def _checked_value(key: Any, value: Any, types: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    if key in REFUSED:
        raise ValueError(f"refused: {REFUSED[key]}. Take {key} out.")
    if key not in types:
        raise ValueError(unknown_key(key, nearest(key, types)))
    hint, bound = types[key], bound_of(key)
    # Words of the command line are read only here: the key's type decides whether `[a]` is a list or a text.
    value = word_value(value, hint) if isinstance(value, Words) else value
    try:
        converted = convert_value(value, hint)
    except ValueError as error:
        near = nearest_choice(value, hint) + REASONS.get(key, "")
        advice = near or quoting_advice(value, hint) or _default_advice(key, defaults)
        raise ValueError(f"got {error}; allowed: {allowed(hint, bound)}.{advice}") from error
    if bound and converted is not None and not bound.holds(converted):
        raise ValueError(f"got {show(value)}; allowed: {allowed(hint, bound)}.{_default_advice(key, defaults)}")
    whole = key in STEPS_OR_SHARES and converted is not None and converted == int(converted)
    return int(converted) if whole else converted


def _default_advice(key: str, defaults: Mapping[str, Any]) -> str:
    entry = argument_fields().get(key)
    default = default_of(entry) if entry else defaults.get(key, MISSING)
    if default in (MISSING, None, [], {}) and key not in OTHER_DEFAULTS:
        return ""
    return f" Leave it out for the default, {OTHER_DEFAULTS.get(key) or show(default)}."


def _missing(given: Mapping[Any, Entry], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in REQUIRED:
        if key not in given and key != "trainable":
            yield key, f"missing. {REQUIRED[key]}."
    partial = "method" not in given or values.get("method") in ("partial", "lora")
    scheduled = "schedule" in given and values.get("schedule") != []
    others = {"lora": values.get("method") != "lora", "new_tokens": values.get("new_tokens") != []}
    others["block_sampling"] = values.get("block_sampling") != {}
    scheduled = scheduled or any(key in given and trains for key, trains in others.items())
    if partial and not scheduled and ("trainable" not in given or values.get("trainable") == []):
        yield "trainable", f"missing: nothing would train. {REQUIRED['trainable']}."


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for converted values that cannot stand together; keys that were not given are absent."""
    if all(key in values for key in LENGTHS) and values["max_steps"] != -1:  # -1: count epochs
        steps, epochs = (values[key] for key in LENGTHS)
        message = f"max_steps {steps} and num_train_epochs {epochs:g} both say how long to train. Keep one of them."
        yield "max_steps", message
    if values.get("bf16") and values.get("fp16"):
        yield "fp16", f"bf16 is {str(values['bf16']).lower()} as well; a run has one precision. Keep one of them."
    if values.get("window_sampling") == "random" and values.get("window_stride") is not None:
        yield "window_stride", "is for window_sampling: chunked; random windows have no stride. Leave one of them out."
    if values.get("eval_strategy", "no") != "no" and values.get("validation_share") == 0:
        yield "eval_strategy", "needs held-out text, and validation_share is 0. Set validation_share to 0.1, say."
    names_metric = any(
        values.get(key) for key in ("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience")
    )
    if values.get("save_strategy") == "best" and not names_metric:
        yield "save_strategy", "best needs metric_for_best_model: loss."
    # Reentrant checkpointing passes no gradient on in a block whose input requires none: the embeddings' output would
    # have to require one, and backward would not stop at the first block that trains.
    if (values.get("activation_checkpointing_kwargs") or {}).get("use_reentrant"):
        message = "use_reentrant needs gradients at every block's input: backward would run through all frozen blocks"
        yield "activation_checkpointing_kwargs", f"{message}. Take it out."
    if values.get("prefix_cache") in ("memory", "disk"):
        yield from _wrong_beside_a_kept_prefix(values)
    if values.get("checkpoint_format") == "delta" and values.get("trust_remote_code"):
        message = "delta: a model whose code comes with it is not made whole again without that code"
        yield "checkpoint_format", f"{message}. Leave it out."
    if values.get("checkpoint_format") == "delta" and _adapters_alone(values):
        method = "method lora" if values.get("method") == "lora" else "a run with lora and no trainable"
        yield "checkpoint_format", f"delta: adapters are all that {method} saves. Leave it out."
    yield from _wrong_selectors(values)
    if "new_tokens" in values or "new_tokens_init" in values:
        yield from _wrong_about_tokens(values)
    if values.get("schedule"):
        yield from _wrong_beside_a_schedule(values)
    if values.get("block_sampling"):
        yield from _wrong_beside_block_sampling(values)
    if values.get("part_learning_rates") or values.get("layer_decay") is not None:
        yield from _wrong_beside_part_rates(values)
    yield from _wrong_about_lora(values)
    yield from _wrong_about_quantization(values)
    yield from wrong_beside_replay(values)
    yield from wrong_about_early_stopping(values)
    yield from _wrong_checkpoint(values.get("resume_from_checkpoint"))


def _wrong_selectors(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from partialtune.grammar.selector_syntax import check_selector_syntax

    trainable = values.get("trainable")
    if values.get("method") == "full":
        if trainable not in (None, ["all"]):
            yield "trainable", f"method full trains everything, got {trainable}. Leave it out, or take method: partial."
        return
    for number, selector in enumerate(trainable or [], start=1):
        problem = check_selector_syntax(selector)
        if problem:
            yield "trainable", f"entry {number}, {selector!r}: {problem}"


def _wrong_about_tokens(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    tokens, init = values.get("new_tokens", []), values.get("new_tokens_init", {})
    if tokens or init:
        yield from wrong_new_tokens(tokens, init)
    if tokens and values.get("method") == "lora":
        yield "new_tokens", "method lora trains adapters alone, and new tokens train rows. Leave one of them out."
    elif tokens and values.get("lora"):
        yield "lora", NOT_WITH_NEW_TOKENS


def _wrong_beside_a_kept_prefix(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    place, advice = values["prefix_cache"], "Say prefix_cache: auto, or off"
    if values.get("neftune_noise_alpha") is not None:
        yield "prefix_cache", f"{place} does not go with neftune_noise_alpha: no pass would give the same. {advice}."
    if values.get("fsdp"):
        yield "prefix_cache", f"{place} does not go with fsdp, which shards the frozen blocks. {advice}."


def _wrong_beside_a_schedule(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("method") == "full":
        yield "schedule", "method full trains everything from the first step. Leave it out, or take method: partial."
    if values.get("ddp_find_unused_parameters") is False:
        message = "false does not go with a schedule: until their phase parameters have no gradient"
        yield "ddp_find_unused_parameters", f"{message}. Take it out."


def _wrong_beside_block_sampling(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    key = "block_sampling"
    if values.get("schedule"):
        yield key, NOT_WITH_A_SCHEDULE
    if values.get("method") == "full":
        yield key, "method full trains everything in every step. Leave it out, or take method: partial."
    if values.get("method") == "lora":
        yield key, "method lora trains its adapters in every step. Leave it out, or take method: partial."
    if values.get("lora"):
        yield key, NOT_WITH_LORA
    if values.get("ddp_find_unused_parameters") is False:
        message = "false does not go with block_sampling: parameters of blocks that rest have no gradient"
        yield "ddp_find_unused_parameters", f"{message}. Take it out."
    if values.get("prefix_cache") in ("memory", "disk"):
        place = values["prefix_cache"]
        message = f"{place} does not go with block_sampling: blocks below those that learn change from draw to draw"
        yield "prefix_cache", f"{message}. Say prefix_cache: auto, or off."


def _wrong_beside_part_rates(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("lr_scheduler_type") == "greedy":
        keys = " and ".join(key for key in ("part_learning_rates", "layer_decay") if values.get(key))
        message = f"greedy holds all rates above one bound, so that {keys} would not keep their ratios"
        yield "lr_scheduler_type", f"{message}. Take another one, such as cosine."


def _adapters_alone(values: Mapping[str, Any]) -> bool:
    """Whether adapters train, and nothing beside them."""
    beside = values.get("trainable") or values.get("schedule")
    return values.get("method") == "lora" or ("lora" in values and not beside)


def _wrong_about_lora(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method, lora = values.get("method", "partial"), values.get("lora")
    for key in ("lora_rank", "lora_alpha"):
        if key in values and method != "lora":
            instead = f"Say {key.removeprefix('lora_')} in lora" if lora else "Take it out"
            yield key, f"is for method: lora, and method is {method}. {instead}."
    if lora and method == "lora":
        trained = values.get("trainable") or ["attention"]
        message = f"method: lora is short for lora: {{target: [{', '.join(trained)}]}} with nothing else that trains"
        yield "lora", f"{message}. Keep one of the two; beside lora, trainable says what else trains."
    elif lora and method == "full":
        yield "lora", "method full trains every matrix itself. Leave lora out, or take method: partial."
    if not lora and method != "lora":
        return
    if not is_peft_installed():
        yield ("lora" if lora else "method"), HOW_TO_INSTALL_PEFT
    if method == "lora" and values.get("schedule"):
        yield "schedule", "method lora trains its adapters from the first step. Leave it out, or take method: partial."
    if values.get("head") == "untied" and _adapters_alone(values):
        yield "head", "an adapter stands beside its base as it is, tied. Leave it out, or take method: partial."
    if values.get("trust_remote_code") and not _adapters_alone(values):
        message = "with trainable it saves a delta, and a model whose code comes with it is not made whole again of one"
        yield "lora", f"{message}. Leave one of the two out."


def _wrong_about_quantization(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    key, kind = "frozen_quantization", values.get("frozen_quantization")
    if kind is None:
        return
    if not is_bitsandbytes_installed():
        yield key, HOW_TO_INSTALL_BITSANDBYTES
    if values.get("method") == "full":
        yield key, "method full trains everything, so that nothing is frozen. Leave it out, or take method: partial."
    if values.get("checkpoint_format") == "full":
        message = f"full: the base's own values are not in memory beside {kind}, and a delta is saved"
        yield "checkpoint_format", f"{message}. Leave it out; `partialtune apply RUN OUT` makes the delta whole."
    if values.get("trust_remote_code"):
        message = "saves a delta, and a model whose code comes with it is not made whole again of one"
        yield key, f"{message}. Leave one of the two out."
    if values.get("fsdp"):
        yield "fsdp", f"shards parameters, and a matrix in {kind} cannot be sharded. Leave one of the two out."
    if values.get("torch_compile"):
        yield "torch_compile", f"does not know matrices in {kind}. Leave one of the two out."


def _wrong_checkpoint(checkpoint: str | None) -> Iterator[tuple[str, str]]:
    if checkpoint not in (None, "auto") and not Path(checkpoint).is_dir():
        kind = "is a file" if Path(checkpoint).exists() else "does not exist"
        advice = "auto takes the newest complete one"
        yield "resume_from_checkpoint", f"{checkpoint!r} {kind}; allowed: auto or a checkpoint's folder. {advice}."


def _position(problem: Problem) -> tuple[int, int]:
    """Lines in their order, then what has no place, then the command line."""
    if problem.origin.startswith("line "):
        return 0, int(problem.origin.removeprefix("line "))
    return (2, 0) if problem.origin else (1, 0)
