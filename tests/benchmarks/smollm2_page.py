"""The results of smollm2_frontier.py -> tables and figures of docs/real-model.md.

In:  docs/data/smollm2_frontier.csv and what lies beside it.
Out: the text between each pair of markers in docs/real-model.md, written anew, and docs/real-model-*.png.

    <!-- policies -->
    ... the table ...
    <!-- end of policies -->

Every number of the page that came from a run stands between markers, so that page and file cannot differ; a test
compares them. A difference is called one where Welch's t-test over the seeds finds it at 5%.
"""

import html
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_frontier import (
    BLOCK_RATE,
    BLOCKS,
    NOTEBOOK,
    NOTEBOOK_STEPS,
    POLICIES,
    REPOSITORY,
    SEEDS,
    Row,
    chosen_rate,
    insight_file,
    rank_file,
    read_rows,
    still_to_run,
)

from partialtune.compare.frontier import Point, label_all
from partialtune.insight.moved_tokens import rank_correlation
from partialtune.pages.figure_style import HEIGHT, LIGHT, PIXELS_PER_INCH, WIDTH, mixed, spread, write_title

PAGE = REPOSITORY / "docs" / "real-model.md"
NONE_YET = "*Not measured yet.*"
GPT2_LOSSES = (5.3849, 5.1868, 4.8730, 4.8263, 4.5179)  # printed by the notebook: GPT-2, 124M
SCORES = ("gradient / weights", "gradient", "signal / noise")  # the columns of the file of ranks
SHOWN_TOKENS = 12
# Student's t that 5% exceed on either side, for 1, 2, ... degrees of freedom; of more, the last one, which is stricter
T_OF_5_PERCENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
FRONTIER, FRONTIER_WORDS = "real-model-frontier.png", "Gain on held-out text against what is forgotten"
BLOCKS_FIGURE, BLOCKS_WORDS = "real-model-blocks.png", "Gain and forgetting of each block alone"


@dataclass(frozen=True)
class Summary:
    """A policy at its chosen rate, over its seeds.

    Attributes:
        name: Of the policy.
        rate: The one that was chosen.
        rates: How many were tried.
        at_edge: Whether the best one of those tried has no neighbour that was tried on one side.
        rows: One a seed.
        times: Runs of this policy, at any rate, whose times count: on a quiet machine, with all threads.
    """

    name: str
    rate: float
    rates: int
    at_edge: bool
    rows: Sequence[Row]
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
        beside = "" if deviation is None else f" ± {deviation:.4f}"
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
        found.append(Summary(name, rate, len(tried), at_edge, chosen, times))
    return sorted(found, key=lambda summary: -summary.mean(gain))


def differ(one: Sequence[float], other: Sequence[float]) -> bool | None:
    """Whether two means differ at 5%: Welch's t-test, two-sided; None with fewer than two values on a side."""
    if min(len(one), len(other)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in (one, other)]
    away = abs(statistics.fmean(one) - statistics.fmean(other))
    if sum(parts) == 0:
        return away > 0
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True)
    )
    return away / math.sqrt(sum(parts)) > T_OF_5_PERCENT[min(int(freedom), len(T_OF_5_PERCENT)) - 1]


# --- tables


def as_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    if not rows:
        return NONE_YET
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def progress(rows: Sequence[Row]) -> str:
    """How much of the plan has run."""
    left = still_to_run(rows)
    seeds = sum(row.policy in POLICIES and row.seed != SEEDS[0] for row in rows)
    tried = sum(row.policy in POLICIES and row.seed == SEEDS[0] for row in rows)
    blocks = sum(row.policy.startswith("block_") for row in rows)
    quiet = sum(row.busy == "no" for row in rows)
    notebook = any(row.policy == NOTEBOOK for row in rows)
    lines = [
        f"**Done: {len(rows)} of about {len(rows) + len(left)} runs.** Policies at their rates, with the first seed: "
        f"{tried}. Further seeds of them:",
        f"{seeds}. Single blocks: {blocks} of {BLOCKS}. The notebook's recipe: {int(notebook)} of 1. {quiet} ran on "
        "a quiet machine, so that their times count.",
        "What is not in a table is not measured yet.",
    ]
    if rows:
        lines.append(f"Versions: {', '.join(sorted({row.versions for row in rows}))}; {_precisions(rows)}.")
    return "\n".join(lines)


