"""`prefix_cache`: is there a frozen prefix, does keeping its states agree, pay and fit -> what each phase does, why.

In: what the recipe wants, the plan with its phases, how many windows there are, free memory. Out: one `PrefixPhase` a
phase. Three steps, since only the first and the last are cheap:

1. `lengths_to_try`: which frozen prefixes would be worth keeping, by counting windows;
2. `try_prefixes`: whether a pass that starts from their states agrees with a whole one, by a few passes of the model;
3. `choose_prefix`: what each phase does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from partialtune.distributed import shards_parameters
from partialtune.engine.prefix import PrefixCache, modules_before_blocks, reach
from partialtune.errors import ModelError, RecipeError
from partialtune.freeze.plan import FreezePlan, Phase
from partialtune.model.train_mode import evaluating, no_layer_drop

SHARE_OF_FREE_MEMORY = 0.5  # what the states may take at most under `auto`
# Relative distance at the head's input between a pass that starts from kept states and a whole one, in fp32. Where they
# agree it is rounding at most (the same operations in the same order); a model that uses more was off by 1e-2 and more.
AGREEMENT = 1e-5
WORTH_IT = 1.1  # times that a window has to be needed: below it the pass that fills the cache costs as much as it saves


@dataclass(frozen=True)
class PrefixPhase:
    """What one phase of the plan does with its frozen prefix.

    Attributes:
        from_step: Its first step.
        blocks: Blocks whose states are kept, 0 where they are computed at every step.
        bytes: Size of the states.
        reason: In words.
    """

    from_step: int
    blocks: int
    bytes: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Windows:
    """How many windows there are, and how many a run looks at.

    Attributes:
        training, held_out: Windows of the two data sets.
        a_step: Training windows of one optimizer step, on all processes.
        steps: Optimizer steps of the run.
        eval_steps: Steps between two evaluations on the held-out windows, None for no evaluation.
    """

    training: int
    held_out: int
    a_step: int
    steps: int
    eval_steps: int | None

    @property
    def kept(self) -> int:
        """Windows whose states are kept: the training windows, and the held-out ones where the run evaluates."""
        return self.training + (self.held_out if self.eval_steps else 0)

    def needed(self, first_step: int, end: int) -> int:
        """Windows that go through the model from step `first_step` to before `end`, evaluations included."""
        # Evaluations follow steps eval_steps, 2 eval_steps, ...: those after `first_step` and up to `end`.
        evaluations = end // self.eval_steps - first_step // self.eval_steps if self.eval_steps else 0
        return (end - first_step) * self.a_step + evaluations * self.held_out


@dataclass(frozen=True)
class TriedPrefix:
    """A frozen prefix of one length, tried.

    Attributes:
        obstacle: What forbids to keep its states, in words; empty if nothing does.
        width: Values of the state of one token, 0 where that is not known.
    """

    obstacle: str
    width: int = 0


def choose_prefix(
    wanted: str,
    plan: FreezePlan,
    windows: Windows,
    window_bytes: int,
    free_bytes: int,
    tried: Mapping[int, TriedPrefix] | None = None,
) -> list[PrefixPhase]:
    """What each phase does.

    Args:
        wanted: `auto`, `off` or `memory`.
        plan: Its phases say how many blocks are frozen below all that trains.
        windows: Of the run.
        window_bytes: States of one window.
        free_bytes: Memory that is free on this node.
        tried: What came of each length of prefix that a phase has, by blocks; an absent one has no obstacle.

    Raises:
        RecipeError: If `memory` is wanted and cannot be had.
    """
    if wanted == "off":
        return [PrefixPhase(phase.first_step, 0, 0, "prefix_cache: off") for phase in plan.phases]
    size = windows.kept * window_bytes  # the same for every phase: one cache at a time is held
    chosen = []
    for phase, needed in _needs(plan, windows):
        obstacle = tried[phase.first_block].obstacle if tried and phase.first_block in tried else ""
        why_not = _not_worth_it(wanted, phase, needed, windows) or obstacle or _does_not_fit(size, free_bytes, wanted)
        reason = (
            why_not or f"{needed:,} passes of windows through {phase.first_block} frozen blocks become {windows.kept:,}"
        )
        blocks = 0 if why_not else phase.first_block
        chosen.append(PrefixPhase(phase.first_step, blocks, size if blocks else 0, reason))
    if wanted == "memory" and not any(phase.blocks for phase in chosen):
        raise RecipeError(f"prefix_cache: memory is impossible here: {chosen[0].reason}. Say prefix_cache: auto.")
    return chosen


def lengths_to_try(wanted: str, plan: FreezePlan, windows: Windows) -> list[int]:
    """Blocks of each frozen prefix that would be worth keeping, each once, the longest first.

    Args:
        wanted, plan, windows: As in `choose_prefix`.
    """
    if wanted == "off":
        return []
    phases = [phase for phase, needed in _needs(plan, windows) if not _not_worth_it(wanted, phase, needed, windows)]
    return sorted({phase.first_block for phase in phases}, reverse=True)


def _needs(plan: FreezePlan, windows: Windows) -> list[tuple[Phase, int]]:
    """Each phase, and how many windows go through the model in it."""
    ends = [phase.first_step for phase in plan.phases[1:]] + [windows.steps]
    return [(phase, windows.needed(phase.first_step, end)) for phase, end in zip(plan.phases, ends, strict=True)]


def _not_worth_it(wanted: str, phase: Phase, needed: int, windows: Windows) -> str:
    return _nothing_frozen(phase) or ("" if wanted == "memory" else _does_not_pay(needed, windows.kept))


def _nothing_frozen(phase: Phase) -> str:
    return "" if phase.first_block else f"{phase.backward_from} trains, and no block before it is frozen"


def _does_not_fit(size: int, free_bytes: int, wanted: str) -> str:
    room = free_bytes if wanted == "memory" else int(SHARE_OF_FREE_MEMORY * free_bytes)
    if size <= room:
        return ""
    return f"the states take {size / 2**20:,.0f} MB, and {room / 2**20:,.0f} MB of memory can be spared for them"


def _does_not_pay(needed: int, kept: int) -> str:
    if needed >= WORTH_IT * kept:
        return ""
    return f"the run needs {needed:,} passes of windows, and keeping their states takes {kept:,} beforehand"


def try_prefixes(
    lengths: Sequence[int], sampling: str, args: TrainingArguments, model: PreTrainedModel, windows: Dataset
) -> dict[int, TriedPrefix]:
    """Whether a frozen prefix can be kept: its length in blocks -> what came of it.

    Every length is tried, before training: a shorter prefix may hold less than what later blocks use, though a longer
    one holds it all. Where the model's forward pass fails on the way, that is the obstacle, and no error.

    Args:
        lengths: In blocks, of all phases of the plan.
        sampling: The recipe's `window_sampling`.
        args: Of the run.
        model: On any device, as it was loaded; no plan is applied yet.
        windows: Training windows; the first one is tried.
    """
    if not lengths:
        return {}
    if obstacle := _obstacle_of_the_run(sampling, args, model):
        return dict.fromkeys(lengths, TriedPrefix(obstacle))
    row = torch.as_tensor(windows[0]["input_ids"], dtype=torch.long, device=model.device)
    return {blocks: _tried(model, blocks, row[None]) for blocks in lengths}


def _obstacle_of_the_run(sampling: str, args: TrainingArguments, model: PreTrainedModel) -> str:
    if sampling == "random":
        return "window_sampling is random"
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha adds noise to the embeddings"
    if args.fp16:
        return "fp16 holds no number above 65,504, and the states behind a block may"
    if shards_parameters(args):
        return "FSDP shards the frozen blocks"
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "the loss has a term of every block's router (output_router_logits)"
    return ""


def _tried(model: PreTrainedModel, blocks: int, input_ids: torch.Tensor) -> TriedPrefix:
    try:
        trial = try_prefix(model, blocks, input_ids)
    except ModelError as error:
        return TriedPrefix(str(error).rstrip("."))
    if trial.apart <= AGREEMENT:
        return TriedPrefix("", trial.width)
    cause = "later blocks use more than the states of the last frozen one, or something below them is drawn at random"
    return TriedPrefix(f"{cause} ({trial.apart:.1e} off)", trial.width)


class PrefixTrial(NamedTuple):
    """What came of starting one pass from kept states.

    Attributes:
        apart: How far it is from a whole one at the head's input, at most: ||difference|| / ||whole||.
        width: Values of the state of one token.
    """

    apart: float
    width: int


def try_prefix(model: nn.Module, blocks: int, input_ids: torch.Tensor) -> PrefixTrial:
    """Compare a pass that starts from kept states with a whole one, in train mode and in eval mode.

    The prefix is in eval mode in both; whole and short pass begin from the same seed. They agree where the frozen
    blocks give all that later ones use and draw nothing at random; the numbers of the later blocks are computed once
    more, by the same operations.

    Args:
        model: A causal language model; it gets every module's mode back.
        blocks: Number of frozen blocks.
        input_ids: int64 (1, T).

    Raises:
        ModelError: If the states cannot be kept, or the model's forward pass fails on one of the ways, in words.
    """
    cache = PrefixCache(model, blocks, torch.float32)
    prefix = [*cache.blocks, *map(model.get_submodule, modules_before_blocks(model, input_ids))]
    states = cache.states_of(input_ids)  # (1, T, D)
    apart = []
    with evaluating(model), no_layer_drop(model), torch.random.fork_rng():
        for training in (True, False):
            model.train(training)
            for module in prefix:
                module.eval()
            whole = _head_input(model, input_ids)
            _head_input(model, input_ids.flip(1))  # other tokens, so that nothing fits which it keeps of its last pass
            short = _head_input_from(cache, states, model, input_ids)
            alike = short.shape == whole.shape
            apart.append(float((short - whole).norm() / whole.norm()) if alike else math.inf)
    return PrefixTrial(max(apart, key=lambda one: math.inf if math.isnan(one) else one), cache.width)


def _head_input_from(
    cache: PrefixCache, states: torch.Tensor, model: nn.Module, input_ids: torch.Tensor
) -> torch.Tensor:
    """What reaches the head in a pass over one window that starts from these states."""
    cache.states = states
    cache.install()
    try:
        with cache.giving(torch.zeros(1, dtype=torch.long)):
            what = f"a pass that starts from the states behind {len(cache.blocks)} blocks"
            return _head_input(model, input_ids, what)
    finally:
        cache.remove()


def _head_input(model: nn.Module, input_ids: torch.Tensor, what: str = "its forward pass") -> torch.Tensor:
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

    torch.manual_seed(0)  # blocks that train may have dropout: the same draws in the passes that are compared
    return reach(model, input_ids, hook, what)


def prefix_words(phases: Sequence[PrefixPhase]) -> str:
    """What was chosen, a line a phase."""
    lines = []
    for phase in phases:
        step = f"from step {phase.from_step}: " if len(phases) > 1 else ""
        if phase.blocks:
            lines.append(
                f"Frozen prefix, {step}states behind {phase.blocks} blocks are kept, {phase.bytes / 2**20:,.0f} MB: "
                f"{phase.reason}."
            )
        else:
            lines.append(f"Frozen prefix, {step}not kept: {phase.reason}.")
    return "\n".join(lines)
