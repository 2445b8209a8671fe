"""Where the commands write: standard output, wide enough for tables also where it is no terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110


def out() -> Console:
    """Return a console on standard output; names in what it prints are not taken for markup."""
    wide = None if sys.stdout.isatty() else WIDTH
    return Console(width=wide, markup=False, emoji=False, highlight=False, soft_wrap=False)


def paths(console: Console, run_dir: Path) -> None:
    """Say where the run and its report lie."""
    for what, path in (("run directory", run_dir), ("report", run_dir / "report.html")):
        console.print(Text(f"{what:<15}{path}"), soft_wrap=True)
