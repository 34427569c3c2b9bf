"""What follows from `early_stopping_patience`: evaluations, checkpoints and the metric that it needs.

In: a recipe's converted values. Out: values of `TrainingArguments` that the recipe does not name, and what contradicts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

CHECKPOINTS_KEPT = 2  # the best one, to go back to, and the newest one, to go on from


def implied_by_early_stopping(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for keys that the recipe does not name; nothing for a recipe without early stopping.

    The run goes back to its best checkpoint, so that a checkpoint is written at each evaluation.
    """
    if values.get("early_stopping_patience") is None:
        return {}
    implied: dict[str, Any] = {
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
    }
    if values.get("load_best_model_at_end", True):
        strategy = values.get("eval_strategy", "steps")
        implied |= {"save_strategy": strategy, "save_total_limit": CHECKPOINTS_KEPT}
        if values.get("save_strategy", strategy) == "steps":
            given = [values[key] for key in ("eval_steps", "save_steps") if values.get(key) is not None]
            implied |= {key: given[0] for key in ("eval_steps", "save_steps") if given}
    return {key: value for key, value in implied.items() if values.get(key) is None}


def wrong_about_early_stopping(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for what contradicts early stopping."""
    if values.get("early_stopping_patience") is None:
        if values.get("early_stopping_threshold"):
            yield "early_stopping_threshold", "does nothing without early_stopping_patience. Give it as well, 3, say."
        return
    if values.get("validation_share") == 0:
        message = "needs held-out text, and validation_share is 0. Set validation_share to 0.1, say"
        yield "early_stopping_patience", f"{message}."
    if values.get("eval_strategy") == "no":
        message = "looks at the held-out loss during training, and eval_strategy is no. Take eval_strategy out"
        yield "early_stopping_patience", f"{message}."
    goes_back = values.get("load_best_model_at_end", True)
    if goes_back and values.get("save_strategy") == "no":
        yield (
            "save_strategy",
            "no leaves no checkpoint to go back to, and early_stopping_patience ends a run with the weights of the "
            "best one. Take it out, or say load_best_model_at_end: false to end with the last weights.",
        )
