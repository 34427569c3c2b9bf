"""The figure of effective ranks: how many directions the change of each kind of matrix has, block by block."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from partialtune.pages.end_labels import label_ends
from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import Theme, titled_axes
from partialtune.pages.wording import trained_title
from partialtune.words import joined, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MOST_LINES = 8


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
        axes.plot(places, values, color=color, linewidth=1.6, marker="o", markersize=5, markeredgecolor=theme.ground)
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
