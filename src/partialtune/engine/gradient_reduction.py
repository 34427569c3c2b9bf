"""Which gradients DDP sends where what learns changes on the way: those of what learns in the present step.

DDP puts all that requires gradients when it wraps the model into its buckets, and sends them whole in every step: what
belongs to a later phase, or rests, would travel as zeros. The hook here leaves it out.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partialtune.freeze.plan import FreezePlan


def leave_out_resting(model: nn.Module, plan: FreezePlan) -> None:
    """Let DDP send no gradients of what does not learn in a step. Doing it again changes nothing.

    Nothing happens for a model of one process, a plan of one phase, and a model with a communication hook of its
    user's: DDP takes one only, and then sends the zeros as well.

    Args:
        model: As the loop calls it, wrapped in DDP or not.
        plan: That was applied to it.
    """
    if not isinstance(model, DistributedDataParallel) or not plan.changes_on_the_way:
        return
    if not model._get_ddp_logging_data().get("comm_hook"):  # the only place where torch tells of all kinds of hooks
        model.register_comm_hook(model.process_group, mean_of_learning)


def mean_of_learning(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: the mean over all processes of those gradients in a bucket that learn now.

    Args:
        group: The processes.
        bucket: Gradients of some parameters, one after the other in one buffer (n,). What rests is zero in it.

    Returns:
        The buffer, when the mean is in it.
    """
    # All processes are in the same phase, so that what they send has the same length.
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    learning = [gradient for parameter, gradient in pairs if parameter.requires_grad]
    whole = bucket.buffer()
    if not learning:
        unsent: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        unsent.set_result(whole)
        return unsent
    sent = whole if len(learning) == len(pairs) else torch.cat([gradient.flatten() for gradient in learning])
    sent.div_(group.size())

    def back_in_place(reduced: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        if sent is not whole:
            parts = reduced.value()[0].split([gradient.numel() for gradient in learning])
            for gradient, part in zip(learning, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return whole

    work = dist.all_reduce(sent, group=group, async_op=True)
    return work.get_future().then(back_in_place)
