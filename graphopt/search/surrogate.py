"""A model of the loss that is quick to ask: measured losses of single levels, and how their effects add up.

    loss(a)  ~  sum_u d(u, a_u)  +  2 sum_(u < v) <z(u, a_u), z(v, a_v)>

d is the loss of a unit alone at a level, z its effect on the outputs, a vector with |z|^2 near d: what two units lose
together beyond the sum is twice the inner product of their effects, to second order and as far as effects add up. All
pairs so come from one reading of each unit alone, where the pairwise second derivatives of "Augmenting Hessians with
Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization" need one evaluation a pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphopt.search.integer import Pairs
from graphopt.search.moves import Moves
from graphopt.search.problem import Assignment, Losses, Problem, additive


@dataclass(frozen=True)
class Surrogate:
    """The model.

    Attributes:
        losses: d, of each unit and level.
        singles: which of the rows of `products` a unit at a level is; others have no effect that is known.
        products: inner products of effects, [rows, rows].
    """

    losses: Losses
    singles: Mapping[tuple[int, int], int]
    products: NDArray[np.float64]

    def __call__(self, assignment: Assignment) -> float:
        """Return the loss of an assignment, as modelled; never less than the largest of its parts alone."""
        alone = additive(self.losses, assignment)
        if not math.isfinite(alone):
            return math.inf
        rows = [row for pair in enumerate(assignment) if (row := self.singles.get(pair)) is not None]
        each = self.products[np.ix_(rows, rows)]
        return float(alone + each.sum() - np.trace(each))

    def pairs(self, share: float, most: int = 200) -> Pairs:
        """Return the terms of the strongest pairs of units for the integer program: a share of all, `most` at most."""
        units = sorted({unit for unit, _ in self.singles})
        levels = {unit: len(self.losses[unit]) for unit in units}
        terms: dict[tuple[int, int], NDArray[np.float64]] = {}
        for at, u in enumerate(units):
            for v in units[at + 1 :]:
                term = np.zeros((levels[u], levels[v]))
                for one in range(levels[u]):
                    for other in range(levels[v]):
                        if (u, one) in self.singles and (v, other) in self.singles:
                            term[one, other] = 2 * self.products[self.singles[u, one], self.singles[v, other]]
                terms[u, v] = term
        count = min(math.ceil(share * len(terms)), most)
        strongest = sorted(terms, key=lambda pair: -float(np.abs(terms[pair]).max()))[:count]
        return {pair: terms[pair] for pair in strongest}

    def descended(self, problem: Problem, start: Assignment, rng: np.random.Generator, tries: int = 4000) -> Assignment:
        """Return what random moves that the model likes lead to, `tries` of them."""
        moves, best, least = Moves(problem, self.losses), start, self(start)
        for _ in range(tries):
            child = moves.switched(best, int(rng.integers(1, 3)), rng)
            if child is not None and (loss := self(child)) < least:
                best, least = child, loss
        return best


def singles_of(problem: Problem) -> dict[tuple[int, int], Assignment]:
    """Return for each unit and level but the first the assignment that is as it is but for that."""
    found = {}
    tied = {(tie.part, tie.level) for tie in problem.ties}
    for unit, each in enumerate(problem.units):
        for level in range(1, len(each.levels)):
            if (unit, level) not in tied:
                made = list(problem.start)
                made[unit] = level
                found[unit, level] = problem.settled(made)
    return found


def losses_of(problem: Problem, found: Mapping[tuple[int, int], float]) -> list[list[float]]:
    """Return losses of units and levels; 0 where there is none in `found`: as it is, and what a tie takes away."""
    return [
        [max(found.get((unit, level), 0.0), 0.0) for level in range(len(each.levels))]
        for unit, each in enumerate(problem.units)
    ]


def correlation(estimates: Sequence[float], truth: Sequence[float]) -> tuple[float, float]:
    """Return the rank correlation (Spearman) and that of the logarithms (Pearson) of estimates with true losses.

    NaN where there are fewer than three, or all are alike.
    """
    from scipy.stats import pearsonr, spearmanr

    pairs = [(a, b) for a, b in zip(estimates, truth, strict=True) if a > 0 and b > 0 and math.isfinite(a + b)]
    if len(pairs) < 3 or min(len({a for a, _ in pairs}), len({b for _, b in pairs})) < 2:
        return math.nan, math.nan
    one, other = (np.array(each) for each in zip(*pairs, strict=True))
    return float(spearmanr(one, other).statistic), float(pearsonr(np.log(one), np.log(other)).statistic)
