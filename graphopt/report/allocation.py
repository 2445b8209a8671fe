"""Pictures of a search: its Pareto front, what each unit loses at each level, and the bits that each got.

Each is one SVG, styled by the page around it or, alone, by its own colours. Names come from the user's model and
figures from a trace that may have been tampered with: everything is escaped, and what is no number is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from graphopt.pipeline import PassRecord
from graphopt.report.svg import bar, dot, line, scale, short, svg, text

_MOST_UNITS = 200  # rows of a picture; the trace holds all
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 760, 270, 60, 18, 34
_ASSUMED_BITS = 32


@dataclass(frozen=True)
class Pictures:
    """Of one search; a picture is None where the record has nothing for it.

    Attributes:
        left_out: units that are not shown. trust: how the estimates followed the true losses, as the rank correlation
            and that of logarithms, by the estimate's name.
    """

    key: str
    front: Markup | None
    losses: Markup | None
    bits: Markup | None
    left_out: int
    trust: dict[str, tuple[str, str]]


def pictures(record: PassRecord) -> Pictures | None:
    """Return the pictures of a pass that chose levels; None for any other."""
    facts = record.facts
    levels = _names(facts.get("levels"))
    if not levels:
        return None
    units = list(levels)[:_MOST_UNITS]
    losses = {unit: _numbers(_mapping(facts.get("losses")).get(unit)) for unit in units}
    trust = {str(name): _mapping(each) for name, each in _mapping(facts.get("correlations")).items()}
    bits = {unit: value for unit, value in _numbers(facts.get("bits")).items() if unit in units}
    return Pictures(
        record.key,
        front(facts.get("front"), facts.get("loss"), str(facts.get("resource", "cost"))),
        losses_of_units(losses, levels) if any(losses.values()) else None,
        bits_of_units(bits) if bits else None,
        len(levels) - len(units),
        {name: (_figure(each.get("rank")), _figure(each.get("logarithm"))) for name, each in trust.items()},
    )


def front(points: Any, chosen: Any, resource: str) -> Markup | None:
    """Return the candidates that no other beats, loss over cost; None where there are less than two.

    `points`: mappings with cost, loss and origin. The one of the loss `chosen` is filled.
    """
    found = [each for each in points if isinstance(each, dict)] if isinstance(points, list) else []
    found = [each for each in found if _positive(each.get("loss")) and _number(each.get("cost"))]
    if len(found) < 2:
        return None
    across = scale([float(each["cost"]) for each in found], 90, _WIDTH - 40)
    height = 300
    up = scale([math.log10(float(each["loss"])) for each in found], height - 40, 20)
    parts = [
        line(90, height - 40, _WIDTH - 40, height - 40), line(90, 20, 90, height - 40),
        text(_WIDTH - 40, height - 8, resource, "end"), text(8, 14, "loss"),
    ]  # fmt: skip
    for cost in (min(float(each["cost"]) for each in found), max(float(each["cost"]) for each in found)):
        parts.append(text(across(cost), height - 24, f"{cost:.4g}", "middle"))
    for loss in (min(float(each["loss"]) for each in found), max(float(each["loss"]) for each in found)):
        parts.append(text(84, up(math.log10(loss)) + 4, f"{loss:.2g}", "end"))
    for each in found:
        title = f"{each.get('origin', '')}: loss {float(each['loss']):.3g} at {float(each['cost']):.5g}"
        x, y = across(float(each["cost"])), up(math.log10(float(each["loss"])))
        parts.append(dot(x, y, 5, each["loss"] == chosen, title))
    return svg(_WIDTH, height, parts, "Pareto front: loss of the candidates over their cost")


def losses_of_units(losses: Mapping[str, Mapping[str, float]], levels: Mapping[str, str]) -> Markup:
    """Return a row for each unit: its loss at each level, alone, on a logarithmic axis; the chosen level is filled."""
    known = [loss for each in losses.values() for loss in each.values() if _positive(loss)]
    across = scale([math.log10(loss) for loss in known], _LEFT, _WIDTH - _RIGHT)
    parts = []
    for loss in {min(known, default=1.0), max(known, default=1.0)}:
        parts.append(text(across(math.log10(loss)), 16, f"{loss:.1g}", "middle"))
    for row, (unit, each) in enumerate(losses.items()):
        y = _TOP + _ROW * row
        parts += [text(_LEFT - 12, y + 4, short(unit), "end"), line(_LEFT, y, _WIDTH - _RIGHT, y)]
        for level, loss in each.items():
            if _positive(loss):
                title = f"{unit} at {level} alone loses {loss:.3g}"
                parts.append(dot(across(math.log10(loss)), y, 4.5, levels.get(unit) == level, title))
    return svg(_WIDTH, _TOP + _ROW * len(losses), parts, "Loss of each unit at each level")


def bits_of_units(bits: Mapping[str, float]) -> Markup:
    """Return a bar for each unit, as long as the bits that a weight of it has."""
    most = max(*bits.values(), 1.0)
    across = scale([0.0, min(most, _ASSUMED_BITS)], _LEFT, _WIDTH - _RIGHT)
    parts = []
    for row, (unit, value) in enumerate(bits.items()):
        y = _TOP + _ROW * row
        end = across(min(value, _ASSUMED_BITS))
        parts += [
            text(_LEFT - 12, y + 4, short(unit), "end"),
            bar(_LEFT, y - 5, end - _LEFT, 10),
            text(end + 6, y + 4, f"{value:.2f}"),
        ]
    return svg(_WIDTH, _TOP + _ROW * len(bits), parts, "Bits of each unit")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> dict[str, str]:
    return {str(key): str(each) for key, each in _mapping(value).items()}


def _numbers(value: Any) -> dict[str, float]:
    return {str(key): float(each) for key, each in _mapping(value).items() if _number(each)}


def _figure(value: Any) -> str:
    return f"{value:.3f}" if _number(value) else "unknown"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0
