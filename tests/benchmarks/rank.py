"""Is a ranking right? Recipe -> held-out text after training what it puts first, beside random choices and beside all.

    python tests/benchmarks/rank.py recipes/quickstart.yaml --blocks 2 --seeds 3 --max_steps 60
    python tests/benchmarks/rank.py recipes/quickstart.yaml --each --seeds 3 --max_steps 60

For each seed the blocks are ranked on the training text, then two runs train as many blocks and the final norm: those
that come first, and some drawn at random among the other choices of that number. With --each a run trains every block
alone, and every attention and mlp alone: for each score the table gives the rank correlation (Spearman) with what the
held-out text gained, a number from -1 (the wrong way round) over 0 (it predicts nothing) to 1. Words after the known
ones are keys of the recipe.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from partialtune.model.loading import quiet_libraries
from partialtune.rank.ranking import Ranked, rank_recipe
from partialtune.rank.signal_to_noise import WeightRanking, rank_weights
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values
from partialtune.recipe_run.train import train

PARTS = ("attention", "mlp")
SCORES = ("||gradient|| / ||weights||", "||gradient||", "signal / noise")


def score_of(recipe: Recipe, trainable: Sequence[str], folder: Path) -> tuple[float, float]:
    """Bits per byte of the held-out text before and after training this."""
    quiet = {"save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "prompts": ["The"]}
    with redirect_stdout(sys.stderr):  # the table alone is the output
        train(recipe_from_values({**recipe.values, **quiet, "trainable": list(trainable), "output_dir": str(folder)}))
    scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["validation"]
    return scores["before"]["bits_per_byte"], scores["after"]["bits_per_byte"]


def blocks_and_norm(blocks: Sequence[int]) -> list[str]:
    return [f"blocks[{','.join(map(str, blocks))}]", "final_norm"]


def against_random(known: argparse.Namespace, words: Sequence[str]) -> None:
    rows = []
    for seed in range(known.seeds):
        recipe = read_recipe(known.recipe, [*words, "--seed", str(seed)])
        ranking = rank_recipe(recipe, top=known.blocks)
        choices = itertools.combinations(range(len(ranking.blocks)), known.blocks)
        drawn = random.Random(seed).choice([blocks for blocks in choices if blocks != ranking.chosen])
        with tempfile.TemporaryDirectory() as folder:
            before, by_rank = score_of(recipe, blocks_and_norm(ranking.chosen), Path(folder) / "ranked")
            _, at_random = score_of(recipe, blocks_and_norm(drawn), Path(folder) / "random")
        rows.append((seed, ranking.chosen, by_rank, drawn, at_random))
        print(
            f"seed {seed}, {before:.4f} before: ranked {ranking.chosen} {by_rank:.4f}, random {drawn} {at_random:.4f}"
        )
    for label, place in (("ranked", 2), ("random", 4)):
        scores = [row[place] for row in rows]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{label}: mean {statistics.mean(scores):.4f} bits per byte, standard deviation {spread:.4f}")


def against_each(known: argparse.Namespace, words: Sequence[str]) -> None:
    """Train each choice alone, and see which score tells what it gains."""
    print("| choice | seed | gain, bits per byte |", *SCORES, sep=" | ")
    correlations: dict[tuple[str, str], list[float]] = {}
    for seed in range(known.seeds):
        recipe = read_recipe(known.recipe, [*words, "--seed", str(seed)])
        ranking = rank_recipe(recipe)
        weights = rank_weights(recipe.model.model_name_or_path)
        groups = {
            "blocks": list(ranking.blocks),
            "attention and mlp": [part for part in ranking.parts if part.block is not None and part.component in PARTS],
        }
        for group, entries in groups.items():
            gains, scores = [], []
            for entry in entries:
                with tempfile.TemporaryDirectory() as folder:
                    before, after = score_of(recipe, [entry.selector], Path(folder) / "run")
                gains.append(before - after)
                scores.append((entry.ratio or 0.0, entry.gradient_norm, signal_of(weights, entry)))
                figures = " | ".join(f"{value:.4g}" for value in scores[-1])
                print(f"| {entry.selector} | {seed} | {gains[-1]:.4f} | {figures} |", flush=True)
            for place, name in enumerate(SCORES):
                found = spearman([row[place] for row in scores], gains)
                correlations.setdefault((group, name), []).append(found)
    print("\n| among | score | rank correlation with the gain, by seed | mean |\n|---|---|---|---|")
    for (group, name), found in correlations.items():
        by_seed = ", ".join(f"{value:+.2f}" for value in found)
        print(f"| {group} | {name} | {by_seed} | {statistics.mean(found):+.2f} |")


def signal_of(weights: WeightRanking, entry: Ranked) -> float:
    """Of a block, or of a part of one: mean over its matrices of their ratio / mean ratio of the kind."""
    if entry.component is None:
        return weights.blocks[entry.block]
    shares = []
    for kind, matrices in weights.kinds.items():
        if ("attn" in kind) == (entry.component == "attention"):
            mean = statistics.mean(matrix.ratio for matrix in matrices)
            shares += [matrix.ratio / mean for matrix in matrices if matrix.block == entry.block]
    return statistics.mean(shares)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation (Spearman 1904): that of the places which values have in their order."""
    places = [[sorted(values).index(value) for value in values] for values in (one, other)]
    return statistics.correlation(*places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--blocks", type=int, default=2, help="blocks to train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", action="store_true", help="train every block and every attention and mlp alone")
    known, words = parser.parse_known_args()
    quiet_libraries()
    (against_each if known.each else against_random)(known, words)


if __name__ == "__main__":
    sys.exit(main())
