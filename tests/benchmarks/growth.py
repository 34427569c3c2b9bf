"""How cost grows with block_size, batch and blocks trained: seconds a step, peak memory, and their lines.

    python tests/benchmarks/growth.py [--output growth.png] [--steps 6]

A GPT-2 of 12 blocks, 256 wide with 8,192 tokens of vocabulary (11.8M parameters), fp32, a few minutes on 2 cores. One
quantity changes at a time: block_size from 128 to 1,024, batch from 1 to 32, blocks trained from 0 to 12 (from the
top), the last with the frozen prefix computed at every step and with it kept. Each point is a process of its own,
measured as `partialtune bench` does it.

Seconds must be linear in the arithmetic of the step, attention's own products (which grow with the square of
block_size) included; memory in the tokens or blocks. A straight line is fitted through the points of a series by least
squares of relative distances; where one lies further from it than the tolerance, a share of its value, the script ends
with exit code 1.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import mul
from pathlib import Path
from typing import Any

SHAPE = {"n_layer": 12, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "n_positions": 1024}
FULL = {"method": "full"}


@dataclass(frozen=True)
class Series:
    """Points along which one quantity changes.

    Attributes:
        name: The quantity that changes, with what stays.
        axis: In the figure.
        points: (value, keys of the recipe).
    """

    name: str
    axis: str
    points: tuple[tuple[int, dict[str, Any]], ...]


@dataclass(frozen=True)
class Point:
    """One measurement: of `value`, seconds a step, MB of 2^20 bytes, multiplications and additions of a step."""

    value: int
    seconds: float
    peak_mb: float
    arithmetic: float


@dataclass(frozen=True)
class Line:
    """A straight line through points, and how far the farthest of them is, as a share of its value."""

    intercept: float
    slope: float
    farthest: float


def blocks(prefix: str) -> tuple[tuple[int, dict[str, Any]], ...]:
    """0 to 12 blocks from the top, and the final norm."""
    counts = (0, 2, 4, 6, 8, 10, 12)
    selectors = {count: [f"blocks[-{count}:]", "final_norm"] if count else ["final_norm"] for count in counts}
    return tuple((count, {"trainable": selectors[count], "prefix_cache": prefix}) for count in counts)


def all_series() -> list[Series]:
    lengths = tuple((size, {**FULL, "block_size": size, "batch": 4}) for size in (128, 256, 512, 1024))
    batches = tuple((size, {**FULL, "block_size": 128, "batch": size}) for size in (1, 2, 4, 8, 16, 32))
    return [
        Series("block_size, 4 windows, everything trains", "tokens a window", lengths),
        Series("batch, windows of 128, everything trains", "windows a step", batches),
        Series("blocks trained, 8 x 256, prefix computed at every step", "blocks trained", blocks("off")),
        Series("blocks trained, 8 x 256, prefix kept", "blocks trained", blocks("memory")[:-1]),
    ]


def measure_point(model: Path, value: int, keys: dict[str, Any], steps: int) -> Point:
    """Measure one point in a process of its own."""
    from partialtune.bench.bench import run_variant
    from partialtune.bench.variants import Variant, plan_of, runnable
    from partialtune.cost.dry_step import dry_step

    keys = {"block_size": 256, "batch": 8, **keys}
    batch = keys.pop("batch")
    values = {"model_name_or_path": str(model), "text": "none", "dropout": 0, **keys}
    values |= {"per_device_train_batch_size": batch, "max_grad_norm": 0, "delta_steps": 1000}
    found = run_variant(Variant("point", 0, values), steps)
    if "error" in found:
        raise SystemExit(f"{keys}: {found['error']}")
    empty, plan = plan_of(runnable(values, steps, "unused"))
    products = dry_step(empty, plan, batch, keys["block_size"]).products
    kept = products.prefix if found["prefix_cache"] == "memory" else 0
    above = 12 - plan.phases[0].first_block  # forward of 12 and twice backward of these; kept: all three of these
    attention = products.attention * (3 * above / (12 + 2 * above) if kept else 1)
    return Point(value, found["median_step_seconds"], found["peak_memory_mb"], products.total - kept + attention)


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line whose distances, as shares of the values, have the least squares: in these the tolerance is said.

    fit([0, 1, 2], [1, 3, 5]) -> Line(intercept=1, slope=2, farthest=0)
    """
    weights = [1 / y**2 for y in ys]
    mean_x, mean_y = (sum(map(mul, weights, values)) / sum(weights) for values in (xs, ys))
    spread = sum(weight * (x - mean_x) ** 2 for weight, x in zip(weights, xs, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    farthest = max(abs(intercept + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Line(intercept, slope, farthest)


def lines_of(points: Sequence[Point]) -> tuple[Line, Line]:
    """Seconds over arithmetic, memory over the quantity that changes."""
    seconds = fit([point.arithmetic for point in points], [point.seconds for point in points])
    memory = fit([point.value for point in points], [point.peak_mb for point in points])
    return seconds, memory


def as_table(series: Series, points: Sequence[Point]) -> str:
    seconds, memory = lines_of(points)
    rows = [f"{series.name}", f"{'':>8} {'GFLOP':>9} {'s/step':>8} {'line':>8} {'peak MB':>9} {'line':>9}"]
    for point in points:
        on_line = seconds.intercept + seconds.slope * point.arithmetic, memory.intercept + memory.slope * point.value
        rows.append(
            f"{point.value:8} {point.arithmetic / 1e9:9.0f} {point.seconds:8.3f} {on_line[0]:8.3f} "
            f"{point.peak_mb:9.0f} {on_line[1]:9.0f}"
        )
    rate = 1 / seconds.slope / 1e9
    rows.append(
        f"farthest from its line: time {seconds.farthest:.0%}, memory {memory.farthest:.0%}; {rate:.0f} GFLOP/s"
    )
    return "\n".join(rows)


def draw(found: Sequence[tuple[Series, list[Point]]], file: Path) -> None:
    """Seconds above, memory below, a column for each series; dots are measurements, lines what they must lie on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(2, len(found), sharex="col")
    for column, (series, points) in enumerate(found):
        seconds, memory = lines_of(points)
        values = [point.value for point in points]
        for row, (name, ys, line, xs) in enumerate(
            [
                ("seconds a step", [p.seconds for p in points], seconds, [p.arithmetic for p in points]),
                ("peak memory (MB)", [p.peak_mb for p in points], memory, values),
            ]
        ):
            place = axes[row][column]
            place.plot(values, [line.intercept + line.slope * x for x in xs], color="#0072b2", linewidth=1.6)
            place.plot(values, ys, "o", color="#d55e00", markersize=5)
            place.set_ylim(0, max(ys) * 1.12)
            place.grid(color="#e4e8ec")
            place.spines[["top", "right"]].set_visible(False)
            if column == 0:
                place.set_ylabel(name)
        axes[0][column].set_title(series.name.replace(", ", "\n", 1), fontsize=9.5, loc="left")
        axes[1][column].set_xlabel(series.axis)
    canvas.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="of each point; the first warms up")
    parser.add_argument("--output", type=Path, help="figure (.png); the points beside it as .json")
    parser.add_argument("--time_tolerance", type=float, default=0.15)
    parser.add_argument("--memory_tolerance", type=float, default=0.10)
    words = parser.parse_args()
    found: list[tuple[Series, list[Point]]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0}
        (Path(folder) / "config.json").write_text(json.dumps({**config, **SHAPE}))
        for series in all_series():
            points = [measure_point(Path(folder), value, keys, words.steps) for value, keys in series.points]
            found.append((series, points))
            print(as_table(series, points), end="\n\n", flush=True)
    if words.output:
        draw(found, words.output)
        content = [{"series": series.name, "points": [asdict(point) for point in points]} for series, points in found]
        words.output.with_suffix(".json").write_text(json.dumps(content, indent=2))
    crooked = [
        series.name
        for series, points in found
        if lines_of(points)[0].farthest > words.time_tolerance or lines_of(points)[1].farthest > words.memory_tolerance
    ]
    print(f"load {os.getloadavg()[0]:.1f}. " + (f"Not linear: {'; '.join(crooked)}" if crooked else "All are linear."))
    return 1 if crooked else 0


if __name__ == "__main__":
    sys.exit(main())
