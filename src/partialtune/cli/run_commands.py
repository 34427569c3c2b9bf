"""Commands on runs and models that are there already: verify, push, apply, generate, report.

As in `commands`, a function imports what it needs in its body.
"""

import argparse
import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from partialtune.errors import InputError
from partialtune.terminal import show

logger = logging.getLogger(__name__)


def add_json(parser: argparse.ArgumentParser, help: str = "print JSON alone") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder, builtin:lilliput or Hub id, also ID@REVISION")
    parser.add_argument(
        "adapted", metavar="ADAPTED", help="likewise; its freeze_plan.json is the claim where --trainable is absent"
    )
    parser.add_argument("--trainable", nargs="+", metavar="SELECTOR", help="what may have moved")
    add_json(parser)


def verify(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    refuse(overrides)
    from partialtune.model.loading import quiet_libraries
    from partialtune.verify.comparison_table import comparison_table
    from partialtune.verify.verify import verify

    quiet_libraries()
    found = verify(known.base, known.adapted, known.trainable)
    as_json = json.dumps(found.to_json(), indent=2, ensure_ascii=False, allow_nan=False) if known.json else None
    # printed first: where the claim is broken, the table says what broke it
    print(as_json, flush=True) if as_json else show(comparison_table(found))
    found.raise_if_violated()


def add_push(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--repo_id", required=True, metavar="NAMESPACE/NAME", help="repository, created where missing")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, main by default")
    parser.add_argument("--private", choices=("true", "false"), help="visibility; the namespace's default where absent")
    parser.add_argument("--allow_failed_audit", action="store_true", help="publish although the freeze audit failed")


def push(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    refuse(overrides)
    from partialtune.hub.push import Target, push_run

    private = None if known.private is None else known.private == "true"
    target = Target(known.repo_id, known.revision, private)
    show(push_run(Path(known.run), target, known.allow_failed_audit))


def add_apply(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("delta", metavar="DELTA", help="folder or Hub id of a run with checkpoint_format: delta")
    parser.add_argument("out", metavar="OUT", help="folder to write, absent or empty")
    parser.add_argument("--base", metavar="BASE", help="the base, if it is no longer where the delta says")


def apply(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    refuse(overrides)
    from partialtune.model.loading import quiet_libraries
    from partialtune.rebuild import apply_delta

    quiet_libraries()
    print(apply_delta(known.delta, known.out, known.base), flush=True)


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder or Hub id of a run, a delta, adapters, or any model")
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue; lines of stdin where it is absent"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id; main by default")
    parser.add_argument("--beside-base", action="store_true", help="let the base that it was made from write too")
    parser.add_argument("--seed", type=int, metavar="N", help="the same text each time; another each time if absent")
    parser.epilog = (
        "Then --key value for fields of transformers' GenerationConfig: --max_new_tokens 60 --temperature 0.7 "
        "--top_p 0.9 --do_sample false --num_beams 4 --repetition_penalty 1.2 ..."
    )


def generate(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    with importing():
        from partialtune.generate import prompts_of, sampling_of, write_after, writers_of
        from partialtune.model.loading import quiet_libraries

    quiet_libraries()
    settings = sampling_of(overrides)
    writers = writers_of(known.run, known.beside_base, known.revision)
    for prompt in prompts_of(known.prompt):
        for writer in writers:
            if len(writers) > 1:
                print(f"--- {writer.name}", flush=True)
            write_after(writer, prompt, settings, known.seed)


def report(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    refuse(overrides)
    from partialtune.pages.card import write_card
    from partialtune.pages.figures import draw_figures
    from partialtune.pages.report import write_report
    from partialtune.pages.run_files import read_run
    from partialtune.run_folder import exit_code_of, is_being_written

    folder = Path(known.run)
    ended = not folder.is_dir() or exit_code_of(folder) is not None
    training = not ended and is_being_written(folder)
    if read_run(folder, ended=False, training=training).unfinished is None:
        if not ended:
            logger.warning(
                "The run in %s has not ended: its scores may be those of fewer steps than its weights.", folder
            )
        draw_figures(folder)  # figures and card are of a model that is finished
        write_card(folder)
    print(write_report(folder, training))


@contextmanager
def importing() -> Iterator[None]:
    """Imports make a million objects that stay. Looking through these for garbage, again and again, takes a second."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def refuse(overrides: Sequence[str]) -> None:
    if overrides:
        raise InputError(f"{' '.join(overrides)}: this command takes no further arguments.")
