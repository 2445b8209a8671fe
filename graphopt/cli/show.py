"""Plain text about passes and recipes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

from rich.table import Table
from rich.text import Text

from graphopt.cli.console import WIDTH
from graphopt.pipeline import Pass, builtin, builtin_names, pass_class, pass_classes
from graphopt.report.text import plain


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
