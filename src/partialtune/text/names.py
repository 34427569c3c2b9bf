"""Text sources as a recipe names them -> one name a text: globs become files, what is missing is said in words."""

import difflib
import glob
import logging
from collections.abc import Sequence
from pathlib import Path

from partialtune.errors import TextError
from partialtune.net.addresses import ADDRESS, LEFT_OUT, lacks_secrets, without_secrets

logger = logging.getLogger(__name__)


def expand_all(sources: Sequence[str]) -> list[str]:
    """The sources with globs expanded; every problem in one error. A file that comes up twice is read once."""
    names: dict[str, None] = {}  # in order, each once
    problems: list[str] = []
    for source in sources:
        try:
            expanded = _expand(source)
        except TextError as error:
            problems.append(str(error))
            continue
        repeated = [name for name in expanded if name in names]
        if repeated:
            logger.warning("Named more than once, read once: %s", ", ".join(map(without_secrets, repeated)))
        names.update(dict.fromkeys(expanded))
    if problems:
        raise TextError("\n".join(problems))
    if not names:
        raise TextError("No text is named: give at least one address, path, glob, builtin:python-docs or hf:DATASET.")
    return list(names)


def _expand(source: str) -> list[str]:
    """The files that a source stands for, or the source itself where it is no path."""
    if source.startswith(("builtin:", "hf:")):
        return [source]
    if address := ADDRESS.match(source):
        if lacks_secrets(source):
            raise TextError(
                f"{source} was written down without its password or token: {LEFT_OUT} stands in their place. Give the "
                "whole address again, as the first recipe had it: --text 'ADDRESS', --eval_texts '{NAME: ADDRESS}'."
            )
        if address[0].lower() in ("http://", "https://"):
            return [source]
        shown = without_secrets(source)
        raise TextError(f"{shown}: texts are fetched over http and https only. Download it and give the file's path.")
    path = Path(source).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        count = sum(1 for _ in path.glob("*.txt"))
        raise TextError(f"{source} is a folder. Name its files with a glob, such as {path}/*.txt ({count} files).")
    if path.exists():
        raise TextError(f"{source} is no regular file (a device or a pipe): save the text to a file and give its path.")
    if glob.has_magic(source):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if files:
            return files
        raise TextError(
            f"{source} matches no file in {Path.cwd()}." if not path.is_absolute() else f"{source} matches no file."
        )
    raise TextError(_explain_missing(source, path))


def _explain_missing(source: str, path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no file {source}: the folder {path.parent.absolute()} does not exist."
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
    return f"There is no file {source} in {path.parent.absolute()}.{hint}"
