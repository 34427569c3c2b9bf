"""Blocks in turn: which decoder blocks learn from which step on, drawn from a seed or taken in order.

    block_sampling: {blocks: 2, every: 20, order: random, keep_state: false}

`random` is LISA (Pan et al. 2024, https://arxiv.org/abs/2403.17919), `ascending` and `descending` are block-coordinate
training as BAdam does it (Luo et al. 2024, https://arxiv.org/abs/2404.02827). A draw is a function of the seed and its
number, never of a state: it is the same on all processes, after a resume, and for whoever checks a run later.

In:  a model's structure, the settings, and what always trains.
Out: `BlockSampling`, data that the plan holds.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from partialtune.errors import RecipeError
from partialtune.grammar.sampling_syntax import read_block_sampling
from partialtune.model.rows import Rows
from partialtune.model.selectors import choose
from partialtune.model.structure import ModelStructure
from partialtune.words import counted

ALL_BLOCKS = "blocks[:]"  # the selector of the candidates where none is given


@dataclass(frozen=True)
class BlockSampling:
    """Which blocks learn when.

    Attributes:
        blocks: How many learn at one time.
        every: Steps from one draw to the next.
        order: `random`, `ascending` or `descending`.
        keep_state: Whether blocks that rest keep their optimizer state. Else they lose it, and begin anew.
        candidates: Numbers of the blocks that are drawn from, ascending.
        seed: Of random draws.
    """

    blocks: int
    every: int
    order: str
    keep_state: bool
    candidates: tuple[int, ...]
    seed: int

    def draw(self, number: int) -> tuple[int, ...]:
        """The blocks of draw `number`, counted from 0, ascending.

        Random: every choice of so many candidates is as likely as any other, whatever was drawn before. In order: the
        next candidates each time, and after the last the first again.
        """
        if self.order == "random":
            # Sorted by digests, and not by Python's or NumPy's generator: what those draw may change with their
            # version, and `verify` draws again years later.
            return tuple(sorted(sorted(self.candidates, key=lambda block: self._digest(number, block))[: self.blocks]))
        in_order = self.candidates if self.order == "ascending" else self.candidates[::-1]
        first = number * self.blocks
        return tuple(sorted(in_order[(first + place) % len(in_order)] for place in range(self.blocks)))

    def number_at(self, step: int) -> int:
        """The number of the draw that step number `step`, counted from 0, belongs to; 0 for a negative step."""
        return max(step, 0) // self.every

    def draws_of(self, steps: int) -> int:
        """In how many draws so many steps lie."""
        return -(-steps // self.every)

    def line(self, number: int) -> dict[str, Any]:
        """A draw as `block_draws.jsonl` has it."""
        return {"from_step": number * self.every, "blocks": list(self.draw(number))}

    def first_steps(self) -> dict[int, int]:
        """Candidate -> the first step in which it learns, however long the run is."""
        found: dict[int, int] = {}
        number = 0
        while len(found) < len(self.candidates):
            for block in self.draw(number):
                found.setdefault(block, number * self.every)
            number += 1
        return found

    def to_json(self) -> dict[str, Any]:
        """As `freeze_plan.json` has it."""
        return {**asdict(self), "candidates": list(self.candidates)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "BlockSampling":
        """What `to_json` was made of.

        Raises:
            TypeError, ValueError: If it is not that.
        """
        sampling = cls(**{**content, "candidates": tuple(content["candidates"])})
        numbers = [sampling.blocks, sampling.every, sampling.seed, *sampling.candidates]
        if not all(isinstance(number, int) for number in numbers) or sampling.order not in ORDER_WORDS:
            raise ValueError("its sampling holds no numbers, or an order that is none")
        if not 1 <= sampling.blocks <= len(sampling.candidates) or sampling.every < 1:
            raise ValueError("its sampling draws more blocks than there are, or none")
        return sampling

    def words(self) -> str:
        """`2 of 12 blocks (0 to 11) in turn, drawn at random from seed 42 every 20 steps`."""
        these = f"{self.blocks} of {counted(len(self.candidates), 'block')} ({spans(self.candidates)}) in turn"
        return f"{these}, {ORDER_WORDS[self.order].format(seed=self.seed)} every {counted(self.every, 'step')}"

    def _digest(self, number: int, block: int) -> bytes:
        return hashlib.sha256(f"{self.seed}/{number}/{block}".encode()).digest()


ORDER_WORDS = {
    "random": "drawn at random from seed {seed}",
    "ascending": "the next higher ones",
    "descending": "the next lower ones",
}


def spans(numbers: Iterable[int]) -> str:
    """Numbers in few words: spans([0, 1, 2, 5]) -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def plan_sampling(
    structure: ModelStructure, given: Mapping[str, Any], always: Mapping[str, Rows | None], seed: int
) -> tuple[BlockSampling, dict[str, str]]:
    """Decide which blocks are drawn from.

    Args:
        structure: The model's parameters.
        given: `block_sampling` as a recipe has it, converted or not.
        always: Name of each parameter that trains in every step -> its rows that do, None for all. A block that they
            hold wholly is no candidate.
        seed: Of random draws.

    Returns:
        The sampling; and by name, of each parameter that learns only while its block is drawn, the selector that made
        it a candidate.

    Raises:
        RecipeError: If the settings are wrong in themselves, or for this model.
    """
    settings, problems = read_block_sampling(given)
    if problems:
        raise RecipeError("\n".join(f"block_sampling: {problem}" for problem in problems))
    selectors = settings.pop("candidates", None) or [ALL_BLOCKS]
    chosen = _resolved(structure, selectors)
    of_block = {number: _names_of(structure, number) for number in range(structure.block_count)}
    wanted = _whole_blocks(structure, of_block, chosen)
    _refuse_shared(structure, of_block, wanted)
    candidates = [number for number in wanted if not set(of_block[number]) <= set(always)]
    rows = [name for number in candidates for name in of_block[number] if always.get(name) is not None]
    if rows:
        raise RecipeError(
            f"block_sampling: rows of {rows[0]} train in every step, and its block would be drawn as a whole. Leave "
            f"these rows out of trainable, or the block out of candidates."
        )
    if len(candidates) < settings["blocks"]:
        trained = [number for number in wanted if number not in candidates]
        why = f"; {blocks_words(trained)} always {'train' if len(trained) > 1 else 'trains'}" if trained else ""
        raise RecipeError(
            f"block_sampling: blocks is {settings['blocks']}, and {structure.model_name} has "
            f"{counted(len(candidates), 'candidate')} to draw from{f' ({spans(candidates)})' if candidates else ''}"
            f"{why}. Draw fewer blocks, or leave some out of trainable."
        )
    sampling = BlockSampling(
        blocks=settings["blocks"],
        every=settings["every"],
        order=settings.get("order", "random"),
        keep_state=settings.get("keep_state", False),
        candidates=tuple(candidates),
        seed=seed,
    )
    return sampling, {name: chosen[name] for number in candidates for name in of_block[number] if name not in always}


