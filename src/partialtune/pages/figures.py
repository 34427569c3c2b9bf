"""A finished run's folder -> figures/*.png, each with its title, its alt text and how to read it.

Drawn through matplotlib's object API with the Agg canvas: no display, and no state shared with a caller's own plots.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from partialtune.files import write_whole
from partialtune.pages import heatmap, insight_figures, step_figures
from partialtune.pages.figure_style import DARK, HEIGHT, LIGHT, PIXELS_PER_INCH, WIDTH, Theme
from partialtune.pages.run_files import RunFiles, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


class Kind(NamedTuple):
    """A kind of figure: `draw` and `alt` of a run that is `wanted`; `section` of the report that shows it."""

    section: str
    title: str
    draw: Callable[["Canvas", RunFiles, Theme], None]
    alt: Callable[[RunFiles], str]
    reading: str
    wanted: Callable[[RunFiles], bool] = lambda run: True


KINDS = {
    "loss.png": Kind(
        "learning",
        "Loss over steps",
        step_figures.draw_loss,
        step_figures.loss_alt,
        "Nats a token, as the optimizer saw them. Where the held-out line turns up while the training line falls, the "
        "model has begun to learn its text by heart.",
    ),
    "learning_curves.png": Kind(
        "learning",
        "Learning curves",
        step_figures.draw_curves,
        step_figures.curves_alt,
        "Bits per byte: how many bits of each byte of a text the model still cannot foresee; lower is better, and it "
        "compares between texts. Each text has a scale of its own. A line that falls was learnt; one that rises "
        "was forgotten.",
        step_figures.has_curves,
    ),
    "deltas_heatmap.png": Kind(
        "movement",
        "How far each part moved",
        heatmap.draw_heatmap,
        heatmap.heatmap_alt,
        "Each cell is a component of a block. The number is its relative delta at the end in percent: the length of "
        "the change over the length of the weights before. Hatched cells were frozen, and their digests prove that "
        "they are what they were.",
    ),
    "deltas_over_time.png": Kind(
        "movement",
        "How the movement spread",
        heatmap.draw_series,
        heatmap.series_alt,
        "The same map at several steps, all in one scale of colours. It shows which parts moved first, and which went "
        "on moving.",
        heatmap.has_series,
    ),
    "deltas_over_steps.png": Kind(
        "movement",
        "Movement over steps",
        step_figures.draw_deltas,
        step_figures.deltas_alt,
        "A line that flattens has settled, or its learning rate has run out; one that rises straight is still on its "
        "way. The frozen part is the dashed line at exactly 0.",
    ),
    "effective_ranks.png": Kind(
        "ranks",
        "Effective rank by block",
        insight_figures.draw_ranks,
        insight_figures.ranks_alt,
        "100% would be a change in all directions alike, near 0% one along few. Where it is low, an adapter of low "
        "rank could have done nearly the same.",
        insight_figures.has_ranks,
    ),
    "moved_tokens.png": Kind(
        "tokens",
        "Frequent and rare tokens",
        insight_figures.draw_tokens,
        insight_figures.tokens_alt,
        "Each point takes the tokens together that occur about equally often in the training text: the line is their "
        "median, the band holds eight in ten of them. A token that never occurs is moved by a head that shares its "
        "row, since it is a wrong answer everywhere, or by weight decay; an embedding alone leaves it where it was.",
        insight_figures.has_tokens,
    ),
    "next_token_shift.png": Kind(
        "shift",
        "How far the probabilities shifted",
        insight_figures.draw_shift,
        insight_figures.shift_alt,
        "Each held-out token by how much its probability changed: one bit to the right is twice as likely, one to the "
        "left half as likely. The outer bars hold all beyond them.",
        insight_figures.has_shift,
    ),
}


@dataclass(frozen=True)
class Figure:
    """A figure in a run's folder, with the words that go with it; `section` of the report is where it stands."""

    path: Path
    title: str
    alt: str
    reading: str = ""
    section: str = ""


def draw_figures(run: str | os.PathLike) -> list[Path]:
    """Draw the figures of a finished run.

    Args:
        run: The run's folder.

    Returns:
        Paths in its folder `figures`, of `loss.png`, `deltas_heatmap.png`, `deltas_over_steps.png` and of those other
        `KINDS` for which the run has something to show.
    """
    files = read_run(run)
    figures = describe_figures(files)
    (files.folder / "figures").mkdir(exist_ok=True)
    for figure in figures:
        write_whole(figure.path, render_figure(files, figure))
    return [figure.path for figure in figures]


def describe_figures(run: RunFiles) -> list[Figure]:
    """Path, title, alt text and reading of each figure, in the order in which they are shown."""
    return [
        Figure(run.folder / "figures" / name, kind.title, kind.alt(run), kind.reading, kind.section)
        for name, kind in KINDS.items()
        if kind.wanted(run)
    ]


def render_figure(run: RunFiles, figure: Figure, dark: bool = False) -> bytes:
    """One figure as PNG, on a light or a dark background."""
    return _png(draw_figure(run, figure, dark), figure.alt)


def draw_figure(run: RunFiles, figure: Figure, dark: bool = False) -> "Canvas":
    """One figure as matplotlib's object, on a light or a dark background. A notebook shows it, with or without pyplot.

    Of several threads each may draw figures of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    theme = DARK if dark else LIGHT
    # no pyplot: it keeps every figure in a global list and may ask for a display
    canvas = Canvas(figsize=(WIDTH, HEIGHT), dpi=PIXELS_PER_INCH, facecolor=theme.background)
    FigureCanvasAgg(canvas)
    KINDS[figure.path.name].draw(canvas, run, theme)
    # IPython knows how to show a Figure only once pyplot was imported; it asks every object for this method
    canvas._repr_png_ = partial(_png, canvas, figure.alt)
    return canvas


def _png(canvas: "Canvas", alt: str) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Description": alt, "Software": "partialtune"})
    return buffer.getvalue()
