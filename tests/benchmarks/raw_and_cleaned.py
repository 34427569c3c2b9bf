"""What cleaning a text changes: one recipe on a raw file and on the book in it -> a Markdown table.

    python tests/benchmarks/raw_and_cleaned.py [TEXT] [--steps 123]

TEXT is *Gulliver's Travels* as Project Gutenberg serves it, or another file or address. The recipe is the quickstart's:
the bundled model, all blocks frozen. A perplexity is one per token, and the two texts are cut into different tokens:
only bits per byte compare between the rows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GULLIVER = "https://www.gutenberg.org/cache/epub/829/pg829.txt"
CLEANINGS = {"raw": "none", "cleaned": "gutenberg"}
SCORED = {"validation": "held-out end", "training": "training text"}


@dataclass(frozen=True)
class Row:
    """One text after one cleaning: bytes and tokens of the whole of it, and the run's evaluation."""

    name: str
    size: int
    tokens: int
    evaluation: dict[str, Any]


def measure(name: str, source: str, steps: int) -> Row:
    """Train on one form of the text."""
    from transformers import AutoTokenizer

    from partialtune import load_text
    from partialtune.builtin import builtin_folder
    from partialtune.text.tokenizing import tokenize_text

    text = load_text(source, CLEANINGS[name])
    tokenizer = AutoTokenizer.from_pretrained(builtin_folder("builtin:lilliput"))
    with tempfile.TemporaryDirectory() as folder:
        words = ["--text", source, "--text_cleaning", CLEANINGS[name], "--output_dir", f"{folder}/run"]
        words += ["--max_steps", str(steps), "--save_strategy", "no"]
        command = [sys.executable, "-m", "partialtune", "train", "builtin:quickstart", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        evaluation = json.loads(Path(folder, "run", "evaluation.json").read_text(encoding="utf-8"))
    return Row(name, len(text.encode()), len(tokenize_text(text, tokenizer)), evaluation)


def table(rows: list[Row]) -> str:
    """The rows in Markdown, a line for each text that was scored."""
    lines = [
        "| text | bytes | tokens | scored | perplexity | loss, nats a token | bits per byte |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        for number, (key, label) in enumerate(SCORED.items()):
            before, after = row.evaluation[key]["before"], row.evaluation[key]["after"]
            whole = (row.name, f"{row.size:,}", f"{row.tokens:,}") if number == 0 else ("", "", "")
            cells = [*whole, label]
            for score, digits in (("perplexity", 1), ("loss", 3), ("bits_per_byte", 3)):
                cells.append(f"{before[score]:.{digits}f} -> {after[score]:.{digits}f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default=GULLIVER)
    parser.add_argument("--steps", type=int, default=123)
    words = parser.parse_args()
    print(table([measure(name, words.text, words.steps) for name in CLEANINGS]))


if __name__ == "__main__":
    main()
