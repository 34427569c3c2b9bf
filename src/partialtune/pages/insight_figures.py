"""The figures of `insight.json`: effective ranks by block, moved tokens by frequency, the shift of probabilities."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from partialtune.pages.figure_style import MOST_LINES, Theme, label_ends, titled_axes
from partialtune.pages.findings import trained_title
from partialtune.pages.run_files import RunFiles
from partialtune.words import change, count, joined, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


# --- effective ranks: how many directions the change of each kind of matrix has, block by block


def matrices(run: RunFiles) -> list[Mapping[str, Any]]:
    """Entries of `effective_ranks` in `insight.json`."""
    return run.insight.get("effective_ranks", {}).get("matrices", [])


def share_of_possible(entry: Mapping[str, Any]) -> float | None:
    """The effective rank as a share of the largest possible one; None where it is unknown."""
    rank = entry["effective_rank"]
    return None if rank is None else rank / entry["largest_possible"]


def ranks_by_kind(run: RunFiles) -> dict[str, dict[int, float]]:
    """Kind of matrix (`attn.c_attn`) -> block -> effective rank as a share, kinds with two blocks or more."""
    kinds: dict[str, dict[int, float]] = {}
    for entry in matrices(run):
        share = share_of_possible(entry)
        if entry["block"] is not None and share is not None:
            # the name inside its block is what kinds share: h.3.attn.c_attn.weight and h.4.attn.c_attn.weight
            inside = re.split(rf"\.{entry['block']}\.", entry["name"], maxsplit=1)[-1]
            kinds.setdefault(inside.removesuffix(".weight"), {})[entry["block"]] = share
    return {kind: blocks for kind, blocks in kinds.items() if len(blocks) > 1}


def has_ranks(run: RunFiles) -> bool:
    return bool(ranks_by_kind(run))


def draw_ranks(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    kinds = dict(list(ranks_by_kind(run).items())[:MOST_LINES])
    axes = titled_axes(canvas, theme, "Effective rank of the weight changes", trained_title(run), right=0.73, top=0.83)
    axes.set_ylabel("effective rank (% of the largest possible)")
    axes.set_xlabel("block")
    labels = []
    for at, (kind, blocks) in enumerate(kinds.items()):
        color = theme.lines[at % len(theme.lines)]
        places, values = list(blocks), [100 * value for value in blocks.values()]
        axes.plot(
            places, values, color=color, linewidth=1.6, marker="o", markersize=5, markeredgecolor=theme.background
        )
        labels.append((values[-1], kind if len(kind) <= 24 else f"…{kind[-23:]}", color))
    axes.set_ylim(0, min(105, max(value for blocks in kinds.values() for value in blocks.values()) * 125))
    first, last = (pick(block for blocks in kinds.values() for block in blocks) for pick in (min, max))
    axes.set_xlim(first - 0.15, last + 0.02 * (last - first) + 0.1)
    label_ends(axes, labels, theme)


def ranks_alt(run: RunFiles) -> str:
    """The figure of effective ranks in words."""
    parts = [
        f"{kind} {percent(min(blocks.values()))} to {percent(max(blocks.values()))} in {len(blocks)} blocks"
        for kind, blocks in ranks_by_kind(run).items()
    ]
    return f"Line chart of the effective rank of weight changes by block: {joined(parts, 400)}."


# --- moved tokens: the relative delta of embedding rows by how often their token occurs in the text


def token_matrices(run: RunFiles) -> list[Mapping[str, Any]]:
    """Entries of `moved_tokens` in `insight.json` that hold rows which moved."""
    entries = run.insight.get("moved_tokens", {}).get("matrices", [])
    return [entry for entry in entries if entry["by_count"]]


def has_tokens(run: RunFiles) -> bool:
    return bool(token_matrices(run))


def draw_tokens(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    from matplotlib.ticker import FixedLocator

    entries = token_matrices(run)
    subtitle = "Relative delta of a token's row, by how often the token occurs in the training text"
    axes = titled_axes(canvas, theme, "Frequent and rare tokens", subtitle)
    axes.set_position((0.095, 0.185, 0.88, 0.595))
    axes.set_ylabel("relative delta (%)")
    axes.set_xlabel("occurrences in the training text, and how many tokens have so many", labelpad=4)
    bins = sorted({row["from"] for entry in entries for row in entry["by_count"]})
    for at, entry in enumerate(entries):
        color = theme.lines[at % len(theme.lines)]
        rows = entry["by_count"]
        places = [bins.index(row["from"]) for row in rows]
        low, middle, high = ([100 * row[key] for row in rows] for key in ("p10", "median", "p90"))
        axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
        label = f"{entry['component']}, median"
        axes.plot(places, middle, color=color, linewidth=2, marker="o", markersize=4.5, label=label)
        mark_foremost(axes, entry, bins, color)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.4, len(bins) - 0.6)
    axes.xaxis.set_major_locator(FixedLocator(range(len(bins))))
    widest = max(entries, key=lambda entry: len(entry["by_count"]))
    sizes = {row["from"]: row["tokens"] for row in widest["by_count"]}
    names = [f"{bin_words(start)}\n{count(sizes.get(start, 0))}" for start in bins]
    axes.set_xticklabels(names, fontsize=8 if len(bins) < 14 else 6.5)
    axes.scatter([], [], s=16, facecolor="none", edgecolor=theme.muted, label="the tokens that moved most")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, borderaxespad=0.1, **theme.legend)


def mark_foremost(axes: "Axes", entry: Mapping[str, Any], bins: list[int], color: str) -> None:
    """The tokens that moved most, as points over their bin."""
    foremost = [(place_of(token["count"], bins), 100 * token["relative_delta"]) for token in entry["most"]]
    if foremost:
        marks = {"s": 16, "facecolor": "none", "edgecolor": color, "linewidth": 1, "zorder": 3}
        axes.scatter(*zip(*foremost, strict=True), **marks)


def place_of(occurrences: int, bins: list[int]) -> int:
    """Number of the bin that a count falls into."""
    return max(at for at, start in enumerate(bins) if start <= occurrences)


def bin_words(start: int) -> str:
    """0, 1, 2–3, 4–7, ..., 1k–2k."""
    if start < 2:
        return str(start)
    return f"{start}–{2 * start - 1}" if start < 512 else f"{round(start / 1024 * 2) / 2:g}k–{round(start / 512):g}k"


def tokens_alt(run: RunFiles) -> str:
    """The figure of moved tokens in words."""
    parts = []
    for entry in token_matrices(run):
        rows = entry["by_count"]
        ends = [f"{percent(row['median'])} for tokens that occur {bin_words(row['from'])} times" for row in rows]
        shown = [ends[0], *([ends[len(ends) // 2]] if len(ends) > 2 else []), *([ends[-1]] if len(ends) > 1 else [])]
        parts.append(f"{entry['component']}: median {', '.join(shown)}")
    return f"Line chart of the relative change of token rows by occurrences: {'; '.join(parts)}."


# --- next-token shift: how many held-out tokens became likelier, and by how many bits


def shift(run: RunFiles) -> Mapping[str, Any]:
    """`next_token_shift` of `insight.json`; empty where the run has none, or none of its scores was finite."""
    found = run.insight.get("next_token_shift") or {}
    return found if found.get("positions") else {}


def has_shift(run: RunFiles) -> bool:
    return bool(shift(run))


def draw_shift(canvas: "Canvas", run: RunFiles, theme: Theme) -> None:
    found = shift(run)
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    shares = [100 * number / found["positions"] for number in counts]
    subtitle = f"{count(found['positions'])} held-out tokens, {percent(found['rose_share'])} of them became likelier"
    axes = titled_axes(canvas, theme, "How far the probabilities shifted", subtitle, top=0.8)
    colors = [theme.lines[0] if left >= 0 else theme.lines[1] for left in edges[:-1]]
    axes.bar(edges[:-1], shares, width=0.92 * (edges[1] - edges[0]), align="edge", color=colors)
    axes.axvline(0, color=theme.muted, linewidth=1)
    mean = found["mean_bits"]
    axes.axvline(mean, color=theme.ink, linewidth=1.4, linestyle=(0, (4, 2)))
    side = {"ha": "left" if mean >= 0 else "right", "va": "top", "fontsize": 9, "color": theme.ink}
    gap = 0.15 if mean >= 0 else -0.15
    axes.text(mean + gap, 0.99, f"mean {change(mean, 2)} bits", transform=axes.get_xaxis_transform(), **side)
    axes.set_ylabel("share of the tokens (%)")
    axes.set_xlabel("change of the probability (bits: log2 of after over before)")
    reach = widest_shift(edges, counts)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(bottom=0)
    ends = {"fontsize": 9, "va": "bottom", "transform": axes.transAxes}
    axes.text(0, 1.02, "less likely", color=theme.lines[1], ha="left", **ends)
    axes.text(1, 1.02, "likelier", color=theme.lines[0], ha="right", **ends)


def widest_shift(edges: Sequence[float], counts: Sequence[int]) -> float:
    """Bits from 0 to the outer end of the outermost bin that holds a token, at least 2."""
    ends = [max(abs(left), abs(right)) for (left, right), n in zip(pairwise(edges), counts, strict=True) if n]
    return max([2.0, *ends])


def shift_alt(run: RunFiles) -> str:
    """The histogram in words."""
    found = shift(run)
    return (
        f"Histogram of the change in probability of {count(found['positions'])} held-out tokens: "
        f"{percent(found['rose_share'])} became likelier, by {change(found['mean_bits'], 2)} bits on average over all."
    )
