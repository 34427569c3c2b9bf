"""Where blocks learnt in turn: a run's folder -> which of its parameters were never drawn, and what its record hides.

The draws are computed anew from the plan's seed. `block_draws.jsonl` says how many there were, and has to agree.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partialtune.errors import ModelError
from partialtune.freeze.block_sampling import BlockSampling, blocks_words
from partialtune.proof.resting import DRAWS_FILE
from partialtune.run_folder import STATE_FILE, read_json
from partialtune.words import counted


@dataclass(frozen=True)
class Draws:
    """What a run drew.

    Attributes:
        never: Names of the parameters of blocks that were never drawn: they have to be those of the base.
        faults: A sentence for each way in which the record is not what the plan draws.
        words: For the claim; empty where no blocks learnt in turn.
    """

    never: frozenset[str] = frozenset()
    faults: tuple[str, ...] = ()
    words: str = ""


def read_draws(folder: Path, plan: Mapping[str, Any], name: str) -> Draws:
    """The draws of the run in a folder.

    Args:
        folder: It may hold `block_draws.jsonl` and `trainer_state.json`; without both it is not known how many draws
            there were, and every candidate may have learnt.
        plan: Its `freeze_plan.json`.
        name: What messages call the folder.

    Raises:
        ModelError: If the plan's sampling cannot be read.
    """
    if "sampling" not in plan:
        return Draws()
    try:
        sampling = BlockSampling.from_json(plan["sampling"])
        in_turn = {entry["name"]: entry["block"] for entry in plan["parameters"] if entry.get("in_turn") is True}
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: the sampling of its freeze plan cannot be read ({error}).") from error
    steps = _steps_of(folder)
    lines = _lines_of(folder / DRAWS_FILE)
    if lines is None and steps is None:
        return Draws(words=f"; how many draws there were is not known ({DRAWS_FILE} is missing)")
    count = sampling.draws_of(steps) if steps is not None else len(lines or ())
    drawn = {block for number in range(count) for block in sampling.draw(number)}
    rest = sorted(set(sampling.candidates) - drawn)
    words = f"; {counted(count, 'draw')} of {blocks_words(drawn)}" if drawn else "; no block was drawn"
    words += f", and {blocks_words(rest)} as in the base" if rest else ""
    never = frozenset(name for name, block in in_turn.items() if block in rest)
    return Draws(never, () if lines is None else tuple(_faults(sampling, lines, count)), words)


def _faults(sampling: BlockSampling, lines: list[Any], count: int) -> list[str]:
    expected = [sampling.line(number) for number in range(count)]
    if lines == expected:
        return []
    if len(lines) != count:
        return [f"{DRAWS_FILE} has {counted(len(lines), 'draw')}, and the run's steps make {count}."]
    number = next(number for number, line in enumerate(lines) if line != expected[number])
    return [
        f"{DRAWS_FILE}, line {number + 1}, says {json.dumps(lines[number])}, and the plan's seed {sampling.seed} draws "
        f"{json.dumps(expected[number])}."
    ]


def _steps_of(folder: Path) -> int | None:
    """Steps that the run took, None where its folder does not say."""
    try:
        steps = read_json(folder / STATE_FILE)["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _lines_of(file: Path) -> list[Any] | None:
    """What each line holds, the line itself where that is no JSON; None without a file."""
    if not file.is_file():
        return None
    found: list[Any] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(line)
    return found
