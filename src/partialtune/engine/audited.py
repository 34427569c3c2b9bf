"""`audited`: a plan carried out, sped up and proved in a loop that is no Trainer: plain PyTorch, accelerate, Lightning.

    with audited(model, plan, optimizer) as tuning:
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuning.step()
    tuning.audit.passed, tuning.deltas

The optimizer's own hooks notice each real step: accelerate leaves steps out while it accumulates gradients, and
Lightning gives a loop no place to call anything. So phases, deltas and audit need no call of `tuning.step()`.
"""

import logging
import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState

from partialtune.distributed import DEEPSPEED, decided_by_main, from_all, is_main, rank_and_processes
from partialtune.engine.fast_paths import FastPaths
from partialtune.engine.forward_stack import put_on
from partialtune.engine.gradient_reduction import leave_out_resting
from partialtune.engine.other_engine import compare_processes
from partialtune.engine.phases import Phases
from partialtune.engine.plan_optimizer import apply_beside_optimizer, bare_optimizer, key_by_name
from partialtune.engine.prefix_choice import choose_prefix
from partialtune.engine.row_checks import check_rows_fit_launch, check_rows_get_gradients
from partialtune.engine.tuning import Tuning, check_settings, check_untuned
from partialtune.errors import FreezeViolation, PartialtuneError, RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.planned import Phase
from partialtune.model.parameters import is_sharded, named_learners, reshard
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.deltas import WeightDeltaCallback

logger = logging.getLogger(__name__)


