"""Pictures of the places that are quantized: bits, error and time of each, and what becomes of their values.

The figures come from a report that may have been tampered with, and the names from the user's model: everything is
escaped, and what is no number is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from markupsafe import Markup

from graphopt.analysis.numerics import Spread
from graphopt.backend import ExportReport
from graphopt.causes import Cause, Causes
from graphopt.report.svg import bar, line, scale, short, svg, text

MOST_ROWS = 200
_NAMES, _COLUMN, _GAP, _ROW, _TOP = 270, 150, 50, 20, 30
_MOST_BITS = 16.0
_WIDE, _HIGH = 320, 96


def layers(causes: Causes, exported: ExportReport | None) -> Markup | None:
    """Return a row for each site, in the program's order; None where there is none.

    Bits of its weights, its share of the error at the outputs, and its time in the runtime: of the file filled, of the
    float export open.
    """
    sites = sorted(causes.sites[:MOST_ROWS], key=lambda each: each.position)
    if not sites:
        return None
    times = _finite(exported.node_ms if exported else {})
    before = _finite(exported.baseline_node_ms if exported else {})
    known = [each for site in sites for each in (times.get(site.node), before.get(site.node)) if each is not None]
    columns = ["bits of a weight", "share of the error"] + (["milliseconds"] if known else [])
    starts = [_NAMES + k * (_COLUMN + _GAP) for k in range(len(columns))]
    parts = [text(start, 14, words) for start, words in zip(starts, columns, strict=True)]
    most_share = max((each.share or 0.0 for each in sites if _good(each.share)), default=1.0) or 1.0
    most_time = max(known, default=1.0) or 1.0
    for row, site in enumerate(sites):
        y = _TOP + _ROW * row
        parts += [text(_NAMES - 12, y + 4, short(site.node), "end"), line(_NAMES, y + 9, starts[-1] + _COLUMN, y + 9)]
        bits = bits_of(site.weights)
        if bits is not None:
            parts += _bar(starts[0], y, bits / _MOST_BITS, f"{bits:g}", f"{site.node}: {site.weights}")
        if _good(site.share):
            share = site.share or 0.0
            parts += _bar(starts[1], y, share / most_share, f"{100 * share:.3g} %", str(site))
        for found, filled, up in ((times, True, 5), (before, False, 0)):
            if (spent := found.get(site.node)) is not None:
                what = f"{site.node}: {spent:.4g} ms {'in the file' if filled else 'in the float export'}"
                parts.append(bar(starts[2], y - up, _COLUMN * spent / most_time, 4, filled, what))
    width = int(starts[-1]) + _COLUMN + _GAP
    return svg(width, _TOP + _ROW * len(sites), parts, "Bits, share of the error and time of each place")


def histogram(spread: Spread, title: str) -> Markup:
    """Return how many values lie where: before as outlines, after filled, on a logarithmic axis."""
    counts = [math.log1p(max(each, 0)) for each in (*spread.before, *spread.after)]
    up = scale([0.0, max([*counts, 1.0])], 0, _HIGH - 20)
    each = _WIDE / max(len(spread.before), 1)
    parts = []
    for filled, found in ((True, spread.after), (False, spread.before)):
        for k, count in enumerate(found):
            high = up(math.log1p(max(count, 0)))
            wide = each * (0.5 if filled else 1.0)
            if count > 0:
                where = bar(each * k + (each - wide) / 2, _HIGH - 20 - high, wide, high, filled)
                parts.append(where if filled else where.replace(Markup('class="open"'), Markup('class="outline"')))
    ends = [text(0, _HIGH - 4, f"{spread.low:.3g}"), text(_WIDE, _HIGH - 4, f"{spread.high:.3g}", "end")]
    return svg(_WIDE, _HIGH, [*parts, *ends], title)


def bits_of(formats: str) -> float | None:
    """Return the bits of a format's name: of `int4 in groups of 64`, 4; None of floats and of names without any."""
    found = re.match(r"[a-z]+?(\d+)", formats)
    return min(float(found[1]), _MOST_BITS) if found else None


def worst(causes: Causes, count: int = 3) -> list[tuple[Cause, list[tuple[str, Markup]]]]:
    """Return the first sites with what became of their values."""
    return [
        (each, [(what, histogram(spread, f"{what} of {each.node}")) for what, spread in each.spreads.items()])
        for each in causes.sites[:count]
    ]


def _bar(x: float, y: float, share: float, label: str, title: str) -> list[Markup]:
    wide = _COLUMN * min(max(share, 0.0), 1.0)
    return [bar(x, y - 5, wide, 10, True, title), text(x + wide + 5, y + 4, label)]


def _finite(times: Mapping[str, float]) -> dict[str, float]:
    return {name: each for name, each in times.items() if math.isfinite(each) and each >= 0}


def _good(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value >= 0
