"""The figure of moved tokens: the relative delta of embedding rows by how often their token occurs in the text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from partialtune.pages.run_files import RunFiles
from partialtune.pages.themes import Theme, titled_axes
from partialtune.words import count, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


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