def audited(
    model: nn.Module,
    plan: FreezePlan,
    optimizer: torch.optim.Optimizer,
    *,
    delta_steps: int = 10,
    output_dir: str | os.PathLike | None = None,
    stop_on_violation: bool = True,
    fast_paths: Collection[str] = ("gelu", "casts"),
    prefix_cache: str = "auto",
    first_step: int = 0,
) -> "AuditedLoop":
    """Let a loop of one's own carry out a plan: freeze, phases, fast paths, prefix cache, deltas, audit.

    The plan is applied at once, and what it freezes leaves the optimizer. All else is on for as long as the `with`
    lasts. Its end is the audit: `tuning.audit`. Where the block ends by an error, the audit gives no verdict on what
    has not moved, and the error goes on.

    Args:
        model: A causal language model, or what accelerate's `prepare`, DDP or torch.compile made of it. In Lightning
            the causal language model within the module.
        plan: Made for this model as it is now, after peft has wrapped it. Applied to it already or not.
        optimizer: Of the model, made already; accelerate's or Lightning's wrapper of it too. A learning rate scheduler
            may exist, unless a phase or a part has a learning rate of its own.
        delta_steps: Optimizer steps between two reports of the weight deltas.
        output_dir: Where `audit.json` and `weight_deltas.jsonl` are written; nowhere where absent.
        stop_on_violation: Whether a violation of the freeze audit raises FreezeViolation, or is only logged.
        fast_paths: Of `gelu` (in one operation), `casts` (of frozen weights once) and `loss` (without all logits, in
            train mode and where labels are given: `outputs.logits` are then none).
        prefix_cache: Whether the states behind frozen first blocks are kept: `auto`, `off`, `memory`, `disk` (both an
            error where it is impossible).
        first_step: Optimizer steps of the checkpoint from which the loop goes on. Give the base here and load weights
            and optimizer within the block: deltas and audit then count from the base.

    Returns:
        To be used in a `with`: what is known of the run, while it goes on and after it.

    Raises:
        RecipeError: If the model is attached already, or model or optimizer cannot carry the plan out, in words.
        FreezeViolation: When the block begins, if what trains is missing from the optimizer; in the step or at the end
            where it is found, if a frozen parameter has changed or one that trains could not learn.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"audited: the model is of type {type(model).__name__}. It takes audited(model, plan, optimizer); for a "
            f"Trainer: attach(trainer, plan)."
        )
    check_settings(plan, fast_paths, prefix_cache, delta_steps)
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):  # the library need not be there
        raise RecipeError(f"audited: {DEEPSPEED}")
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    check_untuned(inner)
    reshard(inner)
    _check_wrapped(model, inner, plan)
    missing = apply_beside_optimizer(inner, plan, optimizer)
    check_rows_get_gradients(inner)
    audit = FreezeAuditCallback(plan, output_dir, stop_on_violation)
    audit.missing_at_start = missing
    deltas = WeightDeltaCallback(plan, delta_steps, output_dir)
    fast = _fast_paths(inner, model, plan, fast_paths, prefix_cache)
    return AuditedLoop(inner, plan, fast, audit, deltas, bare_optimizer(optimizer), model, first_step)


class AuditedLoop(Tuning):
    """A plan that is carried out in a loop: a context, made by `audited`.

    Args:
        model, plan, fast, audit_callback, delta_callback: As in `Tuning`.
        optimizer: Itself, no wrapper; it suits the plan.
        given: The model as the loop calls it.
        first_step: Steps that were taken before the block.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: FreezePlan,
        fast: FastPaths,
        audit_callback: FreezeAuditCallback,
        delta_callback: WeightDeltaCallback,
        optimizer: torch.optim.Optimizer,
        given: nn.Module,
        first_step: int,
    ) -> None:
        super().__init__(model, plan, fast, audit_callback, delta_callback)
        self._optimizer, self._given, self._first_step = optimizer, given, first_step
        self._phases = Phases(plan, model, optimizer, fast, given=given)
        # What a Trainer hands to callbacks: steps taken, the log, where files go.
        self._args = SimpleNamespace(output_dir=None, max_grad_norm=1.0)
        self._state, self._control = TrainerState(global_step=first_step), TrainerControl()
        self._held: ExitStack | None = None
        self._is_skipped = self._makes_state = False
        self._is_sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self._rates_logged_at = first_step

    @property
    def phase(self) -> Phase | None:
        """The present phase, None outside the block."""
        return self._phases.phase

    @property
    def steps(self) -> int:
        """Optimizer steps so far, with those before the block."""
        return self._state.global_step

    @property
    def log(self) -> list[dict[str, float]]:
        """The groups' deltas at each report, `delta/trainable_l2` and so on, and `audit/passed`, each with its step.

        Where parts have rates of their own, `learning_rate` and `learning_rate/embeddings` and so on at each report.
        """
        return self._state.log_history

    def step(self) -> None:
        """May be called after each batch or each step, or never: all is done by the optimizer's hooks.

        Raises:
            RecipeError: Outside the block, where nothing is noticed.
        """
        if self._held is None:
            raise RecipeError("tuning.step() stands outside its block: with audited(model, plan, optimizer) as tuning.")

    # ---- the block begins and ends ----------------------------------------------------------------------------------

    def __enter__(self) -> "AuditedLoop":
        with ExitStack() as held:  # takes off what is on where one of these fails
            self._begin(held)
            self._held = held.pop_all()
        return self

    def _begin(self, held: ExitStack) -> None:
        held.callback(self.end)
        self._check_processes()
        for callback in (self.audit_callback, self.delta_callback):
            callback.take_snapshot(self._args, self._state, self.model)
        self.fast.sha256 = {**self.audit_callback.digests_before, **self.audit_callback.buffers_before}
        held.enter_context(self.fast)
        held.callback(self._phases.end)
        self._phases.recompute = bool(getattr(self.model, "is_activation_checkpointing", False))
        self._phases.start(self.steps)
        leave_out_resting(self._given, self.plan)
        self._tell("on_train_begin")
        if "loss" in self.fast.in_use or self.fast.keeps_prefix:
            held.callback(put_on(self.model, self._with_fast_loss).take_off)
        handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        if not self._is_sharded:  # torch's own functions give sharded state names, and look for places
            handles += key_by_name(self._optimizer, self.model)
            handles += compare_processes(self._optimizer)
        for handle in handles:
            held.callback(handle.remove)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()
        if error is None:
            if self.steps == self._first_step:
                logger.warning("The optimizer took no step within audited(...): does the loop call another one?")
            self._conclude()
        elif not isinstance(error, FreezeViolation) and rank_and_processes()[1] == 1:  # else others may not be here
            self._conclude_after_error()

    def _log_rates(self) -> None:
        """As Trainer logs them: the rate of the optimizer's first group, and those of the parts by name."""
        if self.rates and self.steps != self._rates_logged_at:
            self.log.append({"learning_rate": self.part_rates.own, **self.rates, "step": self.steps})
            self._rates_logged_at = self.steps

    def _conclude(self) -> None:
        self._log_rates()
        reshard(self.model)
        self._state.max_steps = self._state.global_step
        self._tell("on_train_end")

    def _conclude_after_error(self) -> None:
        """Audit what there is without a verdict on what has not moved, and let the loop's own error go on."""
        self.audit_callback.interrupted = lambda: True
        self.audit_callback.stop_on_violation = False  # logged as an error
        try:
            self._conclude()
        except PartialtuneError as failure:
            logger.error("%s", failure)

    def _tell(self, event: str) -> None:
        self._state.is_world_process_zero = is_main()
        for callback in (self.delta_callback, self.audit_callback):
            hook = getattr(callback, event)
            hook(self._args, self._state, self._control, model=self.model, optimizer=self._optimizer)

    # ---- around each step of the optimizer --------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note what the step needs. A closure, as Lightning gives, makes the gradients only within the step.

        Args:
            args: Of `step`, which begin with the optimizer.
        """
        self._makes_state = _only_makes_state(optimizer)
        if self._makes_state:
            return None
        self.part_rates.note(optimizer)
        closure = kwargs["closure"] if "closure" in kwargs else next(iter(args[1:]), None)
        if closure is None:
            self._note(optimizer)
            return None
        noting = self._then_note(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": noting}
        return (args[0], noting, *args[2:]), kwargs

    def _then_note(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def noting() -> Any:
            loss = closure()
            self._note(optimizer)
            return loss

        return noting

    @torch.no_grad()
    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        # GradScaler of fp16 gives fused optimizers the scale, and lets them leave a step out that overflowed. To all
        # others it gives plain gradients, and does not call them.
        self._is_skipped = bool(getattr(optimizer, "found_inf", 0))
        if not self._is_skipped:
            scale = getattr(optimizer, "grad_scale", None)
            self.audit_callback.before_step(1.0 if scale is None else float(scale), self.model)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._makes_state:
            self._phases.forget_state_of_new(self.steps)
        if self._makes_state or self._is_skipped:
            return
        self._state.global_step += 1
        self.audit_callback.after_step()
        self._tell("on_step_end")
        if self.steps % self.delta_callback.delta_steps == 0:
            self._log_rates()
        if self.plan.phase_at(self.steps) is not self.phase:
            self._check_processes()
        self._phases.step_begins(self.steps)
        self._tell("on_step_begin")

    def _check_processes(self) -> None:
        """Raises RecipeError where a later phase would learn on each process by itself."""
        wrapped = isinstance(self._given, DistributedDataParallel) or self._is_sharded
        if self.plan.changes_on_the_way and rank_and_processes()[1] > 1 and not wrapped:
            raise RecipeError(
                f"{self.plan.what_changes}: DDP synchronises only what learns when it wraps the model, and this model "
                "was not wrapped yet. Call apply_plan(model, plan) and wrap it (accelerator.prepare, fully_shard) "
                "before audited."
            )

    def _with_fast_loss(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wanted = not self.model.training or kwargs.get("labels") is None
        with self.fast.batch(kwargs, wanted, padding_wanted=not self.model.training):
            return forward(*args, **kwargs)


def _only_makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is none of the loop's: torch's `set_optimizer_state_dict` takes one, at rate 0 and with gradients
    of 0, so that there is state to load into."""
    if optimizer.state or any(float(group.get("lr", 1)) for group in optimizer.param_groups):
        return False
    gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    parts = [gradient.to_local() if is_sharded(gradient) else gradient for gradient in gradients]
    return not any(from_all(any(bool(part.any()) for part in parts)))  # one process may have nothing of all shards


