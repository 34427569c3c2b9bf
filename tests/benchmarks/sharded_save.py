"""Peak memory of the main process while a checkpoint is saved under FSDP2: in shards against in whole tensors.

    python tests/benchmarks/sharded_save.py [--processes 2] [--layers 8]

A GPT-2 with random weights, 512 wide (34 million parameters with 8 layers, 122 million with 36), of which the last two
blocks train, takes one step on processes on CPUs (FSDP2 as in tests/fsdp_on_cpu.py) and is saved: checkpoint, and then
the final model. The peak is the largest resident memory (VmHWM, begun anew before the save and each part of it) over
what was resident before the save. Each kind has processes of its own.
"""

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from random_models import Shape, write_model_and_text

TESTS = Path(__file__).resolve().parents[1]
SHAPE = Shape(
    {"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    | {"attn_pdrop": 0.0, "n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 16_000, "n_positions": 128}
)
KINDS = {"whole": "FULL_STATE_DICT", "shards": "SHARDED_STATE_DICT"}
MB = 2**20


def status(key: str) -> int:
    """Bytes of this process, as the system counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Peaks:
    """The largest resident memory of each part of what is being saved, over what was resident before.

    Attributes:
        found: Part -> bytes; `rest` is what belongs to no part. A part in which nothing was added, but to what the ones
            before have left behind, has 0.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._before, self._entered, self._part = 0, 0, "rest"

    def begin(self) -> None:
        """Begin anew, with what is resident now."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what training left free would hide what the save takes
        self._before = status("VmRSS")
        self._enter("rest")
        self.found = {}

    def _enter(self, part: str) -> str:
        """Count for another part from now on; the one before."""
        peak, last = status("VmHWM"), self._part
        added = peak - self._before if peak - self._entered > MB else 0
        self.found[last] = max(added, self.found.get(last, 0))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._entered, self._part = status("VmRSS"), part
        return last

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which counts for a part."""

        def counted(*args: object, **kwargs: object) -> Any:
            last = self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._enter(last)

        return counted

    def end(self) -> dict[str, float]:
        self._enter("rest")
        found, self.found = self.found, {}
        return {part: peak for part, peak in found.items() if peak}


PEAKS = Peaks()


def measured(save: Callable[..., None], found: list[dict[str, Any]]) -> Callable[..., None]:
    """The same function, whose peaks and seconds are kept."""

    def save_and_measure(*args: object, **kwargs: object) -> None:
        PEAKS.begin()
        begun = time.perf_counter()
        save(*args, **kwargs)
        parts = PEAKS.end()
        found.append({"peak": max(parts.values()), "parts": parts, "seconds": time.perf_counter() - begun})

    return save_and_measure


def train(folder: Path, kind: str) -> None:
    """One process of a run; the main one writes what it measured."""
    sys.path.insert(0, str(TESTS))
    from transformers import trainer as of_transformers

    import fsdp_on_cpu
    from partialtune.cli import main
    from partialtune.engine import trainer_overrides
    from partialtune.engine.trainer_overrides import TunedTrainer
    from partialtune.engine.tuning import Tuning
    from partialtune.proof.audit import FreezeAuditCallback
    from partialtune.recipe_run import write_results

    fsdp_on_cpu.let_accelerate_shard()
    os.environ["FSDP_STATE_DICT_TYPE"] = KINDS[kind]
    write_results.draw_figures = write_results.write_report = write_results.write_card = lambda folder: None
    for owner, name, part in (
        (FreezeAuditCallback, "check_frozen", "audit"),
        (of_transformers, "save_fsdp_model", "shards of weights"),
        (of_transformers, "save_fsdp_optimizer", "optimizer"),
        (trainer_overrides, "save_sharded_model", "whole weights"),
        (trainer_overrides, "shards_by_process", "digests of files"),
        (trainer_overrides, "finish_checkpoint", "digests of files"),
        (Tuning, "read_back", "read back"),
    ):
        setattr(owner, name, PEAKS.of(part, getattr(owner, name)))
    checkpoint: list[dict[str, Any]] = []
    model: list[dict[str, Any]] = []
    TunedTrainer._save_checkpoint = measured(TunedTrainer._save_checkpoint, checkpoint)
    in_checkpoint = TunedTrainer.save_model

    def save_model(self, *args, **kwargs) -> None:
        (in_checkpoint if self._in_checkpoint else measured(in_checkpoint, model))(self, *args, **kwargs)

    TunedTrainer.save_model = save_model
    recipe = {"model_name_or_path": folder, "text": folder / "text.txt", "output_dir": folder / kind}
    keys = {"max_steps": 1, "per_device_train_batch_size": 1, "prefix_cache": "off", "validation_share": 0}
    (folder / f"{kind}.yaml").write_text(
        json.dumps({**{key: str(value) for key, value in recipe.items()}, "prompts": []})
    )
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    code = main(["train", str(folder / f"{kind}.yaml"), *words, "--block_size", "64", "--trainable", "blocks[-2:]"])
    if os.environ["RANK"] == "0":
        (folder / f"{kind}.json").write_text(json.dumps({"checkpoint": checkpoint[0], "model": model[0]}))
    os._exit(code)


def run(folder: Path, kind: str, processes: int) -> dict[str, dict[str, Any]]:
    """What the main process of a run measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    words = [sys.executable, __file__, "--as-process", kind, str(folder)]
    started = [
        subprocess.Popen(words, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(processes)
    ]
    if any(process.wait() for process in started):
        raise SystemExit(f"{kind}: a process failed.")
    return json.loads((folder / f"{kind}.json").read_text())


def as_table(found: dict[str, dict[str, dict[str, Any]]], disk: dict[str, int], weights: int) -> str:
    """Rows of both kinds, and their ratio.

    Args:
        found: Kind -> what was saved -> its peak in bytes, and seconds.
        disk: Kind -> bytes of its checkpoint.
        weights: Bytes of the model in fp32.
    """
    lines = [
        f"Weights: {weights / MB:,.0f} MB in fp32. Memory of the main process over what it held before the save.",
        "",
    ]
    lines += ["| checkpoint | peak MB | seconds | on disk MB | final model, peak MB |", "|---|---|---|---|---|"]
    for kind, of_kind in found.items():
        checkpoint, model = of_kind["checkpoint"], of_kind["model"]
        cells = f"{checkpoint['peak'] / MB:,.0f} | {checkpoint['seconds']:.1f} | {disk[kind] / MB:,.0f}"
        lines.append(f"| {kind} ({KINDS[kind]}) | {cells} | {model['peak'] / MB:,.0f} |")
    ratio = found["shards"]["checkpoint"]["peak"] / found["whole"]["checkpoint"]["peak"]
    for kind, of_kind in found.items():
        parts = (f"{part} {peak / MB:,.0f}" for part, peak in of_kind["checkpoint"]["parts"].items())
        lines += ["", f"{kind}, peak MB of each part of the checkpoint: {', '.join(parts)}."]
    return "\n".join([*lines, "", f"Shards take {ratio:.2f} of the memory that whole tensors take."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--as-process", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.as_process:
        train(Path(words.as_process[1]), words.as_process[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_and_text(replace(SHAPE, config={**SHAPE.config, "n_layer": words.layers}), 256, folder)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found = {kind: run(folder, kind, words.processes) for kind in KINDS}
        files = {kind: (folder / kind / "checkpoint-1").rglob("*") for kind in KINDS}
        disk = {kind: sum(path.stat().st_size for path in paths if path.is_file()) for kind, paths in files.items()}
        print(as_table(found, disk, weights))


if __name__ == "__main__":
    main()
