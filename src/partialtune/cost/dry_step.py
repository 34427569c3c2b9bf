"""One training step without values: model on the meta device + plan -> its matrix products and its memory.

Real autograd runs forward, backward and the optimizer on fake tensors, which have shapes, dtypes and a device, but no
data. So backward stops where it will stop and every tensor lives as long as it will, whatever the architecture.

`FakeTensorMode` and `TorchDispatchMode` have no public home in torch; its own FLOP counter and compiler stand on them.
What the meter sees of a step without values is compared with what it sees of a real one, operation by operation, in
`test_a_step_without_values_is_what_the_same_meter_sees_in_a_real_one` (tests/test_forecast.py).
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from partialtune.cost.flops import ProductCounter, Products, tensors_in
from partialtune.cost.memory import Memory, MemoryLedger
from partialtune.engine.fast_modules import CastOnce, fused_gelu
from partialtune.engine.head_loss import rows_at_once
from partialtune.engine.no_logits import LogitsInUse, LossWithoutLogits
from partialtune.engine.recomputation import recompute_from
from partialtune.errors import ModelError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan
from partialtune.model.held_narrow import hold_narrow, narrow_values
from partialtune.model.narrow_weights import held_matrix
from partialtune.model.packed_weights import packed_size
from partialtune.model.parameters import exact_values_of
from partialtune.model.structure import decoder_blocks
from partialtune.model.train_mode import stop_layer_drop

# Of these, too, the fake result is a tensor beside it.
WRITES_ITS_FIRST = (torch.ops.aten.copy_.default,)


@dataclass(frozen=True)
class Cost:
    """Arithmetic and memory of one optimizer step on one process.

    Attributes:
        products: Of the whole step.
        memory: From the second step on.
        narrow: dtype of 16 bits -> values of frozen matrices that are held in it.
        unrounded: Bytes on the CPU beside `memory`: exact values of what is held rounded (`frozen_dtype: bf16`).
    """

    products: Products
    memory: Memory
    narrow: Mapping[str, int] = field(default_factory=dict)
    unrounded: int = 0


def _adafactor(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1.0, scale_parameter=False, relative_step=False)


# `optim` of a recipe -> the optimizer that Trainer makes of it, as far as memory goes.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "adafactor": _adafactor,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def dry_step(
    model: nn.Module,
    plan: FreezePlan,
    batch_size: int,
    block_size: int,
    accumulation: int = 1,
    bf16: bool = False,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
    fast_paths: Collection[str] = (),
    base_dtype: torch.dtype | None = None,
) -> Cost:
    """Take one optimizer step of `plan` without values, with the operations that PyTorch has for a CPU.

    Args:
        model: Causal language model, on the meta device or another. It is not touched.
        plan: What trains. Its weights are held in fp32, whatever the dtype of `model`, but see `base_dtype`.
        batch_size: Windows of one forward pass on one process.
        block_size: Tokens per window.
        accumulation: Forward passes of one optimizer step.
        bf16: Whether products run in bf16 (autocast).
        optimizer: `optim` of the recipe, one of `OPTIMIZERS`.
        checkpointing: Whether blocks that backward passes are recomputed (`activation_checkpointing`).
        fast_paths: Those of the recipe: `gelu` and `loss` hold fewer tensors, `casts` keeps copies for bf16.
        base_dtype: 16-bit dtype in which frozen matrices are held, as `frozen_dtype: auto` holds those of such a base.

    Returns:
        The products of the whole step, and its memory from the second step on.

    Raises:
        ModelError: If the model decides by values what it computes.
    """
    step = (model, plan, batch_size, block_size, accumulation, bf16, optimizer, checkpointing, base_dtype)
    try:
        return _cost_of_step(*step, fast_paths)
    except LogitsInUse:  # found out as in training: this model's loss is taken from its logits
        return _cost_of_step(*step, set(fast_paths) - {"loss"})


def _cost_of_step(
    model: nn.Module,
    plan: FreezePlan,
    batch_size: int,
    block_size: int,
    accumulation: int,
    bf16: bool,
    optimizer: str,
    checkpointing: bool,
    base_dtype: torch.dtype | None,
    fast_paths: Collection[str],
) -> Cost:
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # positions and masks that models make for themselves have values
    twin = _twin_under_plan(model, plan, fake, checkpointing, base_dtype)
    loss = _loss_without_logits(twin) if "loss" in fast_paths else None
    vocabulary = twin.config.get_text_config().vocab_size if loss else None
    rows = rows_of_logits(batch_size, block_size, vocabulary)
    meter = StepMeter(twin, fake, rows, first_block=plan.phases[-1].first_block)
    input_ids = torch.zeros(batch_size, block_size, dtype=torch.long)
    with _failing_in_words(plan.model_name, loss), ExitStack() as paths:
        if "gelu" in fast_paths:
            paths.enter_context(fused_gelu(twin))
        if bf16 and "casts" in fast_paths:
            casts = CastOnce(twin)
            casts.begin()
            paths.callback(casts.end)
        if loss:
            paths.enter_context(loss.active())
        memory = take_step(twin, input_ids, meter, bf16=bf16, optimizer=optimizer, accumulates=accumulation > 1)
    exact = {id(p): values for p in twin.parameters() if (values := exact_values_of(p)) is not None}
    unrounded = sum(values.nbytes for values in exact.values())
    narrow = narrow_values(twin, left_out=plan.quantized)
    return Cost(meter.products(passes=accumulation), _packed(memory, plan), narrow, unrounded)


def _packed(memory: Memory, plan: FreezePlan) -> Memory:
    """With weights in 8 or 4 bits where the plan has them. They took 16 until now, from first to last."""
    held = [parameter for parameter in plan.parameters if parameter.quantized]
    less = sum(2 * p.numel - packed_size(tuple(p.shape), plan.frozen_quantization or "") for p in held)
    parts = ("weights", "peak", "resident")
    return replace(memory, **{part: getattr(memory, part) - less for part in parts})


def _twin_under_plan(
    model: nn.Module, plan: FreezePlan, fake: FakeTensorMode, checkpointing: bool, base_dtype: torch.dtype | None
) -> nn.Module:
    """A copy of `model` without values to which the plan is applied, as a run does it."""
    twin = _without_values(model, fake, base_dtype or torch.float32, set(plan.quantized))
    if base_dtype is not None or plan.quantized:
        hold_narrow(twin)
    stop_layer_drop(twin)  # apply_plan does it too, and says so, which belongs to a run
    apply_plan(twin, plan)
    if checkpointing:
        twin.activation_checkpointing_enable({"use_reentrant": False})
        recompute_from(twin, plan.phases[-1].first_block)
    return twin


def _loss_without_logits(model: nn.Module) -> LossWithoutLogits | None:
    """None where the model's build says already that it needs all logits."""
    loss = LossWithoutLogits(model)
    return None if loss.needs_logits() else loss


