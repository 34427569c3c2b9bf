"""Where rows of a matrix cannot train: said before the first step, by the way of launching and by one pass of tokens.

In: a model that a plan is applied to, or is about to be. Out: nothing, or an error in words.
"""

from collections.abc import Sequence

import torch
from torch import nn

from partialtune.errors import ModelError, RecipeError, in_one_line, is_ours
from partialtune.freeze.plan import FreezePlan
from partialtune.model.conformance import probe_windows
from partialtune.model.parameters import is_sharded, reshard, rows_by_name
from partialtune.model.rows import name_with_rows
from partialtune.model.train_mode import evaluating

TOKENS = 4  # of the pass: a model may want more than one


def check_rows_fit_launch(plan: FreezePlan, model: nn.Module, replicated: bool) -> None:
    """Stop where the way of launching does not bear rows that train.

    Args:
        plan: To be applied.
        model: As it is now, sharded or not.
        replicated: Whether DataParallel copies the model for several GPUs.

    Raises:
        RecipeError: In words.
    """
    present = {name: trained.rows for name, trained in rows_by_name(model).items()}
    lacking = [name for name, rows in plan.rows.items() if present.get(name) != rows]
    if plan.rows and replicated:
        name, rows = next(iter(plan.rows.items()))
        raise RecipeError(
            f"{name_with_rows(name, rows)} trains, and DataParallel copies the matrix for each GPU, without its rows. "
            f"Start a process for each GPU: accelerate launch. Or train the whole matrix."
        )
    if lacking and any(map(is_sharded, model.parameters())):
        name = lacking[0]
        raise RecipeError(
            f"{name_with_rows(name, plan.rows[name])} trains, and the model is sharded already, without the parameter "
            f"that these rows learn through. Call apply_plan(model, plan) before fully_shard, and make the optimizer "
            f"after it."
        )


def check_rows_get_gradients(model: nn.Module) -> None:
    """Stop where the model uses a matrix in a way that gives the rows of it that train no gradient.

    One pass over a few tokens, in eval mode; nothing of it stays. Without rows that train nothing is computed, nor by a
    process that waits for the weights of the main one.

    Args:
        model: A causal language model, the plan applied.

    Raises:
        ModelError: In words.
    """
    rows = rows_by_name(model)
    if not rows or any(trained.parameter.is_meta for trained in rows.values()):
        return
    kind = type(model).__name__
    ids = probe_windows(model, TOKENS, [])
    with evaluating(model), torch.enable_grad(), torch.random.fork_rng():
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            gradients = _gradients(model, loss, [trained.parameter for trained in rows.values()])
        except ModelError as error:
            raise ModelError(f"{kind}: {error}") from error
        except Exception as error:  # whatever its own code runs into
            if is_ours(error):
                raise
            words = in_one_line(error)
            raise ModelError(f"{kind}: no pass for the rows that train ({type(error).__name__}: {words}).") from error
    for (name, trained), gradient in zip(rows.items(), gradients, strict=True):
        if gradient is None:
            raise ModelError(
                f"{kind}: {name_with_rows(name, trained.rows)} trains, and its forward pass gives these rows no "
                f"gradient: it reads the matrix past the module that holds it. Train the whole matrix, or none of it."
            )


def _gradients(model: nn.Module, loss: torch.Tensor, learners: Sequence[nn.Parameter]) -> Sequence[torch.Tensor | None]:
    """The gradients of a loss, None where it does not depend on a parameter."""
    if not loss.requires_grad:
        return [None] * len(learners)
    if not any(map(is_sharded, model.parameters())):
        return torch.autograd.grad(loss, learners, allow_unused=True)
    # A pass does not depend on shards, but on what was gathered of them: FSDP gives them their gradients.
    loss.backward()
    reshard(model)
    gradients = [trained.parameter.grad for trained in rows_by_name(model).values()]
    model.zero_grad()
    return gradients
