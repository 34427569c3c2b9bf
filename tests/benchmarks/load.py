"""How a run's cost grows with the number of text files, the vocabulary, and the number of blocks: nothing is quadratic.

    python tests/benchmarks/load.py [--case files vocabulary blocks]

Each case is a whole `partialtune train` of two steps of a tiny GPT-2, at a quarter, a half and all of the load: 1,000
text files, a vocabulary of 256k, 96 blocks. Seconds are those of the process's own work, so that other work on the
machine does not show. A step that is quadratic would make the last factor come near to 4. The result is a Markdown
table on stdout; it takes about three minutes on an idle machine.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import yaml

CASES = {"files": (250, 500, 1000), "vocabulary": (64_000, 128_000, 256_000), "blocks": (24, 48, 96)}


def make_run(folder: Path, files: int = 4, vocabulary: int = 1000, blocks: int = 2) -> list[str]:
    """A base, texts and a recipe of a load; the words that run it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    shape = {"n_layer": blocks, "n_embd": 16, "n_head": 2, "vocab_size": vocabulary, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder / "base")
    (folder / "texts").mkdir()
    for number in range(files):
        text = " ".join(f"w{(number + place) * 7919 % vocabulary}" for place in range(400))
        (folder / "texts" / f"{number}.txt").write_text(text)
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "text": str(folder / "texts" / "*.txt"),
        "block_size": 32,
        "trainable": ["embeddings", "blocks[-1]", "final_norm"],
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "no",
        "learning_rate": 1e-3,
        "prompts": ["w1 w2"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["train", str(folder / "recipe.yaml")]


def seconds_of(**load: int) -> float:
    """Processor seconds of a whole run."""
    from partialtune.cli import main

    with tempfile.TemporaryDirectory() as folder:
        words = make_run(Path(folder), **load)
        started = time.process_time()
        if main(words) != 0:
            raise SystemExit(f"a run with {load} failed")
        return time.process_time() - started


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    words = parser.parse_args()
    torch.set_num_threads(1)  # processor seconds of several threads count their waiting
    print("| load | seconds | factor for twice the load |", "|---|---|---|", sep="\n", flush=True)
    out, sys.stdout = sys.stdout, sys.stderr
    seconds_of()  # imports and first uses
    for case in words.case:
        before = None
        for size in CASES[case]:
            seconds = seconds_of(**{case: size})
            factor = f"{seconds / before:.2f}" if before else ""
            print(f"| {size:,} {case} | {seconds:.1f} | {factor} |", file=out, flush=True)
            before = seconds


if __name__ == "__main__":
    main()
