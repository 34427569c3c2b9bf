"""A short probe: model + windows of a text -> for every parameter the norms of its gradient and of its weights."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan, plan_freeze
from partialtune.model.conformance import next_token_loss
from partialtune.model.parameters import named_weights
from partialtune.progress import progress_bar
from partialtune.proof.distances import l2_norm
from partialtune.training.training_data import collate_windows


@dataclass(frozen=True)
class Probe:
    """The norms that one pass over the windows gives.

    Attributes:
        plan: Of the whole model: every tensor once, with its block and component.
        gradient_norms: Name -> norm of the gradient of the mean loss, 0 where none came.
        weight_norms: Name -> norm of the weights.
        windows: How many windows the loss is a mean of.
        loss: That loss, in nats a token.
        window_seconds: Forward and backward of one window, through all of the model and with all gradients.
    """

    plan: FreezePlan
    gradient_norms: dict[str, float]
    weight_norms: dict[str, float]
    windows: int
    loss: float
    window_seconds: float


def draw_windows(windows: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` windows, drawn without replacement."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows.select(order[:count].tolist())


def probe(model: PreTrainedModel, windows: Dataset, batch_size: int, head: str = "tied") -> Probe:
    """Forward and backward over the windows, without a step: no weight changes.

    Args:
        model: In fp32. Afterwards all of it requires gradients, and its head is untied where `head` says so.
        windows: `input_ids` (block_size,).
        batch_size: Windows of one pass.
        head: As in a recipe.
    """
    plan = plan_freeze(model, ["all"], head=head)  # a frozen parameter would get no gradient to rank by
    apply_plan(model, plan)
    model.eval()  # dropout off: the gradient of the text, not of chance
    start = time.perf_counter()
    loss = sum(_losses(model, windows, batch_size))
    seconds = time.perf_counter() - start
    weights = dict(named_weights(model))
    gradient_norms = {name: 0.0 if p.grad is None else l2_norm(p.grad) for name, p in weights.items()}
    model.zero_grad(set_to_none=True)
    weight_norms = {name: l2_norm(parameter.detach()) for name, parameter in weights.items()}
    return Probe(plan, gradient_norms, weight_norms, len(windows), loss, seconds / max(1, len(windows)))


def _losses(model: PreTrainedModel, windows: Dataset, batch_size: int) -> Iterator[float]:
    """The share of each batch in the mean loss. Gradients add up in the model."""
    device = next(model.parameters()).device
    with progress_bar(len(windows), "probing", "windows") as bar:
        for rows in _batches(windows, batch_size):
            batch = {name: tensor.to(device) for name, tensor in collate_windows(rows).items()}
            loss = next_token_loss(model(batch["input_ids"], use_cache=False), batch["labels"])
            loss = loss * len(rows) / len(windows)  # windows are of one length
            loss.backward()
            bar.update(len(rows))
            yield float(loss.detach())


def _batches(windows: Dataset, batch_size: int) -> Iterable[list[dict]]:
    rows = list(windows)
    return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
