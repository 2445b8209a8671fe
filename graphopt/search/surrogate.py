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

    def descended(self, problem: Problem, start: Assignment, rounds: int = 1000) -> Assignment:
        """Return where exchanges lead to: of one or two units' levels, each time what the model likes best.

        All hold the limits. Units that a tie binds stay as they are.
        """
        bound = {tie.part for tie in problem.ties} | {tie.whole for tie in problem.ties}
        options = [
            (unit, level)
            for unit, each in enumerate(problem.units)
            for level in range(len(each.levels))
            if unit not in bound and math.isfinite(self.losses[unit][level])
        ]
        if not options:
            return start
        units = np.array([unit for unit, _ in options])
        alone = np.array([self.losses[unit][level] for unit, level in options])
        rows = np.array([self.singles.get(option, -1) for option in options])
        products = np.pad(self.products, (0, 1))[np.ix_(rows, rows)]  # the row of what has no effect is the last
        index = {option: at for at, option in enumerate(options)}
        scale = {name: max(abs(limit), 1e-300) for name, limit in problem.limits.items()}
        costs = [
            np.array([problem.units[unit].levels[level].costs.get(name, 0.0) for unit, level in options]) / scale[name]
            for name in problem.limits
        ]
        made = list(start)
        free = sorted(set(units.tolist()))
        place = np.array([free.index(unit) for unit in units])
        for _ in range(rounds):
            now = np.array([index[unit, made[unit]] for unit in free])
            own = now[place]  # of each option, the one its unit is at
            total = products[:, now].sum(1)
            others = total - products[np.arange(len(options)), own]  # what all other units add to an option
            single = alone - alone[own] + 2 * (others - others[own])
            cross = products - products[:, own] - products[own] + products[np.ix_(own, own)]
            change = single[:, None] + single[None] + 2 * cross
            change[units[:, None] == units[None]] = np.inf
            np.fill_diagonal(change, single)
            for each, (name, limit) in zip(costs, problem.limits.items(), strict=True):
                more = each - each[own]
                both = more[:, None] + more[None]
                np.fill_diagonal(both, more)
                left = (limit - problem.costs(tuple(made))[name]) / scale[name]
                change[both > left + 1e-12] = np.inf
            best = np.unravel_index(int(np.argmin(change)), change.shape)
            if not change[best] < -1e-12 * max(abs(self(tuple(made))), 1e-300):
                break
            for at in best:
                unit, level = options[int(at)]
                made[unit] = level
        return tuple(made)


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
