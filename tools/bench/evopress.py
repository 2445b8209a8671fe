"""The algorithm of "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", to compare with.

Written after the paper's Algorithm 1 and its appendix on quantization, over an evaluator of graphopt, so that both
judge the same candidates on the same data:

- the search begins with the uniform assignment, some units raised at random where that leaves something of the budget;
- an offspring switches levels: of two units of one size, one takes the next level up, the other the next one down, min
  of two draws from 1 to 3 times, so that what is spent stays;
- selection has stages, each on more data, drawn anew; the parent takes part in the last one;
- fitness is the divergence from the original.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from graphopt.search import Assignment, Evaluator, Moves

_IDLE = 200  # generations without an assignment that was not seen before
OFFSPRING = 32
STAGES = ((8, 1 / 16), (2, 1 / 4), (1, 1.0))  # survivors, share of the data


def evolve(evaluator: Evaluator, start: Assignment, evaluations: int, resource: str, seed: int) -> Assignment:
    """Return the last parent after so many evaluations on all the data, or as many pieces altogether."""
    rng = np.random.default_rng(seed)
    problem, begun = evaluator.problem, evaluator.evaluated
    order = [
        sorted(range(len(unit.levels)), key=lambda at, unit=unit: unit.levels[at].costs.get(resource, 0.0))  # type: ignore[misc]
        for unit in problem.units
    ]
    groups: dict[float, list[int]] = defaultdict(list)
    for at, unit in enumerate(problem.units):
        groups[unit.levels[0].costs.get(resource, 0.0)].append(at)
    alike = [group for group in groups.values() if len(group) > 1]
    sizes = np.array([len(group) for group in alike], float)

    def offspring(parent: Assignment) -> Assignment:
        child = list(parent)
        for _ in range(min(int(rng.integers(1, 4)), int(rng.integers(1, 4)))):
            group = alike[int(rng.choice(len(alike), p=sizes / sizes.sum()))]
            up, down = (int(each) for each in rng.choice(group, 2, replace=False))
            above, below = order[up].index(child[up]) + 1, order[down].index(child[down]) - 1
            if above < len(order[up]) and below >= 0:
                child[up], child[down] = order[up][above], order[down][below]
        return tuple(child)

    parent = Moves(problem).filled(start, rng)
    idle = 0
    while evaluator.evaluated - begun < evaluations * evaluator.pieces and idle < _IDLE:
        before = evaluator.evaluated
        young = [offspring(parent) for _ in range(OFFSPRING)]
        young = [each for each in dict.fromkeys(young) if each != parent and problem.feasible(each)]
        for survivors, share in STAGES:
            last = survivors == 1
            count = max(1, round(share * evaluator.pieces))
            pieces = sorted(map(int, rng.choice(evaluator.pieces, count, replace=False)))
            found = evaluator.losses([*young, parent] if last else young, pieces)
            ranked = sorted(zip(found, [*young, parent] if last else young, strict=True))
            young = [each for _, each in ranked[:survivors]]
        parent = young[0]
        idle = idle + 1 if evaluator.evaluated == before else 0
    return parent
