"""The integer program equals brute force on small problems, with pairs, ties and several limits."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from small_problems import Pairs, problems

from graphopt.search import (
    Infeasible,
    Level,
    Problem,
    Unit,
    additive,
    greedy,
    integer_program,
    sorted_steps,
    taken,
    with_pairs,
)


def everything(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(unit.levels)) for unit in problem.units)))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(drawn: tuple[Problem, list[list[float]], Pairs]) -> None:
    problem, losses, pairs = drawn
    feasible = [each for each in everything(problem) if problem.feasible(each)]
    if not feasible:
        with pytest.raises(Infeasible, match="the budget cannot be met"):
            integer_program(problem, losses, pairs)
        return
    found = integer_program(problem, losses, pairs)
    least = min(with_pairs(losses, pairs, each) for each in feasible)
    assert problem.feasible(found)
    assert with_pairs(losses, pairs, found) <= least + 1e-3 * max(abs(least), 1)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_steps_along_the_hull_are_optimal_where_they_stop(drawn: tuple[Problem, list[list[float]], Pairs]) -> None:
    """After k steps nothing else is better at what that costs; greedy is feasible and no better than the program."""
    whole, losses, _ = drawn
    problem = Problem(whole.units, {}, whole.fixed)
    losses = [[0.0, *each[1:]] for each in losses]
    steps = sorted_steps(problem, losses, "size")
    for count in range(len(steps) + 1):
        made = taken(problem, steps, count)
        spent = problem.costs(made)["size"]
        others = [each for each in everything(problem) if problem.costs(each)["size"] <= spent]
        assert additive(losses, made) <= min(additive(losses, each) for each in others) + 1e-9
    limited = Problem(whole.units, {"size": whole.limits["size"]}, whole.fixed)
    try:
        found = greedy(limited, losses)
    except Infeasible:
        return
    assert limited.feasible(found)
    assert additive(losses, found) >= additive(losses, integer_program(limited, losses)) - 1e-6


def test_infinite_losses_forbid_a_level() -> None:
    unit = Unit("u", (Level("float", {"size": 4}), Level("int8", {"size": 2}), Level("int4", {"size": 1})))
    problem = Problem((unit, unit), {"size": 6})
    assert integer_program(problem, [[0, math.inf, 5], [0, 1, math.nan]]) == (0, 1)
    with pytest.raises(Infeasible, match="each limit could be alone"):
        integer_program(Problem((unit,), {"size": 3}), [[0, math.inf, math.inf]])


def test_says_what_can_be_reached() -> None:
    levels = (Level("wide", {"size": 4.0, "time": 1.0}), Level("narrow", {"size": 1.0, "time": 3.0}))
    units = (Unit("a", levels), Unit("b", levels))
    with pytest.raises(Infeasible, match="size 1 is asked and size 2 the least, time 9 is asked and time 2 the least"):
        integer_program(Problem(units, {"size": 1, "time": 9}), [[0, 1]] * 2)
    with pytest.raises(Infeasible, match="each limit could be alone"):
        integer_program(Problem(units, {"size": 2, "time": 2}), [[0, 1]] * 2)


def test_no_units_and_no_limits() -> None:
    assert integer_program(Problem(()), []) == ()
    unit = Unit("u", (Level("a", {}), Level("b", {})))
    assert integer_program(Problem((unit,)), [[3.0, 1.0]]) == (1,)
    with pytest.raises(Infeasible):
        integer_program(Problem((), {"size": 1}, {"size": 2}), [])
