"""The commands: for each its arguments, its help, and the function that does the work and prints the result.

A command is one entry of `COMMANDS`, at the end. A function imports what it needs in its body: `partialtune --help`
does not wait for torch, and `verify` not for what only `train` needs.
"""

import argparse
import json
import logging
import os
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from partialtune.cli.run_commands import (
    add_apply,
    add_generate,
    add_json,
    add_push,
    add_run,
    add_verify,
    apply,
    generate,
    importing,
    push,
    refuse,
    report,
    verify,
)
from partialtune.errors import InputError, ModelError, RecipeError
from partialtune.files import write_whole
from partialtune.launcher_environment import check_launched
from partialtune.terminal import prose_width, show

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


def _add_recipe(parser: argparse.ArgumentParser, metavar: str = "RECIPE", what: str = "YAML file") -> None:
    """A recipe's path, and below the options the help on every key of our own."""
    from partialtune.recipe.arguments import recipe_help

    parser.add_argument(
        "recipe", metavar=metavar, help=f"{what}, or builtin:quickstart; then --key value for each key to change"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = recipe_help()


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser, "RECIPE|TEXT", "YAML file; or a text, which is trained on as `init` proposes")


def _train(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    check_launched()
    is_text = known.recipe == "builtin:python-docs" or not known.recipe.startswith("builtin:")
    is_recipe = Path(known.recipe).suffix in (".yaml", ".yml") or not is_text
    path = _checked_words(known.recipe, overrides, is_recipe)
    with importing():
        from partialtune.freeze.recipe_mistakes import read_with_model
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
        if is_recipe:
            recipe = read_with_model(lambda: read_recipe(path, overrides), reads_text=True)
        else:
            recipe = _proposed(known.recipe, overrides)
        with importing():
            import partialtune.recipe_run.train  # noqa: F401 - four seconds, for which no mistake in a recipe has to wait

        run_recipe(recipe)


def _checked_words(name: str, overrides: Sequence[str], is_recipe: bool = True) -> str:
    """A recipe's path, or the text, once the words of the command line are known to be right; torch is not needed."""
    from partialtune.recipe.recipe import check_words
    from partialtune.text.sources import expand_sources

    path = _recipe_path(name) if is_recipe else name
    check_words(path if is_recipe else None, overrides)
    if not is_recipe:
        expand_sources([name])
    return path


def _proposed(text: str, overrides: Sequence[str]) -> "Recipe":
    """The recipe that `init` would write for a text, which is shown; `--key value` win over it."""
    from partialtune.net.addresses import without_secrets
    from partialtune.propose import MODEL, name_of, propose
    from partialtune.recipe.parsing import group_words
    from partialtune.recipe.recipe import recipe_from_values

    words, _ = group_words(overrides)
    model = words.get("model_name_or_path", (MODEL,))[0]
    proposal = propose(text, model, words.get("output_dir", (None,))[0])
    recipe = recipe_from_values(proposal.values, overrides)
    logger.info("Recipe:\n%s", textwrap.indent(proposal.text(f"{name_of(text)}.yaml"), "  "))
    logger.info("To change it: partialtune init %s, and train what that writes.", shlex.quote(without_secrets(text)))
    return recipe


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="as a recipe's `text`: a file, a glob, an address")
    parser.add_argument(
        "--model", default="builtin:lilliput", metavar="M", help="Hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="where to write it (default: NAME OF THE TEXT.yaml)")


def _init(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    refuse(overrides)
    with importing():
        from partialtune.model.loading import quiet_libraries
        from partialtune.propose import name_of, propose

    file = Path(known.output or f"{name_of(known.text)}.yaml")
    _check_new(file)
    quiet_libraries()
    content = propose(known.text, known.model).text(str(file))
    write_whole(file, content.encode())
    print(f"{content}\nWritten: {file}", flush=True)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    add_json(parser, "print freeze_plan.json instead of tables")


def _plan(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    path = _checked_words(known.recipe, overrides)
    with importing():
        from partialtune.cost.forecast import forecast_table
        from partialtune.freeze.plan_table import plan_table
        from partialtune.freeze.recipe_mistakes import check_with_model, read_with_model
        from partialtune.freeze.recipe_plan import empty_base, names_rows, plan_before_text
        from partialtune.model.loading import load_tokenizer, quiet_libraries
        from partialtune.model.train_mode import stop_layer_drop
        from partialtune.recipe.key_rules import training_defaults
        from partialtune.recipe.recipe import read_recipe

    quiet_libraries()
    recipe = read_with_model(lambda: read_recipe(path, overrides), reads_text=False)
    base = recipe.model
    model = empty_base(base)
    check_with_model(recipe, model, model.config, vocabulary=0, reads_text=False)
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
        show(plan_table(plan, rate), *([forecast_table(cost, prose_width())] if cost else []))


def _forecast(recipe: "Recipe", model: "PreTrainedModel", plan: "FreezePlan") -> "Forecast | None":
    """Arithmetic and memory of a step; None, with a warning, for a model that computes none without weights."""
    from partialtune.cost.forecast import forecast
    from partialtune.cost.held_dtype import held_dtype

    training = recipe.training
    held = held_dtype(recipe, model.config)
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
            base_dtype=held.dtype,
            held=held.reason,
            prefix_cache=recipe.speed.prefix_cache,
        )
    except ModelError as error:  # a model whose forward pass decides by values has no step without them
        logger.warning("No forecast of arithmetic and memory: %s", error)
        return None


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
    add_json(parser)


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
        show(comparison_lines(rows), f"Everything is in {options.output_dir}")
    raise_if_failed(rows)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML files; then --key value for all of them")
    parser.add_argument("--steps", type=int, default=11, help="steps of each, the first not counted (default: 11)")
    add_json(parser)
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
    found = bench(recipes, overrides, known.steps, known.output, as_json=known.json)
    print(found, flush=True) if known.json else show(found)


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
    add_json(parser)


def _rank(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with importing():
        from partialtune.freeze.recipe_mistakes import read_with_model
        from partialtune.model.loading import quiet_libraries
        from partialtune.rank.ranking import rank_recipe, ranking_table, recipe_of
        from partialtune.rank.ranking_figure import draw_ranking
        from partialtune.rank.signal_to_noise import rank_weights, weight_table
        from partialtune.recipe.recipe import read_recipe, write_recipe
        from partialtune.training.launch import use_all_cores

    _at_least_one(batches=known.batches, top=known.top)
    use_all_cores()
    quiet_libraries()
    path = _recipe_path(known.recipe)
    recipe = read_with_model(lambda: read_recipe(path, overrides), reads_text=known.by == "gradient")
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
        _print(by_weights.to_json(), None if known.json else weight_table(by_weights))
        if written and not known.json:
            print(f"\nWritten: {written}")
        return
    ranking = rank_recipe(recipe, known.batches, known.top)
    if written:
        record = {"ranked": known.recipe, "windows": ranking.windows}
        write_recipe(written, recipe_of(recipe.values, ranking.selectors), {"rank": record})
    if figure:
        draw_ranking(ranking, figure)
    _print(ranking.to_json(), None if known.json else ranking_table(ranking))
    if not known.json and (written or figure):
        print("\n".join(["", *(f"Written: {file}" for file in (written, figure) if file)]))


def _print(values: Any, table: str | None) -> None:
    """A table for people, or the values as JSON."""
    if table is None:
        print(json.dumps(values, indent=2, allow_nan=False), flush=True)
    else:
        show(table)


def _recipe_path(name: str) -> str:
    from partialtune.builtin import builtin_recipe

    return str(builtin_recipe(name)) if name.startswith("builtin:") else name


# In the order of the help.
COMMANDS = {
    "init": Command("write a recipe to begin with, for a text and a model", _add_init, _init),
    "train": Command("run a recipe, or a text alone, from the text to the report", _add_train, _train),
    "plan": Command("show what a recipe would train, without weights", _add_plan, _plan),
    "generate": Command("continue a prompt with a run's model, or line by line", add_generate, generate),
    "verify": Command("compare two checkpoints: what moved, and only what may?", add_verify, verify),
    "push": Command("upload a finished run to the Hub, verify it; again: what is missing", add_push, push),
    "apply": Command("make the whole model of a delta checkpoint and its base", add_apply, apply),
    "rank": Command("order blocks and parts by gradient norm beside weight norm, on the text", _add_rank, _rank),
    "compare": Command("run several recipes, or read finished runs, on the same text", _add_compare, _compare),
    "report": Command("make figures, card and page of a finished run again", add_run, report),
    "bench": Command("seconds a step and memory of recipes on this machine, beside full", _add_bench, _bench),
}
