"""Evolution of assignments at a fixed budget.

    each generation:  offspring of the best so far: a few units change their level, others pay for it
                      all on few pieces of the data -> the best of them on more -> the best of these on all
                      a better one takes the place of the worst parent

After "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", which begins with the best of some random
assignments and keeps one parent. Here seeds come from the integer program over measured losses; what is evaluated on
all the data stands in the front, whatever became of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.search.evaluator import Evaluator
from graphopt.search.front import Front, Point
from graphopt.search.moves import Moves
from graphopt.search.problem import Assignment, Losses

_MORE = 8  # times as many offspring are drawn where a model chooses
_TRIES = 20  # for an offspring that was not seen before


@dataclass(frozen=True)
class Evolution:
    """How to search.

    Attributes:
        evaluations: candidates judged on all the data, or as many pieces of it altogether.
        offspring: in each generation.
        stages: how many of them stay, and the share of the data that judges them, before the last stage on all of it.
        parents: the best so far that have offspring.
        switches: units that change at once, at most; the draw favours few.
        patience: generations without a gain after which it ends.
        seed: of all draws.
    """

    evaluations: int = 100
    offspring: int = 16
    stages: tuple[tuple[int, float], ...] = ((4, 1 / 16), (2, 1 / 4))
    parents: int = 2
    switches: int = 3
    patience: int = 20
    seed: int = 0

    def search(
        self,
        evaluator: Evaluator,
        seeds: Sequence[Assignment],
        losses: Losses | None = None,
        model: Callable[[Assignment], float] | None = None,
    ) -> Front:
        """Return all candidates that were judged on all the data.

        Args:
            seeds: assignments to begin with, which hold the limits.
            losses: estimates; a level of infinite loss is left out.
            model: of the loss of an assignment; half of the offspring are then those it likes of several times as many.
        """
        problem, rng = evaluator.problem, np.random.default_rng(self.seed)
        moves, front = Moves(problem, losses), Front()
        if not seeds or not all(map(problem.feasible, seeds)):
            raise GraphoptError("an evolution begins with assignments that hold the limits")
        begun, shown = evaluator.evaluated, 0
        parents = self._judged(evaluator, list(dict.fromkeys(seeds)), front, "seed")
        seen, generation, idle = set(seeds), 0, 0
        with evaluator.progress.stage("evolution", self.evaluations) as stage:
            while parents and shown < self.evaluations and idle < self.patience:
                generation += 1
                young = self._offspring([each.assignment for each in parents], moves, rng, seen, model)
                if not young:
                    break
                best, worst = parents[0].loss, parents[-1].loss if len(parents) == self.parents else math.inf
                young = self._selected(young, evaluator, rng)
                grown = self._judged(evaluator, young, front, f"evolution, generation {generation}", worst)
                parents = sorted([*parents, *grown], key=lambda each: each.loss)[: self.parents]
                idle = 0 if parents[0].loss < best else idle + 1
                done = (evaluator.evaluated - begun) // max(evaluator.pieces, 1)
                stage.advance(min(done, self.evaluations) - shown)
                shown = min(done, self.evaluations)
        return front

    def _selected(self, young: list[Assignment], evaluator: Evaluator, rng: np.random.Generator) -> list[Assignment]:
        """Return the offspring that the stages leave, each on other pieces of the data."""
        for keep, share in self.stages:
            count = max(1, math.ceil(share * evaluator.pieces))
            if len(young) > keep and count < evaluator.pieces:
                pieces = sorted(map(int, rng.choice(evaluator.pieces, count, replace=False)))
                found = evaluator.losses(young, pieces)
                ranked = sorted(range(len(young)), key=lambda at: (found[at], at))
                young = [young[at] for at in ranked[:keep]]
        return young

    def _judged(
        self, evaluator: Evaluator, young: list[Assignment], front: Front, origin: str, bound: float = math.inf
    ) -> list[Point]:
        """Put the candidates, as they do on all the data, in the front; return them, the best first."""
        found = zip(young, evaluator.losses(young, bound=bound), strict=True)
        costs = evaluator.problem.costs
        points = [Point(each, loss, costs(each), origin) for each, loss in found if math.isfinite(loss)]
        front.update(points)
        return sorted(points, key=lambda each: each.loss)[: self.parents]

    def _offspring(
        self,
        parents: list[Assignment],
        moves: Moves,
        rng: np.random.Generator,
        seen: set[Assignment],
        model: Callable[[Assignment], float] | None,
    ) -> list[Assignment]:
        made: dict[Assignment, None] = {}
        wanted = self.offspring * (1 if model is None else _MORE)
        for _ in range(wanted * _TRIES):
            if len(made) == wanted:
                break
            parent = parents[int(rng.integers(len(parents)))]
            count = int(min(rng.integers(1, self.switches + 1), rng.integers(1, self.switches + 1)))
            child = moves.switched(parent, count, rng)
            if child is not None and child not in seen:
                made[child] = None
        young = list(made)
        if model is not None:
            liked = sorted(young, key=model)[: self.offspring // 2]
            young = [*liked, *(each for each in young if each not in liked)][: self.offspring]
        seen.update(young)
        return young
