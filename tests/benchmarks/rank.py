"""Ranked blocks against as many random ones: recipe -> bits per byte of held-out text after training, by seed.

    python tests/benchmarks/rank.py recipes/quickstart.yaml --blocks 2 --seeds 3 --max_steps 60

For each seed the blocks are ranked on the training text, then two runs train as many blocks and the final norm: those
that come first, and some drawn at random among the other choices of that number. Words after the known ones are keys
of the recipe.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from partialtune.model.loading import quiet_libraries
from partialtune.rank.ranking import rank_recipe
from partialtune.recipe.recipe import Recipe, read_recipe, recipe_from_values
from partialtune.recipe_run.train import train


def score_of(recipe: Recipe, blocks: Sequence[int], folder: Path) -> tuple[float, float]:
    """Bits per byte of the held-out text before and after training these blocks and the final norm."""
    trainable = [f"blocks[{','.join(map(str, blocks))}]", "final_norm"]
    quiet = {"save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "prompts": ["The"]}
    train(recipe_from_values({**recipe.values, **quiet, "trainable": trainable, "output_dir": str(folder)}))
    scores = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["validation"]
    return scores["before"]["bits_per_byte"], scores["after"]["bits_per_byte"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--blocks", type=int, default=2, help="blocks to train")
    parser.add_argument("--seeds", type=int, default=3)
    known, words = parser.parse_known_args()
    quiet_libraries()
    rows = []
    for seed in range(known.seeds):
        recipe = read_recipe(known.recipe, [*words, "--seed", str(seed)])
        ranking = rank_recipe(recipe, top=known.blocks)
        choices = itertools.combinations(range(len(ranking.blocks)), known.blocks)
        drawn = random.Random(seed).choice([blocks for blocks in choices if blocks != ranking.chosen])
        with tempfile.TemporaryDirectory() as folder:
            before, by_rank = score_of(recipe, ranking.chosen, Path(folder) / "ranked")
            _, at_random = score_of(recipe, drawn, Path(folder) / "random")
        rows.append((seed, ranking.chosen, by_rank, drawn, at_random))
        print(
            f"seed {seed}, {before:.4f} before: ranked {ranking.chosen} {by_rank:.4f}, random {drawn} {at_random:.4f}"
        )
    for label, place in (("ranked", 2), ("random", 4)):
        scores = [row[place] for row in rows]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{label}: mean {statistics.mean(scores):.4f} bits per byte, standard deviation {spread:.4f}")


if __name__ == "__main__":
    sys.exit(main())
