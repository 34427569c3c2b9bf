"""What a freeze audit found: its reasons, its verdict, `audit.json`, and the sentences of log and page."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from partialtune.model.rows import Rows, count_rows, rows_in_words

# Why a trainable parameter kept every bit: a warning but for KEPT_EVERY_BIT, which is a violation.
NEVER_A_GRADIENT = "never had a gradient other than 0 in a step whose learning rate was above 0"
NOT_REACHED = "the run ended before step {step}, from which its phase trains it"
GONE_BACK = "the weights are those of step {back}, from before step {step}, from which its phase trains it"
NEVER_DRAWN = "the run ended before step {step}, at which its block is drawn for the first time"
ONLY_SKIPPED = "had a gradient only in steps that were skipped, because a gradient overflowed in fp16"
TOO_SMALL = (
    "no update large enough was due: where its gradients were largest, at most {update:.2g}, and half the spacing of "
    "floating-point numbers there is {half_spacing:.2g}"
)
CANNOT_BE_TOLD = "had a gradient; whether an update large enough was due cannot be told of {optimizer}"
INTERRUPTED = "the run was interrupted after step {step}: no verdict on what has not moved so far"
KEPT_EVERY_BIT = "kept every bit, although an update larger than half the spacing of its values was due"
PLAN_AFTERWARDS = (
    "The plan does not know this model: plan after wrapping. Wrap or change a model first (get_peft_model, "
    "resize_token_embeddings, tie_weights), and only then call plan_freeze and apply_plan"
)


@dataclass
class Audit:
    """What the audit found, as in `audit.json`.

    Attributes:
        frozen_parameters: Number of tensors that are frozen as a whole.
        trainable_parameters: Number of tensors that train, or of which rows train.
        buffers: Number of persistent buffers. No selector lets them learn, so all of them have to stay.
        changed: Names of frozen tensors whose digest changed, or that are no longer there: a violation. The frozen rows
            of a matrix of which some train are one of them, under the name that `rows.other_rows_name` gives.
        changed_buffers: Likewise of persistent buffers.
        missing: Names of parameters of the plan that are not in the model: a violation.
        new: Names of parameters in the model that the plan does not know: a violation.
        missing_buffers, new_buffers: Likewise of persistent buffers, against the start.
        stuck: Trainable tensors that kept every bit although an update large enough was due: a violation.
        unmoved: Other trainable tensors that kept every bit, with the reason: a warning.
        below_precision: Trainable tensors in 16 bits, most of whose values kept every bit: a warning.
        not_in_optimizer: Trainable tensors that the optimizer does not hold: a violation.
        trainable_l2_delta: Distance of all trainable tensors from the start.
        rows_without_gradient: Matrices of which some rows train -> those of them that never had a gradient: a warning.
            None where there is no such matrix.
        saved: What the saved files, read back, hold otherwise than was audited: a violation. None where none were read.
        changed_at_rest: Names of trainable tensors that changed while their block rested: a violation. None where no
            blocks learn in turn.
    """

    frozen_parameters: int
    trainable_parameters: int
    buffers: int = 0
    changed: list[str] = field(default_factory=list)
    changed_buffers: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    missing_buffers: list[str] = field(default_factory=list)
    new_buffers: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    unmoved: dict[str, str] = field(default_factory=dict)
    below_precision: list[str] = field(default_factory=list)
    not_in_optimizer: list[str] = field(default_factory=list)
    trainable_l2_delta: float | None = 0.0
    rows_without_gradient: dict[str, Rows] | None = None
    saved: "list[SavedDifference] | None" = None
    changed_at_rest: list[str] | None = None

    @property
    def other_names(self) -> list[str]:
        """Names that the model has lost or gained."""
        return [*self.missing, *self.missing_buffers, *self.new, *self.new_buffers]

    @property
    def passed(self) -> bool:
        changed = self.changed or self.changed_at_rest or self.changed_buffers or self.other_names or self.saved
        return not (changed or self.stuck or self.not_in_optimizer)

    def to_json(self) -> dict[str, Any]:
        reasons = {**dict.fromkeys(self.stuck, KEPT_EVERY_BIT), **self.unmoved}
        return {
            "passed": self.passed,
            "saved_files": {
                "read_back": self.saved is not None,
                "different": [asdict(difference) for difference in self.saved or ()],
            },
            "frozen": {
                "parameters": self.frozen_parameters,
                "changed": self.changed,
                "l2_delta": None if self.changed else 0.0,  # equal digests: the distance is exactly 0
            },
            "trainable": {
                "parameters": self.trainable_parameters,
                "unmoved": [{"name": name, "reason": reason} for name, reason in reasons.items()],
                "below_precision": self.below_precision,
                "not_in_optimizer": self.not_in_optimizer,
                "l2_delta": self.trainable_l2_delta,
                **self._json_of_rows(),
            },
            **({} if self.changed_at_rest is None else {"resting": {"changed": self.changed_at_rest}}),
            "buffers": {"persistent": self.buffers, "changed": self.changed_buffers},
            "names": {"missing": self.missing + self.missing_buffers, "new": self.new + self.new_buffers},
        }

    def _json_of_rows(self) -> dict[str, Any]:
        """A key that only a run with rows that train has."""
        if self.rows_without_gradient is None:
            return {}
        entries = [
            {"name": name, "rows": [list(run) for run in rows]} for name, rows in self.rows_without_gradient.items()
        ]
        return {"rows_without_gradient": entries}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Audit":
        """The audit that an `audit.json` was written of. Which of its new names are buffers the file does not tell."""
        frozen, trainable = content["frozen"], content["trainable"]
        # younger keys of the file: older runs lack them
        buffers, names = content.get("buffers", {}), content.get("names", {})
        saved = content.get("saved_files", {})
        reasons = {entry["name"]: entry["reason"] for entry in trainable["unmoved"]}
        changed_buffers = buffers.get("changed", [])
        missing = names.get("missing", [])
        return cls(
            frozen_parameters=frozen["parameters"],
            trainable_parameters=trainable["parameters"],
            buffers=buffers.get("persistent", 0),
            changed=frozen["changed"],
            changed_buffers=changed_buffers,
            missing=[name for name in missing if name not in changed_buffers],
            new=names.get("new", []),
            missing_buffers=[name for name in missing if name in changed_buffers],  # what has gone counts as changed
            stuck=[name for name, reason in reasons.items() if reason == KEPT_EVERY_BIT],
            unmoved={name: reason for name, reason in reasons.items() if reason != KEPT_EVERY_BIT},
            below_precision=trainable["below_precision"],
            not_in_optimizer=trainable["not_in_optimizer"],
            trainable_l2_delta=trainable["l2_delta"],
            rows_without_gradient=_rows_of_json(trainable.get("rows_without_gradient")),
            saved=[SavedDifference(**entry) for entry in saved["different"]] if saved.get("read_back") else None,
            changed_at_rest=content.get("resting", {}).get("changed"),
        )

    def verdict(self) -> str:
        """`freeze audit passed`, or what failed."""
        return "freeze audit passed" if self.passed else f"freeze audit FAILED: {self.violations()}"

    def violations(self) -> str:
        """The violations in words, empty if there are none."""
        parts = [  # what has gone counts as changed too, and is named once
            ("frozen parameters changed", [name for name in self.changed if name not in self.missing]),
            (
                "parameters changed while their block rested",
                [name for name in self.changed_at_rest or () if name not in self.missing],
            ),
            ("persistent buffers changed", [n for n in self.changed_buffers if n not in self.missing_buffers]),
            ("parameters of the plan are not in the model", self.missing),
            ("persistent buffers are no longer in the model", self.missing_buffers),
            ("parameters in the model are new", self.new),
            ("persistent buffers in the model are new", self.new_buffers),
            ("trainable parameters were due an update larger than half the spacing, yet kept every bit", self.stuck),
            ("trainable parameters are missing from the optimizer", self.not_in_optimizer),
            ("differences between what was audited and the saved files", [str(one) for one in self.saved or ()]),
        ]
        found = [f"{len(names)} {what}: {some(names)}" for what, names in parts if names]
        return "; ".join(found + [PLAN_AFTERWARDS] * bool(self.other_names))

    def warnings(self) -> list[str]:
        """A sentence for each thing that is no violation, and that a reader should know."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.unmoved.items():
            by_reason.setdefault(reason, []).append(name)
        sentences = [
            f"{len(names)} trainable parameters kept every bit ({some(names)}): {reason}."
            for reason, names in by_reason.items()
        ]
        if self.below_precision:
            sentences.append(
                f"{len(self.below_precision)} trainable parameters are held in 16 bits and most of their updates "
                f"round away: {some(self.below_precision)}. Load the model in fp32."
            )
        for name, rows in (self.rows_without_gradient or {}).items():
            sentences.append(
                f"{count_rows(rows)} of the rows of {name} that train {NEVER_A_GRADIENT}: {rows_in_words(rows, 8)}. "
                f"Of an embedding these are tokens that the text does not hold; only weight decay moved them."
            )
        return sentences


def _rows_of_json(entries: Iterable[Mapping[str, Any]] | None) -> dict[str, Rows] | None:
    if entries is None:
        return None
    return {entry["name"]: tuple((start, stop) for start, stop in entry["rows"]) for entry in entries}


@dataclass(frozen=True)
class SavedDifference:
    """Something in saved files that is not what was audited: the name of a tensor or a file, and what is wrong."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


def some(names: list[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
