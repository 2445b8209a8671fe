"""The story of one place: every pass that made, changed, touched or declined it, and why, from the trace alone.

A place is called by the name of an operator or a weight, in any program of the run, of a module, or of a space of
weights. An operator's story holds those of the weights that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import GraphoptError, nearest
from graphopt.pipeline import PassRecord, Trace

_WEIGHT = re.compile(r"@([^\s,()\[\]]+)")
_REMARK = re.compile(r" # (\S+)")
_MOST_NAMES = 200  # operators of one module


@dataclass(frozen=True)
class Event:
    """What a pass did, or did not do, to a place.

    Attributes:
        index, key: of the pass. name: of the operator or weight.
        kind: made, changed, gone, touched, skipped, named (in what is said of another place) or figure.
        text: the line of the program, the reason, or the figure. before: the line that it was, of what changed.
    """

    index: int
    key: str
    name: str
    kind: str
    text: str
    before: str = ""


def story(trace: Trace, name: str) -> list[Event]:
    """Return what happened to a place, pass by pass. GraphoptError where no program of the run has it."""
    lines = [_lines(record) for record in trace]
    names = _resolved(trace, lines, name)
    found: list[Event] = []
    before: dict[str, str] = {}
    for record, after in zip(trace, lines, strict=True):
        for each in names:
            found += _seen(record, each, before.get(each, ""), after.get(each, ""))
        found += _said(record, names)
        found += _figures(record, names)
        before = after
    return found


def _lines(record: PassRecord) -> dict[str, str]:
    """Return the lines of a program's text by what they are about."""
    found = {}
    for line in record.text.splitlines():
        name, colon, _ = line.strip().partition(": ")
        if line.startswith("  ") and colon:
            found[name] = " ".join(line.split())
        elif line.startswith("program("):
            found |= dict(re.findall(r"(\w+): ([^:]+?)(?=, \w+: |\)$)", line.removeprefix("program(")))
    return found


def _resolved(trace: Trace, lines: list[dict[str, str]], name: str) -> list[str]:
    """Return the operators and weights that a name stands for, or the name of a space."""
    known: dict[str, None] = {}
    for each in lines:
        known |= dict.fromkeys(each)
    if name in known:
        read = dict.fromkeys(w for each in lines if name in each for w in _WEIGHT.findall(each[name]))
        return [name, *(each for each in read if each != name)]
    within = {
        each: None for program in lines for each, line in program.items()
        if _inside(each, name) or any(_inside(path, name) for path in _REMARK.findall(line))
    }  # fmt: skip
    if within:
        return list(within)[:_MOST_NAMES]
    if any(_said(record, [name]) or _figures(record, [name]) for record in trace):
        return [name]
    raise GraphoptError(
        f"no program of this run has a node, weight, module or space {name!r}{nearest(name, known)}; "
        "`graphopt inspect RUN_DIR --pass capture` lists them"
    )


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _seen(record: PassRecord, name: str, before: str, after: str) -> Iterator[Event]:
    if before == after:
        return
    kind = "changed" if before and after else ("made" if after else "gone")
    yield Event(record.index, record.key, name, kind, after or before, before if kind == "changed" else "")


def _said(record: PassRecord, names: list[str]) -> list[Event]:
    """Return what a pass says of places, and where it names them."""
    found = []
    for kind, sites in (("touched", record.touched), ("skipped", record.skipped)):
        for site in sites:
            if site.node in names:
                found.append(Event(record.index, record.key, site.node, kind, site.reason))
            else:
                named = [name for name in names if name in site.reason and _whole(name, site.reason)]
                found += [Event(record.index, record.key, n, "named", f"{site.node}: {site.reason}") for n in named]
    return found


def _whole(name: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]\w)(?!\w)", text) is not None


def _figures(record: PassRecord, names: list[str]) -> list[Event]:
    found = []
    for title, table in record.facts.items():
        if isinstance(table, Mapping):
            for name in names:
                if name in table:
                    text = f"{title.replace('_', ' ')}: {figure_text(table[name])}"
                    found.append(Event(record.index, record.key, name, "figure", text))
    return found


def figure_text(value: Any) -> str:
    """Return a figure, or several, as a person reads it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(figure_text, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return str(value)
