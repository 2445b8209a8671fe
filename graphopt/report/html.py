"""The report as one HTML file: no scripts, nothing loaded from anywhere, readable on paper and in the dark.

Names in it come from the user's model, so that everything is escaped, and a content security policy allows
nothing but the file's own style sheet, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources
from itertools import islice

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from graphopt.pipeline import PassRecord
from graphopt.report.allocation import pictures
from graphopt.report.report import PassRow, Report
from graphopt.report.text import error_text, figure_rows, pass_cells, size_text

_MOST_LINES = 400  # of one pass's diff; the trace holds all
_MOST_TEXT_BYTES = 1 << 20  # before and after together; comparing more takes many seconds a pass


@dataclass(frozen=True)
class Line:
    """A line of a diff; `kind` is `add`, `remove`, `at` (a position) or `same`."""

    kind: str
    text: str


@dataclass(frozen=True)
class Diff:
    """The diff of a pass as shown, with the number of lines that are left out."""

    row: PassRow
    lines: list[Line]
    left_out: int
    too_large: bool = False


def html(report: Report) -> str:
    """Return the report as an HTML document."""
    folder = resources.files("graphopt.report") / "templates"
    style = (folder / "report.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = size_text
    environment.filters["error"] = error_text
    environment.filters["cells"] = pass_cells
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        figures=list(figure_rows(report)),
        searches=[found for record in report.trace if (found := pictures(record)) is not None],
        diffs=diffs(report),
        style=Markup(style),  # ours, and without `<`: `test_html` checks
        style_hash=base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii"),
    )


def diffs(report: Report) -> list[Diff]:
    """Return the diff of every pass that changed the program, as far as it is shown."""
    rows = {row.index: row for row in report.passes}
    return [_diff(rows[record.index], record) for record in report.trace if record.changed and record.index in rows]


def _diff(row: PassRow, record: PassRecord) -> Diff:
    if len(record.text) + len(record.before) > _MOST_TEXT_BYTES:
        return Diff(row, [], 0, too_large=True)
    # The first two lines name the sides, which the heading does.
    lines = record.diff().splitlines()[2:]
    shown = [Line(_KINDS.get(line[:1], "same"), line) for line in islice(lines, _MOST_LINES)]
    return Diff(row, shown, max(0, len(lines) - _MOST_LINES))


_KINDS = {"+": "add", "-": "remove", "@": "at"}