def _check_wrapped(model: nn.Module, inner: nn.Module, plan: FreezePlan) -> None:
    """Raises RecipeError where the model is wrapped or sharded in a way that the plan does not bear."""
    several = plan.changes_on_the_way
    sharded = any(is_sharded(parameter) for parameter in inner.parameters())
    check_rows_fit_launch(plan, inner, isinstance(model, nn.DataParallel))
    if several and sharded:
        _check_shards(inner, plan)
    if not isinstance(model, DistributedDataParallel):
        return
    learning = sum(parameter.requires_grad for parameter in inner.parameters())
    if learning != len(plan.trainable):
        raise RecipeError(
            f"DDP waits for the gradients of all that learns when it wraps the model: {learning} parameters, and the "
            f"plan trains {len(plan.trainable)}. Call apply_plan(model, plan) before accelerator.prepare."
        )
    if several and not model.find_unused_parameters:
        raise RecipeError(
            f"{plan.what_changes}: what learns in other steps has no gradient, and DDP would wait for it. Wrap the "
            "model with "
            "find_unused_parameters=True (accelerate: kwargs_handlers=[DistributedDataParallelKwargs(...)])."
        )


def _check_shards(model: nn.Module, plan: FreezePlan) -> None:
    """Raises RecipeError where a plan that changes on the way does not fit how the model is sharded."""
    if apart := [name for name, one in named_learners(model) if name in plan.trainable and not is_sharded(one)]:
        raise RecipeError(
            f"{plan.what_changes}: {apart[0]} trains and is not sharded, while others are, so that nothing sums its "
            f"gradients. Call fully_shard(model) on the whole model before audited."
        )
    if plan.sampling is not None and plan.sampling.keep_state:
        raise RecipeError(
            "block_sampling: the state of blocks that rest is out of the optimizer, and torch's "
            "get_optimizer_state_dict, by which a loop saves it under FSDP, takes none. Say keep_state: false, or take "
            "attach(trainer, plan)."
        )


def _fast_paths(
    model: nn.Module, given: nn.Module, plan: FreezePlan, enabled: Collection[str], prefix_cache: str
) -> FastPaths:
    sharded = any(is_sharded(parameter) for parameter in model.parameters())
    if sharded or isinstance(given, nn.DataParallel):
        # The others hold whole weights, which FSDP has not; and DataParallel copies a module with its patches.
        enabled = {"gelu"} & set(enabled)
        prefix_cache = "off" if prefix_cache == "auto" else prefix_cache
    # In which dtype a loop computes shows when it does: casts look for autocast in each forward pass.
    prefix = decided_by_main(lambda: choose_prefix(prefix_cache, plan, model))
    fast = FastPaths(model, enabled, prefix, torch.bfloat16)
    fast.compiled = any(hasattr(part, "_orig_mod") for part in (given, getattr(given, "module", None)))
    return fast
