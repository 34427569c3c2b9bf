"""The commands: what was read from the command line -> work and output. Each imports the heavy libraries it needs."""

import argparse
import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from partialtune.environment import check_launched
from partialtune.errors import InputError, ModelError

logger = logging.getLogger(__name__)


def _train(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    check_launched()
    with _importing():
        from partialtune.distributed import DDP_TIMEOUT, peers_watched
        from partialtune.model.loading import quiet_libraries
        from partialtune.recipe.reading import read_recipe
        from partialtune.training.launch import check_launcher, join_processes, use_all_cores
        from partialtune.training.stopping import ended_by_signals

    use_all_cores()
    quiet_libraries()
    check_launcher()
    with ended_by_signals():
        recipe = read_recipe(_recipe_path(known.recipe), overrides)
        with _importing():
            from partialtune.train.train import train  # four seconds, which a mistake in the recipe need not wait for

        with peers_watched(recipe.training.get("ddp_timeout", DDP_TIMEOUT)):
            join_processes(recipe.training)
            train(recipe)


def _plan(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with _importing():
        from partialtune.cost.forecast import forecast, forecast_table
        from partialtune.freeze.plan_table import plan_table
        from partialtune.freeze.recipe_plan import plan_before_text
        from partialtune.model.loading import empty_model, load_config, quiet_libraries
        from partialtune.model.train_mode import stop_layer_drop
        from partialtune.recipe.reading import read_recipe

    quiet_libraries()
    recipe = read_recipe(_recipe_path(known.recipe), overrides)
    base = recipe.model
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    model = empty_model(config, base.trust_remote_code)
    if switched_off := stop_layer_drop(model):
        logger.warning(switched_off)
    plan = plan_before_text(model, recipe.freeze)
    said = recipe.training
    try:
        cost = forecast(
            model,
            plan,
            batch_size=said.get("per_device_train_batch_size", 8),
            block_size=recipe.text.block_size,
            accumulation=said.get("gradient_accumulation_steps", 1),
            bf16=said.get("bf16") is True,
            optimizer=said.get("optim", "adamw_torch_fused"),
            checkpointing=bool(said.get("activation_checkpointing")),
            fast_paths=recipe.speed.fast_paths,
        )
    except ModelError as error:  # a model whose forward pass decides by values has no step without them
        logger.warning("No forecast of arithmetic and memory: %s", error)
        cost = None
    if known.json:
        content = plan.to_json({}, {}) | (cost.to_json() if cost else {})
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        print("\n\n".join([plan_table(plan), *([forecast_table(cost)] if cost else [])]))


def _verify(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.model.loading import quiet_libraries
    from partialtune.verify.comparison_table import comparison_table
    from partialtune.verify.verify import verify

    _refuse(overrides)
    quiet_libraries()
    found = verify(known.base, known.adapted, known.trainable)
    as_json = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False) if known.json else None
    print(as_json or comparison_table(found), flush=True)
    found.raise_if_violated()


def _push(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.hub.push import Target, push_run

    _refuse(overrides)
    private = None if known.private is None else known.private == "true"
    target = Target(known.repo_id, known.revision, private)
    print(push_run(Path(known.run), target, known.allow_failed_audit), flush=True)


def _apply(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.model.loading import quiet_libraries
    from partialtune.rebuild import apply_delta

    _refuse(overrides)
    quiet_libraries()
    print(apply_delta(known.delta, known.out, known.base), flush=True)


def _compare(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.compare.compare import COMPARISON_FILE, compare_recipes, compare_runs, raise_if_failed
    from partialtune.compare.options import are_runs, read_choices
    from partialtune.compare.table import comparison_lines
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    choices = read_choices(known, overrides)
    reads = are_runs(known.compared, choices)
    rows = compare_runs(known.compared, choices.output_dir) if reads else compare_recipes(known.compared, choices)
    if known.json:
        print((choices.output_dir / COMPARISON_FILE).read_text(encoding="utf-8"), end="", flush=True)
    else:
        print(comparison_lines(rows), f"\nEverything is in {choices.output_dir}", sep="\n", flush=True)
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


def _bench(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.bench.bench import bench
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    recipes = [_recipe_path(recipe) for recipe in known.recipes]
    print(bench(recipes, overrides, known.steps, known.output, as_json=known.json), flush=True)


def _rank(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with _importing():
        from partialtune.model.loading import quiet_libraries
        from partialtune.rank.figure import draw_ranking
        from partialtune.rank.rank import check_new, rank_recipe
        from partialtune.rank.ranking import ranking_table, recipe_of
        from partialtune.recipe.reading import read_recipe, write_recipe
        from partialtune.training.launch import use_all_cores

    _at_least_one(batches=known.batches, top=known.top)
    use_all_cores()
    quiet_libraries()
    recipe = read_recipe(_recipe_path(known.recipe), overrides)
    written = Path(known.write) if known.write else None
    figure = Path(known.figure) if known.figure else written.with_suffix(".png") if written else None
    for file in filter(None, (written, figure)):
        check_new(file)
    ranking = rank_recipe(recipe, known.batches, known.top)
    if written:
        record = {"ranked": known.recipe, "windows": ranking.windows}
        write_recipe(written, recipe_of(recipe.values, ranking), {"rank": record})
    if figure:
        draw_ranking(ranking, figure)
    print(json.dumps(ranking.to_json(), indent=2, allow_nan=False) if known.json else ranking_table(ranking))
    if not known.json and (written or figure):
        print("\n".join(["", *(f"Written: {file}" for file in (written, figure) if file)]))


def _at_least_one(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"--{name} is {number}; allowed: a whole number, 1 or more.")


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


COMMANDS = {
    "train": _train,
    "plan": _plan,
    "rank": _rank,
    "verify": _verify,
    "push": _push,
    "compare": _compare,
    "apply": _apply,
    "report": _report,
    "bench": _bench,
}
