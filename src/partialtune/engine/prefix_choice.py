"""`prefix_cache`: is there a frozen prefix, and does keeping its states agree -> what each phase does, and why.

In: what is wanted, the plan with its phases, the model. Out: one `PrefixPhase` a phase. Every frozen prefix is tried by
a few passes of the model before training: a pass that starts from kept states has to agree with a whole one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from partialtune.distributed import shards_parameters
from partialtune.engine.broken_off_pass import modules_before_blocks, reach
from partialtune.engine.disk_folders import limit_bytes
from partialtune.engine.prefix import PrefixCache, hooked_words, modules_below
from partialtune.engine.prefix_place import Rows, choose_place
from partialtune.engine.state_store import MemoryStore
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import FreezePlan
from partialtune.model.conformance import probe_windows
from partialtune.model.parameters import uncompiled
from partialtune.model.structure import decoder_blocks
from partialtune.model.train_mode import evaluating, no_layer_drop

# Relative distance at the head's input between a pass that starts from kept states and a whole one, in fp32. Where they
# agree it is rounding at most (the same operations in the same order); a model that uses more was off by 1e-2 and more.
AGREEMENT = 1e-5
TRIED_TOKENS = 32
BY_LONGEST_ROW = ("dynamic", "longrope")  # kinds of rotary embedding that are computed for the longest row of a batch
WANTED = ("auto", "off", "memory", "disk")


@dataclass(frozen=True)
class PrefixPhase:
    """What one phase of the plan does with its frozen prefix.

    Attributes:
        from_step: Its first step.
        blocks: Blocks whose states are kept, 0 where they are computed at every step.
        reason: In words.
        on_disk: Whether the states are kept on disk, for later runs too, and not in memory.
    """

    from_step: int
    blocks: int
    reason: str
    on_disk: bool = False

    def to_json(self) -> dict[str, Any]:
        """As `recipe.yaml` and checkpoints hold it."""
        return asdict(self, dict_factory=without_memory)


def without_memory(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `asdict`: of a phase that keeps its prefix in memory, or none, the fields that it had before."""
    return {key: value for key, value in fields if (key, value) != ("on_disk", False)}


def choose_prefix(
    wanted: str,
    plan: FreezePlan,
    model: nn.Module,
    args: TrainingArguments | None = None,
    rows: Rows | None = None,
) -> list[PrefixPhase]:
    """What each phase does.

    Every length of prefix is tried: a shorter one may hold less than what later blocks use, though a longer one holds
    it all. Where the model's forward pass fails on the way, that is the obstacle, and no error.

    Args:
        wanted: `auto`, `off`, `memory` or `disk`.
        plan: Its phases say how many blocks are frozen below all that trains.
        model: A causal language model, on any device, the plan applied or not.
        args: Of the Trainer, where there is one.
        rows: Of the run, where they are known: `auto` then chooses between memory and disk. Else it is memory.

    Raises:
        RecipeError: If `memory` or `disk` is wanted and no phase can keep anything, or something else is wanted; if
            the limit of what lies on disk is no number.
    """
    if wanted not in WANTED:
        raise RecipeError(f"prefix_cache is {wanted!r}; allowed are {', '.join(WANTED)}.")
    if wanted == "off":
        return [PrefixPhase(phase.first_step, 0, "prefix_cache is off") for phase in plan.phases]
    if plan.sampling is not None:
        reason = "blocks learn in turn, so that the blocks below those that learn change from draw to draw"
        if wanted != "auto":
            raise RecipeError(f"prefix_cache: {wanted} is impossible here: {reason}. Say prefix_cache: auto.")
        return [PrefixPhase(0, 0, reason)]
    if wanted == "disk":
        limit_bytes()
    model = uncompiled(model)
    lengths = sorted({phase.first_block for phase in plan.phases if phase.first_block}, reverse=True)
    obstacle = _obstacle_of_the_run(args, model) if lengths else ""
    tried = {blocks: obstacle or _tried(model, blocks) for blocks in lengths}
    chosen = []
    for phase in plan.phases:
        if not phase.first_block:
            reason = f"{phase.backward_from} trains, and no block before it is frozen"
        else:
            reason = tried[phase.first_block]
        if reason:
            chosen.append(PrefixPhase(phase.first_step, 0, reason))
            continue
        why_disk = choose_place(model, phase.first_block, rows, bool(args and args.bf16)) if wanted == "auto" else ""
        reason = "rows that come again start from them" + (f"; {why_disk}" if why_disk else "")
        on_disk = wanted == "disk" or bool(why_disk)
        chosen.append(PrefixPhase(phase.first_step, phase.first_block, reason, on_disk))
    if wanted != "auto" and not any(phase.blocks for phase in chosen):
        raise RecipeError(f"prefix_cache: {wanted} is impossible here: {chosen[0].reason}. Say prefix_cache: auto.")
    return chosen


