"""The prefix from disk: how long a first run fills, how long a second one takes to look the same rows up.

    python tests/benchmarks/prefix_on_disk.py [--windows 48] [--batch 16] [--bf16] [--folder FOLDER]

GPT-2's 124M shape with random weights, 256 tokens, the last two blocks train: ten are frozen. Each run is a process of
its own, in which every pass ends where the first block that trains would begin. Between the two the files leave the
system's cache, so that the second run reads them from the disk. To open the store, with the weights' digests of which
a run has those of its audit, and the 32 tokens that tell a changed model, stands beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 0.05  # of the time of filling
TOKENS, FROZEN = 256, 10


def pass_over(windows: int, batch: int, bf16: bool) -> dict[str, float]:
    """One run: seconds of all passes, of the processor too, and of opening; rows from disk, and bytes there."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from partialtune.engine.broken_off_pass import reach
    from partialtune.engine.disk_store import open_disk_store
    from partialtune.engine.prefix import PrefixCache
    from partialtune.engine.prefix_facts import prefix_facts
    from partialtune.engine.prefix_weights import prefix_digest
    from partialtune.model.digests import digests

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    rows = torch.randint(model.config.vocab_size, (windows, TOKENS))
    sums = digests(model)
    began = time.perf_counter()
    digest = prefix_digest(model, FROZEN, sums)
    store = open_disk_store(prefix_facts(model, FROZEN, digest))
    opening = time.perf_counter() - began
    cache = PrefixCache(model, FROZEN, store, digest)
    cache.put_on()
    first_that_trains = model.transformer.h[FROZEN]

    def until_it_begins(stop):
        return first_that_trains.register_forward_pre_hook(lambda _module, args: stop(args))

    began, processor = time.perf_counter(), time.process_time()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for ids in rows.split(batch):
            reach(model, {"input_ids": ids, "use_cache": False}, until_it_begins, "GPT-2")
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    found = {"hits": cache.hits, "misses": cache.misses, "written": store.size}
    cache.take_off()
    for file in store.path.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"seconds": seconds, "processor": processor, "opening": opening, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="under autocast, which keeps half the bytes")
    parser.add_argument("--folder", type=Path, help="of the cache; else one that is removed at the end")
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_run:
        print(json.dumps(pass_over(args.windows, args.batch, args.bf16)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        environment = {**os.environ, "PARTIALTUNE_CACHE": str(args.folder or temporary)}
        command = [sys.executable, __file__, *sys.argv[1:], "--one-run"]
        runs = []
        for _ in range(2):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    print("| run | rows computed | rows from disk | seconds | of the processor | to open | MB written |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, run in zip(("first", "second"), runs, strict=True):
        print(
            f"| {name} | {run['misses']} | {run['hits']} | {run['seconds']:.2f} | {run['processor']:.2f} | "
            f"{run['opening']:.2f} | {run['written'] / 2**20:.0f} |"
        )
    ratio = runs[1]["seconds"] / runs[0]["seconds"]
    print(f"second / first: {ratio:.3f}, {'met' if ratio <= TARGET else 'MISSED'} ({TARGET} wanted)")


if __name__ == "__main__":
    main()
