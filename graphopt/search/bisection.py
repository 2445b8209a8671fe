"""Bisection: how far along a list of steps a candidate may go before the metric falls too far, with true evaluations.

    steps, the cheapest loss for what it saves first:   s_1 .. s_n      candidate k: the first k of them
    low holds, high does not; the one in the middle takes the place of either, until they are neighbours

What is returned was evaluated and holds, whatever the metric does in between; where it rises and falls along the list
a later candidate may hold as well. After "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision
Post-Training Quantization", which bisects the list of layers by sensitivity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphopt.search.problem import Assignment, Losses, Problem


@dataclass(frozen=True)
class Step:
    """A unit goes to another level.

    Attributes:
        unit, level: indices. price: estimated loss for what is saved.
    """

    unit: int
    level: int
    price: float


def sorted_steps(problem: Problem, losses: Losses, resource: str) -> list[Step]:
    """Return the steps down the lower convex hull of each unit's levels, all together by their price.

    Along the hull the prices of a unit rise, so that its steps come in order. The first k steps are the optimum of the
    additive program at what they spend.
    """
    steps: list[Step] = []
    spent = problem.spent[resource]
    for index, unit in enumerate(problem.units):
        costs = spent[problem.offsets[index] : problem.offsets[index] + len(unit.levels)]
        level = 0
        while True:
            lower = [
                (max(losses[index][each] - losses[index][level], 0.0) / (costs[level] - costs[each]), costs[each], each)
                for each in range(len(unit.levels))
                if costs[each] < costs[level] and losses[index][each] < float("inf")
            ]
            if not lower:
                break
            price, _, level = min(lower)
            steps.append(Step(index, level, price))
    return sorted(steps, key=lambda step: (step.price, step.unit))


def taken(problem: Problem, steps: list[Step], count: int) -> Assignment:
    """Return the candidate after the first `count` steps."""
    made = list(problem.start)
    for step in steps[:count]:
        made[step.unit] = step.level
    return problem.settled(made)


def bisect(holds: Callable[[int], bool], count: int) -> int:
    """Return a number k of steps, up to `count`, for which `holds(k)` was seen to be true, or -1.

    Where `holds` changes once, from true to false, k is the largest for which it is true. About log2(count) calls.
    """
    if not holds(0):
        return -1
    if holds(count):
        return count
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
