"""What the explorer of an HTML report is given: the programs of a run, line by line, and what passes said of places.

Programs share most of their lines, so that each is a list of numbers of lines, and a pass that changed nothing has
none. What a page cannot hold stays in the trace; the page says where.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from graphopt.causes import Causes
from graphopt.pipeline import PassRecord
from graphopt.report.report import PassRow, Report
from graphopt.report.story import figure_text
from graphopt.report.text import error_text, pass_cells, visible

_MOST_BYTES = 4 << 20  # of all programs together
_MOST_PLACES = 20_000  # figures of one pass, by place


def payload(report: Report) -> dict[str, Any]:
    """Return the lines and the passes as plain data."""
    numbers: dict[str, int] = {}
    rows = {row.index: row for row in report.passes}
    left, passes = _MOST_BYTES, []
    for record in report.trace:
        if record.index not in rows:
            continue
        text: list[int] | None = []
        if record.changed or record.index == 0:
            lines = record.text.splitlines()
            cost = 6 * len(lines) + sum(len(line) for line in lines if line not in numbers)
            if cost <= left:
                left -= cost
                text = [numbers.setdefault(line, len(numbers)) for line in lines]
            else:
                text = None
        passes.append(_pass(record, rows[record.index], text))
    return {"lines": [visible(line) for line in numbers], "passes": passes, "sites": _sites(report.causes)}


def _sites(causes: Causes | None) -> dict[str, Any]:
    """Return what is known of each place, by its name."""
    sites = causes.sites[:_MOST_PLACES] if causes is not None else []
    return {
        visible(each.node): {
            "told": visible(str(each)),
            "spreads": {visible(name): list(dataclasses.astuple(one)) for name, one in each.spreads.items()},
        }
        for each in sites
    }


def _pass(record: PassRecord, row: PassRow, text: list[int] | None) -> dict[str, Any]:
    return {
        "key": visible(row.key), "stem": row.stem, "changed": record.changed, "text": text,
        "rejected": visible(row.rejected), "error": error_text(row), "about": _about(row),
        "touched": _places(row.touched), "skipped": _places(row.skipped), "figures": _figures(record),
    }  # fmt: skip


def _about(row: PassRow) -> list[str]:
    """Return sentences about a pass."""
    kind, nodes, size, error, said = pass_cells(row)[2:7]
    found = [", ".join(each for each in (kind, nodes, size, error) if each), said]
    found += [f"{name} = {value}" for name, value in row.options.items()]
    found += [f"{name.replace('_', ' ')}: {figure_text(value)}" for name, value in row.facts.items()]
    return [visible(each) for each in found if each]


def _places(groups: Any) -> list[list[Any]]:
    return [[visible(each.reason), [visible(node) for node in each.nodes]] for each in groups]


def _figures(record: PassRecord) -> dict[str, dict[str, str]]:
    """Return the figures that belong to a place each, by their title."""
    found = {}
    for title, table in record.facts.items():
        if isinstance(table, Mapping) and table and len(table) <= _MOST_PLACES:
            found[title.replace("_", " ")] = {visible(str(k)): visible(figure_text(v)) for k, v in table.items()}
    return found


def as_script(data: Any) -> Markup:
    """Return data as JSON that a script element can hold: it cannot end the element, nor begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate({ord(each): f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"}))
