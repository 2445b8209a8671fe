"""Plain text about passes, recipes and one pass of a run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

from rich.console import Group
from rich.table import Table
from rich.text import Text

from graphopt.cli.console import WIDTH
from graphopt.errors import GraphoptError
from graphopt.pipeline import Pass, builtin, builtin_names, pass_class, pass_classes
from graphopt.report import Report
from graphopt.report.text import bullet, passes, plain

_FEW = 8  # figures that fit on a line

def pass_text(report: Report, name: str) -> str:
    """Return a pass's line, what it touched and skipped, and its diff; `name` is its key or index."""
    record = report.trace[_position(name, len(report.trace)) if name.isdigit() else name]
    rows = [row for row in report.passes if row.key == record.key]
    parts: list[Any] = [passes(rows)]
    for option, value in record.options.items():
        parts.append(bullet(f"{option} = {value!r}"))
    parts += _facts(record.facts)
    for row in rows:
        for title, groups in (("touched", row.touched), ("skipped", row.skipped)):
            if groups:
                parts.append(Text(f"\n{title}"))
                parts += [bullet(f"{each.reason}: {', '.join(each.nodes)}") for each in groups]
    text = plain(Group(*parts), WIDTH)
    return (
        text
        + "\n"
        + (record.diff() or (record.text if record.index == 0 else "The program is the same before and after.\n"))
    )


def _facts(facts: dict[str, Any]) -> Iterator[Any]:
    """Yield the figures and sentences that a pass reports; long tables of figures are in the trace's JSON."""
    for name, value in facts.items():
        title = name.replace("_", " ")
        if isinstance(value, bool | int | float | str):
            yield bullet(f"{title}: {value}")
        elif isinstance(value, dict) and value and len(value) <= _FEW and not any(map(_nested, value.values())):
            yield bullet(f"{title}: " + ", ".join(f"{key} {each}" for key, each in value.items()))
        elif isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            yield Text(f"\n{title}")
            yield from (bullet(each) for each in value)


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _position(text: str, count: int) -> int:
    if int(text) >= count:
        raise GraphoptError(f"the trace has no pass {int(text)}; it has 0 to {count - 1}")
    return int(text)


def passes_text() -> str:
    """Return every pass with the first line of its documentation."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, cls in pass_classes().items():
        table.add_row(Text(name), Text(_kind(cls)), Text(_doc(cls)[0]))
    return plain(table, WIDTH)


def pass_help(name: str) -> str:
    """Return a pass's documentation, what it needs, and its options with types and defaults."""
    cls = pass_class(name)
    hints = get_type_hints(cls)
    lines = [f"{name}  ({_kind(cls)})", "", *_doc(cls), ""]
    if cls.requires:
        lines.append(f"runs after: {', '.join(cls.requires)}")
    if cls.needs:
        lines.append(f"needs: {', '.join(sorted(cls.needs))}")
    fields = dataclasses.fields(cls)
    lines.append("options:" if fields else "options: none")
    for each in fields:
        default = "" if each.default is dataclasses.MISSING else f" = {_shown(each.default)}"
        lines.append(f"  {each.name}: {_type(hints[each.name])}{default}")
    return "\n".join(lines) + "\n"


def recipes_text() -> str:
    """Return every built-in recipe with its description."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name in builtin_names():
        table.add_row(Text(name), Text(builtin(name).description))
    return plain(table, WIDTH)


def _kind(cls: type[Pass]) -> str:
    return "exact" if cls.exact else "lossy"


def _doc(cls: type[Pass]) -> list[str]:
    return (inspect.cleandoc(cls.__doc__ or "") or "(no description)").splitlines()


def _shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _type(hint: Any) -> str:
    """Return a type as a user reads it: `tuple[str, ...]` is a list of str, `Literal` its values."""
    name = str(hint) if not isinstance(hint, type) or hasattr(hint, "__args__") else hint.__name__
    return name.replace("typing.", "").replace("tuple[str, ...]", "list of str")
