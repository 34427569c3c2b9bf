"""Where blocks learn in turn: what each parameter that rests came to rest with, and the record of the draws.

Between two draws only what is drawn, and what always trains, may change. So the digest of a parameter is taken when its
block comes to rest, and has to be the same at every save, when it is drawn again, and at the end.
"""

import json
import logging
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from partialtune.distributed import from_all, from_main
from partialtune.errors import InputError
from partialtune.files import write_whole
from partialtune.freeze.block_sampling import BlockSampling
from partialtune.freeze.plan import FreezePlan
from partialtune.model.digests import bit_sums, digests_on_main
from partialtune.model.parameters import Named, named_weights
from partialtune.proof.snapshot import Snapshot

logger = logging.getLogger(__name__)

DRAWS_FILE = "block_draws.jsonl"


class RestingParameters:
    """The parameters that rest, and their values when they came to rest. All processes of a run use it together.

    Args:
        plan: Its blocks learn in turn, or nothing ever rests.

    Attributes:
        digests: sha256 by name, of the main process's replica, the same on every process.
        sums: `bit_sum` by name, of this process's replica; empty after `go_back_to`.
    """

    def __init__(self, plan: FreezePlan) -> None:
        self._plan = plan
        self._in_turn = {parameter.name: parameter for parameter in plan.parameters if parameter.in_turn}
        self.digests: dict[str, str] = {}
        self.sums: dict[str, int] = {}
        self._unknown: set[str] = set()
        self._drawn: set[str] = set()

    def start(self, model: nn.Module, step: int, snapshot: Snapshot) -> None:
        """Training begins, or goes on, with this step.

        Args:
            model: Its weights may still be those of the base: a loop loads a checkpoint after this.
            step: Number of steps that were taken already.
            snapshot: Of the base.

        Raises:
            InputError: If a checkpoint, see `go_back_to`, had drawn other blocks than the plan.
        """
        known = dict(self.digests)
        rested = self._in_turn.keys() - set(self._plan.phase_at(step - 1).trainable)
        if known and known.keys() != rested:
            raise InputError(
                f"The checkpoint does not fit: other blocks rested in it after step {step} than this plan draws. Go on "
                f"with the seed and the block_sampling of that run, or start in a new output_dir."
            )
        resting = self._in_turn.keys() - set(self._plan.phase_at(step).trainable)
        base = {name for name in resting if (self._in_turn[name].from_step or 0) >= step}
        self.digests = {name: snapshot.digests[name] if name in base else known.get(name, "") for name in resting}
        self._unknown = {name for name, sha256 in self.digests.items() if not sha256}
        for name in self._unknown:
            del self.digests[name]
        self.sums = bit_sums((n, p) for n, p in named_weights(model) if n in self.digests)
        self.sums |= {name: snapshot.bit_sums[name] for name in base}

    def digest(self, name: str, start: Mapping[str, str]) -> str | None:
        """sha256 of a parameter that no step may change: of when it came to rest, or of the start."""
        return self.digests.get(name, start.get(name))

    def changed(self, parts: Named, kept: Collection[str], step: int, snapshot: Snapshot) -> bool:
        """At a draw: whether anything changed, on any process, that had to stay as it was.

        Checksums of all of it, since sha256 of a whole model at every draw would cost more than it proves: a block's
        sha256 is taken when it comes to rest, and compared here when it is drawn, at every save and at the end.

        Args:
            parts: What had to stay, by name.
            kept: All names that there should be.
            step: The first of the draw.
            snapshot: Of the base.
        """
        named, drawn = list(parts), set(self._plan.phase_at(step).trainable)
        found = bool(self.other_sums(named, snapshot)) or {name for name, _ in named} != set(kept)
        present = digests_on_main((name, part) for name, part in named if name in drawn)
        found |= any(self.digest(name, snapshot.digests) != sha256 for name, sha256 in present.items())
        return any(from_all(found))

    def other_sums(self, parts: Named, snapshot: Snapshot) -> set[str]:
        """Names of the parts of this process's replica that have another checksum than when they came to rest."""
        # of what rested in the best model, which was loaded at the end, no checksum is known
        known = [(name, part) for name, part in parts if name not in self.digests or name in self.sums]
        totals = bit_sums(known, self._plan.frozen_rows)
        return {name for name, total in totals.items() if total != self.sums.get(name, snapshot.bit_sums.get(name))}

    def draw(self, model: nn.Module, step: int) -> None:
        """Other blocks learn from this step on: take note of those that come to rest."""
        learning = set(self._plan.phase_at(step).trainable)
        resting = self._in_turn.keys() - learning
        self._drawn = self.digests.keys() & learning
        self._note(model, resting - self.digests.keys() - self._unknown)

    def step_begins(self, model: nn.Module | None = None) -> None:
        """The optimizer steps: what was drawn rests no more. Up to here it had to stay as it was."""
        for name in self._drawn:
            del self.digests[name]
            self.sums.pop(name, None)
        self._drawn = set()
        if self._unknown and model is not None:  # of a run that goes on, whose weights are loaded by now
            unknown, self._unknown = self._unknown, set()
            self._note(model, unknown)

    def _note(self, model: nn.Module, names: set[str]) -> None:
        named = [(name, parameter) for name, parameter in named_weights(model) if name in names]
        self.digests |= from_main(digests_on_main(named))
        self.sums |= bit_sums(named)

    def go_back_to(self, digests: Any) -> None:
        """Take over what a checkpoint keeps of `digests`.

        Raises:
            InputError: If it is something else.
        """
        if not (isinstance(digests, Mapping) and all(isinstance(sha256, str) for sha256 in digests.values())):
            raise InputError("The checkpoint's trainer_state.json is damaged: its freeze audit (what rested).")
        self.digests = {name: sha256 for name, sha256 in digests.items() if name in self._in_turn}
        self.sums, self._drawn, self._unknown = {}, set(), set()


