"""The results of smollm2_frontier.py -> tables and figures of docs/real-model.md.

In:  docs/data/smollm2_frontier.csv and what lies beside it.
Out: the text between each pair of markers in docs/real-model.md, written anew, and docs/real-model-*.png.

    <!-- policies -->
    ... the table ...
    <!-- end of policies -->

Every table that came from runs stands between markers, so that page and file cannot differ; a test compares them, and
the figures by a digest of what they draw.
"""

import html
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from smollm2_figures import BLOCKS_FIGURE, BLOCKS_WORDS, FRONTIER, FRONTIER_WORDS, draw_figures
from smollm2_frontier import (
    BLOCK_RATE,
    BLOCKS,
    NOTEBOOK,
    NOTEBOOK_STEPS,
    POLICIES,
    REPOSITORY,
    SEEDS,
    SHARE_PREFIX,
    STEPS,
    Row,
    chosen_rate,
    close_rates,
    insight_file,
    rank_file,
    read_rows,
    still_to_run,
)
from smollm2_statistics import (
    TARGETS,
    Summary,
    block_rows,
    correlation_words,
    difference,
    forgotten,
    gain,
    holm,
    mean_of,
    summaries,
)

from partialtune.freeze.block_sampling import BlockSampling

AGAINST = ("full", "embeddings")  # what every policy is compared with
PAGE = REPOSITORY / "docs" / "real-model.md"
NONE_YET = "*Not measured yet.*"
GPT2_LOSSES = (5.3849, 5.1868, 4.8730, 4.8263, 4.5179)  # printed by the notebook: GPT-2, 124M
SCORES = ("gradient / weights", "gradient", "signal / noise")  # the columns of the file of ranks
SHOWN_TOKENS = 12
MILD_RATE = 1e-4  # at which the last eight blocks forget next to nothing


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
    blocks = block_rows(rows)
    twice = sum(len(runs) > 1 for runs in blocks.values())
    quiet = sum(row.busy == "no" for row in rows)
    notebook = any(row.policy == NOTEBOOK for row in rows)
    lines = [
        f"**Done: {len(rows)} of about {len(rows) + len(left)} runs.** Policies at their rates, with the first seed: "
        f"{tried}. Further seeds of them:",
        f"{seeds}. Single blocks: {len(blocks)} of {BLOCKS}, {twice} of them with a second seed. The notebook's "
        f"recipe: {int(notebook)} of 1.",
        f"{quiet} ran on a quiet machine, so that their times count.",
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
    words = (
        f"Before training: {_before(rows, 'held_out')} bits per byte of the held-out end, {_before(rows, 'python')} of "
        f"Python's reference, {_before(rows, 'novel')} of *Persuasion*, by number of threads and way of computing. "
        f"Each gain is against the same run's own. The last two columns are what the texts' scores change by: above 0 "
        f"is forgotten.\n"
        f"LISA's draws left out {', '.join(str(never_drawn(seed)) for seed in SEEDS)} of {BLOCKS} blocks, by seed.\n"
        f"`*`: the search is not over: a rate next to the best one is untried, or the best one ends the list."
    )
    return f"{as_table(titles, lines)}\n\n{words}\n\n![{FRONTIER_WORDS}]({FRONTIER})"


def never_drawn(seed: int) -> int:
    """How many blocks LISA's draws leave out in a run of this seed."""
    sampling = {**POLICIES["lisa"].recipe["block_sampling"], "candidates": tuple(range(BLOCKS)), "seed": seed}
    firsts = BlockSampling(**sampling).first_steps()
    return sum(step >= STEPS for step in firsts.values())


def _before(rows: Sequence[Row], text: str) -> str:
    """The score of the untrained model: the least and the most of all runs."""
    found = [getattr(row, f"{text}_before") for row in rows if getattr(row, f"{text}_before") is not None]
    return f"{min(found):.4f} to {max(found):.4f}"


def _share(row: Row) -> str:
    return f"{100 * row.trainable / row.total:.2g}%" if row.trainable < row.total else "100%"


def difference_table(rows: Sequence[Row]) -> str:
    """How far each policy's gain lies from that of everything, and from that of the notebook's policy."""
    found = summaries(rows)
    known = {one.name: one.rows for one in found}
    cells = {
        (one.name, other): difference(one.rows, known.get(other, ()))
        for one in found
        for other in AGAINST
        if one.name != other
    }
    tested = [place for place, value in cells.items() if value is not None]
    sure = {
        place for place, holds in zip(tested, holm([cells[place].chance for place in tested]), strict=True) if holds
    }

    def cell(place: tuple[str, str]) -> str:
        value = cells.get(place)
        return "–" if value is None else f"**{value}**" if place in sure else f"{value}"

    lines = [[one.label, *(cell((one.name, other)) for other in AGAINST)] for one in found]
    titles = ["gain of", *(f"less that of *{POLICIES[name].label}*" for name in AGAINST)]
    words = (
        f"Mean over the seeds ± half the 95% interval. Bold: different at 5%, all {len(tested)} comparisons together."
    )
    return f"{as_table(titles, lines)}\n\n{words}"


def cost_table(rows: Sequence[Row]) -> str:
    """Arithmetic, seconds and memory of each policy, all of the same runs: those on a quiet machine."""
    titles = ["policy", "arithmetic of a step, GFLOP", "seconds a step", "CPU seconds a step", "peak MB", "runs"]
    lines, threads = [], set()
    for one in summaries(rows):
        timed = [row for row in one.times if row.step_seconds and row.step_gflop]
        threads |= {row.threads for row in timed}
        if not timed:
            lines.append([one.label, *["–"] * 4, "0"])
        for label, some in _by_start(one, timed).items():

            def median(name: str, form: str, some: Sequence[Row] = some) -> str:
                return f"{statistics.median(getattr(row, name) for row in some):{form}}"

            figures = [median("step_gflop", ",.0f"), median("step_seconds", ".3f"), median("step_cpu_seconds", ".3f")]
            lines.append([label, *figures, median("peak_mb", ",.0f"), f"{len(some)}"])
    words = "".join(f"Threads: {count}.\n\n" for count in threads)  # one number: `summaries` takes no other times
    return words + as_table(titles, lines)


def _by_start(one: Summary, timed: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs that computed the frozen first blocks in each step, and those that began behind them, from kept states."""
    found: dict[str, list[Row]] = {}
    most = max((row.step_gflop for row in one.own if row.step_gflop), default=0.0)
    for row in sorted(timed, key=lambda row: -row.step_gflop):
        kept = one.name in SHARE_PREFIX and row.step_gflop < 0.9 * most
        found.setdefault(f"{one.label}, from kept states" if kept else one.label, []).append(row)
    return found


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


def trade_table(rows: Sequence[Row]) -> str:
    """Gain and what is forgotten of Python's reference at every rate that was tried, seed 0."""
    lines = []
    for name, policy in POLICIES.items():
        tried = {row.rate: row for row in rows if row.policy == name and row.seed == SEEDS[0]}
        if tried:
            cells = [_trade_cell(tried.get(rate), chosen_rate(rows, name)) for rate in policy.rates]
            lines.append([policy.label, *cells])
    return as_table(["gain, forgotten", "lowest", "low", "middle", "high", "highest"], lines)


def _trade_cell(row: Row | None, best: float | None) -> str:
    if row is None or row.held_out_after is None:
        return "–"
    mark = "**" if row.rate == best else ""
    return f"{mark}{gain(row):+.3f}, {forgotten('python')(row):+.3f}{mark}"


def close_table(rows: Sequence[Row]) -> str:
    """Policies whose second best rate scored hardly worse on the choice text: both rates, over the seeds."""
    lines = []
    for one in summaries(rows):
        for rate in (one.rate, *close_rates(rows, one.name)) if close_rates(rows, one.name) else ():
            own = [row for row in one.own if row.rate == rate and row.held_out_after is not None]
            there = replace(one, rate=rate, rows=own)
            values = (gain, forgotten("python"), forgotten("novel"))
            mark = "**" if rate == one.rate else ""
            lines.append(
                [one.label, f"{mark}{rate:g}{mark}", f"{len(own)}", *(there.cell(value, "+.4f") for value in values)]
            )
    return as_table(["policy", "rate", "seeds", "gain", "Python's reference", "*Persuasion*"], lines)


def _rate_cell(rate: float, row: Row | None, best: float | None) -> str:
    if row is None:
        return f"{rate:g}: –"
    if row.choice_after is None:
        return f"{rate:g}: {row.failure.split(':')[0]}"
    mark = "**" if rate == best else ""
    return f"{rate:g}: {mark}{row.choice_after:.4f}{mark}"


def read_ranks(file: Path) -> dict[int, tuple[float, ...]]:
    """Block -> what `rank` said of it, in the order of `SCORES`."""
    if not file.is_file():
        return {}
    lines = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return {int(block): tuple(map(float, figures)) for block, *figures in lines}


DEPTH = "number of the block"


def correlation_table(rows: Sequence[Row], ranks: Mapping[int, Sequence[float]]) -> str:
    """How well each score, and the block's number, tell the gain and the forgetting of a block that trains alone."""
    found = {block: runs for block, runs in block_rows(rows).items() if block in ranks}
    if len(found) < 8:
        return f"*{len(found)} of {BLOCKS} blocks have been trained: too few for a correlation.*"
    columns = {title: [mean_of(runs, value) for runs in found.values()] for title, value in TARGETS.items()}
    scores = {title: [ranks[block][place] for block in found] for place, title in enumerate(SCORES)}
    depth = [float(block) for block in found]
    lines = [
        [title, *(correlation_words(values, column) for column in columns.values())]
        for title, values in {**scores, DEPTH: depth}.items()
    ]
    lines += [
        [f"{title}, given the {DEPTH}", *(correlation_words(values, column, depth) for column in columns.values())]
        for title, values in scores.items()
    ]
    both = {block: runs for block, runs in found.items() if len(runs) > 1}
    if len(both) >= 8:
        seeds = [
            correlation_words(*([value(runs[at]) for runs in both.values()] for at in (0, 1)))
            for value in TARGETS.values()
        ]
        lines.append([f"its first seed with its second, over {len(both)}", *seeds])
    return as_table([f"over {len(found)} blocks", *columns], lines)


def block_table(rows: Sequence[Row], ranks: Mapping[int, Sequence[float]]) -> str:
    """A line for each block that has been trained alone."""
    lines = []
    for block, runs in block_rows(rows).items():
        scores = [f"{figure:.3g}" for figure in ranks.get(block, ())]
        figures = [f"{mean_of(runs, value):+.4f}" for value in TARGETS.values()]
        lines.append([str(block), f"{len(runs)}", *figures, *scores])
    if not lines:
        return NONE_YET
    return f"Rate {BLOCK_RATE:g}; means over the seeds.\n\n![{BLOCKS_WORDS}]({BLOCKS_FIGURE})\n\n" + as_table(
        ["block", "seeds", "gain", "Python's reference", "*Persuasion*", *SCORES], lines
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
    lines = []
    for one in summaries(rows):
        if one.name not in ("embeddings", "last_8"):
            continue
        ranks = insight.get(one.name, {}).get("ranks", [])
        shares = [_mean_share(ranks, place) for place in (2, 3)]
        lines.append([f"{one.label}, rate {one.rate:g}", *_same_size_cells(one), *shares])
        mild = [row for row in one.own if row.rate == MILD_RATE and row.seed == SEEDS[0]]
        if one.name == "last_8" and mild:
            lines.append([f"{one.label}, rate {MILD_RATE:g}", *_same_size_cells(replace(one, rows=mild)), "–", "–"])
    titles = ["policy", "trains", "seeds", "gain", "Python's reference", "*Persuasion*"]
    return as_table([*titles, "effective rank", "stable rank"], lines)


def _same_size_cells(one: Summary) -> list[str]:
    values = (gain, forgotten("python"), forgotten("novel"))
    return [f"{one.rows[0].trainable:,}", f"{len(one.rows)}", *(one.cell(value, "+.4f") for value in values)]


def _mean_share(ranks: Sequence[Sequence[Any]], place: int) -> str:
    """Mean over the matrices of what each has of the most that it could."""
    return f"{100 * statistics.fmean(one[place] / one[1] for one in ranks):.1f}%" if ranks else "–"


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
    shift = insight["embeddings"].get("shift")
    if shift:
        words += (
            f"\n\nThe mean row makes {100 * shift['share']:.1f}% of the squared change. The stable rank of the change "
            f"is {insight['embeddings']['ranks'][0][3]:.1f}; without the mean, {shift['stable_rank']:.1f}."
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


def sections(results: Path) -> dict[str, str]:
    """What stands between each pair of markers."""
    rows = read_rows(results)
    ranks, insight = read_ranks(rank_file(results)), read_insight(insight_file(results), rows)
    return {
        "progress": progress(rows),
        "policies": policy_table(rows),
        "differences": difference_table(rows),
        "rates": rate_table(rows),
        "trade": trade_table(rows),
        "close rates": close_table(rows),
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
    for file in [page, *draw_figures(rows, page.parent)]:
        print(file)
