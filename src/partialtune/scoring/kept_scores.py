"""Scores of the base, kept in the run's folder and in the user's cache: they are taken once.

In: what the scores depend on. Out: a file that gives them back where that is still the same, and else gives nothing.
A run that was interrupted before its first step finds what it had taken in its folder; another run of the same base,
texts and prompts, as with another learning rate, finds all of it in the cache.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from partialtune.cache import cached_by_content, find_cached
from partialtune.distributed import decided_by_main, is_main, rank_and_processes
from partialtune.errors import TextError
from partialtune.files import write_whole
from partialtune.metrics import METRICS
from partialtune.scoring.evaluation import ScoredText, TextScores
from partialtune.scoring.prompts import PromptProbe

KEPT_FILE = ".before.safetensors"
CACHED = "scores"  # kind of file in the cache
PROMPTS = "prompts"  # no text has this name: `prompts` of evaluation.json is taken
LAYOUT = 2  # of the file; raised when it changes, so that no older one is read as a newer one
ROWS_AT_ONCE = 4096  # windows that are digested at a time


class KeptScores:
    """Scores by the name of their text, and prompts; each is written as soon as it is there.

    Args:
        file: Read where it exists and has the same `basis`. A file that cannot be read or written costs no run.
        basis: Digest of all that the scores depend on, of `basis_of`.
        shared: Whether to look into the cache, and to put them there.

    Attributes:
        used: Names of what is used again.
        source: What took it, in words.
    """

    def __init__(self, file: Path, basis: str, shared: bool = False) -> None:
        self.file, self.basis, self.shared = file, basis, shared
        self._parts, self._tensors, self.source = decided_by_main(self._find)
        self.used = list(self._parts)

    def share(self) -> None:
        """Put all of them into the cache, for other runs. A cache that cannot be written costs no run."""
        if self.shared and is_main() and set(self._parts) - set(self.used):
            with suppress(OSError, SafetensorError, TextError):
                cached_by_content(CACHED, ".safetensors", {"basis": self.basis}, self._write)

    def _write(self, path: Path) -> dict[str, Any]:
        path.write_bytes(self._content())
        return {}

    def text(self, name: str, score: Callable[[], TextScores]) -> TextScores:
        """What `evaluation.score_windows` gives for a text: as it was kept, else as `score` gives it now."""
        if name not in self._parts:
            found = score()
            tensors = {f"nats/{name}": found.nats, f"sums/{name}": found.sums}
            self._keep(name, found.figures, {key: torch.from_numpy(values) for key, values in tensors.items()})
        nats, sums = (self._tensors[f"{kind}/{name}"].numpy() for kind in ("nats", "sums"))
        return TextScores(self._parts[name], nats, sums)

    def prompts(self, probe: Callable[[], list[PromptProbe]]) -> list[PromptProbe]:
        """What `prompts.probe_prompts` gives: as it was kept, else as `probe` gives it now."""
        if PROMPTS not in self._parts:
            probes = probe()
            entries = [asdict(replace(one, log_probabilities=None)) for one in probes]
            self._keep(PROMPTS, entries, {f"prompt/{at}": one.log_probabilities for at, one in enumerate(probes)})
        tensors = [self._tensors[f"prompt/{at}"] for at in range(len(self._parts[PROMPTS]))]
        return [
            PromptProbe(**{**entry, "log_probabilities": tensor})
            for entry, tensor in zip(self._parts[PROMPTS], tensors, strict=True)
        ]

    def _keep(self, name: str, part: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self._parts[name] = part
        self._tensors |= tensors
        if is_main():
            with suppress(OSError, SafetensorError):  # they are taken again then
                write_whole(self.file, self._content())

    def _content(self) -> bytes:
        return save(self._tensors, {"basis": self.basis, "parts": json.dumps(self._parts, allow_nan=False)})

    def _find(self) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
        parts, tensors = self._read(self.file)
        cached = find_cached(CACHED, ".safetensors", {"basis": self.basis}) if self.shared and not parts else None
        if cached is not None:
            return *self._read(cached.path), "an earlier run"
        return parts, tensors, "an earlier start"

    def _read(self, file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        with suppress(OSError, SafetensorError, ValueError), safe_open(file, "pt") as kept:
            metadata = kept.metadata() or {}
            if metadata.get("basis") == self.basis:
                return json.loads(metadata.get("parts", "")), {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        return {}, {}


def basis_of(
    base_sha256: Mapping[str, str],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, ScoredText],
    prompts: Sequence[str],
    batch_size: int,
    device: torch.device,
    fast_paths: Collection[str] = (),
    dtypes: Mapping[str, int] | None = None,
) -> str:
    """Digest of what scores depend on, to the bit: model, texts, prompts, batches, machine, versions.

    Args:
        base_sha256: Digest of each parameter of the base.
        config: Of the model; buffers are made from it.
        tokenizer: Decides the prompts' tokens, and what they read as.
        texts, prompts, batch_size: What is scored, and how much at once.
        device: Where.
        fast_paths: By which; they round otherwise.
        dtypes: How many parameters are held in each dtype: a digest is over values widened to fp32.
    """
    basis = {
        "base": dict(base_sha256),
        "config": config.to_json_string(use_diff=False),
        "tokenizer": tokenizer_basis(tokenizer),
        "texts": {name: text_basis(text) for name, text in texts.items()},
        "prompts": list(prompts),
        "batch": [batch_size, rank_and_processes()[1], torch.get_num_threads()],
        "device": [device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else ""],
        "metrics": list(METRICS),
        "layout": [LAYOUT, *sorted(fast_paths)],
        "source": _source(),
        "dtypes": dict(dtypes or {}),
        "versions": [version(name) for name in ("partialtune", "torch", "transformers")],
    }
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """Digest of the code that takes scores: another state of it, under the same version, may take other ones."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()


def tokenizer_basis(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of a tokenizer that `tokenizers` runs, its way of cutting words too; of others the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()


def text_basis(text: ScoredText) -> list[Any]:
    """What the scores of a text depend on: its windows by their digest, and its size."""
    return [_digest(text), text.text_tokens, text.text_bytes, text.comes_back]


def _digest(text: ScoredText) -> str:
    digest, windows = hashlib.sha256(), text.windows.with_format("numpy")
    for at in range(0, len(windows), ROWS_AT_ONCE):
        digest.update(np.asarray(windows[at : at + ROWS_AT_ONCE]["input_ids"], dtype="<i8").tobytes())
    return digest.hexdigest()
