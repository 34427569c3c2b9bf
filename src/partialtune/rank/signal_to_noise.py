"""Matrices ranked by their weights alone: singular values above what noise has, beside those below.

A matrix of independent entries with standard deviation s has no singular value above s (sqrt(m) + sqrt(n)), but for
ever smaller exceptions: the edge of Marchenko and Pastur (1967, https://doi.org/10.1070/SM1967v001n04ABEH001994). What
a matrix has above it was learnt. s is estimated from the median singular value, which a few large ones do not move:
Gavish and Donoho 2014, "The optimal hard threshold for singular values is 4/sqrt(3)",
https://arxiv.org/abs/1305.5870, section III.E.

To train the matrices with the highest ratio of signal to noise, kind by kind, is the idea of Spectrum: Hartford et al.
2024, "Spectrum: Targeted Training on Signal to Noise Ratio", https://arxiv.org/abs/2406.06623. There the spread of the
singular values stands for s; here it is s. Neither text nor gradients are needed, nor the model in memory.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from partialtune.cost.advice import as_yaml
from partialtune.errors import ModelError
from partialtune.model.checkpoint_folder import checkpoint_folder
from partialtune.model.structure import ModelStructure
from partialtune.model.weight_files import Weights, open_weights
from partialtune.progress import progress_bar
from partialtune.tables import draw_table

GRID = 20_001  # places at which the law of noise is summed: its median is then right to 1e-6


@dataclass(frozen=True)
class RankedMatrix:
    """One matrix of a block.

    Attributes:
        name: Of the parameter.
        kind: What it is in its block: `attn.c_attn.weight`.
        block: Its block.
        shape: As the model holds it. Of several experts in one tensor (E, m, n) each is a matrix by itself.
        signal: Sum of the singular values above the edge.
        noise: Sum of those below.
        ratio: signal / noise, None where noise is 0.
        above: How many are above.
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, ...]
    signal: float
    noise: float
    ratio: float | None
    above: int


@dataclass(frozen=True)
class WeightRanking:
    """The matrices of a model, the largest ratio first, within each kind.

    Attributes:
        model_name: For messages.
        top: How many of each kind are chosen.
        kinds: Kind -> its matrices in their order.
        selectors: What to paste into a recipe: the first of each kind.
    """

    model_name: str
    top: int
    kinds: Mapping[str, tuple[RankedMatrix, ...]]
    selectors: list[str]

    @property
    def lowest_block(self) -> int:
        """Backward stops there if what is chosen trains."""
        return min(matrix.block for matrices in self.kinds.values() for matrix in matrices[: self.top])

    @property
    def blocks(self) -> dict[int, float]:
        """Block -> mean over its matrices of ratio / mean ratio of the kind; the largest first."""
        shares: dict[int, list[float]] = {}
        for matrices in self.kinds.values():
            ratios = [matrix.ratio for matrix in matrices if matrix.ratio is not None]
            mean = sum(ratios) / len(ratios) if ratios else 0.0
            for matrix in matrices:
                if matrix.ratio is not None and mean:
                    shares.setdefault(matrix.block, []).append(matrix.ratio / mean)
        means = {block: sum(found) / len(found) for block, found in shares.items()}
        return dict(sorted(means.items(), key=lambda pair: -pair[1]))

    def to_json(self) -> dict[str, Any]:
        """All of it, for `json.dumps(..., allow_nan=False)`."""
        return {
            "model_name": self.model_name,
            "kinds": {kind: [asdict(matrix) for matrix in matrices] for kind, matrices in self.kinds.items()},
            "blocks": {str(block): score for block, score in self.blocks.items()},
            "lowest_block": self.lowest_block,
            "trainable": self.selectors,
        }


def rank_weights(name: str, top: int | None = None, trust_remote_code: bool = False) -> WeightRanking:
    """Rank the matrices in the blocks of a model by their signal-to-noise ratio, one tensor in memory at a time.

    Args:
        name: Folder, `builtin:lilliput` or Hub id, which may end in `@REVISION`.
        top: How many of each kind to choose; if None, a quarter of them, at least one.
        trust_remote_code: Whether the model's code may come from there.

    Raises:
        ModelError: If the weights cannot be read, or no block has a matrix.
    """
    folder, said = checkpoint_folder(name)
    weights = open_weights(folder, said, trust_remote_code)
    matrices = _measure(weights, _matrices_in_blocks(weights.structure))
    if not matrices:
        raise ModelError(f"{said} has no matrix in its blocks: there is nothing to rank.")
    kinds: dict[str, list[RankedMatrix]] = {}
    for matrix in matrices:
        kinds.setdefault(matrix.kind, []).append(matrix)
    count = top or max(1, round(weights.structure.block_count / 4))
    ordered = {kind: tuple(sorted(found, key=_place)) for kind, found in kinds.items()}
    selectors = [_selector([matrix.name for matrix in found[:count]]) for found in ordered.values()]
    return WeightRanking(said, count, ordered, selectors)


