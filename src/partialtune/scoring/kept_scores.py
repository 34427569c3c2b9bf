"""Scores of the base, kept in the run's folder: a run that was interrupted before its first step uses them again.

In: what the scores depend on. Out: a file that gives them back where that is still the same, and else gives nothing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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

from partialtune.distributed import decided_by_main, is_main, rank_and_processes
from partialtune.files import write_whole
from partialtune.metrics import METRICS
from partialtune.scoring.evaluation import ScoredText
from partialtune.scoring.prompts import PromptProbe

KEPT_FILE = ".before.safetensors"
PROMPTS = "prompts"  # no text has this name: `prompts` of evaluation.json is taken
ROWS_AT_ONCE = 4096  # windows that are digested at a time


class KeptScores:
    """Scores by the name of their text, and prompts; each is written as soon as it is there.

    Args:
        file: Read where it exists and has the same `basis`. A file that cannot be read or written costs no run.
        basis: Digest of all that the scores depend on, of `basis_of`.
    """

    def __init__(self, file: Path, basis: str) -> None:
        self.file, self.basis = file, basis
        self._parts, self._tensors = decided_by_main(self._read)
        self.used = list(self._parts)  # names of what is used again

    def text(self, name: str, score: Callable[[], tuple[dict, np.ndarray]]) -> tuple[dict[str, Any], np.ndarray]:
        """What `evaluation.score_tokens` gives for a text: as it was kept, else as `score` gives it now."""
        if name not in self._parts:
            figures, nats = score()
            self._keep(name, figures, {f"nats/{name}": torch.from_numpy(nats)})
        return self._parts[name], self._tensors[f"nats/{name}"].numpy()

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
            metadata = {"basis": self.basis, "parts": json.dumps(self._parts, allow_nan=False)}
            with suppress(OSError, SafetensorError):  # they are taken again then
                write_whole(self.file, save(self._tensors, metadata))

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        with suppress(OSError, SafetensorError, ValueError), safe_open(self.file, "pt") as kept:
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
) -> str:
    """Digest of what scores depend on, to the bit: model, texts, prompts, batches, machine, versions.

    Args:
        base_sha256: Digest of each parameter of the base.
        config: Of the model; buffers are made from it.
        tokenizer: Decides the prompts' tokens, and what they read as.
        texts, prompts, batch_size: What is scored, and how much at once.
        device: Where.
    """
    basis = {
        "base": dict(base_sha256),
        "config": config.to_json_string(use_diff=False),
        "tokenizer": _tokenizer_basis(tokenizer),
        "texts": {name: _text_basis(text) for name, text in texts.items()},
        "prompts": list(prompts),
        "batch": [batch_size, rank_and_processes()[1], torch.get_num_threads()],
        "device": [device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else ""],
        "metrics": list(METRICS),
        "versions": [version(name) for name in ("partialtune", "torch", "transformers")],
    }
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def _tokenizer_basis(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of a tokenizer that `tokenizers` runs, its way of cutting words too; of others the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()


def _text_basis(text: ScoredText) -> list[Any]:
    return [_digest(text), text.text_tokens, text.text_bytes, text.comes_back]


def _digest(text: ScoredText) -> str:
    digest, windows = hashlib.sha256(), text.windows.with_format("numpy")
    for at in range(0, len(windows), ROWS_AT_ONCE):
        digest.update(np.asarray(windows[at : at + ROWS_AT_ONCE]["input_ids"], dtype="<i8").tobytes())
    return digest.hexdigest()
