"""`python -m partialtune COMMAND`."""

from partialtune.cli import run

run()
