"""Runs of smollm2_frontier.py -> means over seeds, differences between policies, correlations over blocks.

Policies meet the same windows under the same seed: differences are taken seed by seed, and called one where the paired
t-test finds it at 5% after Holm's correction.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from smollm2_frontier import BLOCK_RATE, POLICIES, SEEDS, Row, chosen_rate

from partialtune.insight.moved_tokens import rank_correlation

T_OF_5_PERCENT = 4.303  # Student's t that 5% exceed on either side, with the two degrees of freedom of three seeds


@dataclass(frozen=True)
class Summary:
    """A policy at its chosen rate, over its seeds.

    Attributes:
        name: Of the policy.
        rate: The one that was chosen.
        rates: How many were tried.
        at_edge: Whether the best one of those tried has no neighbour that was tried on one side.
        rows: One a seed.
        own: All its runs, at any rate.
        times: Those of them whose times count: on a quiet machine, with all threads.
    """

    name: str
    rate: float
    rates: int
    at_edge: bool
    rows: Sequence[Row]
    own: Sequence[Row]
    times: Sequence[Row]

    @property
    def label(self) -> str:
        return POLICIES[self.name].label

    def mean(self, value: Callable[[Row], float]) -> float:
        return statistics.fmean(map(value, self.rows))

    def deviation(self, value: Callable[[Row], float]) -> float | None:
        """Standard deviation over the seeds (n - 1); None with one."""
        return statistics.stdev(map(value, self.rows)) if len(self.rows) > 1 else None

    def cell(self, value: Callable[[Row], float], form: str = ".4f") -> str:
        deviation = self.deviation(value)
        beside = "" if deviation is None else f" ± {deviation:{form.lstrip('+')}}"
        return f"{self.mean(value):{form}}{beside}"


def gain(row: Row) -> float:
    return row.held_out_before - row.held_out_after


def forgotten(name: str) -> Callable[[Row], float]:
    return lambda row: getattr(row, f"{name}_after") - getattr(row, f"{name}_before")


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Of every policy that has been run, the largest gain first."""
    found = []
    threads = max((row.threads for row in rows if row.busy == "no"), default=0)
    for name, policy in POLICIES.items():
        rate = chosen_rate(rows, name)
        if rate is None:
            continue
        own = [row for row in rows if row.policy == name]
        tried = {row.rate for row in own if row.seed == SEEDS[0]}
        at = policy.rates.index(rate)
        at_edge = not {policy.rates[beside] for beside in (at - 1, at + 1) if 0 <= beside < 5} <= tried or at in (0, 4)
        chosen = [row for row in own if row.rate == rate and row.held_out_after is not None]
        times = [row for row in own if row.busy == "no" and row.threads == threads]
        found.append(Summary(name, rate, len(tried), at_edge, chosen, own, times))
    return sorted(found, key=lambda summary: -summary.mean(gain))


TARGETS = {"gain": gain, "forgotten of Python": forgotten("python"), "forgotten of the novel": forgotten("novel")}


def block_rows(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Block -> its runs, one a seed."""
    found: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.policy.startswith("block_") and row.rate == BLOCK_RATE and row.held_out_after is not None:
            found.setdefault(int(row.policy[-2:]), []).append(row)
    return dict(sorted(found.items()))


def mean_of(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.fmean(map(value, rows))


@dataclass(frozen=True)
class Difference:
    """Between the gains of two policies, seed by seed.

    Attributes:
        mean: Over the seeds, bits per byte.
        half: Of the 95% interval's width, by Student's t.
        chance: That a difference at least as far from 0 comes of chance alone: the two-sided paired t-test's p.
    """

    mean: float
    half: float
    chance: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def difference(one: Sequence[Row], other: Sequence[Row]) -> Difference | None:
    """None unless both have all three seeds.

    Student's t with two degrees of freedom has a distribution in closed form: p = 1 - t / sqrt(t^2 + 2).
    """
    pairs = [{row.seed: gain(row) for row in rows if row.seed in SEEDS} for rows in (one, other)]
    if any(len(gains) < len(SEEDS) for gains in pairs):
        return None
    apart = [pairs[0][seed] - pairs[1][seed] for seed in SEEDS]
    mean, error = statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(SEEDS))
    if error == 0:
        return Difference(mean, 0.0, float(mean == 0))
    t = abs(mean) / error
    return Difference(mean, T_OF_5_PERCENT * error, 1 - t / math.sqrt(t * t + 2))


def holm(chances: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests find something, so that in all of them together chance finds anything once in 20 times.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    found, holds = [False] * len(chances), True
    for done, place in enumerate(sorted(range(len(chances)), key=lambda place: chances[place])):
        holds = holds and chances[place] <= level / (len(chances) - done)
        found[place] = holds
    return found


def correlation_words(one: Sequence[float], other: Sequence[float], given: Sequence[float] | None = None) -> str:
    """Spearman's rank correlation with its interval of 95%; of what `given` does not tell, the partial one."""
    found = rank_correlation(np.array(one), np.array(other))
    if given is not None and found is not None:
        sides = [rank_correlation(np.array(values), np.array(given)) for values in (one, other)]
        left = math.prod(1 - side**2 for side in sides)
        found = (found - math.prod(sides)) / math.sqrt(left) if left > 1e-12 else None
    if found is None:
        return "–"
    low, high = interval(found, len(one) - (given is not None))
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f})"


def interval(correlation: float, count: int) -> tuple[float, float]:
    """95% of a rank correlation: Fisher's z, with the variance of Bonett and Wright 2000, (1 + r^2 / 2) / (n - 3).

    D. G. Bonett and T. A. Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations",
    Psychometrika 65, https://doi.org/10.1007/BF02294183.
    """
    if abs(correlation) >= 1:
        return correlation, correlation
    wide = 1.96 * math.sqrt((1 + correlation**2 / 2) / (count - 3))
    return math.tanh(math.atanh(correlation) - wide), math.tanh(math.atanh(correlation) + wide)
