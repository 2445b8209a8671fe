"""The integer program: the cheapest choice where losses add up, with terms for pairs of units.

    minimize    sum_u loss(u, a_u) + sum_(u,v) pair(u, v)[a_u, a_v]

    x_ul in {0, 1}, sum_l x_ul = 1                                     one level for each unit
    sum_ul cost_r(u, l) x_ul <= limit_r - fixed_r                      every limited resource
    x_pg = x_wh                                                        every tie
    y_lm >= 0, sum_m y_lm = x_ul, sum_l y_lm = x_vm                     every pair: y is x_ul x_vm wherever x is whole

Without pairs and ties it is a multiple-choice knapsack, whose relaxation has fractions in as many units as there are
limits: the search tree stays small for tens of thousands of units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from graphopt.errors import GraphoptError
from graphopt.search.problem import Assignment, Infeasible, Losses, Problem

Pairs = Mapping[tuple[int, int], NDArray[np.float64]]  # of two units, u < v: [levels of u, levels of v]
GAP = 1e-4  # relative, between what is found and what is proven
_TIGHTER = 2e-6  # relative: the solver lets rows be exceeded by half of it


def integer_program(problem: Problem, losses: Losses, pairs: Pairs | None = None, seconds: float = 60.0) -> Assignment:
    """Return the assignment of least loss, within a relative gap of 1e-4.

    Args:
        losses: of each level of each unit; infinity, or NaN, forbids a level.
        pairs: what two units lose together beyond the sum.
        seconds: after which the best so far is taken.

    Raises Infeasible where no assignment holds the limits, with what can be reached.
    """
    problem.check()
    made = _solved(problem, losses, pairs or {}, seconds, 0.0)
    if not problem.feasible(made):  # within the solver's tolerance, which is not ours
        made = _solved(problem, losses, pairs or {}, seconds, _TIGHTER)
    assert problem.feasible(made)
    return made


def _solved(problem: Problem, losses: Losses, pairs: Pairs, seconds: float, tighter: float) -> Assignment:
    """Return the assignment; limits are lowered by the share `tighter`."""
    offsets, total = problem.offsets, int(problem.offsets[-1])
    if not problem.units:
        return ()
    flat = np.array([loss for each in losses for loss in each], float)
    if len(flat) != total:
        raise ValueError(f"there are {total} levels and {len(flat)} losses")
    allowed = np.isfinite(flat)
    flat[~allowed] = 0.0
    joint = [(u, v, np.asarray(each, float)) for (u, v), each in pairs.items() if np.any(each)]
    rows = _Rows(total + sum(each.size for _, _, each in joint))
    for first, end in itertools.pairwise(offsets):
        rows.add(np.arange(first, end), np.ones(end - first), 1.0, 1.0)
    for name, limit in problem.limits.items():
        left = limit - tighter * abs(limit) - problem.fixed.get(name, 0.0)
        scale = max(abs(left), float(np.abs(problem.spent[name]).max()), 1e-300)
        rows.add(np.arange(total), problem.spent[name] / scale, -np.inf, left / scale + 1e-12)
    for tie in problem.ties:
        rows.add(np.array([offsets[tie.part] + tie.level, offsets[tie.whole] + tie.at]), np.array([1.0, -1.0]), 0, 0)
    costs, at = np.concatenate([flat, *(each.ravel() for _, _, each in joint)]), total
    for u, v, each in joint:
        place = at + np.arange(each.size).reshape(each.shape)
        for level in range(each.shape[0]):
            rows.add(np.r_[place[level], offsets[u] + level], np.r_[np.ones(each.shape[1]), -1.0], 0, 0)
        for level in range(each.shape[1]):
            rows.add(np.r_[place[:, level], offsets[v] + level], np.r_[np.ones(each.shape[0]), -1.0], 0, 0)
        at += each.size
    scale = np.abs(costs).max() or 1.0
    found = milp(
        costs / scale,
        integrality=np.r_[np.ones(total), np.zeros(at - total)],
        bounds=Bounds(0, np.r_[allowed.astype(float), np.ones(at - total)]),
        constraints=rows.constraint(),
        options={"mip_rel_gap": GAP, "time_limit": seconds},
    )
    if found.x is None:
        if found.status == 2:
            raise Infeasible(
                f"the budget cannot be met, each limit could be alone: {problem.reach()}; allow more of one of them"
            )
        raise GraphoptError(f"the integer program was not solved ({found.message.strip()}); allow more time")
    chosen = found.x[:total]
    return tuple(int(np.argmax(chosen[a:b])) for a, b in itertools.pairwise(offsets))


def with_pairs(losses: Losses, pairs: Pairs, assignment: Assignment) -> float:
    """Return what the integer program minimizes."""
    single = math.fsum(each[level] for each, level in zip(losses, assignment, strict=True))
    return single + math.fsum(each[assignment[u], assignment[v]] for (u, v), each in pairs.items())


class _Rows:
    """Constraints, row by row."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._indices: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, indices: NDArray[np.int64], values: NDArray[np.float64], low: float, high: float) -> None:
        self._indices.append(indices)
        self._values.append(values)
        self._low.append(low)
        self._high.append(high)

    def constraint(self) -> LinearConstraint:
        pointers = np.cumsum([0, *map(len, self._indices)])
        shape = (len(self._indices), self._columns)
        matrix = csr_array((np.concatenate(self._values), np.concatenate(self._indices), pointers), shape=shape)
        return LinearConstraint(matrix, np.array(self._low), np.array(self._high))
