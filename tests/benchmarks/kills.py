"""Runs killed with SIGKILL at random moments, during saves too, and resumed: do they end as if nothing had happened?

    python tests/benchmarks/kills.py [--kills 20] [--seed 0]

A tiny GPT-2 with dropout trains 32 steps in two phases, with a checkpoint every other step. It is killed at random
moments, three in ten of them in the next save, each time resumed with `--resume_from_checkpoint auto`, until it ends;
then the next run begins, until there were so many kills. Weights, losses, evaluations and deltas are compared, to the
bit, with those of a run that was left alone. The result is a Markdown table on stdout; it takes about two minutes on an
idle machine.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster import Killed, WarmProcess, fingerprint, kill, small_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, WarmProcess(Path(name) / "log") as warm:
        rows = measure(Path(name), warm, words.kills, random.Random(words.seed))
    print("| run | killed after | while saving | goes on from | ended bit-identical |")
    print("|---|---|---|---|---|")
    for run, killed, same in rows:
        start = killed.checkpoint or "the beginning"
        print(f"| {run} | {killed.seconds:.2f} s | {'yes' if killed.saving else 'no'} | {start} | {same} |")
    if not all(same == "yes" for *_, same in rows):
        sys.exit(1)


def measure(folder: Path, warm: WarmProcess, kills: int, rng: random.Random) -> list[tuple[int, Killed, str]]:
    """(number of the run, the kill, whether the run ended as the one that was left alone), for each kill."""
    recipe = small_recipe(folder)
    whole = folder / "whole"
    assert warm.run([*recipe, "--output_dir", str(whole)]) == 0, warm.log.read_text()
    longest = (whole / "checkpoint-32").stat().st_mtime - (whole / "recipe.yaml").stat().st_mtime
    expected, rows, number = fingerprint(whole), [], 0
    while len(rows) < kills:
        number += 1
        run, killed = folder / f"run-{number}", []
        again = [*recipe, "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
        while len(rows) + len(killed) < kills:
            one = kill(warm, again, run, rng.uniform(0, longest / 2), in_save=rng.random() < 0.3)
            if one is None:
                break
            killed.append(one)
            print(f"run {number}: {one}", file=sys.stderr, flush=True)
            if one.checkpoint == "checkpoint-32":  # its training is over
                break
        assert warm.run(again) == 0, warm.log.read_text()
        found = fingerprint(run)
        differ = [key for key in expected if found[key] != expected[key]]
        rows += [(number, one, f"no: {', '.join(differ)}" if differ else "yes") for one in killed]
    return rows


if __name__ == "__main__":
    main()
