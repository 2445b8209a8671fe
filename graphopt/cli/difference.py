"""`graphopt diff`: two runs side by side, as plain text."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.cli.console import WIDTH
from graphopt.report import PassRow, Report
from graphopt.report.text import bullet, pass_cells, plain, section, size_text
from graphopt.rundir import read_text

_QUANTITIES: tuple[tuple[str, Callable[[Report], float | None], Callable[[float], str]], ...] = (
    ("metric before", lambda r: r.metric.before, lambda v: f"{v:.6g}"),
    ("metric", lambda r: r.metric.after, lambda v: f"{v:.6g}"),
    ("file", lambda r: r.size_bytes.after, size_text),
    ("parameter bytes", lambda r: r.parameter_bytes.after, size_text),
    ("parameters", lambda r: r.parameters.after, lambda v: f"{v:,.0f}"),
    ("bits a weight", lambda r: r.average_bits.after, lambda v: f"{v:.2f}"),
    ("multiply-accumulates", lambda r: r.macs.after, lambda v: f"{v:,.0f}"),
    ("latency", lambda r: r.latency_ms.after, lambda v: f"{v:.3g} ms"),
    ("latency of the float export", lambda r: r.latency_ms.before, lambda v: f"{v:.3g} ms"),
    ("output SQNR", lambda r: r.exported.sqnr_db if r.exported else None, lambda v: f"{v:.1f} dB"),
    (
        "integer kernels",
        lambda r: sum(r.exported.fused.values()) if r.exported else None,
        lambda v: f"{v:.0f}",
    ),
    ("unfused", lambda r: len(r.exported.unfused) if r.exported else None, lambda v: f"{v:.0f}"),
    (
        "skipped places",
        lambda r: sum(len(p.nodes) for row in r.passes for p in row.skipped),
        lambda v: f"{v:.0f}",
    ),
    ("seconds in passes", lambda r: sum(row.seconds for row in r.passes), lambda v: f"{v:.1f}"),
)


def difference_text(run_a: Path, run_b: Path) -> str:
    """Return what differs between two run directories; GraphoptError where one is none, or damaged."""
    a, b = Report.read(run_a), Report.read(run_b)
    parts: list[RenderableType] = [
        Text(f"A  {run_a}: {a.recipe} for {a.target}"),
        Text(f"B  {run_b}: {b.recipe} for {b.target}"),
    ]
    parts += [
        section("recipe"),
        *recipe_lines(run_a, run_b),
        section("figures"),
        figures(a, b),
        section("passes"),
    ]
    parts += pass_lines(a, b)
    return plain(Group(*parts), WIDTH)


def recipe_lines(run_a: Path, run_b: Path) -> list[RenderableType]:
    """Return the unified diff of the resolved recipes."""
    old, new = (read_text(run, "recipe.yaml").splitlines() for run in (run_a, run_b))
    lines = list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]
    return [Text("  " + line) for line in lines] or [bullet("the same")]


def figures(a: Report, b: Report) -> Table:
    """Return the quantities of both results and their ratio."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column()
    for heading in ("A", "B", "B / A"):
        table.add_column(heading, justify="right")
    for name, get, show in _QUANTITIES:
        first, second = get(a), get(b)
        if first is None and second is None:
            continue
        ratio = f"{second / first:.3g}×" if first and second is not None else ""
        table.add_row(name, *("" if each is None else show(each) for each in (first, second)), ratio)
    return table


def pass_lines(a: Report, b: Report) -> list[RenderableType]:
    """Return the passes whose line differs or that only one run has, and where the programs part."""
    first, second = ({row.key: row for row in report.passes} for report in (a, b))
    keys = [*first, *(key for key in second if key not in first)]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key in keys:
        rows = first.get(key), second.get(key)
        if None not in rows and _line(rows[0]) == _line(rows[1]):
            continue
        for side, row in zip("AB", rows, strict=True):
            cells = ("not run",) if row is None else _line(row)
            table.add_row(Text(key if side == "A" else ""), side, *(Text(cell) for cell in cells))
    parts: list[RenderableType] = [table] if table.row_count else [bullet("every pass reports the same in both")]
    parted = parting(a, b)
    parts.append(
        bullet(f"the programs differ from {parted} on" if parted else "the programs are equal after every pass")
    )
    return parts


def parting(a: Report, b: Report) -> str:
    """Return the first pass after which the programs differ, or an empty string."""
    for first, second in zip(a.trace, b.trace, strict=False):
        if first.key != second.key or first.text != second.text:
            return first.key if first.key == second.key else f"{first.key} (A) and {second.key} (B)"
    longer = a.trace if len(a.trace) > len(b.trace) else b.trace
    shared = min(len(a.trace), len(b.trace))
    return longer[shared].key if len(longer) > shared and longer[shared].changed else ""


def _line(row: PassRow | None) -> tuple[str, ...]:
    return pass_cells(row)[2:] if row is not None else ()
