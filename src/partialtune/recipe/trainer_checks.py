"""What `TrainingArguments` or Trainer would refuse later, asked before anything is loaded.

In: a recipe's converted values. Out: (key, message) of what would stop the run when TrainingArguments is built (a
combination of keys, a missing tracker), at the first step (the learning-rate schedule) or at the first evaluation (the
metric for the best model).
"""

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from partialtune.grammar.values import nearest
from partialtune.metrics import CHOOSES_BEST, METRICS
from partialtune.recipe.early_stopping import implied_by_early_stopping
from partialtune.recipe.key_rules import training_defaults

if TYPE_CHECKING:
    from transformers import TrainingArguments

GIVEN_BY_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
STEPS_TRIED = 1000  # where the recipe counts epochs


def training_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What TrainingArguments, or the machine, has against values whose types and bounds are right."""
    import torch

    training = {key: value for key, value in values.items() if key in training_defaults()}
    training = implied_by_early_stopping(values) | training
    if training.get("bf16") == "auto":  # measured by the run, before it builds the real TrainingArguments
        del training["bf16"]
    training["use_cpu"] = training.get("use_cpu") or not torch.accelerator.is_available()
    if values.get("validation_share") != 0:  # where text is held out, it is scored in between by default
        training.setdefault("eval_strategy", "steps")
    # The run sets its own eval_steps, when it knows its length. Equal to save_steps they pass the one check that there
    # is: load_best_model_at_end wants save_steps to be a multiple of them.
    training.setdefault("eval_steps", training.get("save_steps", training_defaults()["save_steps"]))
    yield from _wrong_trackers(training.get("report_to"))
    if training.get("fp16") and training["use_cpu"]:
        yield "fp16", "needs a GPU. Leave it out, or take bf16: auto."
        return
    yield from _metric_problems(training.get("metric_for_best_model"), training.get("greater_is_better"))
    args, refusal = _built(training)
    if refusal:
        yield next((key for key in values if key in refusal), "TrainingArguments"), f"transformers says: {refusal}"
    else:
        yield from _schedule_problems(args)


def _built(training: Mapping[str, Any]) -> tuple[Any, str | None]:
    """TrainingArguments of these keywords, and None; or None, and the words in which it refuses them."""
    import torch
    from transformers import TrainingArguments

    class Checked(TrainingArguments):
        # The real property picks a device and starts torch.distributed, which belongs to the run: a recipe is also
        # read by commands that train nothing.
        device = torch.device("cpu")

    log = logging.getLogger(TrainingArguments.__module__)
    was_silent, log.disabled = log.disabled, True  # its warnings come once, when the run builds the real one
    try:
        return Checked(**copy.deepcopy(dict(training))), None  # a copy: it rewrites the mappings that it is given
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        return None, " ".join(str(error).split())
    finally:
        log.disabled = was_silent


def _wrong_trackers(report_to: str | list[str] | None) -> Iterator[tuple[str, str]]:
    if report_to in (None, "none", "all", ["none"], ["all"]):
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for tracker in [report_to] if isinstance(report_to, str) else report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            near = nearest(tracker, INTEGRATION_TO_CALLBACK)
            advice = f" Did you mean {near}?" if near else ""
            yield "report_to", f"got {tracker!r}; allowed: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}.{advice}"
        elif tracker not in get_available_reporting_integrations():
            yield "report_to", f"{tracker} is not installed here. Install it (pip install {tracker}), or leave it out."


def _schedule_problems(args: "TrainingArguments") -> Iterator[tuple[str, str]]:
    """A schedule without arguments that it needs, with one that it does not know, or whose rate is no number.

    transformers builds it after the base was scored, and leaves out the arguments of the schedules that take none.
    """
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    kind, kwargs = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        own = {name: entry for name, entry in parameters.items() if name not in GIVEN_BY_TRAINER}
        strange = [name for name in kwargs if name not in own]
        if strange:
            near = nearest(strange[0], own)
            advice = f" Did you mean {near}?" if near else ""
            allowed = f"allowed: {', '.join(own)}" if own else "it takes none. Take lr_scheduler_kwargs out"
            yield "lr_scheduler_kwargs", f"{kind} does not know {strange[0]!r}; {allowed}.{advice}"
            return
        missing = [name for name, entry in own.items() if entry.default is entry.empty and name not in kwargs]
        if missing:
            example = f"lr_scheduler_kwargs: {{{missing[0]}: 10}}"
            yield "lr_scheduler_type", f"{kind} needs {' and '.join(missing)}. Write, for instance, {example}."
            return
    wrong = _refusal_of_schedule(args, kwargs)
    if wrong:
        yield "lr_scheduler_kwargs" if kwargs else "lr_scheduler_type", f"{kind}: transformers says: {wrong}"


def _refusal_of_schedule(args: "TrainingArguments", kwargs: Mapping[str, Any]) -> str | None:
    """What stands against a schedule that is built on an optimizer of one number, at its ends and in its middle."""
    import torch
    from transformers import get_scheduler

    steps = args.max_steps if args.max_steps > 0 else STEPS_TRIED
    warmup = args.get_warmup_steps(steps)
    # The cheapest optimizer there is: a schedule reads its learning rate alone.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, dict(kwargs))
        for factor in getattr(scheduler, "lr_lambdas", []):
            # The ends of the run and of its warm-up and the middle: a polynomial or a power goes wrong at an end.
            for step in sorted({0, 1, warmup, warmup + 1, steps // 2, steps - 1, steps}):
                value = factor(step)
                if isinstance(value, complex) or not math.isfinite(value) or value < 0:
                    return f"the learning rate would be multiplied by {value} at step {step}."
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return " ".join(str(error).split())
    return None


def _metric_problems(metric: str | None, greater_is_better: bool | None) -> Iterator[tuple[str, str]]:
    """A metric for the best model that no evaluation during training gives, or one taken for better the wrong way."""
    if metric is None:
        return
    name = metric.removeprefix("eval_")
    if name not in CHOOSES_BEST:
        near = nearest(name, CHOOSES_BEST)
        advice = f" Did you mean {near}?" if near else ""
        yield "metric_for_best_model", f"got {metric!r}; allowed: {', '.join(CHOOSES_BEST)}.{advice}"
        return
    larger = METRICS[name].better == "higher"
    if greater_is_better is not None and bool(greater_is_better) != larger:
        got, right = str(greater_is_better).lower(), "more" if larger else "less"
        yield (
            "greater_is_better",
            f"{got}: of {name}, {right} is better, and the worst model would be kept. Take it out.",
        )