def _precisions(rows: Sequence[Row]) -> str:
    names = {"bf16": "products in bf16, weights in fp32", "fp32": "fp32"}
    return " and ".join(names[name] for name in sorted({row.precision for row in rows}))


def policy_table(rows: Sequence[Row]) -> str:
    """A line for each policy: what trains, what it gained, what it forgot."""
    titles = ["policy", "trains", "of all", "rate", "rates tried", "seeds", "held-out bits per byte", "gain"]
    titles += ["Python's reference", "*Persuasion*"]
    lines = []
    for one in summaries(rows):
        first = one.rows[0]
        lines.append(
            [
                one.label,
                f"{first.trainable:,}",
                _share(first),
                f"{one.rate:g}{'*' if one.at_edge else ''}",
                f"{one.rates}",
                f"{len(one.rows)}",
                one.cell(lambda row: row.held_out_after),
                one.cell(gain, "+.4f"),
                one.cell(forgotten("python"), "+.4f"),
                one.cell(forgotten("novel"), "+.4f"),
            ]
        )
    if not lines:
        return NONE_YET
    before = next(row for row in rows if row.held_out_before is not None)
    words = (
        f"Before training: {before.held_out_before:.4f} bits per byte of the held-out end, "
        f"{before.python_before:.4f} of Python's reference, {before.novel_before:.4f} of *Persuasion*. The "
        f"last two columns are what these change by: above 0 is forgotten.\n"
        f"`*`: the search is not over: a rate next to the best one is untried, or the best one ends the list."
    )
    return f"{as_table(titles, lines)}\n\n{words}\n\n![{FRONTIER_WORDS}]({FRONTIER})"


def _share(row: Row) -> str:
    return f"{100 * row.trainable / row.total:.2g}%" if row.trainable < row.total else "100%"


def claims(rows: Sequence[Row]) -> str:
    """What the spread over seeds allows to say of neighbours in the table."""
    found = [one for one in summaries(rows) if len(one.rows) > 1]
    if len(found) < 2:
        return "No two policies have several seeds yet: no difference between two of them is claimed."
    lines = []
    for better, worse in pairwise(found):
        apart = differ([gain(row) for row in better.rows], [gain(row) for row in worse.rows])
        words = "above" if apart else "not told apart from"
        lines.append(f"- The gain of *{better.label}* is {words} that of *{worse.label}*.")
    return "\n".join(lines)


def cost_table(rows: Sequence[Row]) -> str:
    """Seconds and memory of each policy, from runs on a quiet machine alone; arithmetic from all."""
    titles = ["policy", "arithmetic of a step, GFLOP", "seconds a step", "CPU seconds a step", "peak MB", "runs"]
    lines, threads = [], set()
    for one in summaries(rows):
        gflop = [row.step_gflop for row in one.rows if row.step_gflop]
        timed = [row for row in one.times if row.step_seconds]
        threads |= {row.threads for row in timed}

        def median(name: str, form: str, timed: Sequence[Row] = timed) -> str:
            return f"{statistics.median(getattr(row, name) for row in timed):{form}}" if timed else "–"

        cells = [f"{min(gflop):,.0f}" if gflop else "–", median("step_seconds", ".3f")]
        lines.append([one.label, *cells, median("step_cpu_seconds", ".3f"), median("peak_mb", ",.0f"), f"{len(timed)}"])
    words = "".join(f"Threads: {count}.\n\n" for count in threads)  # one number: `summaries` takes no other times
    return words + as_table(titles, lines)


def rate_table(rows: Sequence[Row]) -> str:
    """Bits per byte of the choice text at every rate that was tried, seed 0."""
    lines = []
    for name, policy in POLICIES.items():
        tried = {row.rate: row for row in rows if row.policy == name and row.seed == SEEDS[0]}
        best = chosen_rate(rows, name)
        if tried:
            cells = [_rate_cell(rate, tried.get(rate), best) for rate in policy.rates]
            lines.append([policy.label, *cells])
    return as_table(["policy", "lowest", "low", "middle", "high", "highest"], lines)


