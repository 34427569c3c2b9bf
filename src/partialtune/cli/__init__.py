"""The command line: words -> one command -> exit code."""

from partialtune.cli.entry import main, run

__all__ = ["main", "run"]
