"""The command line: words -> one command -> exit code."""

import argparse
import difflib
import gc
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from partialtune import __version__
from partialtune.cli.commands import COMMANDS
from partialtune.errors import PartialtuneError, code_of, disk_words, is_disk_fault
from partialtune.launcher_environment import forget_left_over
from partialtune.terminal import columns_of, fitted

DESCRIPTION = "Fine-tune chosen parts of a causal language model, keep the rest frozen, and prove that it stayed so."
EPILOG = """\
exit codes: 0 done, 1 a bug or another process was lost, 2 bad input or a full disk, 3 a frozen weight changed or a
trainable one could not learn, 4 training diverged, 5 the upload did not complete, 130 interrupted and 143 terminated,
both after a checkpoint once a step was taken
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
    if known.command != "train":
        forget_left_over()
    try:
        COMMANDS[known.command].run(known, overrides)
    except PartialtuneError as error:
        return _say(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read our output has gone: `partialtune plan RECIPE | head`
        # Python flushes stdout once more at its end, and would print a traceback of the same error there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not is_disk_fault(error):
            raise
        return _say(disk_words(error), code_of(error))
    except KeyboardInterrupt:
        return _say("Interrupted. What was saved before is in the run's folder.", 130)
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, with a guess what a misspelt command was meant to be."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if wrong:
            near = difflib.get_close_matches(wrong[1], COMMANDS, 1, 0.5)
            guess = f" Did you mean {near[0]}?" if near else ""
            message = f"there is no command {wrong[1]!r}.{guess} Commands are {', '.join(COMMANDS)}."
        super().error(message)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their own arguments; `--key value` of a recipe are left to `recipe.read_recipe`."""
    parser = _Parser(
        prog="partialtune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # else an unknown `--model` would be taken for the start of an option of ours
    )
    parser.add_argument("--version", action="version", version=f"partialtune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, allow_abbrev=False))
    return parser


def _say(message: str, code: int) -> int:
    """Print the last line of our process; nothing where another process of the run has given the reason."""
    sys.stdout.flush()
    if message:
        from partialtune.net.addresses import without_secrets  # a help text need not wait for its patterns

        print(fitted(f"partialtune: {without_secrets(message)}", columns_of(sys.stderr)), file=sys.stderr, flush=True)
    return code


class _WithoutSecrets(logging.Formatter):
    """A line of the log without the passwords and tokens of addresses, whoever wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        from partialtune.net.addresses import without_secrets

        return fitted(without_secrets(super().format(record)), columns_of(sys.stderr))


def _set_up_logging() -> None:
    """Our decisions on stderr, from one process of a run; the libraries' warnings only where they are errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("partialtune").setLevel(logging.INFO if main_process else logging.ERROR)


def _leave_process_group() -> None:
    """gloo aborts about one exit in four where the group is left to the interpreter's end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # First what still holds the group: with this order 34 of 34 runs ended cleanly.
        gc.collect()
        distributed.destroy_process_group()
