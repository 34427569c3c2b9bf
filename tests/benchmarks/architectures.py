"""Every model type that transformers calls a causal language model: right, right with our loss, or refused in words.

    python tests/benchmarks/architectures.py [--types gpt2 bart ...] [--again]

Writes tests/benchmarks/architectures.csv, a row a type, as soon as it is known; a second start goes on where the first
one ended, unless it is to be done `--again`. About 200 types, some 15 minutes on one core. Types that read ahead are
tried once more with the setting of their config that the refusal names. What a row says: see tests/trials.py.

Exit code 1 if a type is neither right nor refused in words.
"""

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
TABLE = Path(__file__).with_suffix(".csv")
SECONDS = 120  # for one type


def judge_all(types: Sequence[str]) -> None:
    """A line of JSON a row, on stdout, and one before each type that says it is begun."""
    import torch
    from transformers.utils import logging

    from partialtune.model.conformance import CAUSAL_SETTINGS
    from trials import Verdict, judge

    torch.set_num_threads(1)
    gc.freeze()  # Trainer looks for garbage after each run: half of the time, among a million objects that stay
    logging.set_verbosity_error()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    for model_type in types:
        print(json.dumps({"begun": model_type}), file=answers, flush=True)
        verdict = judge(model_type)
        rows = [verdict]
        if "reads ahead" in verdict.verdict:
            settings = [key for key in CAUSAL_SETTINGS if f'"{key}"' in verdict.verdict]
            rows += [judge(model_type, setting) for setting in settings]
        assert all(isinstance(row, Verdict) for row in rows)
        print(json.dumps({"type": model_type, "rows": [asdict(row) for row in rows]}), file=answers, flush=True)


def run(types: Sequence[str], table: "Table") -> None:
    """Judge in a child; go on in another behind a type that ends it or takes too long."""
    types = list(types)
    while types:
        command = [sys.executable, __file__, "--judge", *types]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            begun = None
            killer = Killer(child)
            for line in child.stdout:
                answer = json.loads(line)
                killer.begin()
                begun = answer.get("begun")
                if "rows" in answer:
                    types.remove(answer["type"])
                    table.add(answer["type"], answer["rows"])
                    print("\n".join(f"{row['model_type']}: {row['verdict']}" for row in answer["rows"]), flush=True)
            killer.end()
        if begun is not None:
            types.remove(begun)
            why = f"took more than {SECONDS} s" if killer.fired else f"ended its process ({child.returncode})"
            table.add(begun, [{"model_type": begun, "verdict": f"WRONG: {why}"}])
        elif types and child.returncode:
            raise SystemExit(f"the child ended with {child.returncode}")


class Killer:
    """Ends a child that takes more than SECONDS from one `begin` to the next."""

    def __init__(self, child: subprocess.Popen) -> None:
        self._child, self._timer, self.fired = child, None, False

    def begin(self) -> None:
        import threading

        self.end()
        self._timer = threading.Timer(SECONDS, self._fire)
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self.fired = True
        self._child.kill()


class Table:
    """The rows by type, in the mapping's order, on disk at all times."""

    def __init__(self, path: Path, order: Sequence[str]) -> None:
        from trials import Verdict

        self._path, self._order = path, list(order)
        self._columns = [field.name for field in fields(Verdict)]
        self.rows: dict[str, list[dict]] = {}
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    self.rows.setdefault(row["model_type"].partition(",")[0], []).append(row)

    def add(self, model_type: str, rows: list[dict]) -> None:
        self.rows[model_type] = rows
        self._path.with_suffix(".part").write_text("")
        with self._path.with_suffix(".part").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            for name in self._order:
                writer.writerows(self.rows.get(name, []))
        self._path.with_suffix(".part").replace(self._path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="of the causal mapping; all of them if it is not said")
    parser.add_argument("--again", action="store_true", help="also those that the table holds")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--judge", nargs="+", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.judge:
        judge_all(known.judge)
        return 0
    from tiny_models import MODEL_TYPES

    started = time.monotonic()
    table = Table(known.output, MODEL_TYPES)
    types = known.types or MODEL_TYPES
    run([name for name in types if known.again or known.types or name not in table.rows], table)
    verdicts = [row["verdict"] for rows in table.rows.values() for row in rows]
    kinds = ("right", "right with our loss", "refused", "WRONG")
    counts = {kind: sum(verdict.partition(":")[0] == kind for verdict in verdicts) for kind in kinds}
    print(f"{len(table.rows)} types in {time.monotonic() - started:.0f} s:", counts)
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
