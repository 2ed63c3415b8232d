"""`python -m pronk`: the command line."""

from pronk.cli.app import run

run()
