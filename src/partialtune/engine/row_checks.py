"""Where rows of a matrix cannot train: said before the first step, by the way of launching and by one pass of tokens.

In: a model that a plan is applied to, or is about to be. Out: nothing, or an error in words.
"""

import torch
from torch import nn

from partialtune.errors import ModelError, RecipeError, in_one_line, is_ours
from partialtune.freeze.plan import FreezePlan
from partialtune.model.conformance import probe_windows
from partialtune.model.parameters import rows_by_name
from partialtune.model.rows import name_with_rows
from partialtune.model.train_mode import evaluating

TOKENS = 4  # of the pass: a model may want more than one


def check_rows_fit_launch(plan: FreezePlan, sharded: bool, replicated: bool) -> None:
    """Stop where the way of launching does not bear rows that train.

    Args:
        plan: To be applied.
        sharded: Whether FSDP shards the parameters.
        replicated: Whether DataParallel copies the model for several GPUs.

    Raises:
        RecipeError: In words.
    """
    if not plan.rows or not (sharded or replicated):
        return
    name, rows = next(iter(plan.rows.items()))
    how = "FSDP shards the matrix" if sharded else "DataParallel copies the matrix for each GPU, without its rows"
    raise RecipeError(
        f"{name_with_rows(name, rows)} trains, and {how}. Rows train on one process, or with a process for each GPU "
        f"under DDP: accelerate launch without FSDP. Or train the whole matrix."
    )


def check_rows_get_gradients(model: nn.Module) -> None:
    """Stop where the model uses a matrix in a way that gives the rows of it that train no gradient.

    One pass over a few tokens, in eval mode; nothing of it stays. Without rows that train nothing is computed.

    Args:
        model: A causal language model, the plan applied.

    Raises:
        ModelError: In words.
    """
    rows = rows_by_name(model)
    if not rows:
        return
    kind = type(model).__name__
    ids = probe_windows(model, TOKENS, [])
    with evaluating(model), torch.enable_grad(), torch.random.fork_rng():
        try:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss

            learners = [trained.parameter for trained in rows.values()]
            gradients: list[torch.Tensor | None] = [None] * len(learners)
            if loss.requires_grad:
                gradients = [*torch.autograd.grad(loss, learners, allow_unused=True)]
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
