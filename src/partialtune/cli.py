"""The command line: words -> one command -> exit code. Heavy libraries are imported by the command that needs them."""

import argparse
import errno
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from partialtune import __version__
from partialtune.errors import ModelError, PartialtuneError

logger = logging.getLogger(__name__)

DESCRIPTION = "Fine-tune chosen parts of a causal language model, keep the rest frozen, and prove that it stayed so."
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
EPILOG = """\
exit codes: 0 done, 1 a bug, 2 bad input, 3 a frozen weight changed or a trainable one could not learn,
4 training diverged, 5 the upload did not complete, 130 interrupted and 143 terminated, both after a checkpoint
"""


def run() -> NoReturn:
    """Entry point of `partialtune` and `python -m partialtune`."""
    code = main(sys.argv[1:])
    _leave_process_group()
    sys.stdout.flush()
    sys.exit(code)


def main(words: Sequence[str]) -> int:
    """Run one command.

    Args:
        words: Command line without the program's name.

    Returns:
        The exit code.
    """
    parser = make_parser()
    known, overrides = parser.parse_known_args(words)
    if known.command is None:
        parser.print_help()
        return 2
    _set_up_logging()
    try:
        COMMANDS[known.command](known, overrides)
    except PartialtuneError as error:
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        return 0
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        where = f": {error.filename}" if error.filename else ""
        return _say(f"{error.strerror}{where}. Make room on the disk, or name another folder.", 2)
    except KeyboardInterrupt:
        return _say("Interrupted. What was saved before is in the run's folder.", 130)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The commands and their own arguments; `--key value` of a recipe are left to `recipe.read_recipe`."""
    parser = argparse.ArgumentParser(
        prog="partialtune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"partialtune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="run a recipe, from its text to its report", allow_abbrev=False)
    _add_recipe(train)
    plan = commands.add_parser("plan", help="show what a recipe would train, without weights", allow_abbrev=False)
    _add_recipe(plan)
    plan.add_argument("--json", action="store_true", help="print freeze_plan.json instead of tables")
    verify = commands.add_parser(
        "verify", help="compare two checkpoints: what moved, and only what may?", allow_abbrev=False
    )
    verify.add_argument("base", metavar="BASE", help="folder, builtin:lilliput or Hub id, also ID@REVISION")
    verify.add_argument(
        "adapted", metavar="ADAPTED", help="likewise; its freeze_plan.json is the claim where --trainable is absent"
    )
    verify.add_argument("--trainable", nargs="+", metavar="SELECTOR", help="what may have moved")
    verify.add_argument("--json", action="store_true", help="print JSON alone")
    push = commands.add_parser(
        "push", help="upload a finished run to the Hub, verify it; again: what is missing", allow_abbrev=False
    )
    push.add_argument("run", metavar="RUN", help="folder of a finished run")
    push.add_argument("--repo_id", required=True, metavar="NAMESPACE/NAME", help="repository, created where missing")
    push.add_argument("--revision", metavar="BRANCH", help="branch, main by default")
    push.add_argument("--private", choices=("true", "false"), help="visibility; the namespace's default where absent")
    push.add_argument("--allow_failed_audit", action="store_true", help="publish although the freeze audit failed")
    apply = commands.add_parser(
        "apply", help="make the whole model of a delta checkpoint and its base", allow_abbrev=False
    )
    apply.add_argument("delta", metavar="DELTA", help="folder or Hub id of a run with checkpoint_format: delta")
    apply.add_argument("out", metavar="OUT", help="folder to write, absent or empty")
    apply.add_argument("--base", metavar="BASE", help="the base, if it is no longer where the delta says")
    rank = commands.add_parser(
        "rank", help="order blocks and parts by gradient norm beside weight norm, on the text", allow_abbrev=False
    )
    _add_recipe(rank)
    rank.add_argument("--write", metavar="FILE", help="write a recipe that trains the first blocks; figure beside it")
    rank.add_argument("--figure", metavar="FILE", help="draw the ranking as PNG")
    rank.add_argument("--batches", type=int, default=4, metavar="N", help="batches of the text to look at (default 4)")
    rank.add_argument("--top", type=int, metavar="N", help="blocks to choose (default: a quarter of them)")
    rank.add_argument("--json", action="store_true", help="print JSON alone")
    _add_compare(commands)
    report = commands.add_parser(
        "report", help="make figures, card and page of a finished run again", allow_abbrev=False
    )
    report.add_argument("run", metavar="RUN", help="folder of a finished run")
    _add_bench(commands)
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="run several recipes, or read finished runs, on the same text", allow_abbrev=False
    )
    compare.add_argument(
        "compared", nargs="+", metavar="RECIPE_OR_RUN", help="recipes to run, then --key value for all; or runs to read"
    )
    compare.add_argument(
        "--output_dir", default="outputs/comparison", help="folder of the comparison (default: %(default)s)"
    )
    compare.add_argument("--seeds", nargs="+", metavar="N", help="each recipe runs once with each; its own if absent")
    compare.add_argument(
        "--learning_rates",
        nargs="+",
        metavar="RATE",
        help="each recipe gets the one that does best on the end of its training text; its own rate if absent",
    )
    compare.add_argument(
        "--trial_steps", metavar="N", help="optimizer steps in which a learning rate is tried; as a run's if absent"
    )
    compare.add_argument("--json", action="store_true", help="print JSON alone")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench", help="seconds a step and memory of recipes on this machine, beside full", allow_abbrev=False
    )
    bench.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML files; then --key value for all of them")
    bench.add_argument("--steps", type=int, default=11, help="steps of each, the first not counted (default: 11)")
    bench.add_argument("--json", action="store_true", help="print JSON alone")
    bench.add_argument(
        "--output",
        action="append",
        default=[],
        metavar="FILE",
        help="write JSON (.json) or a figure (.png); repeatable",
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    from partialtune.recipe.arguments import recipe_help

    command.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, or builtin:quickstart; then --key value for each key to change"
    )
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = recipe_help()


def _train(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with _importing():
        from partialtune.launch import check_launcher, join_processes, peers_watched, use_all_cores
        from partialtune.model.loading import quiet_libraries
        from partialtune.recipe.reading import read_recipe
        from partialtune.train import train
        from partialtune.training.stopping import ended_by_signals

    use_all_cores()
    quiet_libraries()
    check_launcher()
    with ended_by_signals(), peers_watched():
        recipe = read_recipe(_recipe_path(known.recipe), overrides)
        join_processes(recipe.training)
        train(recipe)


def _plan(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    import json

    with _importing():
        from partialtune.cost.forecast import forecast, forecast_table
        from partialtune.freeze.methods import plan_before_text
        from partialtune.freeze.table import plan_table
        from partialtune.model.loading import empty_model, load_config, quiet_libraries
        from partialtune.recipe.reading import read_recipe

    quiet_libraries()
    recipe = read_recipe(_recipe_path(known.recipe), overrides)
    base = recipe.model
    config = load_config(base.model_name_or_path, base.model_revision, base.dropout, base.trust_remote_code)
    model = empty_model(config, base.trust_remote_code)
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
    import json

    from partialtune.model.loading import quiet_libraries
    from partialtune.proof.table import comparison_table
    from partialtune.proof.verify import verify

    _refuse(overrides)
    quiet_libraries()
    found = verify(known.base, known.adapted, known.trainable)
    as_json = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False) if known.json else None
    print(as_json or comparison_table(found), flush=True)
    found.raise_if_violated()


def _push(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from pathlib import Path

    from partialtune.hub.push import Target, push_run

    _refuse(overrides)
    private = None if known.private is None else known.private == "true"
    target = Target(known.repo_id, known.revision, private)
    print(push_run(Path(known.run), target, known.allow_failed_audit), flush=True)


def _apply(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.delta.rebuild import apply_delta
    from partialtune.model.loading import quiet_libraries

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
    from pathlib import Path

    from partialtune.pages.card import write_card
    from partialtune.pages.figures import draw_figures
    from partialtune.pages.report import write_report

    _refuse(overrides)
    folder = Path(known.run)
    draw_figures(folder)
    write_card(folder)
    print(write_report(folder))


def _bench(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    from partialtune.bench.command import bench
    from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    recipes = [_recipe_path(recipe) for recipe in known.recipes]
    print(bench(recipes, overrides, known.steps, known.output, as_json=known.json), flush=True)


def _rank(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    import json
    from pathlib import Path

    with _importing():
        from partialtune.launch import use_all_cores
        from partialtune.model.loading import quiet_libraries
        from partialtune.rank.command import check_new, rank_recipe
        from partialtune.rank.figure import draw_ranking
        from partialtune.rank.ranking import ranking_table, recipe_of
        from partialtune.recipe.reading import read_recipe, write_recipe

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
    from partialtune.errors import InputError

    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"--{name} is {number}; allowed: a whole number, 1 or more.")


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
    from partialtune.errors import InputError

    if overrides:
        raise InputError(f"{' '.join(overrides)}: this command takes no further arguments.")


def _recipe_path(name: str) -> str:
    from partialtune.builtin import builtin_recipe

    return str(builtin_recipe(name)) if name.startswith("builtin:") else name


def _say(message: str, code: int) -> int:
    """The last thing that our process prints; nothing where another process of the run says it."""
    sys.stdout.flush()
    if message:
        print(f"partialtune: {message}", file=sys.stderr, flush=True)
    return code


def _set_up_logging() -> None:
    """Our decisions on stderr, from one process of a run; the libraries' warnings only where they are errors."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.ERROR)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("partialtune").setLevel(logging.INFO if main_process else logging.ERROR)


def _leave_process_group() -> None:
    """gloo aborts about one exit in four where the group is left to the interpreter's end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
