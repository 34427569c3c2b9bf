"""The commands: for each its arguments, its help, and the function that does the work and prints the result.

A command is one entry of `COMMANDS`, at the end. A function imports what it needs in its body: `partialtune --help`
does not wait for torch, and `verify` not for what only `train` needs.
"""

import argparse
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from partialtune.errors import InputError, ModelError, RecipeError
from partialtune.launcher_environment import check_launched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from partialtune.cost.forecast import Forecast
    from partialtune.freeze.plan import FreezePlan
    from partialtune.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


class Command(NamedTuple):
    """One command: its line in the help, what declares its arguments, and what runs it.

    `run` takes the parsed arguments and the words that are not among them: the `--key value` of a recipe.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Sequence[str]], None]


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe's path, and below the options the help on every key of our own."""
    from partialtune.recipe.arguments import recipe_help

    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, or builtin:quickstart; then --key value for each key to change"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = recipe_help()


def _add_json(parser: argparse.ArgumentParser, help: str = "print JSON alone") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")


def _train(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    check_launched()
    with _importing():
        from partialtune.model.loading import quiet_libraries
        from partialtune.recipe.recipe import read_recipe
        from partialtune.recipe_run.run_recipe import run_recipe
        from partialtune.training.launch import check_launcher, use_all_cores
        from partialtune.training.stopping import ended_by_signals

    # `accelerate launch` sets OMP_NUM_THREADS=1: on two cores a step of 1.39 s took 2.56 s
    use_all_cores()
    quiet_libraries()
    check_launcher()
    with ended_by_signals():
        recipe = read_recipe(_recipe_path(known.recipe), overrides)
        with _importing():
            import partialtune.recipe_run.train  # noqa: F401 - four seconds, for which no mistake in a recipe has to wait

        run_recipe(recipe)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    _add_json(parser, "print freeze_plan.json instead of tables")


def _plan(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with _importing():
        from partialtune.cost.forecast import forecast_table
        from partialtune.freeze.plan_table import plan_table
        from partialtune.freeze.recipe_plan import empty_base, names_rows, plan_before_text
        from partialtune.model.loading import load_tokenizer, quiet_libraries
        from partialtune.model.train_mode import stop_layer_drop
        from partialtune.recipe.key_rules import training_defaults
        from partialtune.recipe.recipe import read_recipe

    quiet_libraries()
    recipe = read_recipe(_recipe_path(known.recipe), overrides)
    base = recipe.model
    model = empty_base(base)
    if switched_off := stop_layer_drop(model):
        logger.warning(switched_off)
    tokens = None
    if names_rows(recipe.freeze) and not base.new_tokens:  # else the plan knows it
        tokens = len(load_tokenizer(base.model_name_or_path, base.model_revision, base.trust_remote_code))
    plan = plan_before_text(model, recipe.freeze, recipe.seed, tokens)
    rate = recipe.training.get("learning_rate", training_defaults()["learning_rate"])
    cost = _forecast(recipe, model, plan)
    if known.json:
        content = plan.to_json({}, {}) | (cost.to_json() if cost else {})
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        print("\n\n".join([plan_table(plan, rate), *([forecast_table(cost)] if cost else [])]))


def _forecast(recipe: "Recipe", model: "PreTrainedModel", plan: "FreezePlan") -> "Forecast | None":
    """Arithmetic and memory of a step; None, with a warning, for a model that computes none without weights."""
    from partialtune.cost.forecast import forecast

    training = recipe.training
    try:
        return forecast(
            model,
            plan,
            batch_size=training.get("per_device_train_batch_size", 8),
            block_size=recipe.text.block_size,
            accumulation=training.get("gradient_accumulation_steps", 1),
            # `auto` is measured by the run, and nothing is measured here
            bf16=training.get("bf16") is True,
            optimizer=training.get("optim", "adamw_torch_fused"),
            checkpointing=bool(training.get("activation_checkpointing")),
            fast_paths=recipe.speed.fast_paths,
        )
    except ModelError as error:  # a model whose forward pass decides by values has no step without them
        logger.warning("No forecast of arithmetic and memory: %s", error)
        return None


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder, builtin:lilliput or Hub id, also ID@REVISION")
    parser.add_argument(
        "adapted", metavar="ADAPTED", help="likewise; its freeze_plan.json is the claim where --trainable is absent"
    )
    parser.add_argument("--trainable", nargs="+", metavar="SELECTOR", help="what may have moved")
    _add_json(parser)


def _verify(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.model.loading import quiet_libraries
    from partialtune.verify.comparison_table import comparison_table
    from partialtune.verify.verify import verify

    _refuse(overrides)
    quiet_libraries()
    found = verify(known.base, known.adapted, known.trainable)
    as_json = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False) if known.json else None
    # printed first: where the claim is broken, the table says what broke it
    print(as_json or comparison_table(found), flush=True)
    found.raise_if_violated()


def _add_push(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--repo_id", required=True, metavar="NAMESPACE/NAME", help="repository, created where missing")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, main by default")
    parser.add_argument("--private", choices=("true", "false"), help="visibility; the namespace's default where absent")
    parser.add_argument("--allow_failed_audit", action="store_true", help="publish although the freeze audit failed")


def _push(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.hub.push import Target, push_run

    _refuse(overrides)
    private = None if known.private is None else known.private == "true"
    target = Target(known.repo_id, known.revision, private)
    print(push_run(Path(known.run), target, known.allow_failed_audit), flush=True)


def _add_apply(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="folder or Hub id of a run with checkpoint_format: delta")
    parser.add_argument("out", metavar="OUT", help="folder to write, absent or empty")
    parser.add_argument("--base", metavar="BASE", help="the base, if it is no longer where the delta says")


def _apply(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.model.loading import quiet_libraries
    from partialtune.rebuild import apply_delta

    _refuse(overrides)
    quiet_libraries()
    print(apply_delta(known.delta, known.out, known.base), flush=True)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "compared", nargs="+", metavar="RECIPE_OR_RUN", help="recipes to run, then --key value for all; or runs to read"
    )
    parser.add_argument(
        "--output_dir", default="outputs/comparison", help="folder of the comparison (default: %(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", metavar="N", help="each recipe runs once with each; its own if absent")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        metavar="RATE",
        help="each recipe gets the one that does best on the end of its training text; its own rate if absent",
    )
    parser.add_argument(
        "--trial_steps", metavar="N", help="optimizer steps in which a learning rate is tried; as a run's if absent"
    )
    _add_json(parser)


def _compare(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.compare.compare import COMPARISON_FILE, compare_recipes, compare_runs, raise_if_failed
    from partialtune.compare.policies import are_runs, read_options
    from partialtune.compare.presentation import comparison_lines
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    options = read_options(known, overrides)
    reads = are_runs(known.compared, options)
    rows = compare_runs(known.compared, options.output_dir) if reads else compare_recipes(known.compared, options)
    if known.json:
        print((options.output_dir / COMPARISON_FILE).read_text(encoding="utf-8"), end="", flush=True)
    else:
        print(comparison_lines(rows), f"\nEverything is in {options.output_dir}", sep="\n", flush=True)
    raise_if_failed(rows)


def _report(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.pages.card import write_card
    from partialtune.pages.figures import draw_figures
    from partialtune.pages.report import write_report
    from partialtune.run_folder import exit_code_of

    _refuse(overrides)
    folder = Path(known.run)
    if folder.is_dir() and exit_code_of(folder) is None:
        logger.warning("The run in %s has not ended: its scores may be those of fewer steps than its weights.", folder)
    draw_figures(folder)
    write_card(folder)
    print(write_report(folder))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML files; then --key value for all of them")
    parser.add_argument("--steps", type=int, default=11, help="steps of each, the first not counted (default: 11)")
    _add_json(parser)
    parser.add_argument(
        "--output",
        action="append",
        default=[],
        metavar="FILE",
        help="write JSON (.json) or a figure (.png); repeatable",
    )


def _bench(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.bench.bench import bench
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    recipes = [_recipe_path(recipe) for recipe in known.recipes]
    print(bench(recipes, overrides, known.steps, known.output, as_json=known.json), flush=True)


def _check_new(file: Path) -> None:
    """Stop before any work where a file would be overwritten or cannot be written."""
    if file.exists():
        raise RecipeError(f"{file} exists already. Name a file that does not.")
    if not file.parent.is_dir():
        raise RecipeError(f"{file}: there is no folder {file.parent}. Make it, or name another file.")
    if not os.access(file.parent, os.W_OK):
        raise RecipeError(f"{file}: {file.parent} is not writable. Name a file in a folder that is.")


def _at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"--{name} is {number}; allowed: a whole number, 1 or more.")


def _add_rank(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--write", metavar="FILE", help="write a recipe that trains the first blocks; figure beside it")
    parser.add_argument("--figure", metavar="FILE", help="draw the ranking as PNG")
    parser.add_argument(
        "--batches", type=int, default=4, metavar="N", help="batches of the text to look at (default 4)"
    )
    parser.add_argument("--top", type=int, metavar="N", help="blocks to choose (default: a quarter of them)")
    parser.add_argument(
        "--by",
        choices=("gradient", "snr"),
        default="gradient",
        help="gradient on the text beside weights; or signal to noise of the weights alone, matrix by matrix",
    )
    _add_json(parser)


def _rank(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with _importing():
        from partialtune.model.loading import quiet_libraries
        from partialtune.rank.ranking import rank_recipe, ranking_table, recipe_of
        from partialtune.rank.ranking_figure import draw_ranking
        from partialtune.rank.signal_to_noise import rank_weights, weight_table
        from partialtune.recipe.recipe import read_recipe, write_recipe
        from partialtune.training.launch import use_all_cores

    _at_least_one(batches=known.batches, top=known.top)
    use_all_cores()
    quiet_libraries()
    recipe = read_recipe(_recipe_path(known.recipe), overrides)
    written = Path(known.write) if known.write else None
    figure = Path(known.figure) if known.figure else written.with_suffix(".png") if written else None
    for file in filter(None, (written, figure)):
        _check_new(file)
    if known.by == "snr":
        if known.figure:
            raise InputError("--figure draws the ranking by gradient. Leave it out with --by snr.")
        base = recipe.model
        at = "" if base.model_revision == "main" else f"@{base.model_revision}"
        by_weights = rank_weights(base.model_name_or_path + at, known.top, base.trust_remote_code)
        if written:
            write_recipe(written, recipe_of(recipe.values, by_weights.selectors), {"rank": {"ranked": known.recipe}})
        print(json.dumps(by_weights.to_json(), indent=2, allow_nan=False) if known.json else weight_table(by_weights))
        if written and not known.json:
            print(f"\nWritten: {written}")
        return
    ranking = rank_recipe(recipe, known.batches, known.top)
    if written:
        record = {"ranked": known.recipe, "windows": ranking.windows}
        write_recipe(written, recipe_of(recipe.values, ranking.selectors), {"rank": record})
    if figure:
        draw_ranking(ranking, figure)
    print(json.dumps(ranking.to_json(), indent=2, allow_nan=False) if known.json else ranking_table(ranking))
    if not known.json and (written or figure):
        print("\n".join(["", *(f"Written: {file}" for file in (written, figure) if file)]))


@contextmanager
def _importing() -> Iterator[None]:
    """Imports make a million objects that stay. Looking through these for garbage, again and again, takes a second."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _refuse(overrides: Sequence[str]) -> None:
    if overrides:
        raise InputError(f"{' '.join(overrides)}: this command takes no further arguments.")


def _recipe_path(name: str) -> str:
    from partialtune.builtin import builtin_recipe

    return str(builtin_recipe(name)) if name.startswith("builtin:") else name


# In the order of the help.
COMMANDS = {
    "train": Command("run a recipe, from its text to its report", _add_recipe, _train),
    "plan": Command("show what a recipe would train, without weights", _add_plan, _plan),
    "verify": Command("compare two checkpoints: what moved, and only what may?", _add_verify, _verify),
    "push": Command("upload a finished run to the Hub, verify it; again: what is missing", _add_push, _push),
    "apply": Command("make the whole model of a delta checkpoint and its base", _add_apply, _apply),
    "rank": Command("order blocks and parts by gradient norm beside weight norm, on the text", _add_rank, _rank),
    "compare": Command("run several recipes, or read finished runs, on the same text", _add_compare, _compare),
    "report": Command("make figures, card and page of a finished run again", _add_run, _report),
    "bench": Command("seconds a step and memory of recipes on this machine, beside full", _add_bench, _bench),
}
