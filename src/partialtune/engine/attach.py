"""`attach`: a plan carried out, sped up and proved in anybody's Trainer, transformers' own or a subclass of it.

plan = plan_freeze(model, ["blocks[-2:]", "final_norm"])
tuning = attach(trainer, plan)          # after the Trainer is made, before it trains
trainer.train()
tuning.audit.passed, tuning.deltas
"""

import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from partialtune.distributed import (
    DEEPSPEED,
    decided_by_main,
    end_where_nodes_differ,
    is_first_of_node,
    launcher_says,
    several_nodes,
    shards_parameters,
)
from partialtune.engine.fast_paths import FAST_PATHS, FastPaths
from partialtune.engine.part_rates import RateCallback
from partialtune.engine.phases import PhaseCallback
from partialtune.engine.plan_optimizer import apply_beside_optimizer
from partialtune.engine.prefix_choice import PrefixPhase, choose_prefix
from partialtune.engine.prefix_place import rows_of_run
from partialtune.engine.row_checks import check_rows_fit_launch, check_rows_get_gradients
from partialtune.engine.shard_model import check_sharding, hand_losses_on_unrounded
from partialtune.engine.sharding import sum_in_fp32
from partialtune.engine.trainer_overrides import TrainerChanges, TunedTrainer, override
from partialtune.engine.trl_head import has_frozen_trl_head
from partialtune.engine.tuning import Tuning, check_settings, check_untuned
from partialtune.engine.unused_parameters import set_search
from partialtune.errors import RecipeError
from partialtune.freeze.apply import apply_plan
from partialtune.freeze.plan import FreezePlan
from partialtune.model.digests import bit_sums
from partialtune.model.parameters import named_weights, uncompiled
from partialtune.model.row_parameters import await_shards
from partialtune.proof.audit import FreezeAuditCallback
from partialtune.proof.deltas import WeightDeltaCallback

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    plan: FreezePlan,
    *,
    delta_steps: int = 10,
    output_dir: str | os.PathLike | None = None,
    stop_on_violation: bool = True,
    fast_paths: Collection[str] = FAST_PATHS,
    prefix_cache: str | Sequence[PrefixPhase] = "auto",
    weight_decay_on: str = "matrices",
    whole_checkpoints: bool = False,
    write_beside: Callable[[Path], None] = lambda folder: None,
    save_now: Callable[[], bool] = lambda: False,
) -> Tuning:
    """Let a Trainer carry out a plan: freeze, phases, fast paths, prefix cache, deltas, audit, trackers.

    The Trainer keeps its own loss, metrics, data and patches. What freezing saves is saved beneath them: the states
    behind frozen blocks are computed once for each row, whatever the data set and the collator are.

    Args:
        trainer: `transformers.Trainer` or a subclass of it, such as TRL's, made and not trained yet. Its
            `args` may become a copy with `ddp_find_unused_parameters`: true where the plan changes on the way, false on
            several processes where the model uses all that trains and nothing is set.
        plan: Made for this model as it is now, after peft has wrapped it. It is applied here.
        delta_steps: Steps between two reports of the weight deltas.
        output_dir: Where `audit.json` and `weight_deltas.jsonl` are written; the Trainer's where absent.
        stop_on_violation: Whether a violation of the freeze audit raises FreezeViolation, or is only written and logged
            as an error.
        fast_paths: Of `loss` (without all logits; only where the Trainer takes the model's own loss or TRL's head is on
            it), `gelu` (in one operation) and `casts` (of frozen weights once).
        prefix_cache: Whether the states behind frozen first blocks are kept: `auto`, `off`, `memory`, `disk` (both an
            error where it is impossible), or what was chosen before.
        weight_decay_on: `matrices` (Trainer's rule) or `all`, where the Trainer makes the optimizer.
        whole_checkpoints: Write each checkpoint aside, compare it with the audit's digests, and rename it when it is
            complete, so that a kill never leaves half a one and what is frozen is proved in the files too.
        write_beside: Writes further files into a whole checkpoint.
        save_now: Whether a checkpoint is wanted at an evaluation, whatever `metric_for_best_model` says.

    Returns:
        What is known of the run, while it goes on and after it.

    Raises:
        RecipeError: If the Trainer is attached already, or cannot carry the plan out, in words.
    """
    _check_trainer(trainer)
    check_settings(plan, fast_paths, prefix_cache, delta_steps)
    _check(trainer, plan)
    if weight_decay_on not in ("matrices", "all"):
        raise RecipeError(f"weight_decay_on is {weight_decay_on!r}; allowed are matrices, all.")
    model = trainer.model
    check_untuned(model)
    missing = []
    if trainer.optimizer is None:
        apply_plan(model, plan)
    else:  # a user's own: the Trainer was made with it
        missing = apply_beside_optimizer(model, plan, trainer.optimizer)
    check_rows_get_gradients(uncompiled(model))
    if trainer.is_fsdp_enabled:
        await_shards(uncompiled(model))
    searching = set_search(trainer, plan, _takes_models_loss(trainer))
    _check_nodes(model, plan, trainer.args)
    fast = _fast_paths(trainer, plan, fast_paths, prefix_cache)
    audit = _callback(trainer, FreezeAuditCallback, plan) or FreezeAuditCallback(plan, output_dir)
    audit.stop_on_violation, audit.missing_at_start = stop_on_violation, missing
    deltas = _callback(trainer, WeightDeltaCallback, plan) or WeightDeltaCallback(plan, delta_steps, output_dir)
    tuning = Tuning(model, plan, fast, audit, deltas)
    changes = TrainerChanges(weight_decay_on == "all", whole_checkpoints, write_beside, save_now)
    override(trainer, tuning, changes)
    if trainer.is_fsdp_enabled:
        hand_losses_on_unrounded(trainer.accelerator.state.fsdp_plugin)
    if trainer.is_fsdp_enabled and sum_in_fp32(trainer.accelerator.state.fsdp_plugin):
        logger.info("FSDP sums the gradients of the processes in fp32, as DDP does, and computes them in 16 bits.")
    # A phase begins first: the others measure what learns in the step. All of them before the trackers, which close
    # their files at the end of training: by then the verdict is logged.
    put_in_front(trainer, [PhaseCallback(plan, fast), RateCallback(tuning.part_rates), deltas, audit, *searching])
    deltas.attach(trainer)
    audit.attach(trainer)
    for callback in (audit, deltas):  # now, and not at the first step: a checkpoint may be loaded before it
        callback.take_snapshot(trainer.args, trainer.state, model)
    fast.sha256 = {**audit.digests_before, **audit.buffers_before}
    return tuning


