"""The command line: `graphopt optimize | inspect | bench | diff | passes | recipes | demo`."""

from graphopt.cli.main import main

__all__ = ["main"]
