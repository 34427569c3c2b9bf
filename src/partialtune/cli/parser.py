"""Words of the command line: the commands, what each takes, and the help. No heavy library is imported."""

import argparse
from typing import Any

from partialtune import __version__

DESCRIPTION = "Fine-tune chosen parts of a causal language model, keep the rest frozen, and prove that it stayed so."
EPILOG = """\
exit codes: 0 done, 1 a bug, 2 bad input, 3 a frozen weight changed or a trainable one could not learn,
4 training diverged, 5 the upload did not complete, 130 interrupted and 143 terminated, both after a checkpoint
"""


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
