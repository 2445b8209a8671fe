"""Small search problems, drawn at random, for tests that can try every assignment."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from graphopt.search import Level, Problem, Tie, Unit

Pairs = dict[tuple[int, int], np.ndarray]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, list[list[float]], Pairs]:
    """Up to five units of up to four levels, two resources, losses, some pairs, perhaps a tie."""
    costs, losses = st.integers(0, 20), st.integers(0, 50)
    units, lost = [], []
    for index in range(draw(st.integers(1, 5))):
        count = draw(st.integers(2, 4))
        levels = [Level(f"l{at}", {"size": draw(costs), "time": draw(costs)}) for at in range(count)]
        units.append(Unit(f"u{index}", tuple(levels)))
        lost.append([float(draw(losses)) for _ in range(count)])
    pairs: Pairs = {}
    ties: tuple[Tie, ...] = ()
    if len(units) > 1:
        if draw(st.booleans()):
            shape = len(units[0].levels), len(units[1].levels)
            drawn = [draw(st.integers(-9, 9)) for _ in range(shape[0] * shape[1])]
            pairs[0, 1] = np.array(drawn, float).reshape(shape)
        if draw(st.booleans()):
            ties = (Tie(1, len(units[1].levels) - 1, 0, len(units[0].levels) - 1),)
    limited = draw(st.sampled_from([["size"], ["size", "time"]]))
    limits = {name: draw(st.integers(0, 20 * len(units))) for name in limited}
    return Problem(tuple(units), limits, {"size": draw(costs)}, ties), lost, pairs
