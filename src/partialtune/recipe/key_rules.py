"""Rules for single recipe keys: types, bounds, refused keys, former names.

In: nothing, or a key. Out: tables, and the row of a key. A key of a new feature needs a field in `arguments.py` alone;
these tables are about the fields of `transformers.TrainingArguments`, which checks no types.
"""

from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from partialtune.grammar.values import MORE_THAN_ZERO, Bound, at_least, union_members
from partialtune.recipe.arguments import BELOW_ONE, NOT_EMPTY, argument_fields, argument_types, default_of

SEED = Bound("0 to 4,294,967,295", lambda value: 0 <= value < 2**32)
STEPS = Bound(
    "either whole steps from 1 or a share of the run between 0 and 1",
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
)

TRAINING_BOUNDS = {
    "output_dir": NOT_EMPTY,
    "learning_rate": at_least(0),
    "weight_decay": at_least(0),
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": MORE_THAN_ZERO,
    "max_grad_norm": at_least(0),
    "neftune_noise_alpha": MORE_THAN_ZERO,
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "gradient_accumulation_steps": at_least(1),
    "num_train_epochs": MORE_THAN_ZERO,
    "max_steps": Bound("1 or more; -1 leaves it to num_train_epochs", lambda value: value == -1 or value >= 1),
    "warmup_steps": Bound(
        "either whole steps from 0 or a share of the run below 1",
        lambda value: 0 <= value < 1 or (value >= 1 and value == int(value)),
    ),
    "logging_steps": STEPS,
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "eval_delay": at_least(0),
    "save_total_limit": at_least(1),
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": at_least(0),
    "dataloader_prefetch_factor": at_least(1),
    "torch_empty_cache_steps": at_least(1),
    "ddp_bucket_cap_mb": at_least(1),
    "ddp_timeout": at_least(1),
}

# Optimizers that keep one state per parameter, so that a checkpoint can name it.
OPTIMIZERS = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"]

# Where a recipe allows more, or less, than the type hint of TrainingArguments.
# TrainingArguments itself checks no types: to it bf16="no" is true.
TRAINING_TYPES: dict[str, Any] = {
    "output_dir": str,
    "resume_from_checkpoint": Literal["auto"] | str | None,
    "bf16": bool | Literal["auto"],
    "optim": OPTIMIZERS,
    "train_sampling_strategy": Literal["random", "sequential"],
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding"],
    "fsdp": bool | str | None,
    "lr_scheduler_kwargs": dict | None,
    "activation_checkpointing_kwargs": dict | None,
}

# Why a value is not among the allowed ones, or what to write in its place.
REASONS = {
    "resume_from_checkpoint": " auto takes the newest complete checkpoint of output_dir.",
    "optim": " Others pack their state or need another package, so that a checkpoint cannot key it by parameter name.",
    "train_sampling_strategy": " All windows are of one length, so that there is nothing to group.",
}

# What stands in for Trainer's default where a key is not given.
OTHER_DEFAULTS = {
    "logging_steps": "1 in runs of up to 200 steps, else 10",
    "eval_strategy": "steps where text is held out, else no",
    "eval_steps": "a tenth of the run",
}

_PUSHING = "Trainer's own pushing is always off: with push_to_hub the finished run is uploaded once, and verified"
_METRICS = "evaluation scores windows by sums and counts of its own, so that it does nothing here"
_SIXTEEN_BIT = "it casts the model's weights to 16 bits, and frozen weights would lose bits. Use bf16: true instead"
REFUSED = {
    "hub_token": "it would be written into training_args.bin. Run `hf auth login` or set HF_TOKEN",
    "hub_strategy": _PUSHING,
    "hub_always_push": _PUSHING,
    "ignore_data_skip": "a resumed run would see other windows than one that was never interrupted",
    "save_only_model": "a checkpoint without optimizer state cannot be resumed. save_strategy: 'no' writes none",
    "save_on_each_node": "every node would write the same checkpoint into the one folder that all of them go on from",
    "auto_find_batch_size": "a batch that shrinks during the run breaks its record. "
    "Set per_device_train_batch_size, and gradient_accumulation_steps for the rest",
    "restore_callback_states_from_checkpoint": "it would put other callbacks in the place of snapshot and audit",
    "logging_nan_inf_filter": "a loss that is not finite ends the run with exit code 4; it is never filtered out",
    "label_smoothing_factor": "losses would be smoothed ones, which bits per byte cannot be made of",
    "bf16_full_eval": _SIXTEEN_BIT,
    "fp16_full_eval": _SIXTEEN_BIT,
    "use_liger_kernel": "its fused loss may skip the head's gradient where the body is frozen",
    "liger_kernel_config": "use_liger_kernel is refused: its fused loss may skip the gradient of a head",
    "deepspeed": "it hides from the audit what learnt. Launch with recipes/launch/fsdp2.yaml in its place",
    "parallelism_config": "a launcher sets it: see accelerate_config.yaml",
    "local_rank": "a launcher sets it: see accelerate_config.yaml",
    "enable_jit_checkpoint": "a run that is terminated always writes a checkpoint first, so that it does nothing here",
    "optim_args": "none of the optimizers that are taken here reads it. Say adam_beta1, adam_beta2 or adam_epsilon",
    "optim_target_modules": "it belongs to optimizers that are refused. Say what trains with trainable",
    "do_train": "the command says it: `partialtune train` trains",
    "do_eval": "`partialtune train` always evaluates before and after. eval_strategy says when in between",
    "do_predict": "there is no prediction set. Score further texts with eval_texts",
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "label_names": "labels are the windows' own tokens, so that it does nothing here",
    "remove_unused_columns": "windows have the one column input_ids, so that it does nothing here",
    "length_column_name": "all windows are of one length, so that it does nothing here",
}

