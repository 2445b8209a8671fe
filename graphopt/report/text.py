"""The report as text: figures before and after, a line for every pass, and what one should know besides."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from graphopt.causes import Causes
from graphopt.report.report import Change, PassRow, Places, Report

_MANY = 8  # entries of one list shown in a summary; the report and the trace hold all
_WORST = 3  # places that cost most, in a summary
_LONG = 60  # characters of what a pass did that are spelled out on its own line
_NUMBER = re.compile(r"\b([A-Za-z]\w*?)_\d+\b")  # names as fx numbers them


# Characters that a terminal obeys instead of showing; names come from models and from files of others.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Return text with a picture in the place of every character that a terminal would obey (␛ for escape)."""
    return text.translate(_PICTURES)


@dataclass(frozen=True)
class Visible:
    """A renderable whose text cannot steer the terminal; its styles stay."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def plain(renderable: RenderableType, width: int = 110) -> str:
    """Return the text of a renderable without colour."""
    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False, emoji=False, markup=False)
    console.print(Visible(renderable), crop=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def summary(report: Report, table: RenderableType | None = None) -> Group:
    """Return everything: figures, passes (or another table of them), what did not fuse, what was skipped and why."""
    head = Text.assemble(
        ("recipe ", "dim"),
        (report.recipe, "bold"),
        (" for ", "dim"),
        (report.target, "bold"),
        (f"  graphopt {report.version}", "dim"),
    )
    parts: list[RenderableType] = [head, figures(report), section("passes"), table or passes(report.passes)]
    parts += export_parts(report)
    if report.causes is not None:
        parts += cause_parts(report.causes)
    skipped = list(skipped_lines(report.passes))
    if skipped:
        parts += [section("skipped"), *skipped]
    if report.notes:
        parts += [section("notes"), *(bullet(note) for note in report.notes)]
    if report.budget:
        parts.append(section("budget"))
        parts += [bullet(each, "red") for each in report.exceeded] or [bullet("every bound holds", "green")]
    return Group(*parts)


def section(title: str) -> Text:
    """Return a heading with an empty line before it."""
    return Text(f"\n{title}", "bold")


def bullet(text: str, style: str = "") -> Padding:
    """Return a paragraph, indented."""
    return Padding(Text(text, style), (0, 0, 0, 2))


def figures(report: Report) -> Table:
    """Return the table of quantities before and after."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column()
    for heading in ("before", "after", ""):
        table.add_column(heading, justify="right", header_style="dim")
    for name, before, after, relation in figure_rows(report):
        table.add_row(name, before, after, relation)
    return table


