"""Small changes of an assignment that hold the limits: some levels change at random, others pay for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.search.problem import Assignment, Losses, Problem

_ROUNDING = 1e-12
Costs = tuple[float, ...]  # of each limited resource, relative to its limit


class Moves:
    """Changes assignments of one problem.

    Args:
        losses: of each level; infinity forbids one.
    """

    def __init__(self, problem: Problem, losses: Losses | None = None) -> None:
        self._problem = problem
        tied = {tie.part: tie.level for tie in problem.ties}
        # A level that follows from another unit's is not chosen here.
        self._free = [
            [
                level for level in range(len(unit.levels))
                if level != tied.get(at) and (losses is None or np.isfinite(losses[at][level]))
            ]
            for at, unit in enumerate(problem.units)
        ]  # fmt: skip
        self._choosable = [at for at, each in enumerate(self._free) if len(each) > 1]
        scale = {name: max(abs(limit), 1e-300) for name, limit in problem.limits.items()}
        self._limits = [(problem.limits[name] - problem.fixed.get(name, 0.0)) / scale[name] for name in scale]
        self._costs: list[list[Costs]] = [
            [tuple(level.costs.get(name, 0.0) / scale[name] for name in scale) for level in unit.levels]
            for unit in problem.units
        ]
        self._near = [self._by_distance(at) for at in range(len(problem.units))]

    def _by_distance(self, unit: int) -> dict[int, list[int]]:
        """Return for each level of a unit the others that may be chosen, the nearest in cost first."""
        costs = [sum(each) for each in self._costs[unit]]
        return {
            level: sorted(set(self._free[unit]) - {level}, key=lambda other: (abs(costs[other] - costs[level]), other))
            for level in self._free[unit]
        }

    def switched(self, assignment: Assignment, count: int, rng: np.random.Generator) -> Assignment | None:
        """Return an assignment with `count` units at other levels and as many more as the limits then ask for.

        None where no other one was found.
        """
        if not self._choosable:
            return None
        made = list(assignment)
        for unit in rng.integers(len(self._choosable), size=count).tolist():
            at = self._choosable[unit]
            others = [level for level in self._free[at] if level != made[at]]
            made[at] = others[int(rng.integers(len(others)))]
        changed = [at for at, was in enumerate(assignment) if was != made[at]]
        repaired = self.repaired(self._problem.settled(made), rng, changed)
        if repaired is None:
            return None
        filled = self.filled(repaired, rng)
        return None if filled == assignment else filled

    def repaired(self, assignment: Assignment, rng: np.random.Generator, keep: Sequence[int] = ()) -> Assignment | None:
        """Return the assignment with random units at cheaper levels until the limits hold; `keep` is changed last.

        None where that is not found.
        """
        made, total = list(assignment), self._total(assignment)
        order: list[int] = []
        # What one limit makes cheaper another may make dearer again: after so many steps there is no use.
        for _ in range(sum(len(each) for each in self._free) + 1):
            over = [at for at, limit in enumerate(self._limits) if self._is_over(total[at], limit)]
            if not over:
                break
            if not order:
                others = [at for at in self._choosable if at not in keep]
                order = [*keep, *(others[at] for at in rng.permutation(len(others)).tolist())]
            for at in range(len(order) - 1, -1, -1):
                unit = order[at]
                if (level := self._cheaper(made, unit, over)) is not None:
                    total = self._moved(total, unit, made[unit], level)
                    made[unit] = level
                    order.insert(0, order.pop(at))  # others come first from now on
                    break
            else:
                return None
        settled = self._problem.settled(made)
        return settled if self._problem.feasible(settled) else None

    def filled(self, assignment: Assignment, rng: np.random.Generator) -> Assignment:
        """Return the assignment with random units at the next dearer level as long as the limits hold."""
        if not self._limits:
            return assignment
        made, total = list(assignment), self._total(assignment)
        for unit in rng.permutation(len(self._choosable)).tolist():
            unit = self._choosable[unit]
            for level in self._near[unit].get(made[unit], ()):
                now, then = self._costs[unit][made[unit]], self._costs[unit][level]
                if now != then and all(a <= b for a, b in zip(now, then, strict=True)):
                    after = self._moved(total, unit, made[unit], level)
                    if not any(map(self._is_over, after, self._limits)):
                        made[unit], total = level, after
                    break
        settled = self._problem.settled(made)
        return settled if self._problem.feasible(settled) else assignment

    def _cheaper(self, made: Sequence[int], unit: int, over: Sequence[int]) -> int | None:
        """Return the nearest level that saves of what is over its limit."""
        costs = self._costs[unit]
        now = costs[made[unit]]
        for level in self._near[unit].get(made[unit], ()):
            if any(costs[level][resource] < now[resource] for resource in over):
                return level
        return None

    def _total(self, made: Sequence[int]) -> list[float]:
        chosen = [each[level] for each, level in zip(self._costs, made, strict=True)]
        return [sum(each[at] for each in chosen) for at in range(len(self._limits))]

    def _moved(self, total: Sequence[float], unit: int, before: int, after: int) -> list[float]:
        return [t - b + a for t, b, a in zip(total, self._costs[unit][before], self._costs[unit][after], strict=True)]

    @staticmethod
    def _is_over(spent: float, limit: float) -> bool:
        return spent > limit + _ROUNDING
