"""What a comparison of two checkpoints found, as plain data: each parameter's change, the claim, the verdict, notes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from partialtune.errors import FreezeViolation
from partialtune.model.config_keys import notable_differences
from partialtune.model.rows import Rows, other_rows_name, rows_in_words
from partialtune.model.weight_files import Weights
from partialtune.words import counted, joined


@dataclass(frozen=True)
class ComparedParameter:
    """One parameter in both checkpoints.

    Attributes:
        name: As in `named_parameters()`; an untied head is a parameter of its own.
        block: Index of its decoder block, None outside the blocks.
        component: Its part of the model, see `layout.COMPONENTS`.
        numel: Number of values.
        changed_values: How many of them differ in a bit, both sides widened to one dtype.
        norm_before: ||before||, None where it is not finite. Where only some rows may move and only they did, of these
            rows, and so are the three below.
        l2_delta: ||after - before||. None where a value is not finite.
        relative_delta: l2_delta / norm_before, None where the norm is 0 or either is unknown.
        max_abs_delta: Largest change of one value, None as l2_delta.
        allowed: Whether the claim lets it, or `rows` of it, move; None without a claim.
        rows: The only rows that the claim lets move, None where it lets all of it, or nothing.
        changed_other_values: How many of the values outside of these rows differ.
        changed_other_rows: The first rows outside of them that differ.
        new_rows: How many rows it has beyond those of the base; all else here is about the base's.
    """

    name: str
    block: int | None
    component: str
    numel: int
    changed_values: int
    norm_before: float | None
    l2_delta: float | None
    relative_delta: float | None
    max_abs_delta: float | None
    allowed: bool | None
    rows: Rows | None = None
    changed_other_values: int = 0
    changed_other_rows: tuple[int, ...] = ()
    new_rows: int = 0

    @property
    def changed(self) -> bool:
        return self.changed_values > 0

    @property
    def breaks_claim(self) -> bool:
        """Whether something of it changed that the claim does not let move."""
        return (self.changed and self.allowed is False) or self.changed_other_values > 0

    @property
    def frozen_name(self) -> str:
        """What may not move of it."""
        return self.name if self.rows is None else other_rows_name(self.name, self.rows)

    @property
    def change_in_words(self) -> str:
        """What changed that may not: `transformer.ln_f.weight (3 of 768 values)`."""
        if self.rows is None:
            return f"{self.name} ({self.changed_values:,} of {self.numel:,} values)"
        first = ", ".join(map(str, self.changed_other_rows))
        values = counted(self.changed_other_values, "value")
        return f"{self.name} ({values} in rows other than {rows_in_words(self.rows, 8)}, first in row {first})"

    def to_json(self) -> dict[str, Any]:
        """All of it; what only rows have, only where there are rows."""
        entry = {**asdict(self), "changed": self.changed}
        if self.rows is None:
            del entry["rows"], entry["changed_other_values"], entry["changed_other_rows"]
        if not self.new_rows:
            del entry["new_rows"]
        return entry


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, compared.

    Attributes:
        base: The first, as it was named, with the commit that it resolved to on the Hub.
        adapted: The second.
        parameters: Every parameter once, in the order of `named_parameters()`.
        claim: What says which of them may move; None where nothing does.
        changed_buffers: Persistent buffers that both hold and that differ; no claim lets a buffer change.
        changed_config: Keys of config.json in which the two stand for other functions, as `n_head (2 -> 4)`.
        not_the_base: Parameters of the base that are not what the run says it started from.
        not_the_result: Parameters of the adapted checkpoint that are not what the run says it ended with.
        new_rows_unclaimed: Parameters with more rows than the base's, or other ones, than a plan says of new tokens.
        notes: What else a reader should know.
        faults_of_the_record: Sentences on what the run's own files say against each other.
    """

    base: str
    adapted: str
    parameters: tuple[ComparedParameter, ...]
    claim: str | None = None
    changed_buffers: tuple[str, ...] = ()
    changed_config: tuple[str, ...] = ()
    not_the_base: tuple[str, ...] = ()
    not_the_result: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    new_rows_unclaimed: tuple[str, ...] = ()
    faults_of_the_record: tuple[str, ...] = ()

    @property
    def moved(self) -> list[ComparedParameter]:
        """Parameters of which a bit changed."""
        return [parameter for parameter in self.parameters if parameter.changed]

    @property
    def changed_though_frozen(self) -> list[ComparedParameter]:
        """Parameters that moved, or of which rows did, and that the claim does not let move."""
        return [parameter for parameter in self.moved if parameter.breaks_claim]

    @property
    def unmoved(self) -> list[ComparedParameter]:
        """Parameters that may move and kept every bit."""
        return [
            parameter
            for parameter in self.parameters
            if parameter.allowed and not (parameter.changed or parameter.new_rows)
        ]

    @property
    def violations(self) -> list[str]:
        """A sentence for each way in which the claim does not hold."""
        sentences = []
        if self.changed_though_frozen:
            changed = [parameter.change_in_words for parameter in self.changed_though_frozen]
            sentences.append(f"{counted(len(changed), 'frozen parameter')} changed: {joined(changed, 240)}.")
        if self.new_rows_unclaimed:
            sentences.append(
                f"{self.adapted} has rows that the base does not have, and no freeze plan says new_tokens of so many: "
                f"{joined(self.new_rows_unclaimed, 240)}."
            )
        if self.claim is not None and self.changed_buffers:
            names = joined(self.changed_buffers, 160)
            sentences.append(f"{counted(len(self.changed_buffers), 'buffer')} changed, which nothing trains: {names}.")
        if self.claim is not None and self.changed_config:
            sentences.append(
                f"The config of {self.adapted} makes another function of the same weights: "
                f"{joined(self.changed_config, 240)}."
            )
        for checkpoint, differing, moment, remedy in (
            (
                self.base,
                self.not_the_base,
                "started from (sha256_before)",
                " Name the base, and its revision, of that run.",
            ),
            (self.adapted, self.not_the_result, "ended with (sha256_after)", ""),
        ):
            if differing:
                where = f"in {counted(len(differing), 'parameter')}: {joined(differing, 160)}"
                sentences.append(f"{checkpoint} has other values than the run {moment} {where}.{remedy}")
        return [*sentences, *self.faults_of_the_record]

    @property
    def passed(self) -> bool | None:
        """Whether the claim holds, None where there is none."""
        return None if self.claim is None else not self.violations

    def raise_if_violated(self) -> None:
        """Stop where the claim does not hold.

        Raises:
            FreezeViolation: With the violations in words.
        """
        if self.violations:
            raise FreezeViolation(f"{self.adapted} breaks its claim ({self.claim}). {' '.join(self.violations)}")

    def to_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps(..., allow_nan=False)`."""
        return {
            "base": self.base,
            "adapted": self.adapted,
            "claim": self.claim,
            "passed": self.passed,
            "moved": [parameter.name for parameter in self.moved],
            "changed_though_frozen": [parameter.frozen_name for parameter in self.changed_though_frozen],
            "unmoved": [parameter.name for parameter in self.unmoved],
            "changed_buffers": list(self.changed_buffers),
            "changed_config": list(self.changed_config),
            "not_the_base": list(self.not_the_base),
            "not_the_result": list(self.not_the_result),
            "violations": self.violations,
            "notes": list(self.notes),
            "parameters": [parameter.to_json() for parameter in self.parameters],
        }


def relative_change(parameters: Sequence[ComparedParameter]) -> float | None:
    """sqrt(sum of l2_delta^2) / sqrt(sum of norm_before^2) of some parameters taken together.

    None where one of them is unknown, or every norm is 0.
    """
    if any(parameter.l2_delta is None or parameter.norm_before is None for parameter in parameters):
        return None
    # hypot: the parameters are parts of one long vector, so squares add up and not lengths
    norm = math.hypot(*(parameter.norm_before for parameter in parameters))
    return math.hypot(*(parameter.l2_delta for parameter in parameters)) / norm if norm else None


# ---- notes ----------------------------------------------------------------------------------------------------------


def notes_on(comparison: Comparison, before: Weights, after: Weights, rounded: Sequence[str]) -> list[str]:
    """What a reader should know beside the table and the verdict, a sentence each.

    Args:
        comparison: Without its notes.
        before: Weights of the base.
        after: Weights of the adapted checkpoint.
        rounded: Changed parameters that are those of the base, rounded to the fewer bits they are stored in.
    """
    notes = [*_about_heads(before, after), *_about_heads(after, before)]
    unmoved = [parameter.name for parameter in comparison.unmoved]
    if unmoved:
        notes.append(f"{counted(len(unmoved), 'parameter')} may move and kept every bit: {joined(unmoved, 160)}.")
    grown = [f"{p.name} ({p.new_rows:,})" for p in comparison.parameters if p.new_rows]
    if grown and not comparison.new_rows_unclaimed:
        notes.append(f"Rows of new tokens, which the base does not have: {joined(grown, 160)}.")
    if rounded:
        notes.append(
            f"{counted(len(rounded), 'parameter')} of {after.name} equal the base rounded to fewer bits: "
            f"{joined(rounded, 160)}. Save the adapted model in fp32, so that storing changes nothing."
        )
    changed = comparison.changed_buffers
    if changed and comparison.claim is None:
        notes.append(f"{counted(len(changed), 'buffer')} changed, which no selector speaks of: {joined(changed, 160)}.")
    notes += [*_about_unused(before), *_about_unused(after)]
    violations = comparison.changed_config if comparison.claim else ()
    different = [one for one in notable_differences(before.config, after.config) if one not in violations]
    if different:
        notes.append(f"config.json differs: {joined(different, 200)}.")
    return notes


def _about_heads(tied: Weights, untied: Weights) -> Iterator[str]:
    own = {info.name for info in untied.structure.parameters}
    for name, alias in tied.structure.ties:
        if alias in own:
            yield f"{alias} has a tensor of its own in {untied.name}; compared with {name}, which it is in {tied.name}."


def _about_unused(weights: Weights) -> Iterator[str]:
    if weights.unused:
        unused = f"{counted(len(weights.unused), 'tensor')} that the model does not use ({joined(weights.unused, 100)})"
        yield f"{weights.name} holds {unused}: not compared."
