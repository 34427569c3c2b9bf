"""Runs and trials of a comparison that start from the states of one frozen prefix: who they are, and in which order.

In:  policies with their plans, seeds, and how many learning rates are tried.
Out: the policies in an order in which those with the same prefix follow one another, and which of their runs share it.

A run keeps the states behind its frozen first blocks in memory, which ends with its process. Where another run or trial
of the comparison wants the same ones, `prefix_cache: auto` keeps them on disk, as far as that pays: the first computes
them and the others read them. The results have the same bits. With PARTIALTUNE_PREFIX_SHARED=0 in the environment each
run keeps its own.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from partialtune.compare.policies import Policy
from partialtune.engine.prefix_place import SHARED_BY_OTHERS
from partialtune.freeze.plan import FreezePlan
from partialtune.recipe.key_rules import training_defaults

logger = logging.getLogger(__name__)

# Beside base and text, which are the same in all of a comparison: other values of these make other states.
STATES_DEPEND_ON = ("bf16", "fp16", "frozen_dtype", "frozen_quantization", "torch_compile", "use_cpu", "dropout")


class Prefix(NamedTuple):
    """States that runs can share.

    Attributes:
        blocks: Number of frozen blocks that they are behind.
        settings: Values of `STATES_DEPEND_ON`, in words.
        windows: What tells the windows of some runs from those of others, where they are drawn by a seed.
    """

    blocks: int
    settings: tuple[str, ...]
    windows: tuple[Any, ...] = ()


@dataclass(frozen=True)
class SharedPrefixes:
    """Who shares a frozen prefix in a comparison.

    Attributes:
        policies: In the order in which they run: those with the same prefix follow one another.
        plans: Of each policy, by its name.
        users: How many runs and trials start from each prefix.
    """

    policies: Sequence[Policy]
    plans: Mapping[str, FreezePlan]
    users: Mapping[Prefix, int]

    def has(self, policy: Policy, seed: int, trial: bool) -> bool:
        """Whether a run, or the trials, of a policy share a prefix that `auto` may keep on disk for them."""
        if policy.recipe.speed.prefix_cache != "auto" or os.environ.get(SHARED_BY_OTHERS) == "0":
            return False
        return any(self.users[prefix] > 1 for prefix in prefixes_of(policy, self.plans[policy.name], seed, trial))

    def words(self) -> list[str]:
        """A line for each prefix that is shared."""
        if os.environ.get(SHARED_BY_OTHERS) == "0":
            return []
        return [
            f"{count} runs and trials have the same {prefix.blocks} frozen blocks below all that trains. With "
            f"prefix_cache: auto the first that pass them keep their states on disk for the others, where that pays."
            for prefix, count in self.users.items()
            if count > 1
        ]


def shared_prefixes(
    policies: Sequence[Policy], plans: Mapping[str, FreezePlan], seeds: Sequence[int], rates: int
) -> SharedPrefixes:
    """Who shares a frozen prefix.

    Args:
        policies: Of the comparison.
        plans: Of each policy, by its name.
        seeds: With which each policy runs.
        rates: How many learning rates are tried for each policy, with the first seed.
    """
    users: Counter[Prefix] = Counter()
    kinds: dict[frozenset[Prefix], int] = {}  # in the order in which they come first
    of_policy = {}
    for policy in policies:
        plan = plans[policy.name]
        runs = [prefixes_of(policy, plan, seed, trial=False) for seed in seeds]
        for found in (*runs, *[prefixes_of(policy, plan, seeds[0], trial=True)] * rates):
            if policy.recipe.speed.prefix_cache in ("auto", "disk"):
                users.update(found)
        of_policy[policy.name] = kinds.setdefault(frozenset(runs[0]), len(kinds))
    ordered = sorted(policies, key=lambda policy: of_policy[policy.name])  # stable: else in the order given
    return SharedPrefixes(ordered, plans, users)


def prefixes_of(policy: Policy, plan: FreezePlan, seed: int, trial: bool) -> set[Prefix]:
    """The prefixes that a run starts from, one for each length that its phases have."""
    recipe = policy.recipe
    if recipe.speed.prefix_cache == "off" or plan.sampling is not None:
        return set()
    values = {**training_defaults(), **recipe.values}
    settings = tuple(str(values.get(key)) for key in STATES_DEPEND_ON)
    drawn = recipe.text.window_sampling == "random"
    data_seed = values.get("data_seed")
    # a trial draws from a shorter text
    windows = (trial, seed if data_seed is None else data_seed) if drawn else ()
    return {Prefix(phase.first_block, settings, windows) for phase in plan.phases if phase.first_block}


@contextmanager
def told_to_share(shares: bool) -> Iterator[None]:
    """Processes that are started within it know whether others want the states that they keep."""
    before = os.environ.get(SHARED_BY_OTHERS)
    if shares:
        os.environ[SHARED_BY_OTHERS] = "1"
    try:
        yield
    finally:
        if shares:
            os.environ.pop(SHARED_BY_OTHERS)
            os.environ.update({} if before is None else {SHARED_BY_OTHERS: before})
