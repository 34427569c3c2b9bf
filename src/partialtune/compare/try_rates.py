"""The process that tries learning rates: `python -m partialtune.compare.try_rates FILE RATE,RATE RECIPE [--key value]`.

Each rate trains the recipe once and is scored on what the recipe holds out. A trial is kept in FILE as soon as it has
ended; no weights and no pages are written.
"""

import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from partialtune.compare.learning_rates import RateTrial, keep_trial, progress_file
from partialtune.compare.reused_base import ReusedBase
from partialtune.engine.prefix_choice import PrefixPhase, prefix_words
from partialtune.engine.prefix_place import SHARED_BY_OTHERS
from partialtune.engine.state_store import StateStore
from partialtune.errors import FreezeViolation, PartialtuneError, TextError, TrainingDiverged
from partialtune.freeze.plan import FreezePlan
from partialtune.freeze.recipe_plan import in_steps, plan_of_recipe, tokens_of_recipe
from partialtune.metrics import HEADLINE
from partialtune.model.conformance import Conformance, check_conformance
from partialtune.model.loading import load_config, load_tokenizer, quiet_libraries
from partialtune.model.model_checks import check_ids
from partialtune.model.new_tokens import NewTokens, config_with
from partialtune.net.addresses import without_secrets
from partialtune.recipe.recipe import Recipe, read_recipe
from partialtune.scoring.evaluation import score_text
from partialtune.scoring.fast_scoring import FastScoring
from partialtune.training.launch import one_device_a_process, use_all_cores
from partialtune.training.load_base import load_base
from partialtune.training.recipe_trainer import make_trainer, prefix_phases
from partialtune.training.settings import run_length, steps_an_epoch, suit_length, training_arguments
from partialtune.training.training_data import RunData, data_of_recipe

logger = logging.getLogger(__name__)


def main(words: Sequence[str]) -> int:
    """Try learning rates and return an exit code.

    Args:
        words: File of the trials, rates with commas, and a recipe as `train` takes it.
    """
    file, rates, path, *overrides = words
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("partialtune").setLevel(logging.INFO)
    use_all_cores()
    quiet_libraries()
    try:
        try_rates(Path(file), [float(rate) for rate in rates.split(",")], read_recipe(path, overrides))
    except PartialtuneError as error:
        print(f"partialtune: {without_secrets(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def try_rates(file: Path, rates: Sequence[float], recipe: Recipe) -> None:
    """Try each rate with the same text, windows and seed."""
    base = recipe.model
    tokenizer = load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code)
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    new_tokens = tokens_of_recipe(base, tokenizer)
    args = training_arguments(recipe.training)
    data = data_of_recipe(recipe, args, tokenizer)
    check_ids(base.model_name_or_path, config_with(config, new_tokens), data.largest_ids)
    if not data.scored["validation"].comes_back:
        raise TextError(
            "The text does not come back from its tokens, so it has no bits per byte and learning rates cannot be "
            "compared by them. Say one learning_rate in each recipe, or take a model whose tokenizer writes the text."
        )
    trials = Trials(recipe, config, new_tokens, data, progress_file(file))
    for rate in rates:
        keep_trial(file, recipe.values, trials.trial(rate))


class StepsTaken(TrainerCallback):
    """Writes at which step a rate is, at most once a second: the bar of `compare` shows it."""

    def __init__(self, file: Path, rate: float) -> None:
        self._file, self._rate, self._next = file, rate, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() >= self._next:
            self._file.write_text(f"{self._rate!r} {state.global_step}")
            self._next = time.monotonic() + 1


