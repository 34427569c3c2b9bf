"""What a freeze audit found, as data and in words."""

from dataclasses import dataclass, field
from typing import Any

NEVER_A_GRADIENT = "never had a gradient other than 0 in a step whose learning rate was above 0"
NOT_REACHED = "the run ended before step {step}, from which its phase trains it"
KEPT_EVERY_BIT = "had a gradient, yet kept every bit"


@dataclass
class Audit:
    """What the audit found, as in `audit.json`.

    Attributes:
        frozen_parameters: Number of frozen tensors.
        trainable_parameters: Number of trainable tensors.
        buffers: Number of persistent buffers. No selector lets them learn, so all of them have to stay.
        changed: Names of frozen tensors whose digest changed: a violation.
        changed_buffers: Names of persistent buffers whose digest changed: a violation.
        stuck: Trainable tensors that had a gradient and kept every bit: a violation.
        untouched: Trainable tensors that never had a gradient: a warning.
        unreached: Those of them whose phase had not begun when the run ended, with the step at which it begins.
        below_precision: Trainable tensors in 16 bits, most of whose values kept every bit: a warning.
        not_in_optimizer: Trainable tensors that the optimizer does not hold: a violation.
        trainable_l2_delta: Distance of all trainable tensors from the start.
    """

    frozen_parameters: int
    trainable_parameters: int
    buffers: int = 0
    changed: list[str] = field(default_factory=list)
    changed_buffers: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    unreached: dict[str, int] = field(default_factory=dict)
    below_precision: list[str] = field(default_factory=list)
    not_in_optimizer: list[str] = field(default_factory=list)
    trainable_l2_delta: float | None = 0.0

    @property
    def passed(self) -> bool:
        return not (self.changed or self.changed_buffers or self.stuck or self.not_in_optimizer)

    def to_json(self) -> dict[str, Any]:
        unmoved = [{"name": name, "reason": KEPT_EVERY_BIT} for name in self.stuck]
        unmoved += [{"name": name, "reason": self._why_untouched(name)} for name in self.untouched]
        return {
            "passed": self.passed,
            "frozen": {
                "parameters": self.frozen_parameters,
                "changed": self.changed,
                "l2_delta": None if self.changed else 0.0,  # equal digests: the distance is exactly 0
            },
            "trainable": {
                "parameters": self.trainable_parameters,
                "unmoved": unmoved,
                "below_precision": self.below_precision,
                "not_in_optimizer": self.not_in_optimizer,
                "l2_delta": self.trainable_l2_delta,
            },
            "buffers": {"persistent": self.buffers, "changed": self.changed_buffers},
        }

    def _why_untouched(self, name: str) -> str:
        return NOT_REACHED.format(step=self.unreached[name]) if name in self.unreached else NEVER_A_GRADIENT

    def violations(self) -> str:
        """The violations in words, empty if there are none."""
        parts = [
            ("frozen parameters changed", self.changed),
            ("persistent buffers changed", self.changed_buffers),
            ("trainable parameters had a gradient, yet kept every bit", self.stuck),
            ("trainable parameters are missing from the optimizer", self.not_in_optimizer),
        ]
        return "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in parts if names)

    def warnings(self) -> list[str]:
        """A sentence for each thing that is no violation, and that a reader should know."""
        sentences = []
        if self.untouched:
            names = some(self.untouched)
            sentences.append(f"{len(self.untouched)} trainable parameters never had a gradient: {names}")
        if self.below_precision:
            sentences.append(
                f"{len(self.below_precision)} trainable parameters are held in 16 bits and most of their updates "
                f"round away: {some(self.below_precision)}. Load the model in fp32."
            )
        return sentences


def some(names: list[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
