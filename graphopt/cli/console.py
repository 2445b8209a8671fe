"""Where the commands write: standard output, wide enough for tables also where it is no terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType

from graphopt.pipeline.trace import finite
from graphopt.report.text import Visible, plain

WIDTH = 110


def show(*parts: RenderableType) -> None:
    """Print in colour on a terminal, else as plain text without trailing blanks; names are not taken for markup."""
    if sys.stdout.isatty():
        Console(markup=False, emoji=False, highlight=False).print(Visible(Group(*parts)), crop=False)
    else:
        print(plain(Group(*parts), WIDTH), end="")


def data(value: Any) -> None:
    """Print plain data as JSON; infinities, which JSON has not, as text."""
    print(json.dumps(finite(value), indent=1, allow_nan=False))


def paths(run_dir: Path) -> None:
    """Say where the run and its report lie, each on a line that can be copied."""
    print(f"\nrun directory  {run_dir}\nreport         {run_dir / 'report.html'}")
