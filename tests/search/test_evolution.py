"""Evolution: holds the budget, finds more than its seed, and ends alike for a seed, processes and interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up_candidates import BITS, Quadratic, allocation

from graphopt.errors import GraphoptError
from graphopt.pipeline.journal import Journal
from graphopt.search import Evaluator, Evolution, Front, Point, Pool, integer_program, random_search

UNITS = 24
ADDITIVE = [[2.0 ** (-2 * bits) for bits in BITS] for _ in range(UNITS)]  # knows nothing of importance


def evaluator(pool: Pool | None = None, journal: Journal | None = None) -> Evaluator:
    return Evaluator(allocation(UNITS, 3.5), Quadratic(UNITS), pool or Pool(), journal or Journal())


def measured() -> list[list[float]]:
    """What each unit loses alone."""
    truth = Quadratic(UNITS)
    at_best = (0,) * UNITS
    return [
        [truth.loss((*at_best[:unit], level, *at_best[unit + 1 :])) for level in range(len(BITS))]
        for unit in range(UNITS)
    ]


def test_it_finds_more_than_chance_and_than_its_seed() -> None:
    judge = evaluator()
    seed = integer_program(judge.problem, ADDITIVE)
    front = Evolution(evaluations=60).search(judge, [seed])
    best = min(front, key=lambda each: each.loss)
    assert best.origin.startswith("evolution, generation")
    assert best.loss == pytest.approx(Quadratic(UNITS).loss(best.assignment))
    assert all(judge.problem.feasible(each.assignment) for each in front)
    assert best.loss < 0.7 * Quadratic(UNITS).loss(seed)
    by_chance = min(each.loss for each in random_search(evaluator(), 60))
    assert best.loss < 0.7 * by_chance
    better_seed = integer_program(judge.problem, measured())
    assert min(each.loss for each in Evolution(evaluations=60).search(evaluator(), [better_seed])) <= best.loss * 1.1


def test_it_spends_what_it_was_given() -> None:
    judge = evaluator()
    Evolution(evaluations=20, patience=1000).search(judge, [integer_program(judge.problem, ADDITIVE)])
    assert 20 * judge.pieces <= judge.evaluated <= 20 * judge.pieces + 16 * judge.pieces


def test_the_same_in_two_processes_and_after_an_interruption(tmp_path: Path) -> None:
    seeds = [integer_program(allocation(UNITS, 3.5), ADDITIVE)]
    search = Evolution(evaluations=12, seed=3)
    expected = search.search(evaluator(), seeds).points
    assert search.search(evaluator(Pool(2)), seeds).points == expected

    class Stopped(Journal):
        left = 40

        def recorded(self, key: str, compute: object) -> object:  # type: ignore[override]
            self.left -= key not in self
            if self.left < 0:
                raise KeyboardInterrupt
            return super().recorded(key, compute)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        search.search(evaluator(journal=Stopped(tmp_path / "journal")), seeds)
    again = evaluator(journal=Journal(tmp_path / "journal"))
    assert search.search(again, seeds).points == expected
    assert Evolution(evaluations=12, seed=4).search(evaluator(), seeds).points != expected


def test_it_begins_with_what_holds_the_budget() -> None:
    with pytest.raises(GraphoptError, match="begins with assignments that hold the limits"):
        Evolution().search(evaluator(), [(0,) * UNITS])


def test_the_front_keeps_what_no_other_beats() -> None:
    rng = np.random.default_rng(0)
    points = [Point((at,), float(rng.random()), {"size": float(rng.integers(9))}, "drawn") for at in range(50)]
    front = Front()
    front.update([*points, Point((0,), 9.0, {"size": 0.0}, "again")])
    assert len(front) == 50
    kept = front.pareto("size")
    for point in kept:
        assert not any(o.loss < point.loss and o.costs["size"] <= point.costs["size"] for o in points)
    assert [each.costs["size"] for each in kept] == sorted({each.costs["size"] for each in kept})