def _place(matrix: RankedMatrix) -> float:
    return -np.inf if matrix.ratio is None else -matrix.ratio


def _matrices_in_blocks(structure: ModelStructure) -> dict[str, tuple[str, int]]:
    """Name -> (kind, block) of each tensor in a block that holds matrices."""
    found = {}
    for info in structure.parameters:
        if info.block is not None and len(info.shape) in (2, 3) and min(info.shape[-2:]) > 1:
            found[info.name] = (info.name.removeprefix(f"{structure.blocks_path}.{info.block}."), info.block)
    return found


def _measure(weights: Weights, matrices: Mapping[str, tuple[str, int]]) -> list[RankedMatrix]:
    ranked = []
    with progress_bar(len(matrices), "singular values", "matrices") as bar:
        for name, (kind, block) in matrices.items():
            values = weights.read(name)
            several = values.unbind(0) if values.dim() == 3 else (values,)
            parts = [signal_and_noise(one) for one in several]
            signal, noise, above = (sum(part[place] for part in parts) for place in range(3))
            ratio = signal / noise if noise else None
            ranked.append(RankedMatrix(name, kind, block, tuple(values.shape), signal, noise, ratio, int(above)))
            bar.update(1)
    return ranked


def signal_and_noise(matrix: torch.Tensor) -> tuple[float, float, int]:
    """(sum of the singular values above the edge of noise, sum of those below, how many are above).

    A matrix and its transpose, as GPT-2's `Conv1D` holds it, give the same.

    Args:
        matrix: (m, n).
    """
    long, short = max(matrix.shape), min(matrix.shape)
    wide = matrix.double() if len(matrix) == short else matrix.double().T  # (short, long)
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()  # singular values, of a smaller matrix
    scale = float(values.median()) / (_median_of_noise(short / long) * long**0.5)
    above = values > scale * (long**0.5 + short**0.5)
    return float(values[above].sum()), float(values[~above].sum()), int(above.sum())


@cache
def _median_of_noise(ratio: float) -> float:
    """Median singular value of a large matrix of noise, divided by s sqrt(longer side); `ratio` is shorter / longer.

    The law of Marchenko and Pastur for singular values x, between 1 - sqrt(ratio) and 1 + sqrt(ratio):
    sqrt((upper^2 - x^2) (x^2 - lower^2)) / (pi ratio x).
    """
    lower, upper = 1 - ratio**0.5, 1 + ratio**0.5
    edges = np.linspace(lower, upper, GRID)
    x = (edges[1:] + edges[:-1]) / 2  # the density has no value at 0, where `ratio` is 1
    share = np.sqrt((upper**2 - x**2) * (x**2 - lower**2)) / x
    total = np.cumsum(share)
    return float(np.interp(total[-1] / 2, total, edges[1:]))


def _selector(names: Sequence[str]) -> str:
    r"""One pattern for matrices of a kind: /transformer\.h\.(3|11)\.attn\.c_attn\.weight/, and its bias beside it."""
    parts = [name.split(".") for name in names]
    differing = [place for place, words in enumerate(zip(*parts, strict=True)) if len(set(words)) > 1]
    if not differing:
        return f"/{re.escape(names[0])}/"
    place = differing[0]
    numbers = sorted({words[place] for words in parts}, key=int)
    pieces = [re.escape(word) for word in parts[0]]
    pieces[place] = f"({'|'.join(numbers)})"
    return "/" + r"\.".join(pieces) + "/"


def weight_table(ranking: WeightRanking, most: int = 6) -> str:
    """Each kind with its first matrices, then what to paste."""
    head = f"{ranking.model_name}: singular values of its weights above the edge of noise, beside those below"
    rows = [("kind", "block", "shape", "above", "signal / noise")]
    for kind, matrices in ranking.kinds.items():
        shown: Iterable[RankedMatrix] = matrices[: max(most, ranking.top)]
        rows += [(kind, str(m.block), " x ".join(map(str, m.shape)), str(m.above), _in_words(m.ratio)) for m in shown]
    more = any(len(matrices) > max(most, ranking.top) for matrices in ranking.kinds.values())
    return "\n".join(
        [
            head,
            "",
            draw_table(rows),
            *(["(--json lists all)"] if more else []),
            "",
            "Beware: on the bundled model this order did not tell what training gains; that of `--by gradient` did,",
            "among whole blocks. See docs/what-may-learn.md, Choosing, and measure on your own text.",
            "",
            f"To train the first {ranking.top} of each kind (backward stops in block {ranking.lowest_block}):",
            f"  trainable: {as_yaml(ranking.selectors)}",
        ]
    )


def _in_words(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.4f}"