def figure_rows(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Yield (quantity, before, after, how they relate) for what is known."""

    def row(name: str, change: Change, show: object, relation: str = "ratio") -> Iterator[tuple[str, str, str, str]]:
        if change.before is None and change.after is None:
            return
        assert callable(show)
        before, after = ("" if value is None else show(value) for value in (change.before, change.after))
        if relation == "ratio":
            shown = "" if change.ratio is None else f"{change.ratio:.3g}×"
        else:
            shown = "" if change.difference is None else f"{change.difference:+.4g}"
        yield name, before, after, shown

    yield from row("metric", report.metric, lambda value: f"{value:.6g}", "difference")
    yield from row("file", report.size_bytes, size_text)
    yield from row("latency", report.latency_ms, lambda value: f"{value:.3g} ms")
    yield from row("parameters", report.parameters, lambda value: f"{value:,.0f}")
    yield from row("parameter bytes", report.parameter_bytes, size_text)
    yield from row("bits a weight", report.average_bits, lambda value: f"{value:.2f}")
    yield from row("multiply-accumulates", report.macs, lambda value: f"{value:,.0f}")
    if report.exported is not None:
        found = report.exported
        if found.sqnr_db is not None:
            yield "output SQNR", "", f"{found.sqnr_db:.1f} dB", ""
        if found.max_steps is not None:
            yield "runtime against torch", "", f"{found.max_steps:.3g} steps", ""


def size_text(count: float) -> str:
    """Return bytes in decimal units: `813 B`, `48.2 kB`, `1.12 MB`."""
    for unit, scale in (("B", 1), ("kB", 1e3), ("MB", 1e6)):
        if abs(count) / scale < 999.5:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e9:,.3g} GB" if abs(count) < 999.5e9 else f"{count / 1e9:,.0f} GB"


def passes(rows: list[PassRow]) -> Table:
    """Return one line a pass: number, name, exact or lossy, operators, bytes, error, what it did."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for justify in ("left", "left", "left", "right", "right", "left", "left"):
        table.add_column(justify=justify, no_wrap=justify == "right", overflow="fold")
    for row in rows:
        style = "yellow" if row.rejected else ("" if row.changed or row.index == 0 else "dim")
        table.add_row(*(Text(cell) for cell in pass_cells(row)), style=style)
    return Table.grid() if not rows else table


def pipeline(rows: list[PassRow]) -> Table:
    """Return the pipeline as a table with a heading: what every pass changed, what it cost, and how often it fired."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "pass", "kind", "nodes", "bytes", "MACs", "error", "seconds", "fired", "declined"):
        words = heading in ("", "pass", "kind", "error")
        table.add_column(heading, justify="left" if words else "right", overflow="fold")
    for row in rows:
        style = "yellow" if row.rejected else ("" if row.changed or row.index == 0 else "dim")
        sign = "" if row.index == 0 else "+"
        fired, declined = (sum(len(each.nodes) for each in groups) for groups in (row.touched, row.skipped))
        cells = (
            f"{row.index:03d}", row.key, "" if row.index == 0 else ("exact" if row.exact else "lossy"),
            f"{row.nodes:{sign}d}" if row.nodes else "", _signed(row.bytes, size_text, sign),
            _signed(row.macs, _count_text, sign), "rejected" if row.rejected else error_text(row),
            f"{row.seconds:.2f}" if row.index else "", str(fired or ""), str(declined or ""),
        )  # fmt: skip
        table.add_row(*map(Text, cells), style=style)
    return table


def _signed(value: float, show: Callable[[float], str], sign: str) -> str:
    return ((sign if value > 0 else "") + show(value)) if value else ""


def _count_text(count: float) -> str:
    for unit, scale in (("", 1), ("k", 1e3), ("M", 1e6)):
        if abs(count) / scale < 999.5:
            return f"{count / scale:.3g}{unit}"
    return f"{count / 1e9:,.3g}G"


def pass_cells(row: PassRow) -> tuple[str, ...]:
    """Return the cells of a pass's line."""
    if row.index == 0:
        return f"{row.index:03d}", row.key, "", f"{row.nodes} nodes", size_text(row.bytes), "", ""
    kind = "exact" if row.exact else "lossy"
    if not row.changed and not row.rejected:
        return f"{row.index:03d}", row.key, kind, "", "", "", _said(row)
    nodes = f"{row.nodes:+d} nodes" if row.nodes else "0 nodes"
    sign = "+" if row.bytes > 0 else ""
    return (
        f"{row.index:03d}",
        row.key,
        kind,
        nodes,
        f"{sign}{size_text(row.bytes)}",
        error_text(row),
        _said(row),
    )


def error_text(row: PassRow) -> str:
    """Return how far the outputs moved."""
    if row.error is not None:
        return f"max rel. error {row.error:.0e}" if row.error else "max rel. error 0"
    if row.sqnr_db is not None:
        return "output unchanged" if row.sqnr_db == math.inf else f"output SQNR {row.sqnr_db:.1f} dB"
    return ""


def _said(row: PassRow) -> str:
    if row.rejected:
        return f"rejected: {row.rejected}"
    parts = [counted(row.touched)] if row.touched else []
    if row.skipped:
        kinds = merged(row.skipped)
        count = sum(len(each.nodes) for each in kinds)
        why = f": {kinds[0].reason}" if len(kinds) == 1 else f" ({len(kinds)} reasons)"
        parts.append(f"{count} skipped{why}")
    if not row.changed and row.index:
        parts.insert(0, "nothing to do")
    if row.inserted:
        parts.append(f"required by {row.inserted}")
    return "; ".join(parts)


def counted(groups: list[Places]) -> str:
    """Return `53 folded`, or `57 places (4 kinds)` where that would get long."""
    kinds = merged(groups)
    text = ", ".join(f"{len(each.nodes)} {each.reason}" for each in kinds)
    if len(text) <= _LONG:
        return text
    count = sum(len(each.nodes) for each in kinds)
    return f"{count} places" + (f" ({len(kinds)} kinds)" if len(kinds) > 1 else "")


def merged(groups: list[Places]) -> list[Places]:
    """Return the groups with those as one that differ in a node's number only: `folded into conv2d_7`."""
    found: dict[str, list[str]] = {}
    for each in groups:
        found.setdefault(_NUMBER.sub(r"\1", each.reason), []).extend(each.nodes)
    return sorted((Places(*each) for each in found.items()), key=lambda each: -len(each.nodes))


def skipped_lines(rows: list[PassRow]) -> Iterator[RenderableType]:
    """Yield a paragraph for every pass and reason with the places it holds for."""
    for row in rows:
        for each in merged(row.skipped):
            yield bullet(f"{row.key}: {each.reason}: {listed(each.nodes)}")


def listed(names: list[str], most: int = _MANY) -> str:
    """Return the names, or the first of them and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def cause_parts(causes: Causes, most: int = _WORST) -> list[RenderableType]:
    """Return where the error comes from and what helps; empty where nothing is quantized."""
    if not causes.sites:
        return []
    parts: list[RenderableType] = [section("where the error comes from")]
    parts += [bullet(str(each), "yellow" if each.defects else "") for each in causes.sites[:most]]
    if (more := len(causes.sites) - most) > 0:
        parts.append(bullet(f"and {more} places that cost less", "dim"))
    if causes.remedies:
        parts.append(section("what helps (tried)"))
        parts += [bullet(str(each)) for each in causes.remedies]
    return parts


def db_text(value: float | None) -> str:
    """Return `31.4 dB`, or nothing where it is not known."""
    return "" if value is None else f"{value:.1f} dB"


def export_parts(report: Report) -> list[RenderableType]:
    """Return what the runtime made of the file; empty before an export."""
    found = report.exported
    if found is None:
        return []
    parts: list[RenderableType] = [section("in the runtime"), bullet(f"{found.path}, opset {found.opset}")]
    fused = ", ".join(
        f"{count} {name}" for name, count in sorted(found.fused.items(), key=lambda each: (-each[1], each[0]))
    )
    parts.append(bullet(f"on integer kernels: {fused or 'nothing'}"))
    if not found.unfused:
        parts.append(bullet("unfused: 0"))
    else:
        parts.append(bullet(f"unfused: {len(found.unfused)}", "yellow"))
        groups = merged([Places(reason, [node]) for node, reason in found.unfused])
        parts += [bullet(f"  {listed(each.nodes)}: {each.reason}", "yellow") for each in groups]
    if found.latency_ratio is not None and found.latency_ratio > 1:
        parts.append(bullet(f"slower than the float export ({found.latency_ratio:.2f}×); the time goes to:", "yellow"))
    parts += [bullet(f"  {line}") for line in found.slow_nodes]
    parts += [bullet(note) for note in found.notes]
    return parts
