"""The model that a run starts from: weights in the dtypes that they are trained in, rows for new tokens."""

import logging

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments, modeling_utils

from partialtune.distributed import shards_parameters
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.held_narrow import narrow_values
from partialtune.model.loading import load_model
from partialtune.model.model_checks import check_finite
from partialtune.model.new_tokens import NewTokens, give_rows
from partialtune.model.parameters import persistent_buffers
from partialtune.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


def load_base(
    recipe: Recipe, args: TrainingArguments, config: PretrainedConfig, revision: str, new_tokens: NewTokens | None
) -> PreTrainedModel:
    """The base on the CPU, in eval mode. It computes in fp32, whatever dtype its frozen matrices are held in.

    Args:
        recipe: Of the run.
        args: Trainer's.
        config: Of the base, by `load_config`.
        revision: Of the base.
        new_tokens: That its tokenizer has by now.

    Raises:
        ModelError: If it cannot be used.
        RecipeError: If the recipe wants 16 bits, and something forbids them.
    """
    base = recipe.model
    wanted, obstacle = recipe.freeze.frozen_dtype, obstacle_to_16_bits(recipe.freeze.method, args)
    if wanted == "bf16" and obstacle:
        raise RecipeError(f"frozen_dtype: bf16 is impossible here: {obstacle}. Say frozen_dtype: auto.")
    narrow = wanted != "float32" and not obstacle
    empty = is_sent_weights()
    model = load_model(base.model_name_or_path, config, revision, base.trust_remote_code, narrow=narrow, empty=empty)
    if main_sends_weights():
        check_can_be_sent(base.model_name_or_path, model)
    if not empty:
        check_finite(base.model_name_or_path, model)
    if new_tokens is not None:
        give_rows(model, new_tokens)
    return model


def main_sends_weights() -> bool:
    """Whether fsdp_cpu_ram_efficient_loading is on: the main process sends its weights when the model is sharded."""
    return modeling_utils.is_fsdp_enabled()  # of transformers, which goes by that setting alone


def is_sent_weights() -> bool:
    """Whether this process loads no weights, since it gets those of the main one: all but the first of each node."""
    return main_sends_weights() and not modeling_utils.is_local_dist_rank_0()


def check_can_be_sent(name: str, model: nn.Module) -> None:
    """Stop where a model holds more than parameters, which is all that accelerate sends.

    Raises:
        ModelError: Names the first such buffer.
    """
    if buffers := [buffer for buffer, _ in persistent_buffers(model)]:
        raise ModelError(
            f"fsdp_cpu_ram_efficient_loading: {name} holds {len(buffers)} buffers that are saved, {buffers[0]} first, "
            f"and the main process sends parameters alone. Set it to false: each process then loads the model."
        )


def obstacle_to_16_bits(method: str, args: TrainingArguments) -> str:
    """Why frozen matrices are held in fp32 in any case, empty where nothing speaks against 16 bits."""
    if method == "full":
        return "nothing is frozen"
    if shards_parameters(args):
        return "FSDP shards parameters of one dtype"
    if args.torch_compile:
        return "torch_compile would keep the wide copy of each matrix"
    return ""


def frozen_dtype_words(model: nn.Module, plan: FreezePlan) -> str:
    """How much of a model stays in 16 bits under a plan, in a sentence; empty where nothing does."""
    if plan.frozen_dtype == "bf16":
        return (
            "Frozen weights: matrices are held in bfloat16 while training, those of a float32 base rounded. Scores and "
            "saved files have the base's own values."
        )
    held = narrow_values(model, left_out=plan.trainable)
    words = [f"{count:,} values of frozen matrices stay in {name}, 2 bytes each" for name, count in held.items()]
    return f"Frozen weights: {'; '.join(words)}; what trains is float32." if held else ""