@contextmanager
def _failing_in_words(model_name: str, loss: LossWithoutLogits | None) -> Iterator[None]:
    """What the model's own code raises, in words: mostly it asks for a value, and there are none."""
    try:
        yield
    except (LogitsInUse, ModelError):
        raise
    except Exception as error:
        if loss:  # BART takes its loss by itself, and finds that states are no logits
            raise LogitsInUse from error
        raise ModelError(
            f"{model_name} cannot take a step without its weights, so that nothing can be forecast: {error}"
        ) from error


def _without_values(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype, packed: Collection[str]) -> nn.Module:
    """A copy of `model` whose parameters and buffers are fake tensors on the CPU. Ties are kept.

    Args:
        model: Its dtypes do not matter.
        fake: Their mode.
        dtype: Of the parameters.
        packed: Names of those that are held in 8 or 4 bits. They are in 16 here, and widened for a product likewise;
            `_packed` takes the difference off.
    """
    twins: dict[int, torch.Tensor] = {}
    with fake:
        for buffer in model.buffers():
            twins[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        for name, parameter in model.named_parameters():
            own = torch.bfloat16 if name in packed else dtype
            twins[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=own, device="cpu"))
    return copy.deepcopy(model, twins)  # which takes the twins for copies made already


class StepMeter(TorchDispatchMode):
    """Looks on while a model takes a step: counts its products and writes down its memory.

    Args:
        model: What takes the step. Its tensors may be fake ones or have values.
        fake: The mode of its fake tensors.
        rows: Scores of fewer tokens than so many are counted to the activations, not to the logits.
        first_block: First block that backward passes; the blocks before it are the frozen prefix.
    """

    def __init__(self, model: nn.Module, fake: FakeTensorMode, rows: int, first_block: int = 0) -> None:
        super().__init__()
        weights = [*model.parameters(), *model.buffers()]
        self.backward = False
        self.ledger = MemoryLedger()
        self.ledger.assign(weights, "weights")
        self._fake, self._rows = fake, rows
        head = getattr(model.get_output_embeddings(), "weight", None)
        head = None if head is None else held_matrix(head)
        self.counter = ProductCounter(self.ledger, list(model.parameters()), head)
        for block in decoder_blocks(model)[:first_block]:
            block.register_forward_pre_hook(lambda *_: setattr(self.counter, "in_prefix", True))
            block.register_forward_hook(lambda *_: setattr(self.counter, "in_prefix", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two in three of all calls, and nothing is computed
            return args[0].fake_device
        result = self._run(func, types, args, kwargs or {})
        outputs = tensors_in(result)
        for output in outputs:
            self.ledger.number(output)
        if outputs:
            self.counter.see(func, args, kwargs or {}, result, self.backward)
            self.ledger.assign(filter(self._are_logits, outputs), "logits")
        return result

    def products(self, passes: int) -> Products:
        """Of `passes` forward passes, of which one was seen."""
        return Products(**{purpose: passes * count for purpose, count in self.counter.counts.items()})

    def _run(self, func: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        # The fake mode is called by hand: entered, it would make fake tensors of positions and masks as well.
        if FakeTensor not in types:
            return func(*args, **kwargs)  # positions and masks have values, and models decide by them
        if func._overloadpacket is torch.ops.aten._grouped_mm:
            return _empty_grouped_product(*args, **kwargs)
        result = self._fake.__torch_dispatch__(func, types, args, kwargs)
        if "out" in kwargs:  # the fake result is a tensor beside what was written to
            return kwargs["out"]
        return args[0] if func in WRITES_ITS_FIRST else result

    def _are_logits(self, tensor: torch.Tensor) -> bool:
        return self.counter.of_logits(tensor) and tensor.numel() >= self._rows * tensor.shape[-1]


def take_step(
    model: nn.Module, input_ids: torch.Tensor, meter: StepMeter, bf16: bool, optimizer: str, accumulates: bool
) -> Memory:
    """One forward, one backward and the optimizer's step, as Trainer does them, under the meter.

    Args:
        model: A model under a plan.
        input_ids: int64 (B, T).
        accumulates: Whether gradients of earlier passes are there already.
    """
    model.config.use_cache = False  # as Trainer has it
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with meter:
        if accumulates:
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
        loss = _loss(model, input_ids, bf16)
        meter.backward = True
        loss.backward()
        meter.backward = False
        meter.ledger.assign([p.grad for p in trainable if p.grad is not None], "gradients")
        meter.ledger.optimizer_starts()
        stepper = OPTIMIZERS[optimizer](trainable)
        stepper.step()
        return meter.ledger.close()


def rows_of_logits(batch_size: int, block_size: int, vocabulary: int | None = None) -> int:
    """Rows of the scores that are there at one time: of all tokens that are predicted, or those of a chunk.

    Args:
        batch_size, block_size: Of a forward pass.
        vocabulary: Width of the scores where the loss is taken without holding them all, else None.
    """
    rows = batch_size * (block_size - 1)
    return rows_at_once(rows, vocabulary, "cpu") if vocabulary else rows


def _loss(model: nn.Module, input_ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """The model's loss: its own, over the scores of all tokens at once, or the one that stands in for it.

    What only its outputs hold is gone afterwards.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = model(input_ids=input_ids, labels=input_ids)
    widened = outputs.logits.float()  # accelerate widens what comes out of autocast
    del widened
    return outputs.loss


def _empty_grouped_product(
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A product of experts without values: torch's own refuses fp32, which its kernel for a CPU takes.

    Rows (m, k) with one (k, n) an expert -> (m, n); (m, k) cut along k with (k, n) cut likewise -> one (m, n) each.
    """
    shape: tuple[int, ...] = (left.shape[0], right.shape[-1])
    if right.ndim == 2:
        shape = (len(ends), *shape)
    return left.new_empty(shape, dtype=out_dtype)