def _obstacle_of_the_run(args: TrainingArguments | None, model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if args is not None:
        if args.neftune_noise_alpha is not None:
            return "neftune_noise_alpha adds noise to the embeddings"
        if args.fp16:
            return "fp16 holds no number above 65,504, and the states behind a block may"
        if shards_parameters(args):
            return "FSDP shards the frozen blocks"
        if args.n_gpu > 1:
            return "DataParallel copies the model for several GPUs. Start a process for each with accelerate launch"
    if getattr(text, "output_router_logits", False):
        return "the loss has a term of every block's router (output_router_logits)"
    kinds = set(_rope_kinds(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)))
    if found := kinds.intersection(BY_LONGEST_ROW):
        return f"its rotary embedding ({found.pop()}) is computed for the longest row of a batch"
    return ""


def _rope_kinds(settings: Any) -> Iterator[str]:
    """`rope_type` in a model's settings, and in those of each kind of its layers."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key in ("rope_type", "type"):
                yield str(value)
            else:
                yield from _rope_kinds(value)


def _tried(model: nn.Module, blocks: int) -> str:
    """What forbids to keep the states behind the first blocks, in words; empty if nothing does."""
    if hooked := hooked_words(decoder_blocks(model)[:blocks], modules_below(model)):
        return hooked
    try:
        apart = try_prefix(model, blocks, probe_windows(model, TRIED_TOKENS, [TRIED_TOKENS // 2]))
    except ModelError as error:
        return str(error).rstrip(".")
    if apart <= AGREEMENT:
        return ""
    cause = "later blocks use more than the states of the last frozen one, or something below them is drawn at random"
    return f"{cause} ({apart:.1e} off)"


def try_prefix(model: nn.Module, blocks: int, input_ids: torch.Tensor) -> float:
    """Compare a pass that starts from kept states with a whole one, in train mode and in eval mode.

    The prefix is in eval mode in both; whole and short pass begin from the same seed. They agree where the frozen
    blocks give all that later ones use and draw nothing at random; the numbers of the later blocks are computed once
    more, by the same operations.

    Args:
        model: A causal language model; it gets every module's mode back.
        blocks: Number of frozen blocks.
        input_ids: int64 (B, T).

    Returns:
        How far they are apart at the head's input, at most: ||difference|| / ||whole||.

    Raises:
        ModelError: If the states cannot be kept, or the model's forward pass fails on one of the ways, in words.
    """
    before = modules_before_blocks(model, input_ids)
    apart = []
    with evaluating(model), no_layer_drop(model), torch.random.fork_rng():
        for training in (True, False):
            cache = PrefixCache(model, blocks, MemoryStore(2**40, torch.uint8))
            model.train(training)
            for module in [*cache.blocks, *map(model.get_submodule, before)]:
                module.eval()
            whole = _head_input(model, input_ids)
            cache.put_on()
            try:
                # Keeps the states. Of another seed: what is drawn below the blocks must not be the same by chance.
                _head_input(model, input_ids, seed=1)
                # other tokens, so that nothing fits which the model keeps of its last pass
                _head_input(model, input_ids.flip(1))
                known = cache.hits
                short = _head_input(model, input_ids, f"a pass that starts from the states behind {blocks} blocks")
            finally:
                cache.take_off()
            if cache.hits - known != len(input_ids):
                why = next(iter(cache.passed_by), "the model does not call its blocks with what it is called with")
                raise ModelError(f"{type(model).__name__}: its passes cannot start from kept states: {why}.")
            alike = short.shape == whole.shape
            apart.append(float((short - whole).norm() / whole.norm()) if alike else math.inf)
    return max(apart, key=lambda one: math.inf if math.isnan(one) else one)


def _head_input(
    model: nn.Module, input_ids: torch.Tensor, what: str = "its forward pass", seed: int = 0
) -> torch.Tensor:
    """The hidden states (1, T, D) that the head is called with. The head itself is not computed."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__}: it names no head (get_output_embeddings), so nothing can be compared."
        )

    def hook(stop: Callable[[Any], None]) -> Any:
        def before(_head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            stop(args[0] if args else next(iter(kwargs.values())))

        return head.register_forward_pre_hook(before, with_kwargs=True)

    torch.manual_seed(seed)  # blocks that train may have dropout: the same draws in the passes that are compared
    return reach(model, {"input_ids": input_ids, "use_cache": False}, hook, type(model).__name__, what)


def prefix_words(phases: Sequence[PrefixPhase]) -> str:
    """What was chosen, a line a phase."""
    lines = []
    for phase in phases:
        step = f"from step {phase.from_step}: " if len(phases) > 1 else ""
        place = " on disk" if phase.on_disk else ""
        kept = f"states behind {phase.blocks} blocks are kept{place}" if phase.blocks else "not kept"
        lines.append(f"Frozen prefix, {step}{kept}: {phase.reason}.")
    return "\n".join(lines)