def _check_nodes(model: nn.Module, plan: FreezePlan, args: TrainingArguments) -> None:
    """Stop where a node has another model, plan or rate: FSDP would make one model of the parts of several.

    Raises:
        InputError: Names the node.
    """
    if not several_nodes():
        return
    own = {}
    if is_first_of_node():  # the others of a node may have no weights yet
        sums = {name: str(total) for name, total in bit_sums(named_weights(model)).items()}
        phases = {f"from step {phase.from_step}": list(phase.trainable) for phase in plan.phases}
        rates = {"learning_rate": args.learning_rate, "max_steps": args.max_steps, "seed": args.seed}
        own = {"model": sums, "plan": phases, **rates}
    end_where_nodes_differ(own, "Give every node the same base, plan and arguments.")


def put_in_front(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Let callbacks be called before all that the Trainer has, in their order."""
    present = trainer.callback_handler.callbacks
    present[:] = [*callbacks, *(one for one in present if one not in callbacks)]


def _check_trainer(trainer: Any) -> None:
    """Raises RecipeError where it is no Trainer, or attached already."""
    if isinstance(trainer, TunedTrainer):
        raise RecipeError(
            "attach: this Trainer is attached already. One plan holds all that trains: what begins later stands in its "
            "schedule, plan_freeze(model, [...], schedule=[...])."
        )
    if not isinstance(trainer, Trainer):
        raise RecipeError(
            f"attach: it takes a transformers.Trainer or a subclass of it, and got a {type(trainer).__name__}. "
            f"For a loop of your own: with audited(model, plan, optimizer) as tuning."
        )


def _check(trainer: Trainer, plan: FreezePlan) -> None:
    """Stop where the Trainer cannot carry a plan out.

    Raises:
        RecipeError: In words.
    """
    if trainer.model_init is not None:
        raise RecipeError(
            "attach: this Trainer makes its model anew in train() (model_init), and a plan is made for a model that "
            "there is. Give the Trainer model= instead."
        )
    if trainer.args.auto_find_batch_size:
        raise RecipeError(
            "attach: auto_find_batch_size begins training anew after it has run out of memory, with weights that have "
            "moved already. Take it out, and set per_device_train_batch_size."
        )
    if trainer.args.restore_callback_states_from_checkpoint:
        raise RecipeError(
            "attach: restore_callback_states_from_checkpoint makes every callback anew when a run goes on, the audit "
            "too. Leave it out: the audit reads its own state, and EarlyStoppingCallback counts from 0 then."
        )
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 2) if trainer.is_fsdp_enabled else 2
    if version != 2:
        raise RecipeError(
            f"attach: FSDP version {version} flattens parameters, and frozen ones cannot be told from trainable ones. "
            f"Set fsdp_version: 2."
        )
    if trainer.is_fsdp_enabled:
        check_sharding(uncompiled(trainer.model), trainer.accelerator.state.fsdp_plugin)
    if plan.names_rates and trainer.args.lr_scheduler_type == "greedy":
        raise RecipeError(
            "attach: the scheduler greedy holds all rates above one bound, so that part_learning_rates and layer_decay "
            "would not keep their ratios. Take another lr_scheduler_type, such as cosine."
        )
    scheduler = trainer.args.lr_scheduler_kwargs
    absolute = isinstance(scheduler, dict) and scheduler.get("min_lr")
    if plan.names_rates and trainer.args.lr_scheduler_type == "reduce_lr_on_plateau" and absolute:
        raise RecipeError(
            "attach: min_lr of reduce_lr_on_plateau is one bound for all rates, so that part_learning_rates and "
            "layer_decay would not keep their ratios. Leave min_lr out of lr_scheduler_kwargs."
        )
    if plan.frozen_quantization and (trainer.is_fsdp_enabled or trainer.args.n_gpu > 1):
        raise RecipeError(
            f"frozen_quantization: FSDP shards parameters and DataParallel copies them, and a matrix in "
            f"{plan.frozen_quantization} allows neither. Launch a process for each GPU without FSDP (DDP)."
        )
    if plan.frozen_dtype is not None and (trainer.is_fsdp_enabled or trainer.args.n_gpu > 1):
        raise RecipeError(
            "attach: a plan with frozen_dtype leaves the model's parameters in two dtypes, which FSDP and DataParallel "
            "do not take. Start a process for each GPU without FSDP (DDP), or load the model with dtype=torch.float32."
        )
    check_rows_fit_launch(plan, uncompiled(trainer.model), trainer.args.n_gpu > 1)
    # On a CPU accelerate runs DDP in its place without a word.
    if trainer.is_deepspeed_enabled or trainer.args.deepspeed or launcher_says("ACCELERATE_USE_DEEPSPEED"):
        raise RecipeError(f"attach: {DEEPSPEED}")


def _callback(trainer: Trainer, kind: type, plan: FreezePlan) -> Any:
    """The Trainer's own callback of a kind, None where it has none."""
    found: list[Any] = [one for one in trainer.callback_handler.callbacks if isinstance(one, kind)]
    if found and found[0].plan is not plan:
        raise RecipeError(
            f"attach: the Trainer has a {kind.__name__} of another plan. Give both the same plan, or leave it out of "
            f"callbacks=[...]: attach brings its own."
        )
    return found[0] if found else None


def _fast_paths(
    trainer: Trainer, plan: FreezePlan, enabled: Collection[str], prefix_cache: str | Sequence[PrefixPhase]
) -> FastPaths:
    """The fast paths that suit the Trainer."""
    args = trainer.args
    if not _takes_models_loss(trainer) and not _takes_trls_loss(trainer):
        enabled = set(enabled) - {"loss"}
    if shards_parameters(args) or args.n_gpu > 1:
        # The others hold whole weights, which FSDP has not; and DataParallel copies a module with its patches, which
        # would go on with the weights of the first device.
        enabled = {"gelu"} & set(enabled)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    model = uncompiled(trainer.model)
    if isinstance(prefix_cache, str):
        wanted = prefix_cache
        rows = rows_of_run(args, trainer.train_dataset, trainer.eval_dataset)
        prefix_cache = decided_by_main(lambda: choose_prefix(wanted, plan, model, args, rows))
    fast = FastPaths(model, enabled, prefix_cache, dtype)
    fast.compiled = bool(args.torch_compile) or model is not trainer.model
    return fast


def _takes_models_loss(trainer: Trainer) -> bool:
    """Whether nothing but the model's own loss is made of its logits."""
    is_own = type(trainer).compute_loss is Trainer.compute_loss
    return is_own and trainer.compute_loss_func is None and trainer.label_smoother is None


def _takes_trls_loss(trainer: Trainer) -> bool:
    """Whether the loss is made of what TRL's head gives, which is frozen."""
    # Rewards are 0 at first, but for rounding: a reference of which the log-probabilities were computed beforehand, by
    # TRL's own function, would make them noise.
    return has_frozen_trl_head(trainer.model) and not getattr(trainer, "precompute_ref_logps", False)
