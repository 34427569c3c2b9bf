"""The learning rate of each policy: each rate of a short list tried on the training text alone, the best one kept.

One rate for all would be no fair comparison: a few norms want ten times the rate of a whole model. The rate is chosen
by text that the comparison does not score: a probe trains on the first part of the training text and is scored on the
rest of it (`validation_share` of the training text). The held-out text plays no part in the choice.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from partialtune.compare.policies import Job, Policy
from partialtune.errors import RecipeError, TrainingDiverged
from partialtune.output_dir import read_json
from partialtune.recipe.arguments import TextArguments
from partialtune.text.sources import read_texts
from partialtune.text.streams import StoredText
from partialtune.text.windows import split_text

PROBE_TEXT = "probe_text"


@dataclass(frozen=True)
class Probe:
    """What a learning rate brought.

    Attributes:
        learning_rate: The rate.
        bits_per_byte: Of the end of the training text, after the probe; None where it failed.
        failure: Why there is none, empty otherwise.
        steps: Optimizer steps of the probe, None where it had as many as the policy's runs.
    """

    learning_rate: float
    bits_per_byte: float | None
    failure: str = ""
    steps: int | None = None


def write_probe_text(text: TextArguments, folder: Path) -> list[Path]:
    """Write the training part of each source to a file of its own, as it was decoded and cleaned.

    Raises:
        RecipeError: If files of another text are there already.
        TextError: If a source cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, source in enumerate(read_texts(text.text, text.text_cleaning, text.text_column)):
        train, _ = split_text(source.content, text.validation_share)
        file = folder / f"{number}.txt"
        aside = file.with_name(f".{file.name}.part")
        with aside.open("wb") as out:
            for piece in pieces_of(train):
                out.write(piece.encode("utf-8", errors="surrogatepass"))
        if file.is_file() and file.read_bytes() != aside.read_bytes():
            aside.unlink()
            raise RecipeError(
                f"{file} holds another text than {source.name} does now: the text has changed since the comparison "
                f"began. Name another --output_dir."
            )
        os.replace(aside, file)
        files.append(file)
    return files


def pieces_of(text: str | StoredText):
    """A text in pieces that fit into memory."""
    return [text] if isinstance(text, str) else text.pieces()


def probe_job(policy: Policy, rate: float, seed: int, text: Sequence[Path], folder: Path, steps: int | None) -> Job:
    """The run that tries a learning rate.

    Args:
        policy: What is tried.
        rate: The learning rate.
        seed: The first seed of the comparison.
        text: Files of the training text.
        folder: Of the comparison.
        steps: Optimizer steps, None for as many as the policy's runs have.
    """
    name = f"{policy.name}-lr{rate:g}"
    changes = {
        "output_dir": str(folder / "probes" / name),
        "learning_rate": rate,
        "seed": seed,
        "text": [str(file) for file in text],
        "text_cleaning": "none",  # it is clean
        "eval_texts": {},
        "prompts": [],
        "eval_strategy": "no",
        "save_strategy": "no",
        "push_to_hub": False,
        "resume_from_checkpoint": "auto",
        **({"max_steps": steps} if steps else {}),
    }
    title = f"{policy.name}, learning rate {rate:g}"
    return Job(policy, title, folder / "probes" / name, changes, folder / "logs" / f"probe-{name}.log")


def read_probe(job: Job, code: int) -> Probe:
    """What a probe that ended with `code` found. A rate at which training diverges is a finding, not a failure."""
    rate, steps = job.changes["learning_rate"], job.changes.get("max_steps")
    if code == 0:
        score = read_json(job.folder / "evaluation.json")["validation"]["after"]["bits_per_byte"]
        return Probe(rate, score, "" if score is not None else "not finite", steps)
    return Probe(rate, None, "diverged" if code == TrainingDiverged.exit_code else f"exit code {code}", steps)


def best_rate(probes: Sequence[Probe]) -> float:
    """The rate with the fewest bits per byte; where none trained, the smallest, whose runs will say why."""
    scored = [probe for probe in probes if probe.bits_per_byte is not None]
    if not scored:
        return min(probe.learning_rate for probe in probes)
    return min(scored, key=lambda probe: probe.bits_per_byte).learning_rate


def at_the_end_of_the_list(rate: float, probes: Sequence[Probe]) -> str:
    """`smallest` or `largest` where the chosen rate is that of the list, so that a better one may lie beyond."""
    rates = sorted(probe.learning_rate for probe in probes)
    return "" if len(rates) < 2 or rates[0] < rate < rates[-1] else "smallest" if rate == rates[0] else "largest"
