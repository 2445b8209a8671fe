"""Bounds as the command line is given them: `NAME=NUMBER`."""

from __future__ import annotations

import math
from collections.abc import Collection

from graphopt.errors import GraphoptError, nearest


def parse_bound(text: str, names: Collection[str], taken: str) -> tuple[str, float]:
    """Return a name of `names` and its number; GraphoptError, which says what is `taken`, where there is none."""
    name, _, value = text.partition("=")
    try:
        if name in names and not math.isnan(number := float(value)):
            return name, number
    except ValueError:
        pass
    raise GraphoptError(f"{taken}, not {text!r}{nearest(name, names)}")
