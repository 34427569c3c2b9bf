"""The command line: words -> one command -> exit code."""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from partialtune.cli.commands import COMMANDS
from partialtune.cli.parser import make_parser
from partialtune.environment import forget_left_over
from partialtune.errors import PartialtuneError, code_of, disk_words, is_disk_fault


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
        COMMANDS[known.command](known, overrides)
    except PartialtuneError as error:
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        return 0
    except OSError as error:
        if not is_disk_fault(error):
            raise
        return _say(disk_words(error), code_of(error))
    except KeyboardInterrupt:
        return _say("Interrupted. What was saved before is in the run's folder.", 130)
    return 0


def _say(message: str, code: int) -> int:
    """The last thing that our process prints; nothing where another process of the run says it."""
    sys.stdout.flush()
    if message:
        from partialtune.net.addresses import without_secrets  # a help text need not wait for its patterns

        print(f"partialtune: {without_secrets(message)}", file=sys.stderr, flush=True)
    return code


class _WithoutSecrets(logging.Formatter):
    """A line of the log without the passwords and tokens of addresses, whoever wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        from partialtune.net.addresses import without_secrets

        return without_secrets(super().format(record))


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
        gc.collect()
        distributed.destroy_process_group()
