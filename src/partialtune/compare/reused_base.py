"""A base that is loaded once and put back after each training: the next one begins with the same bits as after loading.

base = ReusedBase(load)              # load() -> the model, as `load_base` gives it
model = base.take()                  # loaded the first time, put back from then on
base.keep(model, plan, args)         # before training: applies the plan and copies what will change
base.give_up()                       # after a training that did not end well: `take` loads it anew
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan
from partialtune.model.parameters import named_weights

logger = logging.getLogger(__name__)

# Above this share of all values that train, copying them costs as much memory as the base has, and as much time as
# loading it.
MOST_THAT_TRAINS = 0.5


@dataclass(frozen=True)
class Start:
    """What a training changes, as it was before.

    Attributes:
        model: The model.
        values: Copies of what trains and of all buffers, by name.
        use_cache: Of the model's config: Trainer switches it off.
        attributes: Of the model itself. accelerate leaves its autocast there (`forward`), and a mark that a model which
            has it is not to be prepared again: the next training would compute in fp32.
    """

    model: PreTrainedModel
    values: Mapping[str, torch.Tensor]
    use_cache: Any
    attributes: Mapping[str, Any]


class ReusedBase:
    """Gives the base for one training after another, loaded as seldom as is safe.

    Args:
        load: Loads it.
    """

    def __init__(self, load: Callable[[], PreTrainedModel]) -> None:
        self._load = load
        self._start: Start | None = None

    def take(self) -> PreTrainedModel:
        """The base: put back, or loaded where `keep` was not called since, or what is to be put back is gone."""
        start, self._start = self._start, None
        if start is not None and _is_put_back(start):
            return start.model
        return self._load()

    def keep(self, model: PreTrainedModel, plan: FreezePlan, args: TrainingArguments) -> None:
        """Apply the plan and copy what a training will change, if the model can be put back after it.

        Args:
            model: As `take` gave it, on its device.
            plan: What trains.
            args: Of the training.
        """
        if why_not := obstacle_to_reuse(plan, args):
            logger.info("The base is loaded anew for each learning rate: %s.", why_not)
            return
        apply_plan(model, plan)  # an untied head is a parameter from here on
        trains = set(plan.trainable)
        changing = [(name, tensor) for name, tensor in named_weights(model) if name in trains] + [
            *model.named_buffers()
        ]
        values = {name: tensor.detach().clone() for name, tensor in changing}
        self._start = Start(model, values, getattr(model.config, "use_cache", None), dict(vars(model)))

    def give_up(self) -> None:
        """The model may have changed in other places than those that were copied: load it anew."""
        self._start = None


def obstacle_to_reuse(plan: FreezePlan, args: TrainingArguments) -> str:
    """Why a model under this plan is not put back after training, in words; empty where it is."""
    if plan.trainable_parameters > MOST_THAT_TRAINS * plan.total_parameters:
        return "more than half of it trains"
    if plan.adapter is not None:
        return "adapters begin with numbers that are drawn when they are added"
    if plan.frozen_quantization is not None:
        return "its frozen matrices were packed"
    if plan.rows:
        return "rows that train are parameters of their own"
    if plan.changes_on_the_way:
        return "what trains changes on the way"
    if args.torch_compile or args.gradient_checkpointing or args.activation_checkpointing:
        return "torch_compile and checkpointing of activations change the model"
    return ""


@torch.no_grad()
def _is_put_back(start: Start) -> bool:
    """Put a model back. False where it has other tensors than before."""
    model = start.model
    present: dict[str, torch.Tensor] = {**dict(named_weights(model)), **dict(model.named_buffers())}
    for name, value in start.values.items():
        if name not in present or present[name].shape != value.shape or present[name].dtype != value.dtype:
            return False
    for name, value in start.values.items():
        present[name].copy_(value)
    for key in vars(model).keys() - start.attributes.keys():
        delattr(model, key)
    vars(model).update(start.attributes)
    if start.use_cache is not None:
        model.config.use_cache = start.use_cache
    model.zero_grad(set_to_none=True)
    nn.Module.train(model, False)  # every module, as it was loaded
    return True
