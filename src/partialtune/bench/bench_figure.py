"""Measurements -> a figure: seconds a step by part, and peak memory, a bar for each variant."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from partialtune.pages.figure_style import LIGHT, PIXELS_PER_INCH, WIDTH, Theme, write_title
from partialtune.training.performance import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.42  # inches from one bar to the next
LABEL_WIDTH = 30  # characters of a line of a label
ORDER = ("forward", "backward", "optimizer", "data", "callbacks")  # from left to right, the large parts first


def bench_figure(rows: Sequence[dict[str, Any]]) -> bytes:
    """A PNG. Variants that did not run are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if "error" not in row]
    height = 1.75 + BAR * len(measured)
    canvas = Figure(figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, facecolor=LIGHT.background)
    FigureCanvasAgg(canvas)
    first = measured[0]
    subtitle = f"{first['device']}, {first['precision']}, {first['tokens_per_step']:,} tokens a step"
    write_title(canvas, LIGHT, "What a step costs", subtitle)
    bottom, top = 0.62 / height, 1 - 1.0 / height
    seconds = canvas.add_axes((0.27, bottom, 0.42, top - bottom), facecolor=LIGHT.background)
    memory = canvas.add_axes((0.735, bottom, 0.225, top - bottom), facecolor=LIGHT.background)
    _draw_seconds(seconds, measured)
    _draw_memory(memory, measured)
    with io.BytesIO() as file:
        canvas.savefig(file, format="png", facecolor=LIGHT.background)
        return file.getvalue()


def _draw_seconds(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    _bars_from_the_top(axes, LIGHT, len(rows))
    axes.set_yticks(range(len(rows)), [textwrap.fill(_shown(row["label"]), LABEL_WIDTH) for row in rows])
    colors = dict(zip(ORDER, LIGHT.lines, strict=False))
    totals = [seconds_by_part(row) for row in rows]
    left = [0.0] * len(rows)
    for part in ORDER:
        widths = [total[part] for total in totals]
        axes.barh(range(len(rows)), widths, 0.62, left=left, color=colors[part], label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for at, (row, end) in enumerate(zip(rows, left, strict=True)):
        slowest = row["slowest_step_seconds"] + end - row["median_step_seconds"]
        fastest = row["fastest_step_seconds"] + end - row["median_step_seconds"]
        axes.plot((fastest, slowest), (at, at), color=LIGHT.ink, linewidth=1)
        axes.annotate(
            _ratio(row, "time"), (max(end, slowest), at), (4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    slowest = max(
        end + row["slowest_step_seconds"] - row["median_step_seconds"] for row, end in zip(rows, left, strict=True)
    )
    axes.set_xlim(0, slowest * 1.2)
    axes.set_xlabel("seconds a step", color=LIGHT.ink, fontsize=9.5)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=len(PARTS), borderaxespad=0.1, **LIGHT.legend)


def _draw_memory(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    _bars_from_the_top(axes, LIGHT, len(rows))
    axes.set_yticks([])
    sizes = [row["peak_memory_mb"] / 1024 for row in rows]
    axes.barh(range(len(rows)), sizes, 0.62, color=LIGHT.muted)
    for at, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        axes.annotate(_ratio(row, "memory"), (size, at), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_xlim(0, max(sizes) * 1.45)
    axes.set_xlabel("peak memory (GB)", color=LIGHT.ink, fontsize=9.5)


def seconds_by_part(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of a median step by part; callbacks come on top of it, as they do in `median_step_seconds`."""
    shares = row["time_shares"]
    return {part: row["median_step_seconds"] * share / (1 - shares["callbacks"]) for part, share in shares.items()}


def _shown(label: str) -> str:
    """The last folder and the file's name without its ending."""
    return "/".join(label.split("/")[-2:]).replace(".yaml", "").replace(".yml", "")


def _ratio(row: dict[str, Any], what: str) -> str:
    ratio = row["of_full"][what]
    return f"{ratio:.0%} of full" if ratio not in (None, 1.0) else ""


def _bars_from_the_top(axes: "Axes", theme: Theme, count: int) -> None:
    axes.set_ylim(count - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.rule)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0, pad=5)
    axes.grid(axis="x", color=theme.rule, linewidth=0.8)
    axes.set_axisbelow(True)
