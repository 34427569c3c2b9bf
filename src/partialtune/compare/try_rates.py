"""The process that tries learning rates: `python -m partialtune.compare.try_rates FILE RATE,RATE RECIPE [--key value]`.

Each rate trains the recipe once and is scored on what the recipe holds out. A trial is kept in FILE as soon as it has
ended; no weights and no pages are written.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig, set_seed

from partialtune.compare.learning_rates import RateTrial, keep_trial
from partialtune.errors import FreezeViolation, PartialtuneError, TextError, TrainingDiverged
from partialtune.freeze.recipe_plan import in_steps, plan_of_recipe, tokens_of_recipe
from partialtune.metrics import HEADLINE
from partialtune.model.conformance import check_conformance
from partialtune.model.loading import load_config, load_model, load_tokenizer, quiet_libraries
from partialtune.model.model_checks import check_finite, check_ids
from partialtune.model.new_tokens import NewTokens, config_with, give_rows
from partialtune.net.addresses import without_secrets
from partialtune.recipe.recipe import Recipe, read_recipe
from partialtune.scoring.evaluation import score_text
from partialtune.training.launch import one_device_a_process, use_all_cores
from partialtune.training.recipe_trainer import make_trainer, prefix_phases
from partialtune.training.settings import run_length, steps_an_epoch, suit_length, training_arguments
from partialtune.training.training_data import RunData, data_of_recipe


def main(words: Sequence[str]) -> int:
    """Try learning rates and return an exit code.

    Args:
        words: File of the trials, rates with commas, and a recipe as `train` takes it.
    """
    file, rates, path, *overrides = words
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
    for rate in rates:
        keep_trial(file, recipe.values, try_rate(rate, recipe, config, new_tokens, data))


def try_rate(
    rate: float, recipe: Recipe, config: PretrainedConfig, new_tokens: NewTokens | None, data: RunData
) -> RateTrial:
    """Train once. A rate at which training diverges is a finding, not an error."""
    base = recipe.model
    with tempfile.TemporaryDirectory() as folder:
        changed = {"learning_rate": rate, "output_dir": folder, "report_to": "none"}
        args = training_arguments({**recipe.training, **changed, "eval_strategy": "no", "save_strategy": "no"})
        one_device_a_process(args)
        suit_length(args, {**recipe.training, "eval_strategy": "no"}, data.epoch_windows, held_out=False)
        model = load_model(base.model_name_or_path, config, base.model_revision, base.trust_remote_code)
        if new_tokens is not None:
            give_rows(model, new_tokens)
        check_finite(base.model_name_or_path, model)
        conformance = check_conformance(model, recipe.text.block_size)
        steps = steps_an_epoch(args, data.epoch_windows), run_length(args, data.epoch_windows)
        plan = plan_of_recipe(model, recipe.freeze, in_steps(recipe.freeze.schedule, *steps), args.seed)
        prefix = prefix_phases(recipe, plan, model, args)
        model.to(args.device)
        # seeded anew for each rate and where `train` seeds, right before the Trainer: the rates differ in nothing else
        set_seed(args.seed)
        run = make_trainer(recipe, plan=plan, model=model, args=args, data=data, prefix=prefix, conformance=conformance)
        length = recipe.training.get("max_steps")
        try:
            run.train()
        except TrainingDiverged:
            return RateTrial(rate, None, "diverged", length)
        except FreezeViolation:
            return RateTrial(rate, None, "failed its audit", length)
    score = score_text(model, data.scored["validation"], args.per_device_eval_batch_size, f"learning rate {rate:g}")
    bits = score[HEADLINE.key]
    return RateTrial(rate, bits, "not finite" if bits is None else "", length)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