def _rate_cell(rate: float, row: Row | None, best: float | None) -> str:
    if row is None:
        return f"{rate:g}: –"
    if row.choice_after is None:
        return f"{rate:g}: {row.failure.split(':')[0]}"
    mark = "**" if rate == best else ""
    return f"{rate:g}: {mark}{row.choice_after:.4f}{mark}"


def block_rows(rows: Sequence[Row]) -> dict[int, Row]:
    """Block -> its run."""
    found = {}
    for row in rows:
        if row.policy.startswith("block_") and row.rate == BLOCK_RATE and row.held_out_after is not None:
            found[int(row.policy[-2:])] = row
    return dict(sorted(found.items()))


def read_ranks(file: Path) -> dict[int, tuple[float, ...]]:
    """Block -> what `rank` said of it, in the order of `SCORES`."""
    if not file.is_file():
        return {}
    lines = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return {int(block): tuple(map(float, figures)) for block, *figures in lines}


def correlation_table(rows: Sequence[Row], ranks: Mapping[int, Sequence[float]]) -> str:
    """How well each score, and the block's number, tell the gain and the forgetting of a block that trains alone."""
    found = {block: row for block, row in block_rows(rows).items() if block in ranks}
    if len(found) < 8:
        return f"*{len(found)} of {BLOCKS} blocks have been trained: too few for a correlation.*"
    targets = {"gain": gain, "forgotten of Python": forgotten("python"), "forgotten of the novel": forgotten("novel")}
    columns = {title: [value(row) for row in found.values()] for title, value in targets.items()}
    scores = {title: [ranks[block][place] for block in found] for place, title in enumerate(SCORES)}
    scores["number of the block"] = list(found)
    lines = [
        [title, *(correlation_words(values, column) for column in columns.values())] for title, values in scores.items()
    ]
    return as_table([f"over {len(found)} blocks", *columns], lines)


def correlation_words(one: Sequence[float], other: Sequence[float]) -> str:
    """Spearman's rank correlation with its interval of 95%."""
    found = rank_correlation(np.array(one), np.array(other))
    if found is None:
        return "–"
    low, high = interval(found, len(one))
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


def block_table(rows: Sequence[Row], ranks: Mapping[int, Sequence[float]]) -> str:
    """A line for each block that has been trained alone."""
    lines = []
    for block, row in block_rows(rows).items():
        scores = [f"{figure:.3g}" for figure in ranks.get(block, ())]
        figures = [gain(row), forgotten("python")(row), forgotten("novel")(row)]
        lines.append([str(block), *(f"{figure:+.4f}" for figure in figures), *scores])
    if not lines:
        return NONE_YET
    return f"Rate {BLOCK_RATE:g}, first seed.\n\n![{BLOCKS_WORDS}]({BLOCKS_FIGURE})\n\n" + as_table(
        ["block", "gain", "Python's reference", "*Persuasion*", *SCORES], lines
    )


