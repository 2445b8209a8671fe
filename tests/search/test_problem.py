"""Problems: costs, ties, names, and moves that hold the limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import problems

from graphopt.errors import GraphoptError
from graphopt.search import Level, Moves, Problem, Tie, Unit, bisect

BITS = tuple(Level(f"int{bits}", {"size": bits}) for bits in (8, 4, 2))


def blocks() -> Problem:
    """Two blocks that stay or go, with two weights each."""
    keep = (Level("stays"), Level("goes"))
    weights = (*BITS, Level("gone"))
    units = [Unit(f"block{b}", keep) for b in range(2)] + [Unit(f"weight{w}", weights) for w in range(4)]
    ties = tuple(Tie(2 + w, 3, w // 2, 1) for w in range(4))
    return Problem(tuple(units), {"size": 14}, {"size": 1}, ties)


def test_ties_follow_the_whole() -> None:
    problem = blocks()
    assert problem.settled((0, 1, 2, 1, 0, 0)) == (0, 1, 2, 1, 3, 3)
    assert problem.settled((0, 0, 3, 1, 3, 3)) == (0, 0, 0, 1, 0, 0)
    assert not problem.tied((0, 1, 2, 1, 0, 0))
    assert problem.costs((0, 1, 2, 1, 3, 3)) == {"size": 1 + 2 + 4}
    assert problem.uniform("int4") == (0, 0, 1, 1, 1, 1)
    assert problem.uniform("goes") == (1, 1, 3, 3, 3, 3)
    assert problem.assignment(problem.names((0, 1, 2, 1, 3, 3))) == (0, 1, 2, 1, 3, 3)


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(GraphoptError, match="weight0 has no level 'int3'; it has int8, int4, int2, gone"):
        blocks().assignment({"weight0": "int3"})


@pytest.mark.parametrize("drawn", range(30))
def test_moves_hold_limits_and_ties(drawn: int) -> None:
    problem, rng = blocks(), np.random.default_rng(drawn)
    moves = Moves(problem)
    now = moves.repaired(problem.start, rng)
    assert now is not None
    reached = {now}
    for _ in range(100):
        child = moves.switched(now, int(rng.integers(1, 4)), rng)
        if child is not None:
            assert problem.feasible(child)
            now = child
            reached.add(child)
    assert len(reached) > 5 and {each[0] for each in reached} == {0, 1}


@given(problems(), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_moves_of_any_problem_are_feasible(drawn: tuple[Problem, list[list[float]], object], seed: int) -> None:
    problem, _, _ = drawn
    rng = np.random.default_rng(seed)
    moves = Moves(problem)
    made = moves.repaired(problem.settled(problem.start), rng)
    for _ in range(5):
        if made is None:
            return
        assert problem.feasible(made)
        made = moves.switched(made, 2, rng)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bisection_returns_what_it_has_seen_to_hold(outcomes: list[bool]) -> None:
    asked: list[int] = []

    def holds(count: int) -> bool:
        asked.append(count)
        return outcomes[count]

    found = bisect(holds, len(outcomes) - 1)
    assert (found == -1) == (not outcomes[0])
    assert found == -1 or (outcomes[found] and found in asked)
    assert len(asked) <= 2 + len(outcomes).bit_length()
    if outcomes == sorted(outcomes, reverse=True) and outcomes[0]:
        assert found == sum(outcomes) - 1
