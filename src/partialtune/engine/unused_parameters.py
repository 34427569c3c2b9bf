"""Whether DDP has to look, in every step, for parameters that got no gradient.

Trainer lets it look in each pretrained model. DDP then walks the graph of each step, sends along which parameters were
used, and warns that all of them were. Here one token is shown to the model first: where its logits depend on all that
trains, the search is left out. A mixture whose experts are modules uses few of them for one token, and keeps it.
"""

import copy
import logging

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from partialtune.distributed import decided_by_main, rank_and_processes
from partialtune.errors import RecipeError
from partialtune.freeze.plan import FreezePlan

logger = logging.getLogger(__name__)


def set_search(trainer: Trainer, plan: FreezePlan, takes_models_loss: bool) -> list[TrainerCallback]:
    """Let DDP look for unused parameters where there may be some, and only there.

    Args:
        trainer: Its model has the plan applied and is not wrapped. Its `args` become a copy where something is set.
        plan: Where it changes on the way, what learns in other steps has no gradient, and DDP would wait for it.
        takes_models_loss: Whether all that learns gets its gradient through the model's own logits.

    Returns:
        Callbacks that the Trainer needs for it.
    """
    if plan.changes_on_the_way:  # Trainer's own choice is not to look where activations are recomputed
        _set(trainer, True)
        return []
    is_set = trainer.args.ddp_find_unused_parameters is not None
    if is_set or not takes_models_loss or trainer.is_fsdp_enabled or rank_and_processes()[1] == 1:
        return []
    with trainer.compute_loss_context_manager():  # the dtype of products
        if not decided_by_main(lambda: uses_all_that_trains(trainer.model)):
            return []
    _set(trainer, False)
    return [GradientsCome()]


def _set(trainer: Trainer, search: bool) -> None:
    trainer.args = copy.copy(trainer.args)
    trainer.args.ddp_find_unused_parameters = search
    if trainer.accelerator.ddp_handler is not None:  # the Trainer has made it of its arguments already
        trainer.accelerator.ddp_handler.find_unused_parameters = search


def uses_all_that_trains(model: nn.Module) -> bool:
    """Whether the logits of one token depend on every parameter that requires a gradient.

    The model is left as it was: its buffers, its modes and the random numbers that come next.

    Args:
        model: A causal language model, not wrapped in DDP.

    Returns:
        False too where it cannot be told: the model does not take a token alone, or skips blocks by chance (layerdrop).
    """
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [token.device] if token.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            logits = model(input_ids=token, use_cache=False).logits
        reached = _leaves(logits)
    except Exception as error:  # noqa: BLE001  (whatever it is, training itself will say it better)
        logger.debug("Whether all that trains is used could not be told: %s", error)
        return False
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad} <= reached


def _leaves(output: torch.Tensor) -> set[int]:
    """Ids of the tensors that backward from `output` would give a gradient."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found


class GradientsCome(TrainerCallback):
    """Stops before a step in which something that trains has no gradient: DDP would not have summed all others."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        without = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        if without:
            raise RecipeError(
                f"Step {state.global_step + 1}: {len(without)} parameters that train got no gradient, such as "
                f"{without[0]}, and every step before used them all. Let DDP look for such parameters: set "
                f"ddp_find_unused_parameters: true."
            )