def read_insight(file: Path, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Policy -> its insight at its chosen rate, first seed."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    found = {}
    for name in ("embeddings", "last_8"):
        rate = chosen_rate(rows, name)
        own = [one for one in entries if (one["policy"], one["rate"], one["seed"]) == (name, rate, SEEDS[0])]
        if own:
            found[name] = own[-1]
    return found


def same_size_table(rows: Sequence[Row], insight: Mapping[str, Mapping[str, Any]]) -> str:
    """The notebook's policy beside as many parameters in blocks."""
    chosen = [one for one in summaries(rows) if one.name in ("embeddings", "last_8")]
    lines = []
    for one in chosen:
        ranks = insight.get(one.name, {}).get("ranks", [])
        lines.append(
            [
                one.label,
                f"{one.rows[0].trainable:,}",
                f"{len(one.rows)}",
                one.cell(gain, "+.4f"),
                one.cell(forgotten("python"), "+.4f"),
                one.cell(forgotten("novel"), "+.4f"),
                one.cell(lambda row: row.l2_delta, ".2f"),
                *(_mean_share(ranks, place) for place in (2, 3)),
            ]
        )
    titles = ["policy", "trains", "seeds", "gain", "Python's reference", "*Persuasion*", "L2 delta"]
    return as_table([*titles, "effective rank", "stable rank"], lines)


def _mean_share(ranks: Sequence[Sequence[Any]], place: int) -> str:
    """Mean over matrices, and what it is of the most that is possible."""
    if not ranks:
        return "–"
    values, shares = [one[place] for one in ranks], [one[place] / one[1] for one in ranks]
    return f"{statistics.fmean(values):.1f} ({100 * statistics.fmean(shares):.1f}%)"


def token_table(insight: Mapping[str, Mapping[str, Any]]) -> str:
    """The tokens whose rows moved most under the notebook's policy."""
    matrices = insight.get("embeddings", {}).get("tokens")
    if not matrices:
        return NONE_YET
    (rows,) = matrices[:1]
    lines = [
        [_shown(one["token"]), f"{one['count']:,}", f"{one['relative_delta']:.4f}"]
        for one in rows["most"][:SHOWN_TOKENS]
    ]
    by_count = [
        [_counts(one), f"{one['tokens']:,}", *(f"{one[name]:.4f}" for name in ("p10", "median", "p90"))]
        for one in rows["by_count"]
    ]
    correlation = rows["rank_correlation"]
    words = (
        f"{rows['moved']:,} of {rows['tokens']:,} rows moved; {rows['occurring']:,} tokens occur in the training text, "
        f"so that {rows['moved_absent']:,} moved without occurring. Of those that occur, count and movement have "
        f"a rank correlation of {correlation:+.2f}."
    )
    first = as_table(["token", "occurs", "moved by, of its length"], lines)
    second = as_table(["occurs", "tokens", "a tenth moved less than", "median", "a tenth moved more than"], by_count)
    return f"{words}\n\n{first}\n\n{second}"


def _shown(token: str) -> str:
    """A token in a cell: a bar in it ends no cell, and a backtick no code."""
    return f"<code>{html.escape(json.dumps(token, ensure_ascii=False), quote=False)}</code>".replace("|", "&#124;")


def _counts(one: Mapping[str, Any]) -> str:
    return f"{one['from']}" if one["from"] == one["to"] else f"{one['from']} to {one['to']}"


def notebook_table(rows: Sequence[Row]) -> str:
    """The losses that the notebook prints, beside those of the same recipe on SmolLM2."""
    ours = next((row for row in rows if row.policy == NOTEBOOK), None)
    losses = dict(one.split(":") for one in ours.losses.split()) if ours else {}
    lines = [
        [f"{step}", f"{loss:.4f}", losses.get(str(step), "–")]
        for step, loss in zip(NOTEBOOK_STEPS, GPT2_LOSSES, strict=True)
    ]
    return as_table(["step", "GPT-2, as the notebook printed it", "SmolLM2-135M-Instruct"], lines)


# --- figures


def draw_figures(rows: Sequence[Row], ranks: Mapping[int, Sequence[float]], folder: Path) -> list[Path]:
    """The frontier, and the blocks, as far as they have been measured."""
    found = []
    if summaries(rows):
        found.append(draw_frontier(rows, folder / FRONTIER))
    if block_rows(rows):
        found.append(draw_blocks(rows, folder / BLOCKS_FIGURE))
    return found


def draw_frontier(rows: Sequence[Row], file: Path) -> Path:
    """Gain against what is forgotten of Python's reference, a point a policy, coloured by the share that trains."""
    words = "SmolLM2-135M-Instruct on Gulliver's Travels, 100 steps; the darker, the more of it trains"
    canvas, axes = _axes("Gain against forgetting", words, 0.975)
    colours, points = mixed(LIGHT.scale), []
    for one in summaries(rows):
        share = one.rows[0].trainable / one.rows[0].total
        x, y = one.mean(forgotten("python")), one.mean(gain)
        colour = colours(max(0.0, 1 + math.log10(max(share, 1e-6)) / 6))
        marker = {"marker": "o", "markersize": 7, "color": colour, "markeredgecolor": LIGHT.ink}
        axes.errorbar(x, y, yerr=one.deviation(gain), **marker, elinewidth=1)  # a level bar would strike the name out
        points.append(Point(one.label, x, y, None, on_frontier=False))
    axes.set_xlabel("forgotten of Python's reference, bits per byte", color=LIGHT.ink)
    axes.set_ylabel("gain on held-out text, bits per byte", color=LIGHT.ink)
    axes.margins(0.16)
    label_all(canvas, [(axes, points)], LIGHT)
    canvas.savefig(file)
    return file


def draw_blocks(rows: Sequence[Row], file: Path) -> Path:
    """Gain and forgetting of every block alone."""
    canvas, axes = _axes("Where it pays to train", "Each block alone, 3,540,096 parameters, 100 steps", 0.75)
    found = block_rows(rows)
    lines = {"gain": gain, "Python forgotten": forgotten("python"), "Persuasion forgotten": forgotten("novel")}
    ends = []
    for (label, value), colour in zip(lines.items(), LIGHT.lines, strict=False):
        values = [value(row) for row in found.values()]
        axes.plot(list(found), values, marker="o", markersize=4, color=colour, linewidth=1.4)
        ends.append((max(found), values[-1], label))
    axes.axhline(0, color=LIGHT.muted, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block", color=LIGHT.ink)
    axes.set_ylabel("bits per byte", color=LIGHT.ink)
    _name_at_the_right(axes, ends)
    canvas.savefig(file)
    return file


def _axes(title: str, subtitle: str, right: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(WIDTH, HEIGHT + 0.8), dpi=PIXELS_PER_INCH, facecolor=LIGHT.background)
    FigureCanvasAgg(canvas)
    write_title(canvas, LIGHT, title, subtitle)
    axes = canvas.add_axes((0.105, 0.12, right - 0.105, 0.71), facecolor=LIGHT.background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT.rule)
    axes.tick_params(colors=LIGHT.muted, labelsize=9, length=0)
    axes.grid(color=LIGHT.rule, linewidth=0.8)
    axes.set_axisbelow(True)
    return canvas, axes


def _name_at_the_right(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names in a column right of the axes, in the order of their heights, each with a line to its point."""
    axes.autoscale_view()  # else the limits are found when the figure is drawn, after the heights
    to_axes = axes.transAxes.inverted().transform
    heights = [to_axes(axes.transData.transform((x, y)))[1] for x, y, _ in points]
    for (x, y, label), place in zip(points, spread(heights, gap=0.062), strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=LIGHT.ink,
            arrowprops={"arrowstyle": "-", "color": LIGHT.hatch, "linewidth": 0.7, "shrinkB": 4},
            annotation_clip=False,
        )


# --- the page


def sections(results: Path) -> dict[str, str]:
    """What stands between each pair of markers."""
    rows = read_rows(results)
    ranks, insight = read_ranks(rank_file(results)), read_insight(insight_file(results), rows)
    return {
        "progress": progress(rows),
        "policies": policy_table(rows),
        "claims": claims(rows),
        "rates": rate_table(rows),
        "costs": cost_table(rows),
        "correlations": correlation_table(rows, ranks),
        "blocks": block_table(rows, ranks),
        "same size": same_size_table(rows, insight),
        "tokens": token_table(insight),
        "notebook": notebook_table(rows),
    }


def filled(page: str, content: Mapping[str, str]) -> str:
    """The page with what stands between its markers written anew."""
    for name, text in content.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
        page, count = pattern.subn(lambda _, text=text, start=start, end=end: f"{start}\n{text}\n{end}", page)
        if count != 1:
            raise SystemExit(f"docs/real-model.md needs one pair of markers {start} ... {end}, and has {count}.")
    return page


def write_page(results: Path, page: Path = PAGE) -> None:
    """Tables and figures, from the results."""
    page.write_text(filled(page.read_text(encoding="utf-8"), sections(results)), encoding="utf-8")
    rows = read_rows(results)
    for file in [page, *draw_figures(rows, read_ranks(rank_file(results)), page.parent)]:
        print(file)
