"""From a download to windows: how fast, in how much memory, and how fast a second run finds all of it in the cache.

    python tests/benchmarks/large_text.py --megabytes 20 80 2000 [--texts 'books/*.txt'] [--tokenizer FOLDER]

The text is made of the paragraphs of `--texts`, drawn at random, with a new invented word after each of them, because
a large text goes on bringing new words. It is fetched from a server in this process; each measurement is a process of
its own. Results are JSON lines on stdout: MB are 10^6 bytes of text; `peak_mb` is the process's peak of resident memory
in 2^20 bytes, mapped files included, and `cache_mb` is what it left on disk. `processor_seconds` hardly depend on what
else the machine does, `seconds` do.
"""

import argparse
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PARAGRAPHS_AT_ONCE = 4000


def make_text(sources: list[str], megabytes: int, path: Path) -> None:
    """Write a text of so many MB."""
    from partialtune.text.reading import read_texts

    paragraphs = [part for text in read_texts(sources) for part in text.text.split("\n\n") if part.strip()]
    rng = random.Random(0)
    with path.open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            drawn = rng.choices(paragraphs, k=PARAGRAPHS_AT_ONCE)
            invented = ("".join(rng.choices("abcdefghijklmnoprstuvwy", k=7)) for _ in drawn)
            data = "".join(f"{part} {word}.\n\n" for part, word in zip(drawn, invented, strict=True)).encode()
            file.write(data[: megabytes * 1_000_000 - file.tell()])


def measure(address: str, tokenizer_folder: str, cleaning: str) -> dict:
    """One run from an address to its windows, in this process."""
    from transformers import AutoTokenizer

    from partialtune.net.download import cache_folder
    from partialtune.recipe.arguments import TextArguments
    from partialtune.training.training_data import prepare_data

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    start, processor, before = time.perf_counter(), time.process_time(), _peak_mb()
    data = prepare_data(TextArguments(text=[address], text_cleaning=cleaning), {}, tokenizer, seed=0)
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "mb_per_second": round(data.sources[0].raw_bytes / 1e6 / seconds, 2),
        "peak_mb": round(_peak_mb()),
        "peak_mb_before": round(before),
        "windows": len(data.train),
        "text_bytes": data.scored["training"].text_bytes + data.scored["validation"].text_bytes,
        "cache_mb": round(sum(file.stat().st_size for file in cache_folder().parent.rglob("*.*")) / 1e6),
        "load_average": round(os.getloadavg()[0], 1),
    }


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The address under which a folder's files can be fetched."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Say nothing of each request."""


def _peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    from partialtune.builtin import builtin_folder

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 80])
    parser.add_argument("--texts", nargs="+", default=["builtin:python-docs"])
    parser.add_argument("--tokenizer", default=str(builtin_folder("builtin:lilliput")))
    parser.add_argument("--cleaning", default="auto", choices=["auto", "gutenberg", "none"])
    parser.add_argument("--folder", help="where the text and the cache go for the time being, default: a temporary one")
    parser.add_argument("--measure", metavar="ADDRESS", help="measure this text, in this process")
    words = parser.parse_args()
    if words.measure:
        logging.basicConfig(level=logging.WARNING)
        print(json.dumps(measure(words.measure, words.tokenizer, words.cleaning)))
        return
    for megabytes in words.megabytes:
        with tempfile.TemporaryDirectory(dir=words.folder) as folder, served(folder) as address:
            make_text(words.texts, megabytes, Path(folder) / "text.txt")
            command = [sys.executable, __file__, "--measure", f"{address}/text.txt", "--tokenizer", words.tokenizer]
            command += ["--cleaning", words.cleaning]
            environment = {**os.environ, "PARTIALTUNE_CACHE": f"{folder}/cache"}
            for run in ("first", "second"):
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                result = {"megabytes": megabytes, "run": run, **json.loads(done.stdout.splitlines()[-1])}
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
