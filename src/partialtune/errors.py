"""Errors that end a run: each carries the exit code that the command line returns for it."""

import errno
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import TypeGuard

PACKAGE = Path(__file__).resolve().parent


class PartialtuneError(Exception):
    """Base of every error whose message is meant for the person who started the run."""

    exit_code = 1


class InputError(PartialtuneError):
    """Something that was given (recipe, text, model, environment) cannot be used. Nothing was written."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, a command-line value or a selector is wrong. The message says what was got and what is allowed."""


class TextError(InputError):
    """A text cannot be fetched, decoded or cut into windows."""


class ModelError(InputError):
    """A model or tokenizer cannot be loaded, or does not fit the recipe."""


class DiskError(InputError):
    """A disk is full or cannot be written. What was saved before is safe."""


class FreezeViolation(PartialtuneError):
    """A frozen parameter changed, or a trainable one could not learn."""

    exit_code = 3


class TrainingDiverged(PartialtuneError):
    """The loss or a gradient became non-finite."""

    exit_code = 4


class UploadIncomplete(PartialtuneError):
    """The upload to the Hub did not complete; the run is safe on disk."""

    exit_code = 5


class Interrupted(PartialtuneError):
    """A signal ended the run: 130 for SIGINT, 143 for SIGTERM and SIGUSR1."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EndedElsewhere(PartialtuneError):
    """Another process of the run ended and gave the reason, or was killed; this one ends too."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# Here, since both a recipe's checks and the engine say it, and the engine needs no recipe.
HOW_TO_INSTALL_PEFT = "lora needs peft, which is not installed here. Install it: pip install 'partialtune[lora]'."


def is_peft_installed() -> bool:
    """Whether adapters can be made here. Found, not imported: importing peft takes seconds."""
    return find_spec("peft") is not None


HOW_TO_INSTALL_BITSANDBYTES = (
    "frozen_quantization needs bitsandbytes, which is not installed here. Install it: "
    "pip install 'partialtune[quantized]'."
)


def is_bitsandbytes_installed() -> bool:
    """Whether matrices can be held in few bits here. Found, not imported: importing it takes seconds."""
    return find_spec("bitsandbytes") is not None


def is_ours(error: BaseException) -> bool:
    """Whether this package's code raised a caught error, and not that of a model or a library which it called."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)


def in_one_line(error: BaseException | str, longest: int = 200, first_line: bool = False) -> str:
    """What a library says, in one line: cut between words, or its class where an error has no message.

    in_one_line(KeyError("layers")) -> "'layers'"; in_one_line(AssertionError()) -> "AssertionError"

    Args:
        error: What was raised, or a text.
        longest: Characters, at most.
        first_line: Whether the lines after the first are left out: PyTorch puts the frames of its C++ stack there.
    """
    lines = str(error).splitlines()[:1] if first_line else str(error).split()
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= longest else text[:longest].rsplit(" ", 1)[0] + " ..."


# what a disk, a network file system or its owner can do to us: no bug, and no traceback
DISK_FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ENXIO, errno.ENODEV),
)


def is_disk_fault(error: BaseException) -> TypeGuard[OSError]:
    """Whether the system could not read or write a file, for a reason that lies in the machine."""
    return isinstance(error, OSError) and error.errno in DISK_FAULTS


def disk_words(error: OSError) -> str:
    """The system's reason, the file, and what to do."""
    where = f": {error.filename}" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    do = "Make room on the disk, or name another folder" if full else "Check the disk and who may write there"
    return f"{error.strerror}{where}. {do}."


def code_of(error: BaseException) -> int:
    """The exit code that the command line returns for an error; 1 is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return InputError.exit_code if is_disk_fault(error) else getattr(error, "exit_code", 1)
