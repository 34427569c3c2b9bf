"""A ranking -> a PNG: the ratio of gradient to weight norm of every block, and of every part of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from partialtune.pages.figure_style import HEIGHT, LIGHT, PIXELS_PER_INCH, WIDTH, mixed, write_title
from partialtune.rank.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES_A_BLOCK = 0.21
LEFT, BARS, GAP, CELLS = 0.085, 0.40, 0.05, 0.30  # shares of the figure's width


def draw_ranking(ranking: Ranking, file: Path) -> None:
    """Draw the blocks from the last, on top, to the first: bars on the left, a map of their parts on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    theme = LIGHT
    height = max(HEIGHT, 1.6 + INCHES_A_BLOCK * len(ranking.blocks))
    canvas = Canvas(figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, facecolor=theme.background)
    FigureCanvasAgg(canvas)
    chosen = ", ".join(map(str, ranking.chosen))
    write_title(
        canvas,
        theme,
        "Gradient norm beside weight norm",
        f"{ranking.model_name}, {ranking.windows} windows. Chosen, in orange: {chosen}",
    )
    bottom = 0.55 / height
    tall = 1 - bottom - 0.85 / height
    bars = canvas.add_axes((LEFT, bottom, BARS, tall), facecolor=theme.background)
    cells = canvas.add_axes((LEFT + BARS + GAP, bottom, CELLS, tall), facecolor=theme.frozen)
    scale = canvas.add_axes((LEFT + BARS + GAP + CELLS + 0.02, bottom, 0.018, tall))
    for axes in (bars, cells, scale):
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=theme.muted, labelsize=9, length=0, pad=4)
    _draw_bars(bars, ranking)
    _draw_cells(cells, scale, ranking)
    canvas.savefig(file, format="png")


def _draw_bars(axes: "Axes", ranking: Ranking) -> None:
    from matplotlib.ticker import MaxNLocator

    theme = LIGHT
    blocks = sorted(ranking.blocks, key=lambda entry: entry.block)
    colours = [theme.lines[1] if entry.block in ranking.chosen else theme.lines[0] for entry in blocks]
    axes.barh([entry.block for entry in blocks], [entry.ratio or 0 for entry in blocks], color=colours, height=0.7)
    axes.set_yticks([entry.block for entry in blocks])
    axes.set_ylim(-0.6, len(blocks) - 0.4)
    axes.set_ylabel("block", color=theme.ink, fontsize=9.5)
    axes.set_xlabel("||gradient|| / ||weights||, whole block", color=theme.ink, fontsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_cells(axes: "Axes", scale_axes: "Axes", ranking: Ranking) -> None:
    """The map of parts; its colours are logarithmic, since norms and matrices lie far apart."""
    from matplotlib.colors import LogNorm

    theme = LIGHT
    parts = [part for part in ranking.parts if part.block is not None]
    names = list(dict.fromkeys(part.component for part in sorted(parts, key=lambda part: part.component)))
    grid: list[list[float]] = [[float("nan")] * len(names) for _ in ranking.blocks]
    for part in parts:
        grid[part.block][names.index(part.component)] = part.ratio or float("nan")
    seen = [part.ratio for part in parts if part.ratio]
    limits = LogNorm(*_around(seen)) if seen else None
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap=mixed(theme.scale), norm=limits)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set_xlabel("parts of it", color=theme.ink, fontsize=9.5)
    bar = axes.figure.colorbar(image, cax=scale_axes)
    bar.outline.set_visible(False)
    scale_axes.tick_params(which="both", colors=theme.muted, labelsize=8, length=0)


def _around(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low / 2, high * 2)
