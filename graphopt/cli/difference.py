"""`graphopt diff`: two runs side by side: recipes, figures, decisions, passes; and whether B is within bounds of A."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.cli.bounds import parse_bound
from graphopt.pipeline import PassRecord
from graphopt.report import PassRow, Report
from graphopt.report.text import bullet, pass_cells, section, size_text
from graphopt.rundir import read_text

_TIME = re.compile(r"\d+(\.\d+)? ms")
_MOST = 40  # decisions that are printed

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


@dataclass(frozen=True)
class Difference:
    """What differs between two runs: for people, as plain data, and a sentence for each bound that does not hold."""

    parts: list[RenderableType]
    data: dict[str, Any]
    exceeded: list[str]


def difference(run_a: Path, run_b: Path, bounds: Sequence[str] = ()) -> Difference:
    """Compare two run directories; GraphoptError where one is none, or damaged, or a bound says nothing.

    `bounds`: texts like `size_ratio=1.05`, see `BOUNDS`; what is not known of both runs holds no bound.
    """
    taken = f"--max takes NAME=NUMBER with a name of {', '.join(BOUNDS)}"
    wanted = [parse_bound(each, BOUNDS, taken) for each in bounds]
    a, b = Report.read(run_a), Report.read(run_b)
    found = {name: get(a, b) for name, get in BOUNDS.items()}
    exceeded = [said for name, bound in wanted if (said := _beyond(name, found[name], bound))]
    decided = decisions(a, b)
    parts: list[RenderableType] = [
        Text(f"A  {run_a}: {a.recipe} for {a.target}"),
        Text(f"B  {run_b}: {b.recipe} for {b.target}"),
        section("recipe"), *recipe_lines(run_a, run_b),
        section("figures"), figures(a, b),
        section("decisions"), *decision_lines(decided),
        section("passes"), *pass_lines(a, b),
    ]  # fmt: skip
    if wanted:
        held = [bullet("every bound holds", "green")]
        parts += [section("bounds"), *([bullet(each, "red") for each in exceeded] or held)]
    data = {
        "a": str(run_a), "b": str(run_b), "figures": {name: [get(a), get(b)] for name, get, _ in _QUANTITIES},
        "differences": found, "decisions": [dataclasses.asdict(each) for each in decided],
        "parted": parting(a, b), "exceeded": exceeded,
    }  # fmt: skip
    return Difference(parts, data, exceeded)


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None or first <= 0 else second / first


def _drop(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _sqnr(report: Report) -> float | None:
    return report.exported.sqnr_db if report.exported else None


# What may be bounded: of B beside A, larger is worse.
BOUNDS: dict[str, Callable[[Report, Report], float | None]] = {
    "metric_drop": lambda a, b: _drop(a.metric.after, b.metric.after),
    "size_ratio": lambda a, b: _ratio(a.size_bytes.after, b.size_bytes.after),
    "latency_ratio": lambda a, b: _ratio(a.latency_ms.after, b.latency_ms.after),
    "macs_ratio": lambda a, b: _ratio(a.macs.after, b.macs.after),
    "params_ratio": lambda a, b: _ratio(a.parameters.after, b.parameters.after),
    "sqnr_drop": lambda a, b: _drop(_sqnr(a), _sqnr(b)),
}


def _beyond(name: str, found: float | None, bound: float) -> str:
    if found is None:
        return f"{name} is not known of both runs, so {bound:g} cannot be seen to hold"
    return "" if found <= bound else f"{name} is {found:.4g}, more than {bound:g}"


@dataclass(frozen=True)
class Decision:
    """A place of which a pass said one thing in A and another in B; empty: nothing."""

    key: str
    node: str
    a: str
    b: str


def decisions(a: Report, b: Report) -> list[Decision]:
    """Return where passes of the same name decided otherwise."""
    found = []
    others = {record.key: record for record in b.trace}
    for record in a.trace:
        if (other := others.get(record.key)) is not None:
            first, second = _decided(record), _decided(other)
            places = [*first, *(place for place in second if place not in first)]
            found += [
                Decision(record.key, place, first.get(place, ""), second.get(place, ""))
                for place in places if _untimed(first.get(place, "")) != _untimed(second.get(place, ""))
            ]  # fmt: skip
    return found


def _decided(record: PassRecord) -> dict[str, str]:
    return {site.node: site.reason for site in (*record.skipped, *record.touched)}


def _untimed(reason: str) -> str:
    """Return a reason without its times, which are never the same twice."""
    return _TIME.sub("", reason)


def decision_lines(found: list[Decision]) -> list[RenderableType]:
    """Return a line for each place, as far as they are shown."""
    if not found:
        return [bullet("the same")]
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    for each in found[:_MOST]:
        table.add_row(*map(Text, (each.key, each.node, f"{each.a or 'nothing'} → {each.b or 'nothing'}")))
    more = len(found) - _MOST
    return [table, bullet(f"and {more} more; --json has all")] if more > 0 else [table]


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
