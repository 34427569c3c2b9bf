"""The learning rate of each policy: each rate of a short list tried on the training text alone, the best one kept.

One rate for all would be no fair comparison: a few norms want ten times the rate of a whole model. The rate is chosen
by text that the comparison does not score: a trial trains on the first part of the training text and is scored on the
rest of it (`validation_share` of the training text). The held-out text plays no part in the choice.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partialtune.compare.policies import Policy, changed_values, changed_words
from partialtune.errors import RecipeError
from partialtune.recipe.arguments import TextArguments
from partialtune.run_folder import read_json, write_json
from partialtune.text.reading import read_texts
from partialtune.text.stored_text import StoredText
from partialtune.text.windows import split_text
from partialtune.training.resume_check import recipe_differences


@dataclass(frozen=True)
class RateTrial:
    """The result of training with one learning rate.

    Attributes:
        learning_rate: The rate.
        bits_per_byte: Of the end of the training text, after the trial; None where it failed.
        failure: Why there is none, empty otherwise.
        steps: Optimizer steps of the trial, None where epochs were counted.
    """

    learning_rate: float
    bits_per_byte: float | None
    failure: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Search:
    """The trials of one policy, all in one process: they are not timed, and starting one costs more than a trial.

    Attributes:
        policy: What is tried.
        rates: Learning rates, ascending.
        text: Files of the training text.
        seed: The first seed of the comparison.
        steps: Optimizer steps of a trial, None for as many as a run has.
        file: Where the trials that ended are kept.
        log: What the process prints goes there.
        shares_prefix: Whether others want the states of its frozen prefix, too.
    """

    policy: Policy
    rates: Sequence[float]
    text: Sequence[Path]
    seed: int
    steps: int | None
    file: Path
    log: Path
    shares_prefix: bool = False

    @property
    def title(self) -> str:
        return f"{self.policy.name}, learning rates"

    @property
    def changes(self) -> dict[str, Any]:
        """Recipe values that a trial changes."""
        # it is clean; without eval_texts: they take time, and their scores play no part in the choice
        text: dict[str, Any] = {"text": [str(file) for file in self.text], "text_cleaning": "none", "eval_texts": {}}
        recipe = self.policy.recipe.text
        if recipe.replay:  # which is read as in the run
            text |= {"replay": {"text_cleaning": recipe.text_cleaning, **recipe.replay}}
        length = {"max_steps": self.steps} if self.steps else {}
        return {**text, "seed": self.seed, "output_dir": str(self.file.with_suffix("")), **length}

    @property
    def values(self) -> dict[str, Any]:
        return changed_values(self.policy.recipe.values, self.changes)

    def command(self, rates: Sequence[float]) -> list[str]:
        """The process that tries `rates`."""
        listed = ",".join(map(repr, rates))  # repr: every digit, so that a kept trial is found by its rate
        recipe = [str(self.policy.path), *changed_words(self.policy.words, self.changes)]
        return [sys.executable, "-m", "partialtune.compare.try_rates", str(self.file), listed, *recipe]

    def read(self) -> list[RateTrial]:
        """The trials that have ended.

        Raises:
            RecipeError: If they were made by another recipe.
        """
        if not self.file.is_file():
            return []
        content = read_json(self.file)
        different = [key for key in recipe_differences(content["recipe"], self.values) if key != "learning_rate"]
        different += ["max_steps"] if content["recipe"].get("max_steps") != self.values.get("max_steps") else []
        if different:
            raise RecipeError(
                f"{self.file} holds learning rates that were tried with another recipe; they differ in "
                f"{', '.join(dict.fromkeys(different))}. Name another --output_dir."
            )
        return [RateTrial(**trial) for trial in content["trials"]]

    def missing(self) -> list[float]:
        """Rates that are still to be tried."""
        tried = {trial.learning_rate for trial in self.read()}
        return [rate for rate in self.rates if rate not in tried]

    def steps_done(self, rates: Sequence[float], steps: int) -> int:
        """Optimizer steps taken to try `rates`, `steps` for each that has ended, and those of the running one."""
        try:
            rate, step = progress_file(self.file).read_text().split()
            running = {float(rate): int(step)}
        except (OSError, ValueError):  # not there yet, or half written
            running = {}
        left = [rate for rate in self.missing() if rate in rates]
        return steps * (len(rates) - len(left)) + sum(running.get(rate, 0) for rate in left)

    def trials(self, failure: str = "") -> list[RateTrial]:
        """The trials of the list's rates, ascending; those that are not there failed, and `failure` says why."""
        found = {trial.learning_rate: trial for trial in self.read()}
        return [found.get(rate) or RateTrial(rate, None, failure) for rate in self.rates]


def progress_file(trials: Path) -> Path:
    """Where the process that tries rates says which of them is at which step, beside the file of its trials."""
    return trials.with_suffix(".progress")


def keep_trial(file: Path, recipe: Mapping[str, Any], trial: RateTrial) -> None:
    """Add a trial to a file."""
    earlier = read_json(file)["trials"] if file.is_file() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"recipe": dict(recipe), "trials": [*earlier, asdict(trial)]})


def write_training_text(text: TextArguments, folder: Path) -> list[Path]:
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
        # written aside, since it is compared with the file of an earlier start before it takes that one's place
        aside = file.with_name(f".{file.name}.part")
        with aside.open("wb") as out:
            for piece in pieces_of(train):
                out.write(piece.encode("utf-8", errors="surrogatepass"))
        # trials that ended are used again, which would mix rates found on two texts
        if file.is_file() and file.read_bytes() != aside.read_bytes():
            aside.unlink()
            raise RecipeError(
                f"{file} holds another text than {source.name} does now: the text has changed since the comparison "
                f"began. Name another --output_dir."
            )
        os.replace(aside, file)
        files.append(file)
    return files


def pieces_of(text: str | StoredText) -> Iterable[str]:
    """A text in pieces that fit into memory."""
    return [text] if isinstance(text, str) else text.pieces()


def best_rate(trials: Sequence[RateTrial]) -> float:
    """The rate with the fewest bits per byte; where no trial has a score, the smallest: its runs will report why."""
    scored = [trial for trial in trials if trial.bits_per_byte is not None]
    if not scored:
        return min(trial.learning_rate for trial in trials)
    return min(scored, key=lambda trial: trial.bits_per_byte).learning_rate


def at_the_end_of_the_list(rate: float, trials: Sequence[RateTrial]) -> str:
    """`smallest` or `largest` where the chosen rate is that of the list, so that a better one may lie beyond."""
    rates = sorted(trial.learning_rate for trial in trials)
    return "" if len(rates) < 2 or rates[0] < rate < rates[-1] else "smallest" if rate == rates[0] else "largest"
