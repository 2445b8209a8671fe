"""Searches to compare with: random assignments, and the greedy one."""

from __future__ import annotations

import numpy as np

from graphopt.search.bisection import Step, sorted_steps, taken
from graphopt.search.evaluator import Evaluator
from graphopt.search.front import Front, Point
from graphopt.search.moves import Moves
from graphopt.search.problem import Assignment, Infeasible, Losses, Problem


def random_search(evaluator: Evaluator, evaluations: int, seed: int = 0) -> Front:
    """Return so many random assignments that hold the limits, evaluated on all the data."""
    problem, rng = evaluator.problem, np.random.default_rng(seed)
    moves = Moves(problem)
    found: dict[Assignment, None] = {}
    for _ in range(20 * evaluations):
        drawn = problem.settled([int(rng.integers(len(unit.levels))) for unit in problem.units])
        if (made := moves.repaired(drawn, rng)) is not None:
            found[moves.filled(made, rng)] = None
        if len(found) == evaluations:
            break
    front = Front()
    for each, loss in zip(found, evaluator.losses(found), strict=True):
        front.add(Point(each, loss, problem.costs(each), "random"))
    return front


def greedy(problem: Problem, losses: Losses) -> Assignment:
    """Return the first steps, by estimated loss for what they save, after which the limits hold.

    With several limits the steps are those of what is exceeded most at the beginning. Raises Infeasible where that does
    not get there.
    """
    problem.check()
    if not problem.limits:
        return problem.start
    costs = problem.costs(problem.start)
    resource = max(problem.limits, key=lambda name: costs[name] / max(problem.limits[name], 1e-300))
    steps = sorted_steps(problem, losses, resource)
    for count in range(_first_within(problem, steps), len(steps) + 1):
        if problem.feasible(made := taken(problem, steps, count)):
            return made
    raise Infeasible(f"greedy steps in {resource} do not hold the budget: {problem.reach()}; use the integer program")


def _first_within(problem: Problem, steps: list[Step]) -> int:
    """Return the number of steps after which the limits hold, ties left aside; all of them where that is never."""
    within = np.ones(len(steps) + 1, bool)
    for name, limit in problem.limits.items():
        spent, changes, level = problem.spent[name], [problem.costs(problem.start)[name]], list(problem.start)
        for step in steps:
            first = problem.offsets[step.unit]
            changes.append(spent[first + step.level] - spent[first + level[step.unit]])
            level[step.unit] = step.level
        within &= np.cumsum(changes) <= limit * (1 + 1e-9)
    return int(np.argmax(within)) if within.any() else len(steps)
