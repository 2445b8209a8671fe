"""The search: units tried alone, a model of the loss from that, a solver, and how well the model did.

    estimated()     every unit alone at every level, on some pieces; other estimates beside, and how well they follow
    solved(model)   candidates by the solver, judged on all the data

Nothing here knows what the levels are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from graphopt.search.baselines import greedy, random_search
from graphopt.search.bisection import bisect, sorted_steps, taken
from graphopt.search.evaluator import Evaluator
from graphopt.search.evolution import Evolution
from graphopt.search.front import Front, Point
from graphopt.search.integer import integer_program
from graphopt.search.problem import Assignment, Infeasible, Losses, Problem
from graphopt.search.surrogate import Surrogate, correlation, losses_of, singles_of

Estimate = Literal["divergence", "interaction", "hessian", "fisher", "sqnr"]
Solver = Literal["evolution", "integer", "bisection", "greedy", "random"]
_EFFECTS = 400  # units at a level whose effects are compared, at most: their products are held in memory


@dataclass
class Search:
    """One search.

    Attributes:
        evaluator: of the problem that is searched.
        solver: integer: the integer program, with and without pairs. evolution: from there on. greedy, bisection: steps
            in the order of loss for what they save, until the limits hold. random: to compare with.
        estimate: what the loss is modelled by. divergence: units alone, measured. interaction: the same, and how their
            effects add up. Any other name: what `others` returns, where it does, and measured losses elsewhere.
        others: returns further estimates by name, of units (by index) at levels; nothing where it has none.
        evaluations: see `Evolution`. alone: pieces on which units are tried alone. pairs: share of the pairs that the
            integer program knows. compare: estimates to report on. seed: of all draws.
        facts: figures for a report. estimate_seconds: spent in `others`.
    """

    evaluator: Evaluator
    solver: Solver = "evolution"
    estimate: Estimate = "interaction"
    others: Callable[[str], Mapping[tuple[int, int], float]] = lambda name: {}
    evaluations: int = 50
    alone: int = 8
    pairs: float = 0.05
    compare: tuple[Estimate, ...] = ()
    seed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    estimate_seconds: float = 0.0

    @property
    def problem(self) -> Problem:
        return self.evaluator.problem

    def estimated(self) -> Surrogate:
        """Try every unit alone at every level, and report how well other estimates follow that."""
        problem = self.problem
        singles = singles_of(problem)
        pieces = range(min(self.alone, self.evaluator.pieces))
        with self.evaluator.progress.stage("try units alone"):
            measured = dict(zip(singles, self.evaluator.losses(singles.values(), pieces), strict=True))
        started = time.perf_counter()
        estimates = {name: self.others(name) for name in dict.fromkeys([*self.compare, self.estimate])}
        self.estimate_seconds += time.perf_counter() - started
        estimates = {name: found for name, found in estimates.items() if found}
        self.facts["correlations"] = {
            name: _rounded(correlation([found[key] for key in found], [measured[key] for key in found]))
            for name, found in estimates.items()
        }
        losses = losses_of(problem, measured)
        if self.estimate in estimates:
            # What changes more than weights has no such estimate: there the measured loss stands.
            losses = losses_of(problem, measured | dict(estimates[self.estimate]))
        self.facts["losses"] = {
            unit.name: {level.name: float(f"{loss:.4g}") for level, loss in zip(unit.levels, each, strict=True)}
            for unit, each in zip(problem.units, losses, strict=True)
        }
        if self.estimate != "interaction":
            return Surrogate(losses, {}, np.zeros((0, 0)))
        finite = [key for key in singles if math.isfinite(measured[key])]
        strongest = sorted(finite, key=lambda key: -measured[key])[:_EFFECTS]
        with self.evaluator.progress.stage("compare effects"):
            products = self.evaluator.effects([singles[key] for key in strongest], pieces)
        return Surrogate(losses, {key: at for at, key in enumerate(strongest)}, products)

    def solved(self, surrogate: Surrogate) -> Front:
        """Return candidates that hold the limits, judged on all the data; Infeasible where there is none."""
        problem, evaluator = self.problem, self.evaluator
        losses = surrogate.losses
        if self.solver == "random":
            return random_search(evaluator, self.evaluations, self.seed)
        if self.solver in ("greedy", "bisection"):
            return self._judged({greedy(problem, losses): "steps until the budget holds"})
        with self.evaluator.progress.stage("integer program"):
            seeds = {integer_program(problem, losses): "integer program"}
            if problem.ties:
                seeds |= self._nothing_taken(losses)
            if surrogate.singles:
                paired = integer_program(problem, losses, surrogate.pairs(self.pairs))
                seeds.setdefault(paired, "integer program with pairs")
                seeds.setdefault(surrogate.descended(problem, paired), "descent on the model")
        front = self._judged(seeds)
        if self.solver == "evolution":
            found = Evolution(self.evaluations, seed=self.seed)
            front.update(found.search(evaluator, list(seeds), losses, surrogate if surrogate.singles else None))
        return front

    def _nothing_taken(self, losses: Losses) -> dict[Assignment, str]:
        """Return the best where no level takes other units away, if any: what such levels lose is hard to add up."""
        taking = {(tie.whole, tie.at) for tie in self.problem.ties}
        left = [
            [math.inf if (unit, level) in taking else loss for level, loss in enumerate(each)]
            for unit, each in enumerate(losses)
        ]
        with contextlib.suppress(Infeasible):
            return {integer_program(self.problem, left): "integer program, nothing taken away"}
        return {}

    def _judged(self, proposed: dict[Assignment, str]) -> Front:
        front = Front()
        for (each, origin), loss in zip(proposed.items(), self.evaluator.losses(proposed), strict=True):
            if math.isfinite(loss):
                front.add(self.point(each, loss, origin))
        return front

    def swept(self, surrogate: Surrogate, count: int) -> Front:
        """Return what the integer program chooses under other bounds of the first resource, to see what more would buy.

        `count` bounds between the least that can be reached and what is spent as it is, in even ratios.
        """
        problem, front = self.problem, Front()
        resource = next(iter(problem.limits), None)
        if resource is None or not count:
            return front
        least, most = problem.least()[resource], problem.costs(problem.start)[resource]
        proposed: dict[Assignment, None] = {}
        for limit in np.geomspace(max(least, 1e-300), max(most, 1e-300), count + 1)[:-1]:
            # The least itself is reached by one assignment; rounding must not take it away.
            bound = dataclasses.replace(problem, limits={resource: float(limit) * (1 + 1e-6)})
            with contextlib.suppress(Infeasible):
                proposed[surrogate.descended(bound, integer_program(bound, surrogate.losses))] = None
        for each, loss in zip(proposed, self.evaluator.losses(proposed), strict=True):
            if math.isfinite(loss):
                front.add(self.point(each, loss, "integer program under another bound"))
        return front

    def by_bisection(self, surrogate: Surrogate, holds: Callable[[Assignment], bool], resource: str) -> Point:
        """Return the candidate farthest along the steps in a resource for which `holds` was seen to be true.

        That is what is as it is where nothing else holds.
        """
        steps = sorted_steps(self.problem, surrogate.losses, resource)
        with self.evaluator.progress.stage("bisection"):
            count = bisect(lambda count: holds(taken(self.problem, steps, count)), len(steps))
        made = taken(self.problem, steps, max(count, 0))
        (loss,) = self.evaluator.losses([made])
        return self.point(made, loss, f"bisection, {max(count, 0)} of {len(steps)} steps")

    def point(self, assignment: Assignment, loss: float, origin: str) -> Point:
        return Point(assignment, loss, self.problem.costs(assignment), origin)

    def correlate(self, surrogate: Surrogate, front: Front) -> None:
        """Report how well models of whole candidates follow their true losses."""
        true = [each.loss for each in front]
        alone = dataclasses.replace(surrogate, singles={})
        models = {"sum of single losses": alone} | ({"with pairs": surrogate} if surrogate.singles else {})
        self.facts["correlations"] |= {
            name: _rounded(correlation([model(each.assignment) for each in front], true))
            for name, model in models.items()
        }


def _rounded(found: tuple[float, float]) -> dict[str, float | None]:
    return {
        name: None if math.isnan(value) else round(value, 4)
        for name, value in zip(("rank", "logarithm"), found, strict=True)
    }
