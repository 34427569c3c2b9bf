"""A callback that reports, during training, how far each parameter and each part of the model has moved."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from partialtune.distributed import raise_disk_error
from partialtune.files import append_lines, keep_lines_up_to
from partialtune.freeze.plan import FreezePlan
from partialtune.proof.distances import ParameterDelta, together, unknown
from partialtune.proof.snapshot import SnapshotCallback, measure_deltas

logger = logging.getLogger(__name__)

DELTAS_FILE = "weight_deltas.jsonl"


class WeightDeltaCallback(SnapshotCallback):
    """Compares the weights with a snapshot from before the first step, and writes how far each has moved.

    Every `delta_steps` steps and at the end it appends a line a parameter to `weight_deltas.jsonl`:
    `step, name, block, component, trainable, l2_delta, relative_delta, max_abs_delta`, and puts the L2 deltas of the
    groups into the log: `delta/frozen_l2`, `delta/trainable_l2`, `delta/block_07/attention`, `delta/final_norm`, ...
    Of a matrix of which some rows train these are measured, and `relative_delta` is a share of their own norm.

    Works in any `transformers.Trainer`: `Trainer(..., callbacks=[WeightDeltaCallback(plan)])`. Trackers such as
    TensorBoard see the values where `attach(trainer)` was called, since Trainer calls them before other callbacks.

    Lines that a full disk does not take are kept and written at the next report or save; only at the end of training
    they are an error.

    Args:
        plan: The plan that was applied to the model.
        delta_steps: Steps between two reports.
        output_dir: Folder of the file, `args.output_dir` where absent.

    Attributes:
        newest: The distance of each parameter by its name, at the newest report; on the main process alone.
        snapshot, seconds: As in `SnapshotCallback`.
    """

    def __init__(self, plan: FreezePlan, delta_steps: int = 10, output_dir: str | os.PathLike | None = None) -> None:
        super().__init__(plan, output_dir)
        self.delta_steps = delta_steps
        self.newest: dict[str, ParameterDelta] = {}
        self._reported_at = -1
        self._unwritten: list[str] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.snapshot is None:
            if state.global_step:
                logger.warning(
                    "WeightDeltaCallback was added after the Trainer was made and the run goes on from step %d: "
                    "deltas count from that step. Pass it in callbacks=[...] to count from the base.",
                    state.global_step,
                )
            self.take_snapshot(args, state, model)
        self._keep_lines_up_to(state.global_step, args, state)
        self._reported_at = state.global_step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        last = state.global_step == state.max_steps  # by on_train_end trackers have closed their files
        if last or state.global_step % self.delta_steps == 0:
            self._report(args, state, control, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._reported_at != state.global_step:  # ended before `max_steps`, or another model was loaded
            self._report(args, state, control, model)
        refused = self._write_lines(args) if state.is_world_process_zero else None
        raise_disk_error(refused and f"{refused} Make room on the disk, then go on from the last checkpoint.")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._write_lines(args)

    def report_again(self, args, state) -> None:
        """Drop the report of this step, so that training ends with a new one: another model has been loaded since."""
        self._reported_at = -1
        self._keep_lines_up_to(state.global_step - 1, args, state)

    def _file(self, args) -> Path | None:
        folder = self.folder(args)
        return folder / DELTAS_FILE if folder else None

    def _keep_lines_up_to(self, step: int, args, state) -> None:
        """Remove the lines of later steps: a resumed run reports the steps after its checkpoint again."""
        refused = None
        file = self._file(args)
        if state.is_world_process_zero and file is not None:
            self._unwritten = [line for line in self._unwritten if json.loads(line)["step"] <= step]
            try:
                keep_lines_up_to(step, file)
            except OSError as error:
                refused = f"{file} could not be written: {error.strerror or error}. Make room on the disk."
        raise_disk_error(refused)

    def _write_lines(self, args) -> str | None:
        """Append the lines that are not written yet; where that fails, all of them stay for the next time.

        Returns:
            Why it failed, None where it did not.
        """
        file = self._file(args)
        if file is None or not self._unwritten:
            return None
        try:
            append_lines(file, self._unwritten)
        except OSError as error:
            refused = f"{file} could not be written: {error.strerror or error}."
            logger.warning("%s Its %d new lines are tried again at the next save.", refused, len(self._unwritten))
            return refused
        self._unwritten = []
        return None

    def _report(self, args, state, control, model) -> None:
        with self._watch:
            # A parameter of the plan that has left the model still gets its line: its distance is unknown, not 0.
            deltas = {parameter.name: unknown(parameter.name) for parameter in self.plan.parameters}
            deltas |= {delta.name: delta for delta in measure_deltas(model, self.snapshot)}
            self.newest = deltas
            self._reported_at = state.global_step
            if state.is_world_process_zero and self._file(args) is not None:
                self._unwritten.extend(self._lines(state.global_step, deltas))
                self._write_lines(args)
            values = self.group_deltas(deltas)
        should_log = control.should_log
        self.log(values, state)
        control.should_log = should_log  # CallbackHandler.on_log clears it: this step's loss would not be logged

    def _lines(self, step: int, deltas: dict[str, ParameterDelta]) -> Iterator[str]:
        for parameter in self.plan.parameters:
            delta = deltas[parameter.name]
            line = {
                "step": step,
                "name": parameter.name,
                "block": parameter.block,
                "component": parameter.component,
                "trainable": parameter.trainable,
                "l2_delta": delta.l2_delta,
                "relative_delta": delta.relative_delta,
                "max_abs_delta": delta.max_abs_delta,
            }
            yield json.dumps(line, allow_nan=False) + "\n"

    def group_deltas(self, deltas: dict[str, ParameterDelta]) -> dict[str, float]:
        """L2 delta of each group: the root of the summed squares of its parameters' L2 deltas.

        A parameter without a known distance leaves its group out; if it is frozen, the audit names it.
        """
        groups = {name: [parameter.name for parameter in members] for name, members in self.plan.groups().items()}
        groups |= {"frozen_l2": self.plan.frozen, "trainable_l2": self.plan.trainable}
        values = {}
        for group, names in groups.items():
            distances = [deltas[name].l2_delta for name in names]
            if group == "frozen_l2":  # frozen rows of a matrix whose distance is unknown may have moved
                distances += [None for name in self.plan.rows if deltas[name].l2_delta is None]
            distance = together(distances)
            if distance is not None:
                values[f"delta/{group}"] = distance
        return values
