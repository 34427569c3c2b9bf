"""At the end of training: what of the trainable parameters kept every bit, and whether it should have moved."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import named_weights, whole_on_main
from partialtune.proof.audit_result import GONE_BACK, INTERRUPTED, NEVER_DRAWN, NOT_REACHED
from partialtune.proof.due_updates import DueUpdates
from partialtune.proof.snapshot import Snapshot


def unmoved(
    plan: FreezePlan,
    before: Mapping[str, str],
    after: Mapping[str, str],
    updates: DueUpdates,
    unreached: Mapping[str, int],
    interrupted_at: int | None,
    last_step: int,
    weights_of: int | None,
) -> tuple[list[str], dict[str, str]]:
    """Trainable parameters that kept every bit: those that were due to move, and the others with the reason.

    Args:
        plan: Of the run.
        before, after: sha256 by name at the start and at the end.
        updates: What was due.
        unreached: Parameters of a later phase than that of the last step, with the step from which it trains them.
        interrupted_at: The last step of a run that a signal ended, None of others.
        last_step: Steps that were taken.
        weights_of: The step of the checkpoint that was gone back to at the end; None where the weights are the last.
    """
    stuck, reasons = [], {}
    for name in plan.trainable:
        if name not in after or after[name] != before.get(name):
            continue
        if name in unreached:
            never = NOT_REACHED if plan.sampling is None else NEVER_DRAWN
            words = never if last_step <= unreached[name] else GONE_BACK
            reasons[name] = words.format(step=unreached[name], back=weights_of)
        elif interrupted_at is not None:
            reasons[name] = INTERRUPTED.format(step=interrupted_at)
        elif name in updates.due:
            stuck.append(name)
        else:
            reasons[name] = updates.why_not_due(name)
    return stuck, reasons


def rounded_away(model: nn.Module, plan: FreezePlan, snapshot: Snapshot, had_gradient: Collection[str]) -> list[str]:
    """Trainable parameters held in 16 bits of which fewer than half of the values moved.

    Args:
        model: After training.
        plan: That was applied to it.
        snapshot: Of the start.
        had_gradient: Names of the parameters to look at.
    """
    planned = {parameter.name: parameter for parameter in plan.parameters if parameter.name in had_gradient}
    names = []
    for name, parameter in named_weights(model):
        if name in planned and parameter.element_size() == 2 and parameter.is_floating_point():
            gathered, start = whole_on_main(parameter), snapshot.copies.get(name)
            if gathered is None or start is None:
                continue
            values = planned[name].learning_part(gathered)
            if values.shape == start.shape:
                moved = int(torch.count_nonzero(values.cpu() != start))
                names += [name] if moved < values.numel() / 2 else []
    return names
