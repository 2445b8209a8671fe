"""Small changes of an assignment that hold the limits: some levels change at random, others pay for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graphopt.search.problem import Assignment, Losses, Problem


class Moves:
    """Changes assignments of one problem.

    Args:
        losses: of each level; infinity forbids one.
    """

    def __init__(self, problem: Problem, losses: Losses | None = None) -> None:
        self._problem = problem
        self._allowed = [
            [level for level in range(len(unit.levels)) if losses is None or np.isfinite(losses[index][level])]
            for index, unit in enumerate(problem.units)
        ]
        tied = {tie.part: tie.level for tie in problem.ties}
        # A level that follows from another unit's is not chosen here.
        self._free = [[level for level in each if level != tied.get(at)] for at, each in enumerate(self._allowed)]
        self._choosable = [at for at, each in enumerate(self._free) if len(each) > 1]
        self._names = tuple(problem.limits)
        limits = np.array([problem.limits[name] - problem.fixed.get(name, 0.0) for name in self._names])
        scale = np.array([max(abs(problem.limits[name]), 1e-300) for name in self._names])
        spent = np.array([problem.spent[name] for name in self._names]).reshape(len(self._names), -1).T / scale
        self._costs = [spent[first:end] for first, end in itertools.pairwise(problem.offsets)]
        self._limits = limits / scale

    def switched(self, assignment: Assignment, count: int, rng: np.random.Generator) -> Assignment | None:
        """Return an assignment with `count` units at other levels and as many more as the limits then ask for.

        None where no other one was found.
        """
        if not self._choosable:
            return None
        made = list(assignment)
        for _ in range(count):
            unit = int(rng.choice(self._choosable))
            made[unit] = int(rng.choice([level for level in self._free[unit] if level != made[unit]]))
        changed = [at for at, was in enumerate(assignment) if was != made[at]]
        repaired = self.repaired(self._problem.settled(made), rng, changed)
        if repaired is None:
            return None
        filled = self.filled(repaired, rng)
        return None if filled == assignment else filled

    def repaired(self, assignment: Assignment, rng: np.random.Generator, keep: Sequence[int] = ()) -> Assignment | None:
        """Return the assignment with random units at cheaper levels until the limits hold; `keep` is changed last."""
        made = list(assignment)
        total = self._total(made)
        order = [*rng.permutation([at for at in self._choosable if at not in keep]), *rng.permutation(list(keep))]
        # What one limit makes cheaper another may make dearer again: after so many steps there is no use.
        for _ in range(sum(len(each) for each in self._free) + 1):
            over = total > self._limits + 1e-12
            if not np.any(over):
                break
            for unit in map(int, order):
                if cheaper := self._steps(made, unit, over):
                    total = total - self._costs[unit][made[unit]]
                    made[unit] = cheaper[0]
                    total = total + self._costs[unit][made[unit]]
                    order = [*[each for each in order if each != unit], unit]  # others come first from now on
                    break
            else:
                return None
        settled = self._problem.settled(made)
        return settled if self._problem.feasible(settled) else None

    def filled(self, assignment: Assignment, rng: np.random.Generator) -> Assignment:
        """Return the assignment with random units at the next dearer level as long as the limits hold."""
        made = list(assignment)
        total = self._total(made)
        for unit in map(int, rng.permutation(self._choosable)) if self._names else ():
            if self._is_tied(made, unit):
                continue
            for level in self._steps(made, unit):
                after = total - self._costs[unit][made[unit]] + self._costs[unit][level]
                if np.all(after <= self._limits + 1e-12):
                    made[unit], total = level, after
                break
        settled = self._problem.settled(made)
        return settled if self._problem.feasible(settled) else assignment

    def _is_tied(self, made: Sequence[int], unit: int) -> bool:
        return made[unit] not in self._free[unit]

    def _total(self, made: Sequence[int]) -> NDArray[np.float64]:
        total: NDArray[np.float64] = np.sum([each[at] for each, at in zip(self._costs, made, strict=True)], axis=0)
        return total

    def _steps(self, made: Sequence[int], unit: int, over: NDArray[np.bool_] | None = None) -> list[int]:
        """Return the levels that save of what is `over` its limit, or all dearer ones; the nearest in cost first."""
        if self._is_tied(made, unit):
            return []
        now = self._costs[unit][made[unit]]
        saved = {level: now - self._costs[unit][level] for level in self._free[unit] if level != made[unit]}
        if over is None:
            found = [level for level, each in saved.items() if np.all(each <= 0) and np.any(each < 0)]
        else:
            found = [level for level, each in saved.items() if np.any(each[over] > 0)]
        return sorted(found, key=lambda level: abs(float(saved[level].sum())))
