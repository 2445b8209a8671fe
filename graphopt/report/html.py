"""The report as one HTML file: nothing loaded from anywhere, readable on paper, in the dark, and without scripts.

Names in it come from the user's model, so that everything is escaped, and a content security policy allows nothing but
the file's own style sheet and script, by their hashes. What the script shows it reads from data in the page.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from graphopt.report.allocation import pictures
from graphopt.report.explorer import as_script, payload
from graphopt.report.layers import MOST_ROWS, layers, worst
from graphopt.report.report import Report
from graphopt.report.text import db_text, error_text, figure_rows, pass_cells, size_text


def html(report: Report) -> str:
    """Return the report as an HTML document."""
    folder = resources.files("graphopt.report") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("report.css", "explorer.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = size_text
    environment.filters["error"] = error_text
    environment.filters["cells"] = pass_cells
    environment.filters["db"] = db_text
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        figures=list(figure_rows(report)),
        layers=layers(report.causes, report.exported) if report.causes else None,
        worst=worst(report.causes) if report.causes else [],
        searches=[found for record in report.trace if (found := pictures(record)) is not None],
        explorer=as_script(payload(report)) if len(report.trace) else "",
        most_rows=MOST_ROWS,
        style=Markup(style),  # ours, and without `<`; the script without `</`: `test_html` checks
        script=Markup(script),
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
