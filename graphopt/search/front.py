"""What a search found: candidates, what they cost and lose, who proposed them, and which are worth having."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from graphopt.search.problem import Assignment


@dataclass(frozen=True)
class Point:
    """A candidate.

    Attributes:
        assignment: the level of each unit.
        loss: what it loses, by true evaluation.
        costs: what it spends of each resource.
        origin: who proposed it: `integer program`, `evolution, generation 7`.
        metric: the user's, where it was asked.
    """

    assignment: Assignment
    loss: float
    costs: dict[str, float]
    origin: str
    metric: float | None = None


@dataclass
class Front:
    """All candidates that a search evaluated.

    Attributes:
        points: in the order they were found; each assignment once.
    """

    points: list[Point] = field(default_factory=list)
    _known: set[Assignment] = field(default_factory=set, repr=False)

    def add(self, point: Point) -> None:
        """Keep a candidate; of an assignment that is known already the first stays."""
        if point.assignment not in self._known:
            self._known.add(point.assignment)
            self.points.append(point)

    def update(self, points: Iterable[Point]) -> None:
        for point in points:
            self.add(point)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def pareto(self, resource: str) -> list[Point]:
        """Return the candidates that no other one beats in loss without costing more, cheapest first."""
        kept: list[Point] = []
        least = math.inf
        for point in sorted(self.points, key=lambda each: (each.costs.get(resource, 0.0), each.loss)):
            if point.loss < least:
                least = point.loss
                kept.append(point)
        return kept