class DrawsRecord:
    """`block_draws.jsonl`: a line for each draw in which a step was taken, `{"from_step": 20, "blocks": [3, 7]}`.

    Lines that a full disk does not take are written with a later one, or at the end.

    Args:
        sampling: Draws the blocks.
    """

    def __init__(self, sampling: BlockSampling) -> None:
        self._sampling = sampling
        self._lines = 0  # in the file, as far as it is known to be whole
        self._is_whole = False

    def reach(self, folder: Path | None, steps: int, anew: bool = False) -> str | None:
        """So many steps have been taken.

        Args:
            folder: Where the file is; None where this process writes nothing.
            steps: So far.
            anew: Whether the file may hold other lines: a run that goes on from a checkpoint draws later ones again.

        Returns:
            Why the file could not be written, None where it was.
        """
        if folder is None:
            return None
        self._is_whole = self._is_whole and not anew
        count = self._sampling.draws_of(steps)
        if self._is_whole and count == self._lines:
            return None
        draws = [self._sampling.line(number) for number in range(self._lines if self._is_whole else 0, count)]
        file = folder / DRAWS_FILE
        try:
            if self._is_whole:
                self._append(file, draws)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(file, _text(draws))
        except OSError as error:
            self._is_whole = False
            refused = f"{file} could not be written: {error.strerror or error}."
            logger.warning("%s It is tried again at the next step.", refused)
            return f"{refused} Make room on the disk."
        self._lines, self._is_whole = count, True
        return None

    @staticmethod
    def _append(file: Path, draws: list[dict[str, Any]]) -> None:
        size = None
        try:
            with file.open("ab") as out:
                size = out.tell()
                out.write(_text(draws))
        except OSError:
            with suppress(OSError):
                if size is not None:
                    os.truncate(file, size)  # there may have been room for a part
            raise


def _text(draws: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(draw) + "\n" for draw in draws).encode()
