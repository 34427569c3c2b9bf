"""Schedules: a recipe's `schedule` -> checked entries, and the step from which each adds to what trains.

    schedule:
      - {from_step: 0, trainable: ['blocks[-1]', final_norm]}
      - {from_step: 40, trainable: ['blocks[-2]'], learning_rate: 2.0e-5}

In: mappings as YAML or a caller gives them. Out: mappings with converted values. Neither model nor text is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from partialtune.errors import RecipeError
from partialtune.grammar.schedule_syntax import STARTS


def in_steps(schedule: Sequence[Mapping[str, Any]], epoch_steps: int, run_steps: int) -> list[dict[str, Any]]:
    """The same schedule with every `from_epoch` as the nearest `from_step`.

    Args:
        schedule: Entries as `read_schedule` returns them.
        epoch_steps: Optimizer steps of one epoch.
        run_steps: Optimizer steps of the whole run.

    Raises:
        RecipeError: If an entry begins when the run has ended.
    """
    resolved, late = [], []
    for number, entry in enumerate(schedule, start=1):
        step = entry["from_step"] if "from_step" in entry else round(entry["from_epoch"] * epoch_steps)
        resolved.append({"from_step": step, **{key: entry[key] for key in entry if key not in STARTS}})
        if step >= run_steps:
            epoch = f"from_epoch {entry['from_epoch']:g}, which is " if "from_epoch" in entry else ""
            late.append(f"schedule, entry {number}: {epoch}from_step {step}")
    if late:
        raise RecipeError(
            f"{'; '.join(late)}: the run has {run_steps} steps, 0 to {run_steps - 1}, {epoch_steps} an epoch. "
            f"Begin earlier, train longer (max_steps, num_train_epochs), or take it out."
        )
    return resolved


def in_places(schedule: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same schedule with each entry's place, 0, 1, ..., for its step: before the text is read, epochs have none."""
    key = next(key for key in STARTS if key in schedule[0])
    first = 0 if schedule[0][key] == 0 else 1
    return [
        {"from_step": place, **{key: entry[key] for key in entry if key not in STARTS}}
        for place, entry in enumerate(schedule, start=first)
    ]