class Trials:
    """Trains one recipe with one rate after another: base, plan and states of the frozen prefix are made once.

    Args:
        recipe: What is tried.
        config: Of its base.
        new_tokens: Of its tokenizer.
        data: Its windows and scored texts.
        progress: File that says which rate is at which step.
    """

    def __init__(
        self, recipe: Recipe, config: PretrainedConfig, new_tokens: NewTokens | None, data: RunData, progress: Path
    ) -> None:
        self.recipe, self.config, self.new_tokens, self.data = recipe, config, new_tokens, data
        self._progress = progress
        self._base: ReusedBase | None = None
        self._scoring: FastScoring | None = None
        self._conformance = Conformance()
        self._decided: tuple[FreezePlan, list[PrefixPhase]] | None = None
        self._states: dict[int, StateStore] = {}  # by the number of blocks that they are behind

    def trial(self, rate: float) -> RateTrial:
        """Train once. A rate at which training diverges is a finding, not an error."""
        recipe, data, length = self.recipe, self.data, self.recipe.training.get("max_steps")
        with tempfile.TemporaryDirectory() as folder:
            args = self._arguments(rate, folder)
            self._base = self._base or ReusedBase(partial(self._loaded, args))
            model = self._base.take()
            plan, prefix = self._decisions(model, args)
            model.to(args.device)
            self._base.keep(model, plan, args)
            # seeded anew for each rate and where `train` seeds, right before the Trainer: the rates differ in nothing
            # else
            set_seed(args.seed)
            run = make_trainer(
                recipe, plan=plan, model=model, args=args, data=data, prefix=prefix, conformance=self._conformance
            )
            run.trainer.add_callback(StepsTaken(self._progress, rate))
            if os.environ.get(SHARED_BY_OTHERS) != "0":
                run.tuning.fast.handed_on = self._states
            try:
                run.train()
            except (TrainingDiverged, FreezeViolation) as error:
                self._give_up()
                why = "diverged" if isinstance(error, TrainingDiverged) else "failed its audit"
                return RateTrial(rate, None, why, length)
        if self._scoring is None or self._scoring.model is not model:
            blocks = min(phase.blocks for phase in prefix)  # frozen in all phases
            self._scoring = FastScoring(model, recipe.speed.fast_paths, blocks)
        held_out, batch_size = data.scored["validation"], args.per_device_eval_batch_size
        score = score_text(model, held_out, batch_size, f"learning rate {rate:g}", fast=self._scoring)
        if run.tuning.audit is None or not run.tuning.audit.passed:  # as a recipe with allow_failed_audit may
            self._give_up()
        bits = score[HEADLINE.key]
        return RateTrial(rate, bits, "not finite" if bits is None else "", length)

    def _give_up(self) -> None:
        """The next trial loads the base anew."""
        self._scoring = None
        if self._base is not None:
            self._base.give_up()

    def _arguments(self, rate: float, folder: str) -> TrainingArguments:
        given = self.recipe.training
        changed = {"learning_rate": rate, "output_dir": folder, "report_to": "none"}
        args = training_arguments({**given, **changed, "eval_strategy": "no", "save_strategy": "no"})
        one_device_a_process(args)
        suit_length(args, {**given, "eval_strategy": "no"}, self.data.epoch_windows, held_out=False)
        return args

    def _loaded(self, args: TrainingArguments) -> PreTrainedModel:
        recipe = self.recipe
        model = load_base(recipe, args, self.config, recipe.model.model_revision, self.new_tokens)
        self._conformance = check_conformance(model, recipe.text.block_size)  # switches off in each config what it must
        return model

    def _decisions(self, model: PreTrainedModel, args: TrainingArguments) -> tuple[FreezePlan, list[PrefixPhase]]:
        """What trains, and what is kept of the frozen prefix: the same for each rate, found out with the first."""
        if self._decided is None:
            recipe, windows = self.recipe, self.data.epoch_windows
            steps = steps_an_epoch(args, windows), run_length(args, windows)
            plan = plan_of_recipe(model, recipe.freeze, in_steps(recipe.freeze.schedule, *steps), args.seed)
            self._decided = plan, prefix_phases(recipe, plan, model, args, data=self.data)
            logger.info(prefix_words(self._decided[1]))
        return self._decided


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
