"""What is searched over: units, each at one of some levels, under limits on what they cost together.

    minimize loss(a)   over a = (a_1 .. a_n), a_u a level of unit u
    subject to         fixed_r + sum_u cost_r(u, a_u) <= limit_r     for every limited resource r
                       a_p = g  exactly where  a_w = h               for every tie (p, g, w, h)

A unit is whatever is decided as one: the format of a weight, or of several that a target reads as one, a block that
stays or goes, the width of a space. Level 0 leaves it as it is. Costs add up, losses need not. A tie says what else is
decided with a level: the formats of a block that goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import GraphoptError

Assignment = tuple[int, ...]  # the index of a level for each unit
Losses = Sequence[Sequence[float]]  # of each unit, of each level
_ROUNDING = 1e-9  # relative: sums of costs in another order


class Infeasible(GraphoptError):
    """No assignment holds the limits."""


@dataclass(frozen=True)
class Level:
    """One choice for a unit.

    Attributes:
        name: of it, the same in every unit that has it.
        costs: what the unit then spends of each resource; what is not named is 0.
    """

    name: str
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """What is decided as one.

    Attributes:
        name: of it. levels: the choices, level 0 leaves it as it is.
    """

    name: str
    levels: tuple[Level, ...]

    def index(self, level: str) -> int:
        """Return the index of a level; GraphoptError where the unit has no such level."""
        for index, each in enumerate(self.levels):
            if each.name == level:
                return index
        raise GraphoptError(
            f"{self.name} has no level {level!r}; it has {', '.join(each.name for each in self.levels)}"
        )


@dataclass(frozen=True)
class Tie:
    """The unit `part` is at `level` exactly where the unit `whole` is at `at`; all are indices."""

    part: int
    level: int
    whole: int
    at: int


@dataclass(frozen=True)
class Problem:
    """Units, and what they may cost together.

    Attributes:
        units: what is decided. limits: the most of each resource that may be spent. fixed: what is spent in any case.
        ties: between levels of different units.
    """

    units: tuple[Unit, ...]
    limits: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()

    @property
    def start(self) -> Assignment:
        """Everything as it is."""
        return (0,) * len(self.units)

    @cached_property
    def resources(self) -> tuple[str, ...]:
        """The resources that anything costs or that are limited."""
        spent = (name for unit in self.units for level in unit.levels for name in level.costs)
        return tuple(dict.fromkeys([*self.limits, *self.fixed, *spent]))

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where the levels of each unit begin in a list of all levels; the last entry is their number."""
        return np.cumsum([0, *(len(unit.levels) for unit in self.units)])

    @cached_property
    def spent(self) -> dict[str, NDArray[np.float64]]:
        """The cost of every level of every unit, in one list, by resource."""
        levels = [level for unit in self.units for level in unit.levels]
        return {name: np.array([level.costs.get(name, 0.0) for level in levels], float) for name in self.resources}

    def costs(self, assignment: Assignment) -> dict[str, float]:
        """Return what an assignment spends of each resource."""
        chosen = self.offsets[:-1] + np.asarray(assignment, np.int64)
        return {name: self.fixed.get(name, 0.0) + math.fsum(each[chosen]) for name, each in self.spent.items()}

    def excess(self, assignment: Assignment) -> float:
        """Return by how much limits are exceeded, each relative to itself, added up; 0 where all hold."""
        costs = self.costs(assignment)
        over = ((costs[name] - limit) / max(abs(limit), 1e-300) for name, limit in self.limits.items())
        return sum(each for each in over if each > _ROUNDING)

    def tied(self, assignment: Assignment) -> bool:
        """Return whether the ties hold."""
        return all((assignment[t.part] == t.level) == (assignment[t.whole] == t.at) for t in self.ties)

    def feasible(self, assignment: Assignment) -> bool:
        """Return whether limits and ties hold."""
        return self.tied(assignment) and self.excess(assignment) == 0

    def settled(self, assignment: Sequence[int]) -> Assignment:
        """Return the assignment with its ties made to hold: what is tied follows the whole.

        What no longer may be at the tied level is as level 0 leaves it, or, where that is the tied one, at the next.
        """
        made = list(assignment)
        for tie in self.ties:
            if made[tie.whole] == tie.at:
                made[tie.part] = tie.level
        for tie in self.ties:
            if made[tie.part] == tie.level and not any(
                made[t.whole] == t.at for t in self.ties if (t.part, t.level) == (tie.part, tie.level)
            ):
                made[tie.part] = 0 if tie.level else 1
        return tuple(made)

    def names(self, assignment: Assignment) -> dict[str, str]:
        """Return the name of the level of each unit."""
        return {unit.name: unit.levels[level].name for unit, level in zip(self.units, assignment, strict=True)}

    def assignment(self, names: Mapping[str, str]) -> Assignment:
        """The inverse of `names`; units that are not named are at level 0."""
        return tuple(unit.index(names[unit.name]) if unit.name in names else 0 for unit in self.units)

    def uniform(self, level: str) -> Assignment:
        """Return every unit at the level of that name, where it has one, else at level 0."""
        known = [[each.name for each in unit.levels] for unit in self.units]
        return self.settled([names.index(level) if level in names else 0 for names in known])

    def least(self) -> dict[str, float]:
        """Return the least of each limited resource that any assignment spends, ties left aside."""
        found = {}
        for name in self.limits:
            each = np.minimum.reduceat(self.spent[name], self.offsets[:-1]) if self.units else np.zeros(1)
            found[name] = self.fixed.get(name, 0.0) + math.fsum(each)
        return found

    def check(self, describe: Callable[[str, float], str] | None = None) -> None:
        """Raise Infeasible where a limit is below what can be reached at all, with the least of every resource.

        `describe(resource, value)` writes a value as the user knows it.
        """
        least = self.least()
        if any(least[name] > limit * (1 + _ROUNDING) for name, limit in self.limits.items()):
            raise Infeasible(f"the budget cannot be met: {self.reach(describe)}; allow more, or give more choices")

    def reach(self, describe: Callable[[str, float], str] | None = None) -> str:
        """Return what is asked of each resource and the least that can be reached of it alone, for a message."""
        write = describe or (lambda name, value: f"{name} {value:.6g}")
        least = self.least()
        asked = (f"{write(n, limit)} is asked and {write(n, least[n])} the least" for n, limit in self.limits.items())
        return ", ".join(asked)


def additive(losses: Losses, assignment: Assignment) -> float:
    """Return the sum of the losses of the chosen levels."""
    return math.fsum(each[level] for each, level in zip(losses, assignment, strict=True))