def in_turn(parameters: Iterable[Any], sampling: BlockSampling, drawn: Mapping[str, str]) -> Iterator[Any]:
    """The parameters of a plan, those that learn in turn with the selector that made their block a candidate.

    Args:
        parameters: `PlannedParameter`s of a plan in which these are frozen.
        sampling, drawn: Of `plan_sampling`.
    """
    first_steps = sampling.first_steps()
    for parameter in parameters:
        if parameter.name in drawn and parameter.block is not None:
            start = first_steps[parameter.block]
            yield replace(parameter, selector=drawn[parameter.name], from_step=start, in_turn=True)
        else:
            yield parameter


def blocks_words(numbers: Collection[int]) -> str:
    """`block 3`, `blocks 0 to 2, 5`."""
    return f"{'blocks' if len(numbers) > 1 else 'block'} {spans(numbers)}"


def _resolved(structure: ModelStructure, selectors: list[str]) -> dict[str, str]:
    try:
        chosen = choose(structure, selectors)
    except RecipeError as problem:
        raise RecipeError(f"block_sampling, candidates: {problem}") from problem
    in_part = [name for name, what in chosen.items() if what.rows is not None]
    if in_part:
        raise RecipeError(
            f"block_sampling, candidates: they choose some rows or experts of {in_part[0]}, which is no whole block. "
            f"Blocks are drawn as a whole: name them as in 'blocks[2:]'."
        )
    return {name: what.selector for name, what in chosen.items()}


def _names_of(structure: ModelStructure, number: int) -> list[str]:
    """The parameters of a block that can train."""
    places = {info.name: {place.block for place in info.places} for info in structure.parameters}
    return [name for name, blocks in places.items() if number in blocks and name not in structure.fixed]


def _whole_blocks(structure: ModelStructure, of_block: Mapping[int, list[str]], chosen: Mapping[str, str]) -> list[int]:
    """The blocks that selectors of candidates chose, each of them as a whole and nothing beside them."""
    whole = [number for number, names in of_block.items() if names and set(names) <= chosen.keys()]
    rest = chosen.keys() - {name for number in whole for name in of_block[number]}
    if rest:
        raise RecipeError(
            f"block_sampling, candidates: {len(rest)} parameters that they choose are no whole blocks, {min(rest)} "
            f"first. Blocks of {structure.model_name} are drawn as a whole: name them as in 'blocks[2:]'. What is to "
            f"learn in every step belongs into trainable."
        )
    return whole


def _refuse_shared(structure: ModelStructure, of_block: Mapping[int, list[str]], wanted: Collection[int]) -> None:
    """Blocks that share a tensor cannot learn without each other, nor one that is the head's or the embeddings'."""
    for info in structure.parameters:
        blocks = {place.block for place in info.places}
        if len(blocks) > 1 and blocks & set(wanted) and info.name not in structure.fixed:
            raise RecipeError(
                f"block_sampling: {structure.model_name} has one tensor in several places ({info.name} is "
                f"{', '.join(info.aliases)}), so that its blocks cannot learn one without another. Take block_sampling "
                f"out."
            )