# Names from other versions and other programs -> what to write here.
FORMER_NAMES = {
    "warmup_ratio": "warmup_steps: a value below 1 is a share of the run, as in warmup_steps: 0.05",
    "overwrite_output_dir": "a new output_dir, or resume_from_checkpoint: auto. Nothing is ever overwritten",
    "logging_dir": "report_to: tensorboard; it logs into output_dir, or into $TENSORBOARD_LOGGING_DIR",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "group_by_length": "nothing: all windows are of one length",
    "no_cuda": "use_cpu: true",
    "push_to_hub_model_id": "hub_model_id",
    "adafactor": "optim: adafactor",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "mixed_precision": "bf16: true, false or auto",
    "dtype": "bf16: true computes in bf16; weights are always trained and saved in fp32",
    "torch_dtype": "bf16: true computes in bf16; weights are always trained and saved in fp32",
    "layers": "trainable: ['blocks[-2:]', final_norm]",
    "freeze": "trainable: it lists what trains, everything else is frozen",
    "unfreeze": "trainable",
    "trainable_layers": "trainable",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "revision": "model_revision",
    "dataset": "text: hf:DATASET[:CONFIG[:SPLIT]]",
    "dataset_name": "text: hf:DATASET[:CONFIG[:SPLIT]]",
    "train_file": "text",
    "validation_file": "validation_share, a part of the text, or eval_texts: {name: source}",
    "max_length": "block_size",
    "max_seq_length": "block_size",
    "seq_length": "block_size",
    "context_length": "block_size",
    "stride": "window_stride",
    "validation_split": "validation_share",
    "resume": "resume_from_checkpoint: auto",
}

# Deprecated -> present name of one and the same field.
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Trainer lets the first win over the second without a word.
LENGTHS = ("max_steps", "num_train_epochs")


def recipe_types() -> dict[str, Any]:
    """Every key that a recipe may hold -> its type; our own first. Imports transformers, which takes seconds."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    training: dict[str, Any] = {}
    for name, entry in TrainingArguments.__dataclass_fields__.items():
        if entry.init and name not in REFUSED and name not in ALIASES:
            choices = entry.metadata.get("choices")
            hint = Literal[tuple(choices)] if choices else without_enums(hints[name])
            optional = hint | None if choices and entry.default is None else hint
            training[name] = TRAINING_TYPES.get(name, optional)
    return {**argument_types(), **training}


def training_defaults() -> dict[str, Any]:
    """Every field of TrainingArguments -> its default. Imports transformers."""
    from transformers import TrainingArguments

    return {name: default_of(entry) for name, entry in TrainingArguments.__dataclass_fields__.items() if entry.init}


def without_enums(hint: Any) -> Any:
    """`SchedulerType | str` -> the Literal of its values: there the text is one of them, too."""
    members = union_members(hint)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:
        return Literal[tuple(choice.value for choice in enums[0])]
    if get_origin(hint) is list:
        return list[without_enums(get_args(hint)[0])]  # type: ignore[misc]  # a type that is made at run time
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(without_enums, members))]  # noqa: UP007
    return hint


def bound_of(key: str) -> Bound | None:
    """The bound on a key's value beyond its type."""
    entry = argument_fields().get(key)
    return entry.metadata.get("bound") if entry else TRAINING_BOUNDS.get(key)


def unknown_key(key: Any, near: str | None) -> str:
    """The message on a key that no recipe has."""
    if key in FORMER_NAMES:
        return f"unknown key. Write {FORMER_NAMES[key]}."
    if near:
        return f"unknown key. Did you mean {near}?"
    return "unknown key: neither one of partialtune's nor a field of transformers.TrainingArguments. Take it out."
